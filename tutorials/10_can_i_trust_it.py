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
# Can I trust it?

You have a Pyro model of your own, and SVI has fitted a guide to it. Is $q$ the posterior? This
notebook takes two models with *global* latents, which all data share, and goes from the fit to a
verdict, to the errors of $q$, and to corrected draws. The numbers refer to the whole data set, in
nats.
"""

# %%
import math
import os
import warnings

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyproelbo as pe

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
IS_OLD = int(az.__version__.split(".")[0]) < 1
pyro.set_rng_seed(0)


def fitted(model, guide, batches, steps, lr=0.02):
    """The guide, trained with a learning rate that falls to a hundredth."""
    steps, lr = (steps // 4, 3 * lr) if SMOKE else (steps, lr)
    optimiser = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(model, guide, optimiser, loss=pe.BetaELBO(num_particles=4, vectorize_particles=True))
    for _ in range(steps):
        svi.step(*next(batches))
    return guide


def always(*args):
    """The same arguments in each step."""
    while True:
        yield args


# %% [markdown]
r"""
## Eight schools

In eight schools a coaching programme has raised the scores of a test by `y` points, with standard
errors `sigma` (Rubin 1981). How much does the effect differ from school to school? The answer is
`tau`. The guide is Pyro's default, an independent normal distribution for each latent.
"""

# %%
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y, sigma):
    """The effects are mu + tau effect."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


guide = fitted(schools, AutoNormal(schools), always(y, sigma), steps=4000)
check = pe.check(schools, guide, (y, sigma), num_samples=1000 if SMOKE else 2000)
for finding in check.findings:
    print(f"{finding.verdict}: {finding.text}")

# %% [markdown]
r"""
The verdict rests on two questions. Are the tails of the importance weights $p(x, z) / q(z)$ light
enough for the weights to be used? Pareto $\hat k$ answers this question, and no other: a guide that
is much too wide also has a small $\hat k$. And, if the weights can be used, how far off is $q$ by
their estimate?
"""

# %%
moments = pe.moments(schools, guide, (y, sigma), num_samples=1000 if SMOKE else 4000)
print(moments)

# %% [markdown]
r"""
The means and standard deviations of most latents are right; those of `tau` are not. Here we can
compare with the truth: given `mu` and `tau` everything is normal, so that the exact posterior of
`tau` can be computed on a grid over these two.
"""


# %%
def exact_tau(y, sigma):
    """The posterior of tau on a grid of log tau, and its density."""
    mu, log_tau = np.linspace(-30, 30, 401), np.linspace(math.log(1e-3), math.log(200), 600)
    tau = np.exp(log_tau)[:, None, None]
    scale = np.sqrt(tau**2 + sigma.numpy() ** 2)
    log_p = -0.5 * ((y.numpy() - mu[:, None]) / scale) ** 2 - np.log(scale)
    log_p = log_p.sum(-1) - 0.5 * (mu / 5) ** 2
    weight = np.exp(log_p).sum(1) / (1 + (np.exp(log_tau) / 5) ** 2)
    density = weight / np.trapezoid(weight, np.exp(log_tau))
    return np.exp(log_tau), density


grid, density = exact_tau(y, sigma)
options = {"num_samples": 2000 if SMOKE else 4000, "coords": {"school": list("ABCDEFGH")}}
tree = pe.from_svi(schools, guide, (y, sigma), **options)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always", pe.CorrectionWarning)
    corrected = pe.from_svi(schools, guide, (y, sigma), corrected=True, **options)
for warning in said:
    print(f"({warning.message})\n")
means = {
    "q": float(tree["posterior"]["tau"].mean()),
    "corrected": float(corrected["posterior"]["tau"].mean()),
    "exact": float(np.trapezoid(grid * density, grid)),
}
for name, mean in means.items():
    print(f"E[tau] {name:10s} {mean:.2f}")

# %% tags=["figure"]
figure, ax = plt.subplots(figsize=(6, 3))
bins = np.linspace(0, 15, 40)
for name, of, color in (("q", tree, "C0"), ("corrected", corrected, "C1")):
    values = of["posterior"]["tau"].values.ravel()
    ax.hist(values, bins, density=True, histtype="step", color=color, linewidth=1.6, label=name)
ax.plot(grid, density, color="0.2", linestyle="dashed", label="exact")
ax.set(xlim=(0, 15), xlabel=r"$\tau$ (points)", ylabel="density")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
plt.show()

# %% [markdown]
r"""
`corrected=True` resamples the draws of $q$ in proportion to their smoothed weights, so that
summaries, figures and predictions describe the posterior. This works if the weights can be used; if
not, there is a `CorrectionWarning`. Here the mean of `tau` is close to the exact one, but the
warning is printed above: the draws of $q$ do not reach far enough into the tail.
"""

# %%
results = az.from_datatree(corrected) if IS_OLD else corrected
az.summary(results, var_names=["mu", "tau"], kind="stats")

# %% [markdown]
r"""
## Many latents, and minibatches

Counts $y_n$ with covariates $X_n$ vary more than a Poisson distribution allows. So each count has
its own latent $z_n$, and all of them share the coefficients `beta` and the scale `tau`:

$$\beta \sim N(0, 1), \quad \tau \sim \text{HalfNormal}(1), \quad z_n \sim N(0, \tau), \quad
y_n \sim \text{Poisson}(e^{X_n \beta + z_n}).$$

The guide computes $q(z_n \mid X_n, y_n, \beta, \tau)$ with a small network, and is trained on
minibatches. The plate receives the number of all data, and scales the terms of a minibatch
accordingly.
"""

# %%
N = 60 if SMOKE else 400
X = torch.cat([torch.ones(N, 1), torch.randn(N, 2)], 1)
counts = dist.Poisson((X @ torch.tensor([1.0, 0.5, -0.3]) + 0.6 * torch.randn(N)).exp()).sample()


def regression(X, y, size=None):
    """Counts with a latent each; of size data some are here."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    rows = torch.arange(len(X))
    with pyro.plate("data", len(X) if size is None else size, subsample=rows):
        z = pyro.sample("z", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Poisson(((X * beta).sum(-1) + z).exp()), obs=y)


class Guide(nn.Module):
    """Normal for beta and log tau, and a net for each z given these."""

    def __init__(self):
        super().__init__()
        self.loc, self.raw = nn.Parameter(torch.zeros(4)), nn.Parameter(-2 * torch.eye(4))
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, X, y, size=None):
        pyro.module("guide", self)
        scale = self.raw.tril(-1) + torch.diag_embed(self.raw.diagonal().exp())
        both = pyro.sample(
            "both",
            dist.MultivariateNormal(self.loc, scale_tril=scale),
            infer={"is_auxiliary": True},
        )
        beta = pyro.sample("beta", dist.Delta(both[..., :3]).to_event(1))
        tau = both[..., 3].exp()
        pyro.sample("tau", dist.Delta(tau, log_density=-both[..., 3]))
        rows = torch.arange(len(X))
        with pyro.plate("data", len(X) if size is None else size, subsample=rows):
            mean, seen = (X * beta).sum(-1), (y + 0.5).log()
            shape = torch.broadcast_shapes(mean.shape, seen.shape, tau.shape)
            parts = (mean, seen, tau.log(), seen - mean)
            loc, raw = self.net(torch.stack([p.expand(shape) for p in parts], -1)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, raw.exp()))


def minibatches(size):
    """Random rows, and how many data there are."""
    while True:
        rows = torch.randperm(N)[:size]
        yield X[rows], counts[rows], N


guide = fitted(regression, Guide(), minibatches(50), steps=4000, lr=0.01)

# %% [markdown]
r"""
Reports cover all data, so the guide is called with all of them, and nothing is scaled. The joint
weights of all latents are of little use, because their variance grows with $N$, however good $q$
is. This is why `check` works level by level. Are the weights of the global latents good, when each
$z_n$ is integrated out by its own weights? And are the weights of each $z_n$ good, given the global
latents?
"""

# %%
data = (X, counts)
draws = {"num_samples": 50 if SMOKE else 500, "num_nested": 5 if SMOKE else 20}
levels = {}
for level in ("joint", "global", "local"):
    levels[level] = psis = pe.psis(regression, guide, data, level=level, **draws)
    ess = float(psis.effective_sample_size.median())
    print(
        f"{level:7s} effective sample size {ess:4.0f} of {psis.num_samples}, can be used: "
        f"{float(psis.is_usable.double().mean()):.0%}"
    )

# %% [markdown]
r"""
The effective sample size of the joint weights is small; level by level it is not. Where weights
hardly differ, as for most $z_n$ here, the tail of their differences has no influence, whatever its
$\hat k$: `is_usable` takes this into account.
"""

# %%
figure, ax = plt.subplots(figsize=(6, 3))
sizes = {level: psis.effective_sample_size / psis.num_samples for level, psis in levels.items()}
ax.hist(sizes["local"].numpy(), np.linspace(0, 1, 41), color="C0", label="local, of each datum")
for level, color in (("joint", "C1"), ("global", "C2")):
    ax.axvline(float(sizes[level]), color=color, label=level)
ax.set(xlim=(0, 1.01), xlabel="effective sample size / draws", ylabel="data")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
r"""
Here are the means and standard deviations of the global latents, from weights in which the local
latents are integrated out:
"""

# %%
print(pe.moments(regression, guide, data, level="global", **draws))

# %% [markdown]
r"""
`pe.evidence(..., level="global")` estimates $\log p(x)$ from the same weights, with a much smaller
standard error than the joint weights have:
"""

# %%
for level in ("joint", "global"):
    found = pe.evidence(regression, guide, data, level=level, **draws)
    print(
        f"{level:8s} log p(x) = {found.log_evidence.item():.2f} ± {found.stderr.item():.2f}"
        f"{', uncertain' * bool(found.is_uncertain)}"
    )

# %% [markdown]
r"""
Draws are corrected in the same way: the global latents by these weights, and each $z_n$ by its own
weights given the global latents. If the weighted draws do not reach as far as the posterior does,
there is a warning.
"""

# %%
options = {"num_samples": 50 if SMOKE else 2000, "groups": ["posterior"]}
for label, corrected in (("q", False), ("corrected", True)):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", pe.CorrectionWarning)
        posterior = pe.from_svi(regression, guide, data, corrected=corrected, **options)[
            "posterior"
        ]
    for warning in said:
        print(f"({warning.message})")
    tau, z = posterior["tau"], posterior["z"].std("draw").mean()
    print(f"{label:10s} tau {float(tau.mean()):.3f}, sd {float(tau.std()):.3f}; sd of z {z:.3f}")

# %% [markdown]
r"""
## What to do about it

- $\hat k$ above 0.7: the guide misses important parts of the posterior. Train it longer, or use a
  richer family (`AutoMultivariateNormal`, a flow); `pe.inference_gap` shows which of the two would
  help.
- $\hat k$ small, but means or standard deviations wrong: use `corrected=True`.
- $\log p(x)$ uncertain: `proposal="mixture"`, more draws, or `method="annealed"`.
- None of these diagnostics detects what no draw of $q$ has found, such as a second mode. Examine
  the model as well.
"""
