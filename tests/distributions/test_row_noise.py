"""Draws by row: the right distribution, the same draws whatever the batch."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows

from pyproelbo._distributions.row_noise import RowNoise


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
    # row by row
    "Gamma": lambda a, b: dist.Gamma(a.exp(), b).to_event(1),
    "Beta": lambda a, b: dist.Beta(a.exp(), b).to_event(1),
    "Dirichlet": lambda a, b: dist.Dirichlet(a.exp()),
    "StudentT": lambda a, b: dist.StudentT(b + 6, a, b).to_event(1),
    "Poisson": lambda a, b: dist.Poisson(3 * b).to_event(1),
}


def drawn(family, a, b, start=0, draw=0, seed=0):
    with RowNoise("data", start, draw, seed), pyro.plate("data", len(a)):
        return pyro.sample("z", FAMILIES[family](a, b))


def parameters(num):
    """The same for all rows, so that their moments are those of the distribution."""
    a, b = torch.tensor([0.3, -0.8, 1.1]), torch.tensor([0.7, 1.2, 0.5])
    return a.expand(num, 3), b.expand(num, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_torchs_draws(family):
    num = 1500
    a, b = parameters(num)
    z = drawn(family, a, b).double()
    other = FAMILIES[family](a[0], b[0]).sample((20 * num,)).double()
    assert z.shape == FAMILIES[family](a, b).sample().shape
    for power in (1, 2):
        ours, theirs = z**power, other**power
        error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
        assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error + 1e-9).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_draw_does_not_depend_on_its_batch(family):
    a, b = rows(600, 3), rows(600, 3).exp()
    whole = drawn(family, a, b)
    parts = [drawn(family, a[i : i + 130], b[i : i + 130], i) for i in range(0, 600, 130)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert len(whole.unique(dim=0)) > 300 or whole.unique(dim=0).numel() < 30


def test_seeds_draws_and_sites_are_independent():
    a, b = parameters(4000)
    draws = [drawn("Normal", a, b, draw=d, seed=s) for d, s in [(0, 0), (1, 0), (0, 1)]]
    with RowNoise("data", 0, 0, 0), pyro.plate("data", 4000):
        draws.append(pyro.sample("other", FAMILIES["Normal"](a, b)))
    correlation = torch.corrcoef(torch.cat([draw - a for draw in draws], 1).mT)
    assert (correlation - torch.eye(12)).abs().max() < 5 / 4000**0.5


def test_only_sites_of_the_plate_and_nothing_of_torchs_state():
    before = torch.get_rng_state()
    a, b = parameters(5)
    for family in FAMILIES:
        drawn(family, a, b)
    assert torch.equal(torch.get_rng_state(), before)
    with RowNoise("data", 0, 0, 0):
        pyro.sample("outside", dist.Normal(0.0, 1.0))
        with pyro.plate("others", 5):
            pyro.sample("inside", dist.Normal(0.0, 1.0))
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_plate_may_be_any_dim():
    with RowNoise("data", 0, 0, 0), pyro.plate("data", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
        whole = pyro.sample("z", dist.Normal(torch.zeros(4, 3), 1.0))
    with RowNoise("data", 1, 0, 0), pyro.plate("data", 3, dim=-2), pyro.plate("inner", 3, dim=-1):
        part = pyro.sample("z", dist.Normal(torch.zeros(3, 3), 1.0))
    torch.testing.assert_close(whole[1:], part)


def test_a_distribution_without_rows_draws_for_its_batch():
    rate, gate = rows(50, 1).exp()[:, 0], torch.tensor(0.2)
    with RowNoise("data", 0, 0, 0), pyro.plate("data", 50):
        z, again = (
            pyro.sample(name, dist.ZeroInflatedPoisson(rate, gate=gate)) for name in ("z", "a")
        )
    assert z.shape == (50,) and not torch.equal(z, again)
