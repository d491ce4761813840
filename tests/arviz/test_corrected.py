"""Draws that are corrected: those of the posterior, from a guide that is off."""

import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from helpers.conjugate import Hierarchy
from helpers.oracles import rows
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

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


SHORT = {"groups": ["posterior", "sample_stats"], **QUIET}


@pytest.mark.parametrize("num", [10, 200])
def test_level_by_level(num):
    """Global and local latents of a guide that is off at each level, also with many data."""
    of, S = Hierarchy.of(num), 1500
    guide = of.guide(0.6, 1.2, 0.3, 1.2)
    tree = pe.from_svi(of.model, guide, (of.x,), corrected=True, num_samples=S, **SHORT)
    mu, z = (torch.tensor(tree.posterior[name].values[0]) for name in ("mu", "z"))
    assert tree.sample_stats.attrs["corrected"] == 1 and tree.sample_stats.attrs["khat"] < 0.67
    size = len(mu.unique()) / 2  # of independent draws, at least
    assert abs(mu.mean() - of.q.loc) < 4 * of.q.scale / size**0.5
    assert mu.std().item() == pytest.approx(of.q.scale.item(), rel=4 * (2 * size) ** -0.5)
    mean, sd = (of.q.loc + 4 * of.x) / 5, (0.2 + of.q.scale**2 / 25) ** 0.5
    off = (z.mean(0) - mean) / sd
    error = (num * size) ** -0.5 + of.q.scale / 5 / sd * size**-0.5
    assert abs(off.mean()) < 4 * error
    assert abs((z.std(0) / sd).mean() - 1) < 4 * error
    # z given mu, too: the slope of z on mu is 1/5
    slopes = ((mu - mu.mean()) @ (z - z.mean(0))) / (mu - mu.mean()).square().sum()
    error = sd / of.q.scale * (num * size) ** -0.5
    assert abs(slopes.mean() - 0.2) < 4 * error
    # densities are of the same draws
    lp = dist.Normal(0.0, 2.0).log_prob(mu) + dist.Normal(mu[:, None], 1.0).log_prob(z).sum(1)
    lp = lp + dist.Normal(z, 0.5).log_prob(of.x).sum(1)
    np.testing.assert_allclose(tree.sample_stats.lp.values[0], lp)


def test_levels_of_an_auto_guide_and_the_same_in_parts(monkeypatch):
    """Whatever is drawn at once: also when the draws of z for one w are not."""
    of = Hierarchy.of(6)
    guide = AutoNormal(of.model, init_scale=0.5)
    guide(of.x)
    options = {"corrected": True, "num_samples": 26, **SHORT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pe.CorrectionWarning)  # of a guide that is not fitted
        whole = pe.from_svi(of.model, guide, (of.x,), **options)
        for num_rows in (1, 7 * 6, 50 * 6):
            monkeypatch.setattr("pyproelbo._rows.levels.ROWS", num_rows)
            part = pe.from_svi(of.model, guide, (of.x,), chunk=7, **options)
            xarray.testing.assert_allclose(
                part.posterior.to_dataset(), whole.posterior.to_dataset()
            )


def test_eight_schools():
    """tau by the mean-field guide is too small; its corrected draws have the posterior's."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(8.0))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    guide = AutoNormal(model, init_scale=0.3)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), pe.BetaELBO(num_particles=2))
    for _ in range(600):
        svi.step()
    # with eta integrated out, y_n ~ N(mu, tau^2 + sigma_n^2): quadrature over mu and tau
    mu, tau = torch.linspace(-25, 35, 301)[:, None], torch.linspace(1e-3, 60, 1500)[None]
    marginal = dist.Normal(mu[..., None], (tau[..., None] ** 2 + sigma**2).sqrt())
    log_p = marginal.log_prob(y).sum(-1) + dist.Normal(0.0, 5.0).log_prob(mu)
    weight = (log_p + dist.HalfNormal(8.0).log_prob(tau)).flatten().softmax(0).reshape(log_p.shape)
    truth = (weight.sum(0) * tau[0]).sum().item()
    options = {"num_samples": 2000, **SHORT}
    plain, tree = (pe.from_svi(model, guide, corrected=c, **options) for c in (False, True))
    found = tree.posterior.tau.values
    size = len(np.unique(found)) / 2
    assert plain.posterior.tau.values.mean() < 0.95 * truth
    assert found.mean() == pytest.approx(truth, abs=4 * found.std() / size**0.5)
    assert tree.sample_stats.attrs["khat"] < 0.7


def test_what_cannot_be_weighed():
    of = Hierarchy.of(6)

    def point(x):
        mu = pyro.sample("mu", dist.Delta(torch.tensor(0.7)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((mu + 4 * x) / 5, 0.45))

    def half(x):
        mu = pyro.sample("mu", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((mu + 4 * x) / 5, 0.45))

    for guide, said in ((point, "one value for the latent 'mu'"), (half, "no draw of the guide")):
        with pytest.raises(ValueError, match=said):
            pe.from_svi(of.model, guide, (of.x,), corrected=True, **QUIET)
        with pytest.raises(ValueError, match=said):
            pe.evidence(of.model, guide, of.x, level="global", **QUIET)
