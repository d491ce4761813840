"""Pareto k-hat of importance weights whose tails are known."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.conjugate import guide_of, model, ppca_and_data
from helpers.oracles import rows

import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal, Exact


def tails(k, num=4000, size=40):
    """Log-weights of Pareto weights: the tail of exp(k E), E exponential, has shape k."""
    return k * np.random.default_rng(0).exponential(size=(num, size))


@pytest.mark.parametrize("k", [0.3, 0.6, 0.9])
def test_known_tails(k):
    _, khat = pe.pareto_smooth(tails(k))
    assert abs(khat.mean() - k) < 4 * khat.std() / len(khat) ** 0.5 + 0.04


def test_smoothed_weights():
    w = torch.as_tensor(tails(0.6, size=3)).reshape(4000, 3, 1)
    smoothed, khat = pe.pareto_smooth(w - 700.0)
    assert smoothed.shape == (4000, 3, 1) and khat.shape == (3, 1)
    np.testing.assert_allclose(np.exp(smoothed).sum(0), 1.0)
    below = w.numpy().argsort(0)[:3000]  # only the tail is smoothed
    shift = np.take_along_axis(w.numpy() - smoothed, below, 0)
    assert (np.ptp(shift, 0) < 1e-9).all()
    again, same = pe.pareto_smooth(w)
    np.testing.assert_allclose(again, smoothed)
    np.testing.assert_allclose(same, khat)


def test_constant_weights_have_no_tail():
    w = np.stack([np.full(100, -3.0) + 1e-9 * rows(100).numpy(), tails(0.6, 100, 1)[:, 0]], 1)
    smoothed, khat = pe.pareto_smooth(w)
    assert khat[0] == 0 and khat[1] > 0
    np.testing.assert_allclose(smoothed[:, 0], -np.log(100))


def test_weights_of_zero():
    w = tails(0.3, size=2)
    w[:50, 0] = -np.inf
    smoothed, khat = pe.pareto_smooth(w)
    assert np.isfinite(khat).all() and (np.exp(smoothed[:50, 0]) == 0).all()
    w[:, 0] = -np.inf
    smoothed, alone = pe.pareto_smooth(w)
    assert np.isnan(smoothed[:, 0]).all() and alone[0] == np.inf and alone[1] == khat[1]


def test_an_exact_guide_is_good_and_narrow_ones_are_bad():
    model, x = ppca_and_data(30)
    exact = pe.psis(model, Exact(model), x, num_samples=100)
    assert (exact.khat == 0).all() and exact.joint_khat == 0
    torch.testing.assert_close(exact.effective_sample_size, torch.full((30,), 100.0).double().cpu())
    torch.testing.assert_close(exact.log_evidence, model.log_evidence(x).detach().double().cpu())

    guide = Diagonal.optimum(model)
    medians = []
    for factor in (1.5, 1.0, 0.4):
        with torch.no_grad():
            guide.raw.add_(np.log(factor))
        medians.append(pe.psis(model, guide, x).khat.median())
        with torch.no_grad():
            guide.raw.sub_(np.log(factor))
    assert medians[0] < medians[1] < medians[2]
    assert medians[0] < 0.2 and medians[2] > 0.7


def test_evidence_by_smoothed_weights():
    model, x = ppca_and_data(30)
    result = pe.psis(model, Diagonal.optimum(model), x, num_samples=4000)
    truth = model.log_evidence(x).detach().double().cpu()
    assert ((result.log_evidence - truth).abs() < 4.5 * result.stderr + 1e-9).all()
    assert (result.stderr < 0.1).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("width", [2.0, 8.0, 64.0])
def test_evidence_where_most_weights_are_zero(width):
    """A prior on part of what the guide draws: a weight is 0, or the width."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(0.0, 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(0.0, width))

    x = rows(10)
    result = pe.psis(model, guide, x, num_samples=4000)
    error = (result.log_evidence - dist.Normal(0.0, 1.0).log_prob(x).cpu()).expm1()
    assert (error.abs() < 4 * result.stderr).all() and (result.stderr < 0.2).all()
    assert (result.khat < 0.7).all() or width == 64.0
    assert width == 2.0 or result.joint_khat == np.inf  # no draw has weights for all data


def test_discrete_latents_have_no_tail():
    """A weight is one of two numbers: a tail cannot be heavy."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5))

    x = rows(20)
    result = pe.psis(model, guide, x, num_samples=4000)
    assert (result.khat == 0).all()
    joint = [
        dist.Bernoulli(0.3).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
        for z in torch.tensor([0.0, 1.0])
    ]
    error = (result.log_evidence - torch.stack(joint).logsumexp(0).cpu()).expm1()
    assert (error.abs() < 4 * result.stderr).all()


def test_all_data_together_are_worse_than_each():
    model, x = ppca_and_data(30)
    guide = Diagonal.optimum(model)
    result = pe.psis(model, guide, x.repeat(10, 1), batch_size=64)
    assert result.joint_khat > result.khat.median()


def test_report():
    model, x = ppca_and_data(30)
    result = pe.psis(model, Diagonal.optimum(model), x, num_samples=200)
    assert result.threshold == pytest.approx(1 - 1 / np.log10(200))
    assert "Pareto k-hat of 30 data, draws: 200" in str(result)
    dataset = result.to_xarray()
    assert dataset.sizes == {"datum": 30} and float(dataset.joint_khat) == result.joint_khat


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: pe.pareto_smooth(np.zeros(10)), "at least 25 draws"),
        (lambda: pe.pareto_smooth(np.full(50, np.nan)), "should not be NaN"),
        (lambda: pe.psis(None, None, rows(3, 4), num_samples=10), "num_samples should be"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_the_evidence_has_it_too():
    """In parts, of the largest weights alone; and says where errors are too small."""
    x, guide = rows(9), guide_of(0.4)
    weights = pe.psis(model, guide, x, num_samples=300, progress=False)
    found = pe.evidence(model, guide, x, num_samples=300, chunk=7, progress=False)
    assert torch.allclose(found.khat, weights.khat, atol=1e-6)
    assert (weights.khat > 0.5).any() and "errors of log p(x) are too small" in str(found)
    assert "khat" in found.to_xarray()
    assert pe.evidence(model, guide, x, num_samples=10, progress=False).khat is None
    exact = pe.evidence(model, guide_of(), x, num_samples=300, progress=False)
    assert not exact.khat.any() and "too small" not in str(exact)
