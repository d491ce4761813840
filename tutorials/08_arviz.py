# ---
# jupyter:
#   jupytext:
#     cell_markers: r"""
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# From a fit to ArviZ

A fitted guide represents a posterior. [ArviZ](https://www.arviz.org) has tables, plots and checks
for posteriors from any source, and `pe.from_svi` converts a fit for ArviZ. This notebook covers
summaries, predictive checks, cross-validation, and the questions that only a variational posterior
raises: is $q$ the posterior at all, and for which data?

It runs with ArviZ 0.23 and with ArviZ 1. Where their names differ, the cells show both. All
log-densities are in nats.
"""

# %%
import math
import os
import tempfile
import warnings
from functools import partial
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal
from torch.optim.lr_scheduler import LambdaLR

import pyproelbo as pe
from pyproelbo.guides import ppca
from pyproelbo.models.ppca import PPCA

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
IS_OLD = int(az.__version__.split(".")[0]) < 1
pyro.set_rng_seed(0)
print("ArviZ", az.__version__)

# %% [markdown]
r"""
## Eight schools

This is a classic data set (Rubin 1981): in eight schools a coaching programme has raised the scores
of a test by `y` points, with standard errors `sigma`. Each school has its own true effect `theta`;
these effects are normal around `mu` with standard deviation `tau`.
"""

# %%
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y, sigma):
    """The effect of coaching in each school, measured with noise."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def fit(model, guide, *data, steps=1200):
    """Train the guide; the ELBO of each step."""
    pyro.clear_param_store()
    steps = 60 if SMOKE else steps

    def falling(step):
        return 100.0 ** -max(0.0, 3 * step / steps - 2)  # 1 at first, 1/100 at the end

    optim = pe.SharedOptim(
        torch.optim.Adam, {"lr": 0.02}, scheduler=partial(LambdaLR, lr_lambda=falling)
    )
    objective = pe.BetaELBO(num_particles=8, vectorize_particles=True)
    svi = SVI(model, guide, optim, loss=objective)
    elbos = []
    for _ in range(steps):
        elbos.append(-svi.step(*data))
        optim.step()
    return elbos


guide = AutoMultivariateNormal(schools, init_scale=0.1)
elbos = fit(schools, guide, y, sigma, steps=2100)
ax = pe.plot_elbo_trace(range(len(elbos)), {"eight schools": elbos})
ax.set_ylabel("ELBO (nats)")
plt.show()

# %% [markdown]
r"""
The learning rate is constant for two thirds of the steps, and decreases afterwards. Had training
converged by then? `pe.convergence` tests the iterates as one would test a Markov chain, by the
R-hat of two halves:
"""

# %%
print(pe.convergence(elbos[: len(elbos) * 2 // 3]))

# %% [markdown]
r"""
## One call

`pe.from_svi` draws from the guide and returns an `xarray.DataTree` with the groups that ArviZ
expects. Plates become dimensions with the plates' names; `coords` labels their elements.
"""

# %%
num_samples = 100 if SMOKE else 4000
tree = pe.from_svi(
    schools,
    guide,
    (y, sigma),
    num_samples=num_samples,
    coords={"school": list("ABCDEFGH")},
    constant_data={"sigma": sigma},
    dims={"sigma": ["school"]},
    elbo_trace=elbos,
)
for name, group in tree.children.items():
    variables = ", ".join(f"{v}{group[v].dims[2:] or ''}" for v in group.data_vars)
    print(f"{name:<21}{variables}")

# %% [markdown]
r"""
ArviZ 1 takes the tree as it is; ArviZ 0.23 needs its own class. There is one chain of independent
draws. Only the statistics in ArviZ's summary are meaningful here, therefore, and not R-hat and
effective sample sizes.
"""

# %%
data = az.from_datatree(tree) if IS_OLD else tree
print(az.summary(data, var_names=["mu", "tau", "theta"], kind="stats"))

# %% [markdown]
r"""
## Is q the posterior?

For each draw `sample_stats` contains $\log p(x, z)$, $\log q(z)$ and their difference, the
`log_weight`. The mean of the log weights is the ELBO, and they would not vary at all if $q$ were
the posterior. Pareto $\hat k$ summarises the tail of the weights in one number: below 0.7 the
weights can be used.
"""

# %%
log_weight = tree.sample_stats.log_weight.values[0]
_, khat = pe.pareto_smooth(log_weight)
print(f"ELBO {log_weight.mean():.2f} nats, sd of the log weights {log_weight.std():.2f}")
print(f"k-hat {khat:.2f}")

# %% [markdown]
r"""
Here they can be used. They therefore also give estimates of the errors in the means and standard
deviations of $q$; `pe.moments` computes these, with standard errors. Like `pe.check`, `pe.evidence`
and `pe.psis` it accepts models whose latents are global, as here; the whole data set is then one
row (`10_can_i_trust_it`).
"""

# %%
moments = pe.moments(schools, guide, (y, sigma), num_samples=num_samples)
print(moments)


# %%
def exact_tau():
    """The posterior's mean and sd of tau, and log p(y), on a grid of mu and log tau."""
    mu, log_tau = np.linspace(-35, 35, 701), np.linspace(-7, 6, 651)
    tau = np.exp(log_tau)[:, None]
    log_p = -0.5 * ((mu / 5) ** 2 + log_tau[:, None] ** 2) - math.log(5 * 2 * math.pi)
    for value, noise in zip(y.tolist(), sigma.tolist(), strict=True):
        variance = tau**2 + noise**2  # of y, given mu and tau
        log_p = log_p - 0.5 * ((value - mu) ** 2 / variance + np.log(2 * math.pi * variance))
    p = np.exp(log_p) * (mu[1] - mu[0]) * (log_tau[1] - log_tau[0])
    mean = (p * tau).sum() / p.sum()
    return mean, math.sqrt((p * tau**2).sum() / p.sum() - mean**2), math.log(p.sum())


mean, sd, log_p = exact_tau()
print(f"exact, by quadrature: tau has mean {mean:.3f} and sd {sd:.3f}; log p(y) = {log_p:.2f} nats")

# %% [markdown]
r"""
In $q$ the effects are right, but `tau` is too small and too narrow. The draws should therefore be
corrected, and with them everything that is computed from them. `corrected=True` resamples the draws
of $q$ in proportion to their smoothed weights, and warns if this does not help:
"""

# %%
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always", pe.CorrectionWarning)
    corrected = pe.from_svi(
        schools,
        guide,
        (y, sigma),
        num_samples=num_samples,
        coords={"school": list("ABCDEFGH")},
        corrected=True,
    )
for warning in said:
    print(f"({warning.message})\n")
data = az.from_datatree(corrected) if IS_OLD else corrected
print(az.summary(data, var_names=["mu", "tau", "theta"], kind="stats"))

# %% [markdown]
r"""
Because everything has a name, questions take little code. How do the estimates of the model differ
from the measurements? Every school is pulled towards the others, the uncertain ones most.
"""

# %%
theta = corrected.posterior.theta
low, high = theta.quantile([0.05, 0.95], ("chain", "draw"))
at = np.arange(8)
_, ax = plt.subplots(figsize=(7, 3.2))
ax.errorbar(at - 0.1, y, 1.645 * sigma, fmt="o", color="0.6", label="measured, 90%")
mean = theta.mean(("chain", "draw"))
ax.errorbar(at + 0.1, mean, [mean - low, high - mean], fmt="s", color="C0", label="theta, 90%")
ax.set_xticks(at, theta.school.values)
ax.set(xlabel="school", ylabel="effect (points of the test)")
ax.legend(ncols=2)
plt.show()

print("probability that school A has the largest effect")
size = {"q": num_samples, "corrected": float(moments.effective_sample_size)}
for name, one in {"q": tree, "corrected": corrected}.items():
    best = (one.posterior.theta.isel(chain=0).idxmax("school") == "A").mean().item()
    print(f"{name:<10}{best:.3f} ± {math.sqrt(best * (1 - best) / size[name]):.3f}")

# %% [markdown]
r"""
What if $\hat k$ is bad? The model can be written in another way, in which `theta` is drawn directly
rather than computed from `eta`. It is the same model, with the same $\log p(x)$, and the same
family of guides. But where `tau` is small, all `theta` must be close to `mu`, and where `tau` is
large they need not be: no normal distribution has this shape.
"""


# %%
def centred(y, sigma):
    """The same model, with the effects drawn as they are."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


other = AutoMultivariateNormal(centred, init_scale=0.1)
fit(centred, other, y, sigma, steps=2100)
other_tree = pe.from_svi(centred, other, (y, sigma), num_samples=num_samples)

print(f"{'program':<10}{'ELBO':>8}{'log p(x)':>10}{'k-hat':>7}   (nats)")
for name, one in {"schools": tree, "centred": other_tree}.items():
    log_weight = one.sample_stats.log_weight.values[0]
    _, khat = pe.pareto_smooth(log_weight)
    log_p = np.logaddexp.reduce(log_weight) - math.log(num_samples)
    print(f"{name:<10}{log_weight.mean():>8.2f}{log_p:>10.2f}{khat:>7.2f}")

# %% [markdown]
r"""
Where $\hat k$ is bad, neither the weighted estimate of $\log p(x)$ nor a mean corrected by the
weights can be trusted:
"""

# %%
print(f"{'program':<10}{'by q':>8}{'corrected':>11}   (mean of tau, points)")
for name, one in {"schools": tree, "centred": other_tree}.items():
    weights = np.exp(pe.pareto_smooth(one.sample_stats.log_weight.values[0])[0])
    tau = one.posterior.tau.values[0]
    print(f"{name:<10}{tau.mean():>8.2f}{np.sum(weights * tau):>11.2f}")

# %% [markdown]
r"""
A trap in Pyro: AutoGuides keep their parameters in one store, under names that do not differ
between guides. A second fit therefore overwrites the parameters of the first guide of the same
class. Compute the reports on the first guide before that, as was done here, or call
`pyro.settings.set(module_local_params=True)` before the guides are made.

## Predictive checks

A posterior may be exact although the model is wrong. What would data from the model look like? For
this question and for cross-validation we use a model with global latents only, for the number of
people who rent a bicycle on a day of a given temperature. The data are simulated, and the counts
vary more than we shall assume at first.
"""

# %%
pyro.set_rng_seed(1)
num_days = 120
temperature = torch.rand(num_days) * 25.0  # degrees Celsius
expected = (2.0 + 0.09 * temperature).exp()
counts = dist.GammaPoisson(4.0, 4.0 / expected).sample()


def poisson(temperature, counts):
    """Counts that vary as those of independent people."""
    intercept = pyro.sample("intercept", dist.Normal(3.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 0.2))
    with pyro.plate("day", len(temperature)):
        expected = (intercept + slope * (temperature - 12.5)).exp()
        pyro.sample("count", dist.Poisson(expected), obs=counts)


def gamma_poisson(temperature, counts):
    """Counts that vary more: days differ in something that nobody has measured."""
    intercept = pyro.sample("intercept", dist.Normal(3.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 0.2))
    shape = pyro.sample("shape", dist.LogNormal(1.0, 1.0))
    with pyro.plate("day", len(temperature)):
        expected = (intercept + slope * (temperature - 12.5)).exp()
        pyro.sample("count", dist.GammaPoisson(shape, shape / expected), obs=counts)


def fitted(model, *data):
    """The tree of a model and its AutoMultivariateNormal."""
    guide = AutoMultivariateNormal(model, init_scale=0.05)
    fit(model, guide, *data)
    return pe.from_svi(model, guide, data, num_samples=num_samples)


trees = {model.__name__: fitted(model, temperature, counts) for model in (poisson, gamma_poisson)}
for name, one in trees.items():
    print(name)
    print(az.summary(az.from_datatree(one) if IS_OLD else one, kind="stats"), end="\n\n")

# %% [markdown]
r"""
Both find the same slope, but the intercept of the first model has less than half the standard
deviation. Which model should be believed? `posterior_predictive` contains data simulated from the
model at draws of the posterior. The figure shows the observed counts and the band in which each
model expects 90% of them:
"""

# %% tags=["figure"]
_, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
order = temperature.argsort().numpy()
for ax, (name, one) in zip(axes, trees.items(), strict=True):
    made = one.posterior_predictive["count"]
    low, high = made.quantile([0.05, 0.95], ("chain", "draw")).values[:, order]
    ax.fill_between(temperature[order], low, high, alpha=0.3, linewidth=0, label="90% predicted")
    ax.scatter(temperature, counts, s=10, color="0.15", label="observed")
    ax.set(title=name, xlabel="temperature (degrees Celsius)", ylabel="rentals per day")
    ax.legend(loc="upper left")
    made = made.values.reshape(-1, num_days)
    low, high = np.quantile(made, [0.05, 0.95], axis=0)
    inside = ((low <= counts.numpy()) & (counts.numpy() <= high)).mean()
    print(f"{name:<14}{inside:.0%} of the days are in their band of 90%")
plt.show()

# %% [markdown]
r"""
Most informative is a statistic to which the model has not been fitted: here the variance of the
counts divided by their mean. What share of the data sets simulated from the model has a ratio at
least as large as ours?
"""

# %%
_, axes = plt.subplots(1, 2, figsize=(9, 3), sharex=True, sharey=True)
for ax, (name, one) in zip(axes, trees.items(), strict=True):
    made = one.posterior_predictive["count"]
    dispersion = (made.var("day") / made.mean("day")).values.ravel()
    ours = (counts.var(correction=0) / counts.mean()).item()
    ax.hist(dispersion, 40, color="C0", alpha=0.6, label="data of the model")
    ax.axvline(ours, color="0.15", label="our data")
    ax.set(title=name, xlabel="variance / mean of the counts", ylabel="data sets drawn")
    ax.legend(fontsize=8)
    print(f"{name:<14}{(dispersion >= ours).mean():.3f} of its data sets have one as large")
plt.show()

# %% [markdown]
r"""
ArviZ plots such checks from the tree as well. For counts a distribution function is better than a
smoothed density:
"""

# %%
for name, one in trees.items():
    if IS_OLD:
        options = {"kind": "cumulative", "num_pp_samples": 50, "random_seed": 0, "figsize": (7, 3)}
        az.plot_ppc(az.from_datatree(one), textsize=10, **options)
    else:
        az.plot_ppc_dist(one, kind="ecdf", num_samples=50)
    plt.gca().set(title=name, xlim=(0, 150), xlabel="rentals per day", ylabel="share of days")
    plt.show()

# %% [markdown]
r"""
## Cross-validation

How well does a model predict a day that was not in its data? Leave-one-out cross-validation needs
no second fit: the draws are reweighted as if the day had not been observed. `pe.loo` corrects at
the same time for the difference between $q$ and the posterior, which `az.loo` alone does not.
"""

# %%
loo = {name: pe.loo(one) for name, one in trees.items()}
for name, result in loo.items():
    print(f"{name}\n{result}\n")

gain = loo["gamma_poisson"].pointwise - loo["poisson"].pointwise
error = gain.std() * math.sqrt(num_days)
print(f"gamma_poisson predicts better by {gain.sum():.0f} ± {error:.0f} nats")

# %% [markdown]
r"""
The effective number of parameters should be about the number of latents. The first model has two
latents, but many more effective parameters: its posterior is so narrow that each unusual day has a
strong influence.

Each day has its own $\hat k$. If it is above 0.7, leaving out the day would have changed the
posterior so much that the draws given all days cannot be reweighted to it.
"""

# %%
_, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for ax, (name, result) in zip(axes, loo.items(), strict=True):
    ax.scatter(counts, result.khat, s=10, color=np.where(result.khat < 0.7, "C0", "C3"))
    ax.axhline(0.7, color="0.3", linewidth=1)
    ax.set(title=name, xlabel="rentals of the day left out", ylabel=r"Pareto $\hat k$")
plt.show()

# %% [markdown]
r"""
Are these estimates right? We actually leave out some days and refit: the day with the largest $\hat
k$, and two others. The new fits give the log densities of these days:
"""

# %%
khat, pointwise = loo["poisson"].khat, loo["poisson"].pointwise
days = [int(khat.argmax()), *range(0 if SMOKE else 2)]
print(f"{'day':>4}{'k-hat':>8}{'pe.loo':>10}{'refitted':>15}   (nats)")
for day in days:
    rest = torch.arange(num_days) != day
    again = fitted(poisson, temperature[rest], counts[rest])
    draws, (log_weights, _) = again.posterior, pe.pareto_smooth(again.sample_stats.log_weight[0])
    log_rate = draws["intercept"] + draws["slope"] * (temperature[day].item() - 12.5)
    log_p = dist.Poisson(torch.tensor(log_rate.values).exp()).log_prob(counts[day])
    log_mean = np.logaddexp.reduce(log_p[0].numpy() + log_weights)
    print(f"{day:>4}{khat[day]:>8.2f}{pointwise[day]:>10.3f}{log_mean:>15.3f}")

# %% [markdown]
r"""
Local latents are no obstacle if the guide has separate parameters for each of them, as AutoGuides
have: without its datum a school's effect has the distribution given by `mu` and `tau`, and the
weights take this into account. An amortised guide computes the posterior of a datum from the datum
itself, and without the datum its posterior would be another one. `pe.loo` therefore refuses
amortised guides, and data have to be held out instead. Here is the result for the eight schools:
"""

# %%
print(pe.loo(tree))

# %% [markdown]
r"""
## A latent for each datum

If each datum has its own latent, each has its own posterior, which may be good or bad.
Probabilistic PCA is a model of this kind whose posterior is known, and `ppca.Diagonal.optimum` is
the best guide with independent latents.
"""

# %%
linear = PPCA(num_latents=2, num_features=3)
with torch.no_grad():
    linear.W.copy_(torch.tensor([[1.2, 1.0], [1.0, 1.1], [0.6, 0.3]]))
    linear.log_sigma.fill_(-1.0)
    x = linear(num=100)
guides = {"exact": ppca.Exact(linear), "independent": ppca.Diagonal.optimum(linear)}

wide = pe.from_svi(linear, guides["exact"], (x,), dims={"z": ["latent"], "x": ["feature"]})
print("dims of z:", wide.posterior.z.dims)
print("dims of x:", wide.posterior_predictive.x.dims)

# %% [markdown]
r"""
`pe.psis` computes $\hat k$ for each datum. `pe.calibration` checks whether $q$ has the right
spread: it simulates latents and data from the model, and finds the ranks of the true latents among
the draws of $q$. For an exact posterior these ranks are uniform.
"""

# %%
calibrations = {}
for name, guide in guides.items():
    psis = pe.psis(linear, guide, x, num_samples=num_samples)
    calibrations[name] = pe.calibration(linear, guide, lambda: linear(num=100 if SMOKE else 500))
    print(f"{name}: largest k-hat {psis.khat.max():.2f}")
    print(calibrations[name], end="\n\n")

# %%
_, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True)
for ax, (name, result) in zip(axes, calibrations.items(), strict=True):
    pe.plot_calibration(result, ax=ax)
    ax.get_legend().remove()
    ax.set_title(name)
axes[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
axes[1].set_ylabel("")
plt.show()

# %% [markdown]
r"""
For the exact posterior the lines stay in the band. The posterior with independent latents is too
narrow: the true latents are too often smaller, or larger, than all draws. So the lines for `z` jump
up at the left end, fall through the middle, and jump up again at the right end. Both results have
`to_xarray()`.

## To a file, and back

The tree can be saved as a netCDF file, which can be read with `xarray` alone.
"""

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "schools.nc"
    tree.to_netcdf(file, engine="h5netcdf")
    with xarray.open_datatree(file, engine="h5netcdf") as opened:
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, groups {len(opened.children)}")
        print("the same as before:", opened.identical(tree))
        print(
            "made by", opened.attrs["creation_library"], "from", opened.attrs["inference_library"]
        )

# %% [markdown]
r"""
## What to take with you

| question | answered by |
|---|---|
| has training converged? | `pe.convergence` |
| tables and plots of the posterior | `pe.from_svi`, then ArviZ |
| is $q$ the posterior? | `sample_stats.log_weight`, `pe.pareto_smooth` |
| which means and sds are wrong? | `pe.moments`, then `pe.from_svi(..., corrected=True)` |
| does the model simulate such data? | `posterior_predictive` |
| which model predicts better? | `pe.loo` |
| for which data is $q$ good? | `pe.psis`; `pe.calibration` |
"""
