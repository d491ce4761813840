"""Means and standard deviations of q, by its weighted draws."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.conjugate import Hierarchy
from helpers.oracles import rows

import pyproelbo as pe

QUIET = {"progress": False}


def model():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))


def guide():
    pyro.sample("a", dist.Normal(0.3, 1.5))
    pyro.sample("b", dist.Normal(torch.tensor([0.0, 0.5]), torch.tensor([1.8, 2.0])).to_event(1))


SHIFT = torch.tensor([0.3, 0.0, 0.25])
RATIO = torch.tensor([1.5, 0.9, 1.0])


def test_against_closed_forms():
    found = pe.moments(model, guide, None, num_samples=8000, **QUIET)
    assert found.dims == ("a", "b[0]", "b[1]") and found.per == "data set"
    assert ((found.mean_shift[0] - SHIFT).abs() < 4 * found.mean_shift_stderr[0] + 0.01).all()
    assert ((found.sd_ratio[0] - RATIO).abs() < 4 * found.sd_ratio_stderr[0] + 0.01).all()
    assert (found.mean_shift_stderr < 0.05).all() and (found.sd_ratio_stderr < 0.05).all()
    assert torch.allclose(found.sd[0], torch.tensor([1.0, 2.0, 2.0]), rtol=0.06)
    assert "off by, in sds" in str(found)
    assert found.to_xarray().mean_shift.dims == ("data_set", "latent_dim")


def test_errors_are_those_of_repeated_runs():
    """Of a shift the standard error is right; of a ratio it is not too small."""
    runs = [pe.moments(model, guide, None, seed=seed, **QUIET) for seed in range(40)]
    for name, most in (("mean_shift", 1.5), ("sd_ratio", 4.0)):
        spread = torch.cat([getattr(run, name) for run in runs]).std(0)
        said = torch.cat([getattr(run, f"{name}_stderr") for run in runs]).mean(0)
        assert (said / spread > 0.6).all() and (said / spread < most).all(), name


@pytest.mark.parametrize("batch_size", [3, 10])
def test_each_datum_has_its_own(batch_size):
    x = rows(10)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean = torch.stack([x / 2 + 0.2, 0.0 * x], -1)
            pyro.sample("z", dist.Normal(mean, torch.tensor([0.5**0.5, 1.2])).to_event(1))

    found = pe.moments(model, guide, x, num_samples=4000, batch_size=batch_size, **QUIET)
    truth = torch.tensor([0.2 / 0.5**0.5, 0.0]).expand(10, 2)
    assert found.mean_shift.shape == (10, 2) and found.dims == ("z[0]", "z[1]")
    assert ((found.mean_shift - truth).abs() < 5 * found.mean_shift_stderr).all()
    assert torch.allclose(found.sd_ratio.mean(0), torch.tensor([1.0, 1.2]), atol=0.03)
    assert torch.allclose(found.mean[:, 0], x / 2, atol=0.08)


def test_a_discrete_latent_whose_draws_are_all_alike():
    def model():
        k = pyro.sample("k", dist.Bernoulli(1e-12))
        pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(0.0))

    def guide():
        pyro.sample("k", dist.Bernoulli(1e-12))

    found = pe.moments(model, guide, None, num_samples=100, **QUIET)
    assert found.mean_shift.item() == 0 and found.sd_ratio.item() == 1


def test_bad_input():
    with pytest.raises(ValueError, match="num_samples should be"):
        pe.moments(model, guide, None, num_samples=10)


@pytest.mark.parametrize("level", ["global", "local"])
def test_by_level(level):
    """Against a guide that is off at each level."""
    of = Hierarchy.of(60)
    guide = of.guide(0.4, 1.3, 0.2, 1.2)
    found = pe.moments(of.model, guide, of.x, level=level, num_samples=2000, num_nested=15, **QUIET)
    if level == "global":
        assert found.per == "data set" and found.dims == ("mu",) and found.mean.shape == (1, 1)
        truth, ratio = torch.tensor([[0.4]]), torch.tensor([[1.3]])
    else:
        assert found.per == "datum" and found.dims == ("z",) and found.num_globals == 15
        truth = torch.full((60, 1), 0.2)
        ratio = torch.full((60, 1), 1.2)
    assert ((found.mean_shift - truth).abs() < 5 * found.mean_shift_stderr).all()
    assert ((found.sd_ratio - ratio).abs() < 5 * found.sd_ratio_stderr).all()
    assert (found.mean_shift_stderr < 0.1).all()
