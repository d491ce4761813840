"""Draws by row: the right distribution, the same draws whatever the batch."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows

from pyproelbo._distributions.sobol import Points
from pyproelbo._rows.noise import RowNoise
from pyproelbo._terms.traces import PARTICLES
from pyproelbo.sequences import IndependentSteps, MarkovChain


def lower(a, b):
    return torch.diag_embed(b) + torch.ones(3, 3).tril(-1)


FAMILIES = {
    "Normal": lambda a, b: dist.Normal(a, b).to_event(1),
    "LogNormal": lambda a, b: dist.LogNormal(a, b / 4).to_event(1),
    "Laplace": lambda a, b: dist.Laplace(a, b).to_event(1),
    "Uniform": lambda a, b: dist.Uniform(a, a + b).to_event(1),
    "Gumbel": lambda a, b: dist.Gumbel(a, b).to_event(1),
    "MultivariateNormal": lambda a, b: dist.MultivariateNormal(a, scale_tril=lower(a, b)),
    "LowRankMultivariateNormal": lambda a, b: dist.LowRankMultivariateNormal(
        a, a[..., None] * torch.ones(2), b
    ),
    "Bernoulli": lambda a, b: dist.Bernoulli(logits=a).to_event(1),
    "Categorical": lambda a, b: dist.Categorical(logits=a),
    "OneHotCategorical": lambda a, b: dist.OneHotCategorical(logits=a),
    "MixtureSameFamily": lambda a, b: dist.MixtureSameFamily(
        dist.Categorical(logits=a),
        dist.Normal(torch.stack([a, a + 3, a - 2], -2), b.unsqueeze(-2)).to_event(1),
    ),
    "a flow": lambda a, b: dist.TransformedDistribution(
        dist.Normal(a, b).to_event(1),
        [dist.transforms.AffineTransform(b, a.exp(), event_dim=1), dist.transforms.TanhTransform()],
    ),
    "masked": lambda a, b: dist.Normal(a, b).to_event(1).mask(True),
    "Gamma": lambda a, b: dist.Gamma(a.exp(), b).to_event(1),
    "Beta": lambda a, b: dist.Beta(a.exp(), b).to_event(1),
    "Dirichlet": lambda a, b: dist.Dirichlet(a.exp()),
    "StudentT": lambda a, b: dist.StudentT(b + 6, a, b).to_event(1),
    "small Gamma": lambda a, b: dist.Gamma(b / 20, b).to_event(1),
    "small Beta": lambda a, b: dist.Beta(b / 20, b / 10).to_event(1),
    "Chi2": lambda a, b: dist.Chi2(b).to_event(1),
    "InverseGamma": lambda a, b: dist.InverseGamma(b + 5, b).to_event(1),
    "Poisson": lambda a, b: dist.Poisson(3 * b).to_event(1),
    "Binomial": lambda a, b: dist.Binomial(7, logits=a).to_event(1),
    "a chain": lambda a, b: MarkovChain(
        dist.Normal(a, b).to_event(1), lambda z: dist.Normal(0.5 * z, 1.0).to_event(1), num_steps=3
    ),
    "steps": lambda a, b: IndependentSteps(
        dist.Normal(a.unsqueeze(-2), torch.stack([b, 2 * b], -2)).to_event(1)
    ),
    # row by row
    "VonMises": lambda a, b: dist.VonMises(a, b).to_event(1),
    "NegativeBinomial": lambda a, b: dist.NegativeBinomial(b + 1, logits=a).to_event(1),
}


INDEPENDENT, SOBOL = (lambda: None), (lambda: Points(2))  # 4 points in each replicate
both_kinds = pytest.mark.parametrize("kind", [INDEPENDENT, SOBOL], ids=["independent", "sobol"])


def drawn(family, a, b, start=0, draw=0, seed=0, kind=INDEPENDENT):
    noise = RowNoise("data", start, range(draw, draw + 1), seed, points=kind())
    with noise, pyro.plate("data", len(a)):
        return pyro.sample("z", FAMILIES[family](a, b))


def parameters(num):
    """The same for all rows, so that their moments are those of the distribution."""
    a, b = torch.tensor([0.3, -0.8, 1.1]), torch.tensor([0.7, 1.2, 0.5])
    return a.expand(num, 3), b.expand(num, 3)


@both_kinds
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_torchs_draws(family, kind):
    num = 1500
    a, b = parameters(num)
    z = drawn(family, a, b, kind=kind).double()
    other = FAMILIES[family](a[0], b[0]).sample((20 * num,)).double()
    assert z.shape == FAMILIES[family](a, b).sample().shape
    for power in (1, 2):
        ours, theirs = z**power, other**power
        error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
        assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error + 1e-9).all()


@both_kinds
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_draw_does_not_depend_on_its_batch(family, kind):
    a, b = rows(600, 3), rows(600, 3).exp()
    whole = drawn(family, a, b, draw=5, kind=kind)
    parts = [
        drawn(family, a[i : i + 130], b[i : i + 130], i, draw=5, kind=kind)
        for i in range(0, 600, 130)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert len(whole.unique(dim=0)) > 300 or whole.unique(dim=0).numel() < 30


def test_seeds_draws_and_sites_are_independent():
    a, b = parameters(4000)
    draws = [drawn("Normal", a, b, draw=d, seed=s) for d, s in [(0, 0), (1, 0), (0, 1)]]
    with RowNoise("data", 0, range(1), 0), pyro.plate("data", 4000):
        draws.append(pyro.sample("other", FAMILIES["Normal"](a, b)))
    correlation = torch.corrcoef(torch.cat([draw - a for draw in draws], 1).mT)
    assert (correlation - torch.eye(12)).abs().max() < 5 / 4000**0.5


def test_nothing_of_torchs_state():
    before = torch.get_rng_state()
    a, b = parameters(5)
    for family in FAMILIES:
        drawn(family, a, b)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_site_outside_of_the_plate_has_one_value_for_all_rows():
    def drawn(start, *key):
        with RowNoise("data", start, range(1), *key):
            value = pyro.sample("outside", dist.Normal(0.0, 1.0))
            with pyro.plate("others", 5):
                return value, pyro.sample("inside", dist.Normal(0.0, 1.0))

    torch.testing.assert_close(drawn(0, 3), drawn(70, 3))
    assert drawn(0, 3)[0] != drawn(0, 4)[0] and drawn(0, 3)[0] != drawn(0, 3, 1)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plate", ["data", None])
@both_kinds
def test_draws_made_at_once_are_those_made_one_by_one(family, plate, kind):
    a, b = rows(5, 3), rows(5, 3).exp()

    def program():
        with pyro.plate("data", 5):
            d = FAMILIES[family](a, b)
            z = pyro.sample("z", d)
            shift = z.double().reshape(*z.shape[: z.dim() - d.event_dim], -1).mean(-1)
            return z, pyro.sample("given it", dist.Gamma(2 + shift.tanh(), 1.0))

    noise = RowNoise(plate, 2, range(3, 7), 1, points=kind())
    with noise, pyro.plate(PARTICLES, 4, dim=-2):
        at_once = program()
    for i, s in enumerate(range(3, 7)):
        with RowNoise(plate, 2, range(s, s + 1), 1, points=kind()):
            one = program()
        for many, single in zip(at_once, one, strict=True):
            torch.testing.assert_close(many[i] if many.dim() > single.dim() else many, single)


@pytest.mark.parametrize("family", ["Gamma", "Beta", "Dirichlet", "StudentT", "small Gamma"])
def test_gradients_by_parameters_are_those_of_the_mean(family):
    """d E[z^2] / d a by the path of each draw, against the gradient of the moment itself."""
    a, b = (x.clone().requires_grad_() for x in parameters(4000))
    z = drawn(family, a, b)
    found = torch.autograd.grad(z.square().sum(), (a, b), allow_unused=True)
    p, q = (x.detach()[:1].clone().requires_grad_() for x in (a, b))
    d = FAMILIES[family](p, q)
    second = (d.mean.square() + d.variance).sum()
    expected = torch.autograd.grad(second, (p, q), allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        if ours is None:
            assert theirs is None
            continue
        mean, error = ours.mean(0), ours.std(0) / len(ours) ** 0.5
        assert ((mean - theirs[0]).abs() < 5 * error + 1e-9).all(), family


def test_the_plate_may_be_any_dim():
    def drawn(start, num):
        noise, plate = RowNoise("data", start, range(1), 0), pyro.plate("data", num, dim=-2)
        with noise, plate, pyro.plate("inner", 3, dim=-1):
            return pyro.sample("z", dist.Normal(torch.zeros(num, 3), 1.0))

    whole, part = drawn(0, 4), drawn(1, 3)
    torch.testing.assert_close(whole[1:], part)


class OnlySamples(dist.TorchDistribution):
    """A distribution without an ``expand`` of its own, which plates wrap."""

    arg_constraints = {"scale": dist.constraints.positive}  # noqa: RUF012

    def __init__(self, scale, validate_args=None):
        self.scale = scale
        super().__init__(scale.shape, validate_args=False)

    def sample(self, sample_shape=()):
        return torch.randn(self.shape(sample_shape)).abs() * self.scale


@pytest.mark.parametrize("num_scales", [None, 30])
def test_what_plates_expand_draws_by_row(num_scales):
    scale = torch.tensor(2.0) if num_scales is None else rows(30, 1)[:, 0].exp()

    def drawn(start, num, draws=range(1), dims=()):
        part = scale if num_scales is None else scale[start : start + num]
        particles = pyro.plate(PARTICLES, len(draws), dim=-2) if dims else nullcontext()
        with RowNoise("data", start, draws, 0), pyro.plate("data", num), particles:
            return pyro.sample("z", OnlySamples(part))

    whole = drawn(0, 30)
    assert len(whole.unique()) == 30
    torch.testing.assert_close(torch.cat([drawn(0, 11), drawn(11, 19)]), whole)
    several = drawn(0, 30, range(2), (1,))
    torch.testing.assert_close(several[0], whole)
    torch.testing.assert_close(several[1], drawn(0, 30, range(1, 2)))


def test_a_distribution_without_rows_draws_for_its_batch():
    rate, gate = rows(50, 1).exp()[:, 0], torch.tensor(0.2)
    with RowNoise("data", 0, range(1), 0), pyro.plate("data", 50):
        z, again = (
            pyro.sample(name, dist.ZeroInflatedPoisson(rate, gate=gate)) for name in ("z", "a")
        )
    assert z.shape == (50,) and not torch.equal(z, again)
