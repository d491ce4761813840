"""closed_form: right where it answers, silent where it would be wrong."""

import math

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyproelbo._distributions.closed_form import closed_form

POSITIVE = st.floats(0.1, 5.0)
REAL = st.floats(-3.0, 3.0)


def sampled(q, p, n=100_000):
    """log q - log p at n samples of q: mean and standard error."""
    z = q.sample((n,))
    values = q.log_prob(z) - p.log_prob(z)
    return values.mean(0), values.std(0) / math.sqrt(n)


VALID = {
    "Normal": (dist.Normal(0.3, 0.5), dist.Normal(0.0, 2.0)),
    "Gamma": (dist.Gamma(2.0, 3.0), dist.Gamma(1.0, 1.0)),
    "Bernoulli": (dist.Bernoulli(0.3), dist.Bernoulli(0.6)),
    "Categorical": (
        dist.Categorical(torch.tensor([0.2, 0.8])),
        dist.Categorical(torch.tensor([0.5, 0.5])),
    ),
    "LogNormal": (dist.LogNormal(0.3, 0.5), dist.LogNormal(0.0, 1.0)),
    "Beta": (dist.Beta(2.0, 3.0), dist.Beta(1.0, 1.0)),
    "event": (
        dist.Normal(torch.ones(2, 3), 0.5).to_event(1),
        dist.Normal(torch.zeros(2, 3), 1.0).to_event(1),
    ),
    "full against diagonal": (
        dist.MultivariateNormal(torch.ones(2), torch.tensor([[1.0, 0.6], [0.6, 1.0]])),
        dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1),
    ),
    "diagonal against full": (
        dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1),
        dist.MultivariateNormal(torch.ones(2), torch.tensor([[1.0, 0.6], [0.6, 1.0]])),
    ),
    "low rank against diagonal": (
        dist.LowRankMultivariateNormal(torch.ones(2), torch.ones(2, 1), torch.ones(2)),
        dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1),
    ),
    "uniform": (dist.Uniform(0.2, 0.5), dist.Uniform(0.0, 1.0)),
}


@pytest.mark.parametrize("pair", VALID)
def test_equals_the_sampled_mean(pair):
    q, p = VALID[pair]
    kl = closed_form(q, p)
    assert kl is not None
    assert kl.shape == q.batch_shape
    mean, error = sampled(q, p)
    assert ((kl - mean).abs() <= 4 * error + 1e-6).all()


@given(REAL, POSITIVE, REAL, POSITIVE)
def test_normal(m, s, n, t):
    expected = math.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5
    kl = closed_form(dist.Normal(m, s), dist.Normal(n, t))
    assert kl is not None
    assert kl.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    st.lists(st.integers(1, 3), max_size=3),
    st.integers(0, 3),
    st.integers(0, 2**16),
)
def test_shapes_are_batch_shapes(shape, event_dims, seed):
    event_dims = min(event_dims, len(shape))
    torch.manual_seed(seed)
    q = dist.Normal(torch.randn(shape), torch.rand(shape) + 0.1).to_event(event_dims)
    p = dist.Normal(torch.randn(shape), torch.rand(shape) + 0.1).to_event(event_dims)
    kl = closed_form(q, p)
    assert kl is not None
    assert kl.shape == q.batch_shape
    assert (kl >= -1e-12).all()


def test_none_where_it_would_be_wrong():
    normal, mask = dist.Normal(torch.zeros(3), 1.0), torch.tensor([True, False, True])
    affine = dist.TransformedDistribution(normal, dist.transforms.AffineTransform(0.0, 2.0))
    other = dist.TransformedDistribution(normal, dist.transforms.AffineTransform(0.0, 3.0))
    for q, p in [
        (dist.Delta(torch.zeros(3)), normal),
        (dist.Delta(torch.zeros(3)).to_event(1), normal.to_event(1)),
        (normal, dist.StudentT(3.0, torch.zeros(3), 1.0)),
        (normal.mask(mask), normal),
        (normal, normal.mask(mask)),
        (normal.mask(mask), normal.mask(~mask)),
        (normal.mask(mask).to_event(1), normal.to_event(1)),
        (normal, dist.Normal(0.0, 1.0)),
        (normal.to_event(1), normal),
        (affine, other),
        (dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0)),
    ]:
        assert closed_form(q, p) is None, (q, p)


def test_same_mask_on_both_sides():
    q, p, mask = (
        dist.Normal(torch.ones(2), 1.0),
        dist.Normal(torch.zeros(2), 1.0),
        torch.tensor([True, False]),
    )
    kl = closed_form(q.mask(mask), p.mask(mask))
    torch.testing.assert_close(kl, torch.tensor([0.5, 0.0]))


def test_registry_is_left_alone():
    """Nothing of ours changes what torch's own kl_divergence does."""
    q = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    p = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    assert closed_form(q, p) is not None
    with pytest.raises(NotImplementedError):
        torch.distributions.kl_divergence(q, p)
