"""Steps uphill: the inverse of the Fisher information, and how long they may be."""

import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows

from pyproelbo._distributions.natural_gradient import Unconstrained


def multivariate(**kwargs):
    return dist.MultivariateNormal(rows(3), **kwargs)


ROOT = torch.eye(3) + 0.3 * torch.ones(3, 3).tril()
FAMILIES = {
    "normal": lambda: dist.Normal(rows(4), rows(4).exp()),
    "independent": lambda: dist.Normal(rows(4), rows(4).exp()).to_event(1),
    "log-normal": lambda: dist.LogNormal(rows(4), rows(4).exp()),
    "Cholesky factor": lambda: multivariate(scale_tril=ROOT.double()),
    "covariance": lambda: multivariate(covariance_matrix=(ROOT @ ROOT.T).double()),
    "precision": lambda: multivariate(precision_matrix=(ROOT @ ROOT.T).double()),
}


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_natural_gradient_is_that_of_the_divergence(make):
    d = make()
    unconstrained = Unconstrained(d)
    values = unconstrained.values(d)
    sizes = [v.numel() for v in values]
    shapes = [v.shape for v in values]

    def divergence(flat):
        parts = [x.reshape(s) for x, s in zip(flat.split(sizes), shapes, strict=True)]
        other = unconstrained.made_of(parts)
        return torch.distributions.kl_divergence(d, other).sum()

    at = torch.cat([v.reshape(-1) for v in values])
    fisher = torch.autograd.functional.hessian(divergence, at)
    g = 1e-3 * (fisher @ rows(len(at)))  # in the range of it: entries that are always 0 have none
    steps = unconstrained.uphill(
        d, [x.reshape(s) for x, s in zip(g.split(sizes), shapes, strict=True)]
    )
    step = torch.cat([x.reshape(-1) for x in steps])
    torch.testing.assert_close(fisher @ step, g)


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_no_step_is_long(make):
    d = make()
    unconstrained = Unconstrained(d)
    values = unconstrained.values(d)
    steps = unconstrained.uphill(d, [torch.full_like(v, 1e6) for v in values])
    other = unconstrained.made_of([v + s for v, s in zip(values, steps, strict=True)])
    assert torch.distributions.kl_divergence(other, d).max() < 40


def test_other_families_take_the_gradient_itself():
    d = dist.Gamma(rows(3).exp(), 2.0)
    g = [0.1 * rows(3), torch.tensor([5.0, 0.2, -3.0])]
    for step, expected in zip(Unconstrained(d).uphill(d, g), g, strict=True):
        assert torch.equal(step, expected.clamp(-1, 1))


def test_values_are_the_distribution():
    for make in (*FAMILIES.values(), lambda: dist.Beta(rows(3).exp(), 2.0)):
        d = make()
        unconstrained = Unconstrained(d)
        again = unconstrained.made_of(unconstrained.values(d))
        torch.testing.assert_close(again.log_prob(d.mean), d.log_prob(d.mean))
