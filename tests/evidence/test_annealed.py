"""log p(x) by annealed importance sampling, against closed forms and quadratures."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import conjugate
from helpers.oracles import mean_and_stderr, rows
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader

import pyproelbo as pe
from pyproelbo._evidence.hmc import Point, hmc
from pyproelbo._evidence.importance import METHODS
from pyproelbo.guides import lgssm as guides
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.guides.vae import Diagonal as Encoder
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vae import VAE

STARTS = ("guide", "prior")


def annealed(num_temperatures, num_leapfrog=2, start="guide", **kwargs):
    return pe.Annealed(num_temperatures, num_leapfrog, start, **kwargs)


def assert_unbiased(result, truth, at_most=0.1):
    """The mean of w / p(x) is 1 within 4 standard errors, which are small enough to tell."""
    error = (result.log_evidence - truth.detach().cpu()).expm1()
    assert (error.abs() < 4 * result.stderr + 1e-9).all(), error / result.stderr
    assert (result.stderr < at_most).all(), result.stderr


def assert_untouched(*modules):
    parameters = [p for module in modules for p in module.parameters()]
    assert all(p.requires_grad and p.grad is None for p in parameters)


def ppca(size=None):
    """With a guide that is a bad one: too wide, and away from the posterior."""
    model = PPCA(2, 4, size)
    guide = Diagonal.optimum(model)
    with torch.no_grad():
        guide.loc.bias += 0.5
        guide.raw += 0.5
    return model, guide


def simulated(model, **kwargs):
    """Data that the model draws, and the latents behind them."""
    with torch.no_grad():
        sites = poutine.trace(model).get_trace(**kwargs).nodes
    return sites["x"]["value"], {"z": sites["z"]["value"]}


def positive(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        w = pyro.sample("w", dist.Uniform(0.0, z))
        pyro.sample("x", dist.Normal(z - w, 0.5), obs=x)


def positive_guide(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.5, 1.0))
        pyro.sample("w", dist.Uniform(0.0, z))


def positive_evidence(x):
    """By the midpoint rule in z and w / z."""
    z = (torch.arange(2000) + 0.5) / 100
    v = (torch.arange(200) + 0.5) / 200
    log_p = dist.Normal((z[:, None] * (1 - v))[..., None], 0.5).log_prob(x).logsumexp(1)
    return (
        log_p + dist.Gamma(2.0, 1.0).log_prob(z)[:, None] - torch.tensor(20000.0).log()
    ).logsumexp(0)


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("num_temperatures", [1, 3, 20])
def test_weights_are_unbiased(start, num_temperatures):
    model, guide = ppca(size=100)
    x = rows(5, 4)
    method = annealed(num_temperatures, start=start)
    result = pe.evidence(model, guide, x, method=method, num_samples=2000, chunk=2000)
    assert_unbiased(result, model.log_evidence(x))
    assert (result.acceptance is None) == (num_temperatures == 1)


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_sandwich(start):
    """lower <= log p(x) <= upper on average, and both close in with more temperatures."""
    model, guide = ppca()
    x, latents = simulated(model, num=400)
    truth = model.log_evidence(x).detach().cpu()
    below, above = [], []
    for num in (1, 5, 25):
        method = annealed(num, start=start)
        result = pe.evidence(
            model, guide, x, method=method, num_samples=2, latents=latents, batch_size=400
        )
        for gaps, gap in (
            (below, truth - result.log_evidence),
            (above, result.upper_bound - truth),
        ):
            mean, stderr = mean_and_stderr(gap)
            assert mean > -4 * stderr
            gaps.append(mean)
    for gaps in (below, above):
        assert gaps[0] > gaps[1] > gaps[2]
    assert 0 < below[2] + above[2] < (below[0] + above[0]) / 4
    assert "upper bound" in str(result) and "accepted moves" in str(result)


@pytest.mark.slow
@pytest.mark.parametrize("num_temperatures", [1, 4])
def test_reverse_weights_are_unbiased(num_temperatures):
    """E[1 / w] = 1 / p(x) over exact draws of the posterior."""
    model, _ = ppca()
    guide = Diagonal.optimum(model)
    with torch.no_grad():
        guide.raw -= 0.3  # narrower than the posterior, so that 1 / w is bounded
    x = rows(1, 4).expand(3000, 4)
    with torch.no_grad():
        z = model.posterior(x).sample()
    method = annealed(num_temperatures)
    result = pe.evidence(
        model, guide, x, method=method, num_samples=1, latents={"z": z}, batch_size=3000
    )
    ratio = (model.log_evidence(x).detach().cpu() - result.upper_bound).exp()
    mean, stderr = mean_and_stderr(ratio)
    assert abs(mean - 1) < 4 * stderr < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("num_temperatures", [1, 3, 20])
def test_sequences_against_kalman(start, num_temperatures):
    """A site that is a whole sequence, padded and with steps missing; the guide is no smoother."""
    model = LGSSM(2, 3)
    x, latents = simulated(model, num=3, num_steps=5)
    args = x, torch.tensor([5, 1, 4]), (torch.arange(5) != 2).expand(3, 5)
    result = pe.evidence(
        model,
        guides.ExactFilter(model),
        args,
        method=annealed(num_temperatures, start=start),
        num_samples=1000,
        chunk=1000,
        latents=latents,
    )
    assert_unbiased(result, model.log_evidence(*args))
    most = 10 if num_temperatures == 1 else 3  # without steps between it is one draw's weight
    assert (result.upper_bound - result.log_evidence).abs().max() < most


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_constrained_latents_against_quadrature(start):
    """A positive latent, and one whose support is that latent's."""
    x = torch.tensor([0.2, 1.0, 4.0])
    result = pe.evidence(
        positive, positive_guide, x, method=annealed(6, start=start), num_samples=3000, chunk=3000
    )
    assert_unbiased(result, positive_evidence(x))


def test_simplex_against_quadrature():
    def program(x, q):
        with pyro.plate("data", 2):
            w = pyro.sample("w", dist.Dirichlet(torch.tensor([1.0 + q, 2.0])))
            if not q:
                pyro.sample("x", dist.Normal(3 * w[..., 0], 0.3), obs=x)

    x, w = torch.tensor([0.1, 2.0]), (torch.arange(5000) + 0.5) / 5000
    log_p = dist.Normal(3 * w[:, None], 0.3).log_prob(x) + dist.Beta(1.0, 2.0).log_prob(w)[:, None]
    result = pe.evidence(
        lambda x: program(x, 0),
        lambda x: program(x, 1),
        x,
        method=annealed(5),
        num_samples=3000,
        chunk=3000,
    )
    assert_unbiased(result, log_p.exp().mean(0).log())


@pytest.mark.slow
@pytest.mark.parametrize("inner_dim", [-1, -2])
@pytest.mark.parametrize("num_samples", [3000, 1])
def test_inner_plates_masks_and_several_latents(inner_dim, num_samples):
    """Latents in an inner plate, masked, one of them positive; the plates in either order."""
    mask, x = torch.tensor(conjugate.MASK), rows(3, 2)
    outer_dim = -3 - inner_dim
    if inner_dim == -2:
        mask = mask.mT

    def program(x, q):
        x = x if inner_dim == -1 else x.mT
        with pyro.plate("data", 3, dim=outer_dim):
            c = pyro.sample("c", dist.Normal(0.1 * q, 1.0))
            with pyro.plate("inner", 2, dim=inner_dim), poutine.mask(mask=mask):
                z = pyro.sample("z", dist.LogNormal(c * (1 - q), 1.0 + 0.3 * q))
                if not q:
                    pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    sites = poutine.trace(lambda: program(x, 0)).get_trace().nodes
    result = pe.evidence(
        lambda x: program(x, 0),
        lambda x: program(x, 1),
        x,
        method=annealed(5),
        num_samples=num_samples,
        chunk=3000,
        plate="data",
        latents={name: sites[name]["value"] for name in ("c", "z")},
    )
    assert result.upper_bound.shape == (3,)
    if num_samples == 1:
        return
    assert_unbiased(result, conjugate.evidence_of_groups(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found non-auxiliary vars")
@pytest.mark.parametrize("start", STARTS)
def test_hierarchies_and_factors(start):
    """A guide that draws one latent given another, a factor, and values that are no draws."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.deterministic("sum", a + b)
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)
            pyro.factor("twice", torch.full_like(x, 2.0).log())

    def guide(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(0.5 * x, 1.0))
            pyro.deterministic("half", b / 2)
            pyro.sample("a", dist.Normal(0.3 * b, 1.0))

    x = torch.tensor([-1.0, 0.3, 3.0])
    method = annealed(6, start=start, num_pilot=1)
    result = pe.evidence(model, guide, x, method=method, num_samples=3000, chunk=3000)
    assert_unbiased(result, dist.Normal(0.0, 3.0**0.5).log_prob(x) + torch.tensor(2.0).log())


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_vamp_prior(start):
    """A prior that cannot be reparameterised, of the guide's own parameters: by quadrature."""
    x = rows(3, 4)
    guide = Encoder(1, 4, (8,))
    prior = pe.VampPrior(guide.posterior, 5, pe.priors.RandomInputs((4,)))
    model = VAE(1, 4, (8,), prior=prior)
    z = ((torch.arange(8000) + 0.5) / 8000 - 0.5).mul(20).unsqueeze(-1)
    log_prior = prior().log_prob(z)[:, None]
    log_p = log_prior + model.decode(z.unsqueeze(1)).log_prob(x)
    truth = log_p.logsumexp(0) + torch.tensor(20 / 8000).log()
    method = annealed(6, start=start)
    result = pe.evidence(model, guide, x, method=method, num_samples=2000, chunk=2000)
    assert_unbiased(result, truth)
    assert all(
        p.requires_grad and p.grad is None for p in (*model.parameters(), *guide.parameters())
    )


def test_auto_guides_from_the_prior():
    model, _ = ppca()
    x = rows(4, 4)
    guide = AutoNormal(model)
    guide(x)
    result = pe.evidence(
        model, guide, x, method=annealed(6, start="prior"), num_samples=2000, chunk=2000
    )
    assert_unbiased(result, model.log_evidence(x))


def test_an_auto_guide_of_a_positive_latent():
    """log s ~ N(0, 1), y ~ N(log s, 1): what the guide computes, s = exp u, has its Jacobian."""

    def model():
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(s.log(), 1.0), obs=torch.tensor(2.0))

    guide = AutoNormal(model, init_scale=0.5)
    guide()
    result = pe.evidence(
        model, guide, None, method=annealed(40, 4), num_samples=400, progress=False
    )
    assert_unbiased(result, dist.Normal(0.0, 2**0.5).log_prob(torch.tensor([2.0])))


def test_hmc_leaves_its_target_invariant():
    """Exact draws of N(0, 1)^2 stay so; a coordinate of step 0 stays where it is."""

    def target(u):
        log_density = -u.square().sum(-1) / 2
        return Point(u, log_density, -u, log_density)

    u = torch.randn(20_000, 1, 2)
    step = torch.tensor([[1.2, 0.0]])
    noise = torch.randn_like(u), torch.rand(20_000, 1)
    moved, accept = hmc(target, target(u), step, 3, *noise)
    assert torch.equal(moved[..., 1], u[..., 1])
    assert 0.3 < accept.mean() < 0.99  # so that rejections matter
    for power in (1, 2, 4):
        mean, stderr = mean_and_stderr(moved[:, 0, 0] ** power)
        assert abs(mean - {1: 0, 2: 1, 4: 3}[power]) < 4 * stderr
    # detailed balance: (u, u') has the distribution of (u', u)
    mean, stderr = mean_and_stderr((u * moved.square() - moved * u.square())[:, 0, 0])
    assert abs(mean) < 4 * stderr


def test_moves_to_where_nothing_is_finite_are_rejected():
    def target(u):
        log_density = torch.where(u > 0, -u, torch.nan).sum(-1)
        return Point(u, log_density, torch.where(u > 0, -1.0, torch.nan), log_density)

    u = torch.rand(100, 1, 1)
    noise = torch.randn_like(u), torch.rand(100, 1)
    moved, accept = hmc(target, target(u), torch.full((1, 1), 2.0), 3, *noise)
    assert (moved > 0).all() and accept.isfinite().all()


def test_nothing_else_changes():
    model, guide = ppca()
    x = rows(3, 4)
    model.training, store = True, pyro.get_param_store()
    state = torch.get_rng_state()
    a, b = (
        pe.evidence(model, guide, x, method=annealed(4), num_samples=3, seed=4) for _ in range(2)
    )
    assert torch.equal(a.log_evidence, b.log_evidence)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not store.keys()
    assert all(
        p.requires_grad and p.grad is None for p in (*model.parameters(), *guide.parameters())
    )
    assert torch.distributions.Distribution._validate_args
    c = pe.evidence(model, guide, x, method=annealed(4), num_samples=3, seed=5)
    assert not torch.equal(a.log_evidence, c.log_evidence)


class Stopping:
    """Batches, after which something happens."""

    def __init__(self, batches, error):
        self.batches, self.error = batches, error

    def __iter__(self):
        yield from self.batches
        raise self.error


@pytest.mark.parametrize("method", ["importance", annealed(3)])
def test_what_is_finished_is_kept(method):
    model, guide = ppca()
    x = rows(6, 4)
    whole = pe.evidence(model, guide, x, method=method, num_samples=3, batch_size=2)
    batches = list(x.split(2))[:2]
    with pytest.warns(pe.UnfinishedWarning, match="first 4 data"):
        part = pe.evidence(
            model, guide, Stopping(batches, KeyboardInterrupt()), method=method, num_samples=3
        )
    assert torch.equal(part.log_evidence, whole.log_evidence[:4])
    with pytest.raises(OSError, match="disk") as caught:
        pe.evidence(model, guide, Stopping(batches, OSError("disk")), method=method, num_samples=3)
    assert torch.equal(caught.value.evidence.log_evidence, part.log_evidence)
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("error")
        pe.evidence(model, guide, Stopping([], KeyboardInterrupt()), method=method)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_one_temperature_is_known_at_the_exact_latents():
    """The upper bound is then log p(x, z) - log q(z | x) at the z of each datum, in any batches."""
    model, guide = ppca()
    x, latents = simulated(model, num=5)
    z = latents["z"]
    log_joint = model.decode(z).log_prob(x) + model.prior().log_prob(z)
    truth = (log_joint - guide.posterior(x).log_prob(z)).detach().cpu()
    for data in (x, DataLoader(x, 3)):
        result = pe.evidence(
            model,
            guide,
            data,
            method=annealed(1),
            latents=latents,
            batch_size=2,
            num_samples=7,
            chunk=3,
            progress=False,
        )
        torch.testing.assert_close(result.upper_bound, truth)
        assert result.num_samples == 7 and (result.upper_stderr < 1e-6).all()


def test_methods_by_name():
    assert METHODS["annealed"] == pe.Annealed()
    assert pe.Annealed.num_samples == 10 and METHODS["importance"].num_samples == 1000
    b = pe.Annealed(4).temperatures
    assert b[0] == 0 and b[2] == pytest.approx(0.5) and b[-1] == 1 and b == sorted(b)


def test_bad_input():
    model, guide = ppca()
    x, latents = simulated(model, num=4)
    auto = AutoNormal(model)
    auto(x)

    def discrete(x, obs=True):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            if obs:
                pyro.sample("x", dist.Normal(k, 1.0), obs=x[:, 0])

    for args, kwargs, message in [
        ((model, guide, x), {"method": "anealed"}, "method should be one of"),
        (
            (model, guide, x),
            {"method": "importance", "latents": latents},
            "upper bound by annealing",
        ),
        ((model, guide, x), {"latents": {}}, "latents should have a value of 'z'"),
        ((model, guide, x), {"latents": {"z": latents["z"][:3]}}, r"shape \(N, 2\)"),
        ((model, guide, x), {"latents": {"z": latents["z"][..., :1]}}, r"shape \(N, 2\)"),
        ((discrete, lambda x: discrete(x, False), x), {}, "'k' is discrete"),
        ((model, auto, x), {"latents": latents}, "is not a latent of the model"),
        ((poutine.scale(model, scale=2.0), guide, x), {}, "scaled by 2.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            pe.evidence(*args, **{"method": "annealed", **kwargs})
    for kwargs, message in [
        ({"num_temperatures": 0}, "num_temperatures should be a positive"),
        ({"num_leapfrog": 1.5}, "num_leapfrog should be a positive"),
        ({"num_pilot": 0}, "num_pilot should be a positive"),
        ({"start": "posterior"}, "start should be"),
        ({"target_acceptance": 1}, "target_acceptance should be between"),
    ]:
        with pytest.raises(ValueError, match=message):
            pe.Annealed(**kwargs)
