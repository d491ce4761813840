"""The distribution of each dimension, where it is known."""

import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows

from pyproelbo._distributions.marginals import is_factorised, marginals


def covariance():
    A = rows(4, 3, 3)
    return A @ A.mT + torch.eye(3)


NORMALS = {
    "independent": lambda: dist.Normal(rows(4, 3), rows(4, 3).exp()).to_event(1),
    "masked": lambda: dist.Normal(rows(4, 3), 1.0).to_event(1).mask(torch.arange(4) < 2),
    "correlated": lambda: dist.MultivariateNormal(rows(4, 3), covariance()),
    "low rank": lambda: dist.LowRankMultivariateNormal(rows(4, 3), rows(4, 3, 2), torch.ones(4, 3)),
}


@pytest.mark.parametrize("name", NORMALS)
def test_normal_marginals_have_the_joints_moments(name):
    joint = NORMALS[name]()
    each = marginals(joint)
    assert each.batch_shape == (4, 3) and each.event_shape == ()
    torch.testing.assert_close(each.mean, joint.mean)
    torch.testing.assert_close(each.variance, joint.variance)
    assert is_factorised(joint) == (name in ("independent", "masked"))


def test_the_densities_of_independent_dims_sum_to_the_joints():
    for joint in (
        dist.Gamma(rows(4, 3).exp(), 1.0).to_event(1),
        dist.Gamma(rows(4, 3, 2).exp(), 1.0).to_event(2),
        dist.LogNormal(rows(4, 3), 1.0).to_event(1),
    ):
        z = joint.sample()
        per_dim = marginals(joint).log_prob(z)
        assert per_dim.shape == z.shape and is_factorised(joint)
        torch.testing.assert_close(per_dim.flatten(1).sum(1), joint.log_prob(z))


def test_a_scalar_is_its_own_marginal():
    scalar = dist.Normal(rows(4), 1.0)
    assert marginals(scalar) is scalar and is_factorised(scalar)


def test_unknown_ones():
    parts = dist.Normal(rows(2, 3), 1.0).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)
    base = dist.Normal(rows(4, 3), 1.0).to_event(1)
    mixing = dist.TransformedDistribution(base, [dist.transforms.Permute(torch.tensor([2, 0, 1]))])
    for joint in (mixture, mixing, dist.Dirichlet(torch.ones(3)), mixture.expand([2]).to_event(1)):
        assert marginals(joint) is None and not is_factorised(joint)
