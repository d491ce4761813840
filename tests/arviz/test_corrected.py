"""Draws that are corrected: those of the posterior, from a guide that is off."""

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows

import pyproelbo as pe

QUIET = {"progress": False}


def mean_model(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def guide_of(x, shift, factor):
    precision = 1.0 + len(x)
    q = dist.Normal(x.sum() / precision + shift * precision**-0.5, factor * precision**-0.5)

    def guide(x):
        pyro.sample("m", q)

    return guide, x.sum().item() / precision, precision**-0.5


def test_global_latents():
    x = rows(10)
    guide, mean, sd = guide_of(x, 0.5, 1.5)
    whole = {"num_samples": 8000, **QUIET}
    tree = pe.from_svi(mean_model, guide, (x,), corrected=True, **whole)
    draws = tree.posterior.m.values[0]
    assert abs(draws.mean() - mean) < 5 * sd / 8000**0.5 * 2
    assert draws.std() == pytest.approx(sd, rel=0.05)
    stats = tree["sample_stats"]
    assert stats.attrs["corrected"] == 1 and stats.attrs["khat"] < 0.5
    # everything is of the same draws
    lp = dist.Normal(0.0, 1.0).log_prob(torch.tensor(draws)).numpy()
    np.testing.assert_allclose(tree.log_prior.m.values[0], lp)
    total = tree.log_likelihood.x.values[0].sum(-1) + lp
    np.testing.assert_allclose(stats.lp.values[0], total)
    # predictions are from them, too
    predicted = tree.posterior_predictive.x.values[0].mean(1)
    assert np.corrcoef(predicted, draws)[0, 1] > 0.5
    # cross-validation weighs them no second time
    exact = [
        dist.Normal(
            torch.cat([x[:i], x[i + 1 :]]).sum() / (1 + len(x) - 1), (1 + 1 / len(x)) ** 0.5
        ).log_prob(x[i])
        for i in range(len(x))
    ]
    truth = float(sum(exact))
    for fit in (tree, pe.from_svi(mean_model, guide, (x,), **whole)):
        assert pe.loo(fit).elpd == pytest.approx(truth, abs=0.05)
    summary = arviz.summary(tree) if hasattr(arviz, "from_datatree") is False else None
    assert summary is None or "m" in summary.index


def test_each_row_by_its_own_weights():
    x = rows(300)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    precision = torch.ones(2, 2) + torch.eye(2)
    covariance = torch.linalg.inv(precision)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean = x[..., None] * covariance.sum(1) + 0.2
            scale = 1.2 * covariance.diagonal().sqrt()
            pyro.sample("z", dist.Normal(mean, scale).to_event(1))

    tree = pe.from_svi(model, guide, (x,), corrected=True, num_samples=2000, **QUIET)
    z = tree.posterior.z.values[0]
    truth = (x[:, None] * covariance.sum(1)).numpy()
    sd = covariance.diagonal().sqrt().numpy()
    assert np.abs((z.mean(0) - truth) / sd).mean() < 0.05
    np.testing.assert_allclose((z.std(0) / sd).mean(0), 1, atol=0.03)
    found = np.mean([np.corrcoef(z[:, n].T)[0, 1] for n in range(300)])
    assert found == pytest.approx(covariance[0, 1].item() / covariance[0, 0].item(), abs=0.03)
    lp = tree.log_likelihood.x.values[0].sum(-1) + tree.log_prior.z.values[0].sum(-1)
    np.testing.assert_allclose(tree.sample_stats.lp.values[0], lp)


def test_the_same_each_time_and_only_the_groups_asked_for():
    x = rows(10)
    guide, _, _ = guide_of(x, 0.3, 1.2)
    options = {"corrected": True, "num_samples": 100, "groups": ["posterior"], **QUIET}
    trees = [pe.from_svi(mean_model, guide, (x,), chunk=chunk, **options) for chunk in (None, 7)]
    assert all(set(tree.children) == {"posterior"} for tree in trees)
    assert np.array_equal(trees[0].posterior.m, trees[1].posterior.m)


def test_weights_that_cannot_be_trusted():
    x = rows(10)
    guide, _, _ = guide_of(x, 4.0, 0.3)
    with pytest.warns(pe.CorrectionWarning, match="k-hat is .*above 0.67"):
        pe.from_svi(mean_model, guide, (x,), corrected=True, **QUIET)
    with pytest.raises(ValueError, match="at least 25 draws"):
        pe.from_svi(mean_model, guide, (x,), corrected=True, num_samples=20, **QUIET)


def test_a_guide_that_is_far_too_narrow():
    """Its own draws have a small k-hat by chance, and their weights cannot widen them enough."""
    precision = torch.linalg.inv(torch.tensor([[1.0, 0.99], [0.99, 1.0]]))

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision))

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(2), precision.diagonal() ** -0.5).to_event(1))

    with pytest.warns(pe.CorrectionWarning, match="too narrow as well"):
        pe.from_svi(model, guide, corrected=True, **QUIET)
    found = pe.moments(model, guide, None, **QUIET)
    assert not found.can_be_corrected.any() and "do not reach" in str(found)
    verdict = pe.check(model, guide, None, **QUIET)
    assert verdict.verdict == "bad" and "richer family" in str(verdict)
