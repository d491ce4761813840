"""Distributions that override what their base does are not taken for it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from torch.distributions import constraints, kl_divergence, register_kl

import pyproelbo as pe
from pyproelbo._distributions.closed_form import closed_form
from pyproelbo._distributions.family import Family
from pyproelbo._distributions.marginals import is_normal, marginals
from pyproelbo._distributions.owners import keeps
from pyproelbo._rows.noise import RowNoise

N = 1000


class CutNormal(dist.Normal):
    """A Normal cut at ``cut`` standard deviations, which ``arg_constraints`` do not tell."""

    def __init__(self, loc, scale, cut=3.0, validate_args=None):
        self.cut = cut
        super().__init__(loc, scale, validate_args=validate_args)

    @property
    def _mass(self):
        return math.erf(self.cut / 2**0.5)

    def expand(self, batch_shape, _instance=None):
        shape = torch.Size(batch_shape)
        return CutNormal(self.loc.expand(shape), self.scale.expand(shape), self.cut, False)

    def log_prob(self, value):
        inside = ((value - self.loc) / self.scale).abs() <= self.cut
        log_prob = super().log_prob(value) - math.log(self._mass)
        return torch.where(inside, log_prob, -torch.inf)

    def rsample(self, sample_shape=()):
        u = torch.rand(self._extended_shape(torch.Size(sample_shape)))
        u = 0.5 + (u - 0.5) * self._mass
        return self.loc + self.scale * 2**0.5 * torch.erfinv(2 * u - 1)


class Doubled(dist.Normal):
    """Draws that lie twice as far out, by ``sample`` alone."""

    has_rsample = False

    def sample(self, sample_shape=()):
        return self.loc + 2 * (super().sample(sample_shape) - self.loc)


class Shifted(dist.Exponential):
    """An Exponential from 1 on, with the distribution function of its base."""

    support = constraints.greater_than(1.0)

    def rsample(self, sample_shape=()):
        return 1 + super().rsample(sample_shape)

    def log_prob(self, value):
        return super().log_prob(value - 1)


class Flipped(dist.Bernoulli):
    """1 - x."""

    def sample(self, sample_shape=()):
        return 1 - super().sample(sample_shape)

    def log_prob(self, value):
        return super().log_prob(1 - value)


class Squared(dist.TransformedDistribution):
    """The square of what its transforms make."""

    def __init__(self, base, transforms, validate_args=None):
        super().__init__(base, transforms, validate_args=validate_args)

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).square()

    def expand(self, batch_shape, _instance=None):
        return Squared(self.base_dist.expand(batch_shape), self.transforms)


def drawn(d, n=N):
    """What a site draws by row."""
    with RowNoise("data", 0, range(1), 0), pyro.plate("data", n):
        return pyro.sample("z", d)


@pytest.mark.parametrize("d, mean, std", [
    (CutNormal(1.0, 2.0, 0.5), 1.0, 2.0 * 0.2849),
    (Doubled(1.0, 0.5), 1.0, 1.0),
    (Shifted(2.0), 1.5, 0.5),
    (Flipped(0.3), 0.7, 0.21**0.5),
    (Squared(dist.Normal(0.0, 1.0), [dist.transforms.AffineTransform(0.0, 2.0)]), 4.0, 32**0.5),
])  # fmt: skip
def test_rows_draw_as_the_distribution_itself(d, mean, std):
    """Within four standard errors of the moments that are known."""
    z = drawn(d)
    assert len(z) == N
    assert abs(z.mean().item() - mean) < 4 * std / N**0.5
    spread = (z - mean).square()
    assert abs(spread.mean().item() - std**2) < 4 * spread.std().item() / N**0.5 + 1e-4


@pytest.mark.parametrize("q, p", [
    (CutNormal(0.0, 1.0, 1.0), dist.Normal(0.5, 1.0)),
    (dist.Normal(0.5, 0.1), CutNormal(0.0, 1.0, 3.0)),
    (CutNormal(0.0, 1.0, 1.0), CutNormal(0.0, 1.0, 2.0)),
    (Shifted(2.0), Shifted(1.0)), (Flipped(0.3), dist.Bernoulli(0.4)),
    (Doubled(0.0, 1.0), dist.Normal(0.0, 1.0)),
    (dist.NanMaskedNormal(0.0, 1.0), dist.NanMaskedNormal(1.0, 1.0)),
    [dist.FoldedDistribution(dist.Normal(loc, 1.0)) for loc in (1.0, 0.0)],
])  # fmt: skip
def test_no_closed_form_of_the_base(q, p):
    def inside(d):
        return d.expand([3]).to_event(1)

    assert closed_form(q, p) is None
    assert closed_form(inside(q), inside(p)) is None
    assert closed_form(q.mask(True), p.mask(True)) is None


def test_the_kl_of_a_cut_normal_is_sampled():
    """Against quadrature; the closed form of the base is 0.125."""
    q, p = CutNormal(0.0, 1.0, 1.0), dist.Normal(0.5, 1.0)
    z = torch.linspace(-1, 1, 20_001)
    values = q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z))
    exact = torch.trapezoid(values, z)

    def model():
        with pyro.plate("data", N):
            pyro.sample("z", p)

    def guide():
        with pyro.plate("data", N):
            pyro.sample("z", q)

    terms = pe.BetaELBO().terms(model, guide)
    kl = terms.kl["z"]
    assert not terms.analytic
    assert abs(kl.mean() - exact) < 4 * kl.std() / N**0.5
    assert abs(exact - 0.125) > 10 * kl.std() / N**0.5


def test_what_is_registered_for_a_subclass_is_its_own():
    class Named(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) + 0

    q, p = Named(0.3, 1.0), dist.Normal(0.0, 1.0)
    assert closed_form(q, p) is None

    @register_kl(Named, torch.distributions.Normal)
    def _(q, p):
        return torch.tensor(7.0)

    assert closed_form(q, p) == 7.0


def test_an_instance_may_have_a_method_of_its_own():
    q, p = dist.Normal(0.3, 1.0), dist.Normal(0.0, 1.0)
    assert closed_form(q, p) is not None
    q.log_prob = lambda value: -value
    assert closed_form(q, p) is None and not is_normal(q)


def test_subclasses_that_change_nothing_are_their_base():
    class Renamed(dist.Normal):
        """As softplus-parameterised ones are."""

        def __init__(self, loc, log_scale):
            super().__init__(loc, log_scale.exp())

    q, p = Renamed(torch.tensor(0.3), torch.tensor(-1.0)), dist.Normal(0.0, 1.0)
    torch.testing.assert_close(closed_form(q, p), kl_divergence(q, p))
    assert is_normal(q) and keeps(q, torch.distributions.Normal)


@pytest.mark.parametrize("q, p", [
    (dist.InverseGamma(3.0, 2.0), dist.InverseGamma(2.5, 1.0)),
    (dist.TransformedDistribution(dist.Normal(0.3, 0.5), [dist.transforms.SigmoidTransform()]),
     dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform()])),
    (dist.HalfNormal(0.5), dist.HalfNormal(2.0)),
    (dist.LogNormal(0.3, 0.5), dist.LogNormal(0.0, 1.0)),
])  # fmt: skip
def test_closed_forms_of_transformed_ones(q, p):
    """Against draws: within four standard errors."""
    exact = closed_form(q, p)
    z = q.sample((200_000,))
    draws = q.log_prob(z) - p.log_prob(z)
    assert abs(draws.mean() - exact) < 4 * draws.std() / len(draws) ** 0.5


def test_marginals_are_not_those_of_the_base():
    class Tilted(dist.MultivariateNormal):
        def log_prob(self, value):
            return super().log_prob(value) + value.sum(-1)

    assert marginals(Tilted(torch.zeros(2), torch.eye(2))) is None
    assert not is_normal(CutNormal(0.0, 1.0))


def test_families_do_not_lose_what_the_constructor_takes_beside_parameters():
    """A distribution that is put together anew would have its default."""
    assert Family.of(CutNormal(0.0, 1.0))  # which is the default
    with pytest.raises(ValueError, match=r"CutNormal has no parameters.*or others than its arg"):
        Family.of(CutNormal(0.0, 1.0, 0.5))


@pytest.mark.parametrize("kind", ["Bernoulli", "OneHotCategorical"])
def test_straight_through_draws_are_hard(kind):
    """In surgery as in training: the decoder sees what the guide gives it in both."""
    x = rows(600, 2)
    W = torch.tensor([[2.0, -1.0], [-1.5, 1.0]])

    def q(logits):
        temperature = torch.tensor(0.7)
        if kind == "Bernoulli":
            soft = dist.RelaxedBernoulliStraightThrough(temperature, logits=logits)
            return soft.to_event(1)
        return dist.RelaxedOneHotCategoricalStraightThrough(temperature, logits=logits)

    seen = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", q(torch.zeros(len(x), 2)))
            seen.append(z)
            pyro.sample("x", dist.Normal(z @ W, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(0.5 * x))

    found = pe.surgery(model, guide, x, progress=False)
    assert all(((z == 0) | (z == 1)).all() for z in seen)
    many = torch.stack(
        [
            pe.BetaELBO(kl="sampled").terms(model, guide, x).reconstruction / len(x)
            for _ in range(60)
        ]
    )
    assert abs(found.reconstruction - many.mean()) < 5 * many.std()
    assert found.mutual_information <= found.log_n
    kl = [pe.BetaELBO(kl="sampled").terms(model, guide, x).shrinkage / len(x) for _ in range(60)]
    assert abs(found.average_kl - torch.stack(kl).mean()) < 5 * torch.stack(kl).std()
    assert pe.evidence(model, guide, x, num_samples=5, progress=False).log_evidence.isfinite().all()
    with pytest.raises(ValueError, match="straight through a rounding"):
        pe.evidence(model, guide, x, method="annealed", num_samples=2, progress=False)
