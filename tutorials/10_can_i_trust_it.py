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
notebook takes two models with *global* latents, which all data share, from the fit to a verdict, to
what is wrong, and to draws that are corrected. The numbers here are of the whole data set, in nats.
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
errors `sigma` (Rubin 1981). How much does the effect differ from school to school? That is `tau`.
The guide is Pyro's default, a normal distribution for each latent by itself.
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
The verdict rests on two questions. Do the importance weights $p(x, z) / q(z)$ have tails that allow
to use them? Pareto $\hat k$ answers that, and no more: a guide that is much too wide has a small
$\hat k$, too. If they can be used, they say how far $q$ is off:
"""

# %%
moments = pe.moments(schools, guide, (y, sigma), num_samples=1000 if SMOKE else 4000)
print(moments)

# %% [markdown]
r"""
The means and standard deviations of most latents are right, those of `tau` are not. Here we can
look at the truth: given `mu` and `tau` everything is normal, so that a grid over these two has the
exact posterior of `tau`.
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
summaries, figures and predictions are those of the posterior. It works where the weights do; where
they do not, a `CorrectionWarning` says so.
"""

# %%
results = az.from_datatree(corrected) if IS_OLD else corrected
az.summary(results, var_names=["mu", "tau"], kind="stats")

# %% [markdown]
r"""
## Many latents, and minibatches

Counts $y_n$ with covariates $X_n$ differ by more than a Poisson distribution allows. So each has a
latent $z_n$ of its own, and all of them share the coefficients `beta` and the scale `tau`:

$$\beta \sim N(0, 1), \quad \tau \sim \text{HalfNormal}(1), \quad z_n \sim N(0, \tau), \quad
y_n \sim \text{Poisson}(e^{X_n \beta + z_n}).$$

The guide computes $q(z_n \mid x_n, \beta, \tau)$ by a small net, and is trained on minibatches: the
plate is told how many data there are, and scales what it has seen.
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
Reports are of all data, so the guide is called with all of them, and nothing is scaled. The weights
of all latents together are useless, for their variance grows with $N$, however good $q$ is. That
is why `check` asks by level: are the weights of the global latents good, with each $z_n$ integrated
out by weights of its own? And those of each $z_n$, given the global ones?
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
The effective sample size of the joint weights is small, by level it is not. Where weights hardly
differ, as those of most $z_n$ here, the tail of their differences is of no weight, whatever its
$\hat k$: `is_usable` counts that.
"""

# %%
figure, ax = plt.subplots(figsize=(6, 3))
sizes = {level: psis.effective_sample_size / psis.num_samples for level, psis in levels.items()}
ax.hist(sizes["local"].numpy(), np.linspace(0, 1, 41), color="C0", label="of each datum")
for level, color in (("joint", "C3"), ("global", "C1")):
    ax.axvline(float(sizes[level]), color=color, label=level)
ax.set(xlim=(0, 1.01), xlabel="effective sample size / draws", ylabel="data")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
r"""
And the means and standard deviations of the global latents, by weights in which the local ones are
integrated out:
"""

# %%
print(pe.moments(regression, guide, data, level="global", **draws))

# %% [markdown]
r"""
`pe.evidence(..., level="global")` is $\log p(x)$ by the same weights, with an error that is small
where that of the joint weights is not:
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
Draws are corrected in the same way: those of the global latents by these weights, and each $z_n$ by
its own given them. Where the weighted draws do not reach as far as the posterior does, a warning
says so.
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

- $\hat k$ above 0.7: the guide misses what matters. Train it longer, or take a richer family
  (`AutoMultivariateNormal`, a flow); `pe.inference_gap` shows which of the two would help.
- $\hat k$ small, but means or standard deviations off: take `corrected=True`.
- $\log p(x)$ uncertain: `proposal="mixture"`, more draws, or `method="annealed"`.
- And nothing here sees what no draw of $q$ has found, as a second mode: look at the model, too.
"""
