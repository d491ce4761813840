"""Reports by Sobol draws: unbiased, with errors that are those of the estimates, and smaller."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.conjugate import Hierarchy, guide_of, model
from helpers.oracles import rows
from pyro.infer import autoguide
from scipy import stats

import pyproelbo as pe

QUIET = {"progress": False}
PPCA_NOISE = 0.7


class MeanField:
    """A PPCA with two correlated latents, and an independent q that is a little off.

    Attributes:
        log_evidence, elbo: of each datum, in closed form, (N,).
    """

    def __init__(self, num_data):
        self.W = torch.tensor([[1.0, 0.3], [0.2, 0.8], [0.6, -0.4], [0.1, 0.5]])
        self.x = rows(num_data, 2) @ self.W.mT + PPCA_NOISE * rows(num_data, 5)[:, :4]
        precision = torch.eye(2) + self.W.mT @ self.W / PPCA_NOISE**2
        self.to_loc = (precision.inverse() @ self.W.mT / PPCA_NOISE**2).mT
        self.scale = precision.diagonal() ** -0.5
        covariance = self.W @ self.W.mT + PPCA_NOISE**2 * torch.eye(4)
        p = dist.MultivariateNormal(torch.zeros(4), covariance)
        posterior = dist.MultivariateNormal(self.x @ self.to_loc, precision_matrix=precision)
        q = dist.MultivariateNormal(self.x @ self.to_loc + 0.1, torch.diag(self.scale**2))
        self.log_evidence = p.log_prob(self.x)
        self.elbo = self.log_evidence - torch.distributions.kl_divergence(q, posterior)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.W.to(x).mT, PPCA_NOISE).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            q = dist.Normal(x @ self.to_loc.to(x) + 0.1, self.scale.to(x))
            pyro.sample("z", q.to_event(1))

    def evidence(self, **options):
        return pe.evidence(self.model, self.guide, self.x, **options, **QUIET)


def assert_right(error, stderr, degrees=7):
    """Of independent estimates: the mean error is 0, and the stated variance is that of them."""
    spread = error.std() / len(error) ** 0.5
    assert error.mean().abs() < 4 * spread
    off = stderr.square() - error.square()
    assert off.mean().abs() < 4 * off.std() / len(off) ** 0.5
    inside = (error.abs() < stats.t.ppf(0.95, degrees) * stderr).double().mean()
    assert abs(inside - 0.9) < 4 * (0.09 / len(error)) ** 0.5 + 0.03


@pytest.mark.parametrize("replicates", [4, 8])
def test_errors_are_what_is_said(replicates):
    """Of 1,500 data, each of which has draws of its own."""
    of = MeanField(1500)
    result = of.evidence(num_samples=128, draws=pe.Sobol(replicates))
    assert result.replicates == replicates
    assert_right(result.elbo - of.elbo, result.elbo_stderr, replicates - 1)
    error = result.log_evidence - of.log_evidence
    assert_right(error.expm1(), result.stderr * error.exp(), replicates - 1)  # of the mean weight


@pytest.mark.parametrize(
    "num, replicates, elbo, log_evidence", [(64, 8, 5, 4), (64, 2, 24, 12), (1024, 8, 100, 30)]
)
def test_fewer_draws_do(num, replicates, elbo, log_evidence):
    """With 64 draws the ELBO of a PPCA has 7 times less variance, so that 470 independent draws
    would have it; with 2 replicates 34 times less; of 1,024 draws 147 times. The variance of
    log p(x) is 5, 19 and 49 times less."""
    of = MeanField(600)
    plain, sobol = (
        of.evidence(num_samples=num, draws=kind) for kind in ("independent", pe.Sobol(replicates))
    )

    def gain(exact, name):
        errors = ((getattr(result, name) - exact).square().mean() for result in (plain, sobol))
        return torch.divide(*errors)

    assert gain(of.elbo, "elbo") > elbo
    assert gain(of.log_evidence, "log_evidence") > log_evidence


def test_what_is_of_the_weights_is_as_of_independent_draws():
    of = MeanField(50)
    plain, sobol = (of.evidence(num_samples=4096, draws=kind) for kind in ("independent", "sobol"))
    for name in ("effective_sample_size", "largest_weight"):
        ratio = getattr(sobol, name) / getattr(plain, name)
        assert (ratio.log().mean().abs() < 0.2).all(), name
    assert (sobol.khat - plain.khat).mean().abs() < 0.1
    assert sobol.stderr.square().mean() < plain.stderr.square().mean() / 50


def test_chunks_need_not_be_of_one_replicate():
    of = MeanField(7)
    whole = of.evidence(num_samples=64, draws="sobol")
    for chunk, batch_size in ((1, 7), (3, 2), (8, 1), (20, 5), (100, 3)):
        options = {"chunk": chunk, "batch_size": batch_size}
        part = of.evidence(num_samples=64, draws="sobol", **options)
        for name in ("elbo", "elbo_stderr", "log_evidence", "stderr"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name))


def test_the_result_says_so():
    of = MeanField(5)
    result = of.evidence(draws="sobol")
    assert result.num_samples == 1024 and result.replicates == 8
    assert "samples: 1,024 in 8 replicates" in str(result)
    assert result.to_xarray().attrs["replicates"] == 8
    plain = of.evidence()
    assert plain.num_samples == 1000 and plain.replicates is None
    assert "replicates" not in {*plain.to_xarray().attrs} and "replicates" not in str(plain)


def regression(X, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal((w * X).sum(-1), 0.7), obs=y)


@pytest.mark.parametrize("kind", ["AutoNormal", "AutoMultivariateNormal"])
def test_global_latents(kind):
    """Over seeds, each of which has one set of draws of all data together."""
    X, y = rows(20, 3), rows(20)
    exact = dist.MultivariateNormal(torch.zeros(20), 4 * X @ X.mT + 0.49 * torch.eye(20))
    guide = getattr(autoguide, kind)(regression)
    pe.fit(regression, guide, (X, y), **QUIET)
    with torch.no_grad():
        for value in guide.parameters():
            value.mul_(1.05)  # not quite the best

    def of(seed, draws):
        return pe.evidence(
            regression, guide, (X, y), num_samples=64, draws=draws, seed=seed, **QUIET
        )

    sobol, plain = ([of(seed, kind) for seed in range(60)] for kind in ("sobol", "independent"))
    assert sobol[0].per == "data set"

    def errors(results):
        return torch.cat([r.log_evidence for r in results]) - exact.log_prob(y)

    stderr = torch.cat([r.stderr for r in sobol])
    assert_right(errors(sobol).expm1(), stderr * errors(sobol).exp())
    elbo = torch.stack([torch.cat([r.elbo for r in of]) for of in (sobol, plain)])
    assert elbo[0].var() < elbo[1].var() / 2
    assert_right(elbo[0] - elbo[0].mean(), torch.cat([r.elbo_stderr for r in sobol]))


def test_global_and_local_latents_together():
    """21 latents of one draw; the mean weight has the mean p(x), and the stated error."""
    of = Hierarchy.of(20)

    def guide(x):
        mu = pyro.sample("mu", dist.Normal(of.q.loc, 1.1 * of.q.scale))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((4 * x + mu) / 5, 0.2**0.5))

    results = [
        pe.evidence(of.model, guide, of.x, num_samples=64, draws="sobol", seed=seed, **QUIET)
        for seed in range(80)
    ]
    error = torch.cat([r.log_evidence for r in results]) - of.log_evidence
    stderr = torch.cat([r.stderr for r in results])
    assert_right(error.expm1(), stderr * error.exp())


def mixture(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        g = pyro.sample("g", dist.Gamma(2.0, 2.0))
        pyro.sample("x", dist.Normal(2.0 * c - 2 + 0 * g, 1.0), obs=x)
        pyro.sample("n", dist.Poisson(g), obs=torch.ones(()))


def guide_of_mixture(x):
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.4, 0.3])))
        pyro.sample("g", dist.Gamma(2.5, 2.5))


def test_discrete_and_gamma_latents():
    x = rows(1000)
    components = dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 1.0).log_prob(x[:, None])
    exact = (components + torch.tensor([0.2, 0.5, 0.3]).log()).logsumexp(-1)
    exact = exact + math.log(2 * 2**2 / 3**3)  # of a Poisson 1 with a rate of Gamma(2, 2)
    result = pe.evidence(mixture, guide_of_mixture, x, num_samples=64, draws="sobol", **QUIET)
    error = result.log_evidence - exact
    assert_right(error.expm1(), result.stderr * error.exp())
    plain = pe.evidence(mixture, guide_of_mixture, x, num_samples=64, **QUIET)
    assert error.square().mean() < (plain.log_evidence - exact).square().mean() / 2


def test_what_torch_draws_is_right_too():
    """Independent within a replicate, and so as good as other draws."""

    def angles(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.VonMises(0.0, 1.0))
            pyro.sample("x", dist.Normal(a.sin(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.VonMises(0.3 * x, 1.2))

    x = rows(50)
    a = torch.linspace(-math.pi, math.pi, 2001)[:-1, None]
    log_joint = dist.VonMises(0.0, 1.0).log_prob(a) + dist.Normal(a.sin(), 1.0).log_prob(x)
    exact = log_joint.logsumexp(0) + math.log(2 * math.pi / 2000)
    result = pe.evidence(angles, guide, x, num_samples=16, draws="sobol", **QUIET)
    error = result.log_evidence - exact
    assert_right(error.expm1(), result.stderr * error.exp())


def test_the_prior_as_proposal():
    x = rows(800)
    options = {"num_samples": 128, "draws": "sobol", "proposal": "prior"}
    result = pe.evidence(model, guide_of(), x, **options, **QUIET)
    error = result.log_evidence - dist.Normal(0.0, 2**0.5).log_prob(x)
    assert_right(error.expm1(), result.stderr * error.exp())


def test_float32():
    of = MeanField(400)
    exact, of.x = of.elbo, of.x.float()
    result = of.evidence(num_samples=256, draws="sobol")
    assert result.log_evidence.dtype == torch.float64 and result.elbo.isfinite().all()
    assert (result.elbo - exact).square().mean() < 1.3 * result.elbo_stderr.square().mean() + 1e-11


def test_every_form_of_the_bound():
    """Each estimate within its error, and half the variance of log w without a bias."""
    of = MeanField(600)
    options = {"num_samples": 32, "draws": pe.Sobol(4), "evidence": of.log_evidence}
    found = pe.decompositions(of.model, of.guide, of.x, **options, **QUIET)
    plain = pe.decompositions(of.model, of.guide, of.x, num_samples=500, **QUIET)
    for name in ("elbo", "energy", "entropy", "reconstruction", "kl", "posterior_kl", "slack"):
        few, many = getattr(found, name), getattr(plain, name)
        assert abs(few.value - many.value) < 4 * math.hypot(*few[1:], *many[1:]) + 1e-9, name
    few, many = found.half_variance, plain.half_variance
    assert abs(few.value - many.value) < 4 * math.hypot(few.stderr, many.stderr)
    assert abs(found.elbo.value - of.elbo.mean()) < 4 * found.elbo.stderr
    independent = pe.decompositions(of.model, of.guide, of.x, num_samples=32, **QUIET)
    assert found.elbo.stderr < independent.elbo.stderr / 2
    by_default = pe.decompositions(of.model, of.guide, of.x[:20], draws="sobol", **QUIET)
    assert by_default.num_samples == 128


def test_arguments():
    of = MeanField(6)
    for options, words in (
        ({"num_samples": 100}, "8 times a power of two.* got 100: take 64 or 128"),
        ({"method": "annealed", "num_samples": 16}, "draws='sobol' is for importance weighting"),
        ({"proposal": "mixture"}, "draws='sobol' is for importance weighting"),
    ):
        with pytest.raises(ValueError, match=words):
            of.evidence(draws="sobol", **options)
    with pytest.raises(ValueError, match="draws='sobol' is for importance weighting"):
        h = Hierarchy.of(5)
        pe.evidence(h.model, h.guide, h.x, draws="sobol", level="global", **QUIET)
    with pytest.raises(ValueError, match="draws should be one of"):
        of.evidence(draws="halton")
    with pytest.raises(ValueError, match="draws should be one of"):
        pe.FixedDraws(draws=3)
    with pytest.raises(ValueError, match="got 100: take 64 or 128"):
        pe.FixedDraws(100, draws="sobol")
    with pytest.raises(ValueError, match="got 100: take 64 or 128"):
        pe.linear_response(lambda: None, lambda: None, None, num_samples=100, draws="sobol")
