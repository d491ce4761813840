"""Cross-validation where the predictive densities are known."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import conjugate
from helpers.oracles import rows
from pyro.infer.autoguide import AutoDelta

import pyproelbo as pe


def model(x, mask=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with (
        pyro.plate("data", len(x)),
        pyro.poutine.mask(mask=torch.tensor(True) if mask is None else mask),
    ):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def posterior(x):
    precision = 0.25 + len(x)
    return dist.Normal(x.sum() / precision, precision**-0.5)


def exact(x, mask=slice(None)):
    pyro.sample("mean", posterior(x[mask]))


def wrong(x):
    q = posterior(x)
    pyro.sample("mean", dist.Normal(q.mean + 0.5 * q.stddev, 1.3 * q.stddev))


def left_out(x):
    """log p(x_i | x_{-i}) in closed form."""
    found = []
    for i in range(len(x)):
        rest = posterior(torch.cat([x[:i], x[i + 1 :]]))
        found.append(dist.Normal(rest.mean, (rest.variance + 1).sqrt()).log_prob(x[i]))
    return torch.stack(found).cpu().numpy()


@pytest.mark.parametrize("guide", [exact, wrong])
def test_against_closed_forms(guide):
    """A guide that is off by a known weight predicts as the posterior does."""
    x = rows(20)
    result = pe.loo(pe.from_svi(model, guide, (x,), num_samples=4000, progress=False))
    np.testing.assert_allclose(result.pointwise, left_out(x), atol=0.02)
    assert result.elpd == pytest.approx(left_out(x).sum(), abs=0.15)
    assert result.stderr == pytest.approx(left_out(x).std() * 20**0.5, rel=0.05)
    q = posterior(x)
    whole = dist.Normal(q.mean, (q.variance + 1).sqrt()).log_prob(x).sum().item()
    assert result.num_effective == pytest.approx(whole - left_out(x).sum(), abs=0.05)
    assert (result.khat < 0.7).all()
    assert "20 data" in str(result)


def test_masked_data_are_left_out_of_the_sum():
    x, mask = rows(12), torch.arange(12) != 3
    tree = pe.from_svi(model, exact, (x, mask), num_samples=4000, progress=False)
    result = pe.loo(tree)
    assert np.isnan(result.pointwise[3]) and np.isnan(result.khat[3])
    np.testing.assert_allclose(np.delete(result.pointwise, 3), left_out(x[mask]), atol=0.03)
    assert "11 data" in str(result)


def test_latents_of_single_data_are_refused():
    programs = conjugate.model, conjugate.guide_of()
    tree = pe.from_svi(*programs, (rows(5),), num_samples=50, progress=False)
    with pytest.raises(ValueError, match="latent 'z' belongs to single data, in plate 'data'"):
        pe.loo(tree)


def test_points_are_refused():
    x = rows(5)
    guide = AutoDelta(model)
    guide(x)
    with pytest.raises(ValueError, match="latent 'mean' is the same in all draws"):
        pe.loo(pe.from_svi(model, guide, (x,), num_samples=50, progress=False))


def test_bad_input():
    groups = ["posterior", "log_likelihood"]
    tree = pe.from_svi(model, exact, (rows(5),), num_samples=50, groups=groups, progress=False)
    with pytest.raises(ValueError, match="tree should have the group 'sample_stats'"):
        pe.loo(tree)
    tree = pe.from_svi(model, exact, (rows(5),), num_samples=50, progress=False)
    with pytest.raises(ValueError, match=r"site should be one of \['x'\], got 'y'"):
        pe.loo(tree, "y")


def test_local_latents_of_a_guide_that_is_not_amortised():
    """The latent of a datum that is left out goes back to its prior, by the weights."""
    x = 0.8 * rows(20)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 0.6))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    precision = 1 + 20 / 1.36
    mean, variance = x.sum() / 1.36 / precision, 1 / precision
    scale, shift = 0.36 / 1.36, 1 / 1.36

    def guide(_):
        mu = pyro.sample("mu", dist.Normal(mean, variance**0.5))
        with pyro.plate("data", 20):
            pyro.sample("z", dist.Normal(shift * mu + scale * x, (0.36 / 1.36) ** 0.5))

    tree = pe.from_svi(model, guide, (x,), num_samples=20_000, progress=False)
    assert tree.attrs["is_amortised"] == 0
    covariance = torch.ones(20, 20) + 1.36 * torch.eye(20)
    inverse = torch.linalg.inv(covariance)
    v = 1 / inverse.diagonal()
    truth = dist.Normal(x - v * (inverse @ x), v**0.5).log_prob(x)
    found = pe.loo(tree)
    assert np.abs(found.pointwise - truth.numpy()).max() < 0.03
    assert found.elpd == pytest.approx(truth.sum().item(), abs=0.05)
