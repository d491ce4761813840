"""Reports on programs with global latents: all data are one row."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.optim import Adam
from torch.distributions import kl_divergence
from torch.utils.data import DataLoader, TensorDataset

import pyproelbo as pe

N, NOISE = 30, 0.7
QUIET = {"progress": False}


def data():
    X = torch.randn(N, 2)
    return X, X @ torch.tensor([1.0, -0.5]) + NOISE * torch.randn(N)


def regression(X, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    w = w if w.dim() == 1 else w.squeeze(-2).unsqueeze(-2)
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal((X * w).sum(-1), NOISE), obs=y)


def log_evidence(X, y):
    covariance = 4 * X @ X.mT + NOISE**2 * torch.eye(N)
    return dist.MultivariateNormal(torch.zeros(N), covariance).log_prob(y)


def posterior(X, y):
    precision = X.mT @ X / NOISE**2 + torch.eye(2) / 4
    return dist.MultivariateNormal(
        torch.linalg.solve(precision, X.mT @ y / NOISE**2), precision_matrix=precision
    )


def guide_of(X, y, shift=0.0, wider=1.0):
    exact = posterior(X, y)
    q = dist.MultivariateNormal(exact.loc + shift, scale_tril=wider * exact.scale_tril)

    def guide(X, y):
        pyro.sample("w", q)

    return guide


def fitted(guide, *args, steps=300):
    svi = SVI(regression, guide, Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)
    return guide


class Easy(EasyGuide):
    def guide(self, X, y):
        group = self.group(match=".*")
        loc = pyro.param("loc", lambda: torch.zeros(group.event_shape))
        scale = pyro.param("scale", lambda: torch.full(group.event_shape, 0.2))
        group.sample("latents", dist.Normal(loc, scale.abs()).to_event(1))


GUIDES = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": autoguide.AutoIAFNormal,
    "AutoStructured": lambda m: _structured(m),
    "AutoNormalMessenger": autoguide.AutoNormalMessenger,
    "AutoGuideList": lambda m: _list(m),
    "EasyGuide": Easy,
}


def _structured(model):
    return autoguide.AutoStructured(model, conditionals={"w": "mvn"}, dependencies={})


def _list(model):
    guides = autoguide.AutoGuideList(model)
    guides.append(autoguide.AutoNormal(model))
    return guides


@pytest.mark.parametrize("name", GUIDES)
def test_reports_of_every_guide(name):
    """log p(x) by importance and by annealing, the best q of the family, and what was there."""
    args = data()
    guide = fitted(GUIDES[name](regression), *args)
    truth = log_evidence(*args).item()
    before = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    found = pe.evidence(regression, guide, args, num_samples=2000, **QUIET)
    assert found.per == "data set" and found.log_evidence.shape == (1,)
    assert abs(found.log_evidence.item() - truth) < 4 * found.stderr.item() + 0.02
    few = pe.Annealed(20, 5)
    annealed = pe.evidence(regression, guide, args, method=few, num_samples=30, **QUIET)
    assert abs(annealed.log_evidence.item() - truth) < 4 * annealed.stderr.item() + 0.02
    weights = pe.psis(regression, guide, args, num_samples=2000, **QUIET)
    assert torch.allclose(weights.log_evidence, found.log_evidence, atol=0.05)
    assert weights.khat.item() < 0.7
    gap = pe.inference_gap(regression, guide, args, steps=150, **QUIET)
    assert gap.amortisation.item() == 0
    assert gap.optimisation.item() > -4 * gap.error("optimisation")
    assert abs(gap.log_evidence.item() - truth) < 4 * gap.error("log_evidence") + 0.02
    after = dict(pyro.get_param_store().named_parameters())
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[n], value) and after[n].requires_grad for n, value in before.items()
    )
    assert all(value.grad is None or not value.grad.any() for value in after.values())


def test_the_forms_of_the_elbo_in_totals():
    args = data()
    guide, exact = guide_of(*args, shift=0.1, wider=1.3), posterior(*args)
    q = dist.MultivariateNormal(exact.loc + 0.1, scale_tril=1.3 * exact.scale_tril)
    found = pe.decompositions(
        regression, guide, args, num_samples=2000, evidence=log_evidence(*args), **QUIET
    )
    prior = dist.MultivariateNormal(torch.zeros(2), 4 * torch.eye(2))
    for name, truth in {
        "kl": kl_divergence(q, prior),
        "posterior_kl": kl_divergence(q, exact),
        "entropy": q.entropy(),
        "elbo": log_evidence(*args) - kl_divergence(q, exact),
    }.items():
        value, stderr = getattr(found, name)
        assert abs(value - truth.item()) < 4 * stderr + 1e-6, name
    assert found.per == "data set" and found.num_data == 1
    assert "nats (all data together" in str(found)
    assert found.to_xarray().elbo.attrs["units"] == "nats"


def test_the_best_q_is_the_closed_form():
    """Of mean field: the diagonal of the precision matrix."""
    args = data()
    guide = fitted(autoguide.AutoNormal(regression), *args, steps=20)
    exact = posterior(*args)
    best = dist.MultivariateNormal(
        exact.loc, torch.diag_embed(1 / exact.precision_matrix.diagonal())
    )
    gap = pe.inference_gap(
        regression,
        guide,
        args,
        evidence=log_evidence(*args),
        steps=1500,
        num_samples=5000,
        lr=0.03,
        **QUIET,
    )
    truth = kl_divergence(best, exact).item()
    assert abs(gap.approximation.item() - truth) < 4 * gap.error("approximation") + 0.005
    assert gap.optimisation.item() > 10 * gap.error("optimisation")
    assert "optimisation gap" in str(gap) and "amortisation gap: 0 by definition" in str(gap)


@pytest.mark.parametrize("narrower", [0.5, 0.7])
def test_khat_of_known_tails(narrower):
    """Of a normal q too narrow by c in one dimension, weights have the tail index 1 - c^2."""

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(0.0, narrower))

    found = pe.psis(model, guide, None, num_samples=20_000, **QUIET)
    assert found.khat.item() == pytest.approx(1 - narrower**2, abs=0.15)
    assert found.per == "data set"
    assert any("standard errors" in note for note in found.notes) == (found.khat.item() > 0.5)


def test_an_improper_prior():
    """Gaps and k-hat are right; log p(x) is said to be up to a constant."""
    x = torch.randn(20)

    def model(x):
        flat = dist.ImproperUniform(dist.constraints.real, (), ())
        m = pyro.sample("m", flat)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(x.mean(), 1.2 * len(x) ** -0.5))

    exact, q = dist.Normal(x.mean(), 20**-0.5), dist.Normal(x.mean(), 1.2 * 20**-0.5)
    truth = kl_divergence(q, exact).item()
    found = pe.evidence(model, guide, x, num_samples=5000, **QUIET)
    gap = (found.log_evidence - found.elbo).item()
    error = math.hypot(found.stderr.item(), found.elbo_stderr.item())
    assert abs(gap - truth) < 4 * error
    k = pe.psis(model, guide, x, **QUIET)
    forms = pe.decompositions(model, guide, x, **QUIET)
    fits = pe.inference_gap(model, guide, x, steps=5, **QUIET)
    for result in (found, k, forms, fits):
        assert result.is_up_to_a_constant
        assert any("up to a constant" in note for note in result.notes)


def test_a_discrete_global_that_the_model_sums_out():
    x = torch.randn(15) + 1

    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m + 2 * k, 1.0), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(0.0, 1.0))

    found = pe.evidence(model, guide, x, num_samples=20_000, **QUIET)
    covariance = torch.eye(15) + torch.ones(15, 15)
    parts = [dist.MultivariateNormal(torch.full((15,), 2.0 * k), covariance) for k in (0, 1)]
    log_p = torch.stack([p.log_prob(x) for p in parts]) + torch.tensor([0.7, 0.3]).log()
    assert abs(found.log_evidence.item() - log_p.logsumexp(0).item()) < 4 * found.stderr.item()


def test_what_has_no_weights_says_why():
    X, y = args = data()

    def half(X, y):
        pyro.sample("w", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))

    def subsampled(X, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", N, subsample_size=10) as i:
            pyro.sample("y", dist.Normal((X[i] * w).sum(-1), NOISE), obs=y[i])

    for model, guide, of, message in [
        (regression, autoguide.AutoDelta(regression), args, "no weight p"),
        (regression, half, args, "'w' from"),
        (subsampled, guide_of(*args), args, "cannot be subsampled"),
        (regression, guide_of(*args), DataLoader(TensorDataset(X, y), 10), "in several batches"),
    ]:
        for report in (pe.psis, pe.evidence, pe.decompositions, pe.inference_gap):
            with pytest.raises(ValueError, match=message):
                report(model, guide, of, **QUIET)

    with pytest.raises(ValueError, match="level should be one of"):
        pe.psis(regression, guide_of(*args), args, level="both")
    with pytest.raises(ValueError, match="by level latents of single data"):
        pe.psis(regression, guide_of(*args), args, level="local")


def test_a_global_latent_in_a_plate_of_one():
    x = torch.randn(8)

    def model(x):
        with pyro.plate("one", 1):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        with pyro.plate("one", 1):
            pyro.sample("m", dist.Normal(x.sum() / (1 + len(x)), (1 + len(x)) ** -0.5))

    truth = dist.MultivariateNormal(torch.zeros(8), torch.eye(8) + 1).log_prob(x)
    for n in (8, 1):
        truth = dist.MultivariateNormal(torch.zeros(n), torch.eye(n) + 1).log_prob(x[:n])
        found = pe.evidence(model, guide, x[:n], num_samples=5, **QUIET)
        assert found.log_evidence.item() == pytest.approx(truth.item(), abs=1e-9)


def test_rows_of_an_auto_guide_are_seen_at_once():
    """It has parameters of its own for each datum; there are more than a batch has by default."""
    x = torch.randn(300)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = autoguide.AutoNormal(model)
    guide(x)
    found = pe.evidence(model, guide, x, num_samples=10, **QUIET)
    assert found.per == "datum" and found.log_evidence.shape == (300,)


PRIORS = {
    "HalfCauchy": dist.HalfCauchy(1.0),
    "HalfNormal": dist.HalfNormal(1.0),
    "Gamma": dist.Gamma(2.0, 1.0),
    "InverseGamma": dist.InverseGamma(3.0, 1.0),
    "Beta": dist.Beta(2.0, 3.0),
    "Dirichlet": dist.Dirichlet(torch.ones(3)),
    "StudentT": dist.StudentT(5.0),
    "Poisson": dist.Poisson(3.0),
    "Binomial": dist.Binomial(4, 0.3),
    "Bernoulli": dist.Bernoulli(0.3),
    "Categorical": dist.Categorical(torch.tensor([0.2, 0.8])),
    "Exponential": dist.Exponential(1.0),
    "LogNormal": dist.LogNormal(0.0, 1.0),
    "Uniform": dist.Uniform(0.0, 2.0),
    "VonMises": dist.VonMises(0.0, 1.0),
    "LKJ": dist.LKJCholesky(2, 1.0),
    "MultivariateNormal": dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "Mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([0.0, 1.0]), 1.0)
    ),
}


@pytest.mark.parametrize("family", PRIORS)
def test_a_global_latent_of_any_family(family):
    """With the prior as guide every weight is p(x | z): here 1."""
    prior = PRIORS[family]

    def program(x):
        pyro.sample("z", prior.expand(prior.batch_shape))

    for report in (pe.evidence, pe.psis, pe.moments):
        found = report(program, program, torch.zeros(3), num_samples=30, **QUIET)
        assert found.per == "data set"
    assert pe.evidence(program, program, torch.zeros(3), **QUIET).log_evidence.item() == 0


def scalars(is_looped):
    """A regression with scalar latents alone, whose draws can be made at once, or cannot."""

    def model(X, y):
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        if is_looped and a.dim():
            raise ValueError("a is a number")
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X[:, 0] * a + X[:, 1] * b, NOISE), obs=y)

    return model


REPORTS = {
    "psis": lambda *of: pe.psis(*of, **QUIET).khat,
    "evidence": lambda *of: pe.evidence(*of, **QUIET).log_evidence,
    "annealed": lambda *of: (
        pe.evidence(
            *of, method=pe.Annealed(num_temperatures=3), num_samples=4, **QUIET
        ).log_evidence
    ),
    "moments": lambda *of: pe.moments(*of, **QUIET).mean,
    "fisher": lambda *of: pe.fisher_divergence(*of, **QUIET).scaled,
    "decompositions": lambda *of: pe.decompositions(*of, **QUIET).elbo,
    "gap": lambda *of: pe.inference_gap(*of, steps=5, **QUIET).best_elbo,
    "repair": lambda *of: pe.repair(
        *of, num_samples=25, steps=2, num_particles=2, methods=["correlated"], **QUIET
    ).draws["a"],
}


@pytest.mark.parametrize("report", REPORTS)
@pytest.mark.filterwarnings("ignore::pyproelbo.LoopedWarning")
def test_draws_of_numbers_that_are_made_one_by_one(report):
    """A value has then no dims at all."""
    X, y = data()
    found = []
    for is_looped in (False, True):
        pyro.clear_param_store()
        model = scalars(is_looped)
        found.append(REPORTS[report](model, autoguide.AutoNormal(model), (X, y)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
