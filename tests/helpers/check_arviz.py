"""What ArviZ does with the result of ``from_svi``, and for us, under whichever is installed.

Python 3.11 has ArviZ 0.23, Python 3.12 and later have ArviZ 1, whose functions have other names.
The tests call :func:`check` under the one that is there; run this file under the other Python::

    python tests/helpers/check_arviz.py
"""

import sys
import tempfile
import warnings
from pathlib import Path

import arviz as az
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray

import pyproelbo as pe

IS_OLD = int(az.__version__.split(".")[0]) < 1


def schools():
    """Eight schools (Rubin 1981): two global latents, one for each school."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y, sigma):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("school", len(y)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + tau * eta)
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model, (y, sigma)


def fitted(num_steps=200):
    """A tree of every group, of eight schools and AutoMultivariateNormal."""
    model, data = schools()
    guide = pyro.infer.autoguide.AutoMultivariateNormal(model)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pe.BetaELBO())
    losses = [svi.step(*data) for _ in range(num_steps)]
    return pe.from_svi(
        model,
        guide,
        data,
        num_samples=500,
        coords={"school": list("ABCDEFGH")},
        dims={"sigma": ["school"]},
        constant_data={"sigma": data[1]},
        elbo_trace=[-loss for loss in losses],
    )


def check(tree, folder):
    """Write and read the tree, then call what a user of ArviZ would; raises if that fails."""
    path = Path(folder) / "fit.nc"
    tree.to_netcdf(path, engine="h5netcdf")
    with xarray.open_datatree(path, engine="h5netcdf") as read:
        xarray.testing.assert_identical(read.load(), tree)
        assert read.attrs == tree.attrs
    data = az.from_datatree(tree) if IS_OLD else tree

    summary = az.summary(data, var_names=["mu", "theta"])
    assert "theta[A]" in summary.index and len(summary) == 9
    loo = az.loo(data, pointwise=True)
    assert np.isfinite(loo.elpd_loo if IS_OLD else loo.elpd)
    assert loo.pareto_k.dims == ("school",)
    for plot in _old_plots(data) if IS_OLD else _new_plots(data):
        plot()
        plt.close("all")
    if IS_OLD:
        az.to_netcdf(data, str(path))
        assert set(az.from_netcdf(str(path)).groups()) == set(tree.children)
        return
    stats = tree.sample_stats
    corrected = az.loo_approximate_posterior(tree, stats.lp, stats.log_q)
    assert np.isfinite(corrected.elpd)
    assert set(az.psense_summary(tree, var_names=["mu"]).index) == {"mu"}


def check_diagnostics():
    """What ArviZ does for us: tails of weights, cross-validation, convergence of iterates."""
    draws = np.random.default_rng(0)
    for k in (0.3, 0.6, 0.9):  # the tail of exp(k E), E exponential
        log_weights = k * draws.exponential(size=(4000, 40))
        smoothed, khat = pe.pareto_smooth(log_weights)
        assert abs(khat.mean() - k) < 4 * khat.std() / 40**0.5 + 0.04
        np.testing.assert_allclose(np.exp(smoothed).sum(0), 1.0)
        largest = np.take_along_axis(smoothed, log_weights.argmax(0)[None], 0)[0]
        np.testing.assert_allclose(largest, smoothed.max(0))  # and not the smallest

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def posterior(x):
        precision = 0.25 + len(x)
        pyro.sample("mean", dist.Normal(x.sum() / precision, precision**-0.5))

    tree = pe.from_svi(model, posterior, (torch.randn(20),))
    ours, theirs = pe.loo(tree), az.loo(az.from_datatree(tree) if IS_OLD else tree)
    assert abs(ours.elpd - (theirs.elpd_loo if IS_OLD else theirs.elpd)) < 1e-3

    iterates = draws.normal(size=400)
    assert pe.convergence(iterates).is_at_rest
    assert not pe.convergence(0.05 * np.arange(400) + iterates).is_at_rest


def _old_plots(data):
    return [
        lambda: az.plot_posterior(data, var_names=["mu", "tau"]),
        lambda: az.plot_forest(data, var_names=["theta"]),
        lambda: az.plot_pair(data, var_names=["mu", "tau"]),
        lambda: az.plot_trace(data, var_names=["mu"]),
        lambda: az.plot_ppc(data, num_pp_samples=20),
        lambda: az.plot_ppc(data, group="prior", num_pp_samples=20),
        lambda: az.plot_ppc(data, kind="cumulative", flatten=["school"], num_pp_samples=20),
        lambda: az.plot_bpv(data, kind="t_stat", t_stat="std"),
        lambda: az.plot_dist_comparison(data, var_names=["mu"]),
        lambda: az.plot_loo_pit(data, y="y"),
        lambda: az.plot_khat(az.loo(data, pointwise=True)),
    ]


def _new_plots(data):
    return [
        lambda: az.plot_dist(data, var_names=["mu", "tau"]),
        lambda: az.plot_forest(data, var_names=["theta"]),
        lambda: az.plot_pair(data, var_names=["mu", "tau"]),
        lambda: az.plot_trace(data, var_names=["mu"]),
        lambda: az.plot_ppc_dist(data, num_samples=20),
        lambda: az.plot_ppc_dist(data, group="prior_predictive", num_samples=20),
        lambda: az.plot_ppc_pit(data),
        lambda: az.plot_ppc_interval(data),
        lambda: az.plot_ppc_tstat(data, t_stat="std"),
        lambda: az.plot_prior_posterior(data, var_names=["mu"]),
        lambda: az.plot_loo_pit(data),
        lambda: az.plot_khat(az.loo(data, pointwise=True)),
    ]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    versions = (f"{m.__name__} {m.__version__}" for m in (az, xarray, torch, pyro, np))
    print(f"Python {sys.version.split()[0]}:", ", ".join(versions))
    with tempfile.TemporaryDirectory() as folder:
        check(fitted(), folder)
    check_diagnostics()
    print("every call passed")
