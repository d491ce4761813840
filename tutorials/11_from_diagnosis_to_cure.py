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
# From diagnosis to cure

`pe.check` reports that something is wrong with a posterior. What then? This notebook goes through
the cures: a fit that ends by itself, standard deviations that a mean-field guide cannot have, a
gradient whose noise has a name, and a posterior that is repaired datum by datum. It ends with what
no cure can do.
"""

# %%
import math
import os
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyproelbo as pe
from pyproelbo.datasets import digits
from pyproelbo.guides import vae
from pyproelbo.models.vae import VAE, BernoulliLikelihood

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
pyro.set_rng_seed(0)

# %% [markdown]
r"""
## A fit without a learning rate

A linear regression whose two covariates say nearly the same: their correlation is 0.97. All is
normal, so the posterior is known exactly, and that makes it a good place to see what a cure does.
The guide is Pyro's `AutoNormal`, a normal distribution for each latent by itself.
"""

# %%
N = 100
shared = torch.randn(N, 1)
X = torch.cat([torch.ones(N, 1), shared + 0.17 * torch.randn(N, 2)], 1)
y = X @ torch.tensor([0.5, 1.0, -0.5]) + torch.randn(N)


def regression(X, y=None):
    """Normal coefficients, and noise of sd 1; without y it simulates."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(X)):
        return pyro.sample("y", dist.Normal((X * beta).sum(-1), 1.0), obs=y)


precision = torch.eye(3) + X.mT @ X
exact = dist.MultivariateNormal(torch.linalg.solve(precision, X.mT @ y), precision_matrix=precision)
prior_and_noise = dist.MultivariateNormal(torch.zeros(N), torch.eye(N) + X @ X.mT)
print(f"log p(y) = {prior_and_noise.log_prob(y).item():.3f} nats")

# %% [markdown]
r"""
`pe.fit` needs neither a learning rate nor a number of steps. Here the parameters are few and the
latents are continuous, so it fixes the noise of the draws, which makes the ELBO an ordinary smooth
function, and maximises that by L-BFGS; the number of draws is raised until the optimum lacks less
than `tolerance` nats. Elsewhere it takes stochastic steps, finds their learning rate, lowers it,
and ends where that gains no more.
"""

# %%
guide = AutoNormal(regression)
fit = pe.fit(regression, guide, (X, y))
print(fit)

# %% [markdown]
r"""
The method can be chosen: `method=pe.FixedDraws()` or `method=pe.Stochastic()`,
with their options. `fit.history` has the ELBO of each step. Where latents are few, scrambled Sobol
points are better than independent draws (`pe.Sobol`): here they give the ELBO of the same guide
with a smaller error.
"""

# %%
methods = [pe.FixedDraws(), pe.FixedDraws(draws="sobol"), pe.Stochastic()]
for method in methods[:2] if SMOKE else methods:
    pyro.clear_param_store()
    again = pe.fit(regression, AutoNormal(regression), (X, y), method=method)
    print(f"{again.elbo:.3f} ± {again.elbo_stderr:.3f} nats in {again.num_steps} steps: {method}")

pyro.clear_param_store()
guide = AutoNormal(regression)
history = pe.fit(regression, guide, (X, y)).history
print(f"\nfrom {history.elbo[0]:.1f} nats at the first step to {history.elbo[-1]:.1f} at the last")
for draws in ("independent", pe.Sobol()):
    found = pe.evidence(regression, guide, (X, y), num_samples=1024, draws=draws)
    elbo, error = found.elbo.item(), found.elbo_stderr.item()
    print(f"ELBO {elbo:.4f} ± {error:.4f} nats by 1,024 draws: {draws}")

# %% [markdown]
r"""
A hand-written loop has to be tuned. Here is the same guide, fitted by Pyro's SVI and Adam for 2,000
steps at each of three constant learning rates:
"""

# %%
figure, ax = plt.subplots(figsize=(6, 3))
for i, lr in enumerate((0.001, 0.01, 0.1)):
    pyro.clear_param_store()
    other, begin, trace = AutoNormal(regression), time.monotonic(), []
    svi = SVI(regression, other, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
    for _ in range(50 if SMOKE else 2000):
        trace.append(-svi.step(X, y))
    found = pe.evidence(regression, other, (X, y), num_samples=10_000)
    print(f"Adam at {lr:<5g}  ELBO {found.elbo.item():9.3f} ± {found.elbo_stderr.item():.3f}")
    smooth = np.convolve(trace, np.ones(20) / 20, "valid")
    ax.plot(np.arange(len(smooth)) + 20, smooth, color=f"C{i}", linewidth=1, label=f"Adam, {lr:g}")
ax.axhline(fit.elbo, color="0.2", linestyle="dashed", label=f"pe.fit, {fit.num_steps} gradients")
ax.set(xscale="log", xlabel="step", ylabel="ELBO (nats)", ylim=(fit.elbo - 40, fit.elbo + 10))
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
plt.show()

# %% [markdown]
r"""
## Standard deviations that are honest

The fit is at its optimum, but is it the posterior?
"""

# %%
pyro.clear_param_store()
guide = AutoNormal(regression)
pe.fit(regression, guide, (X, y))
check = pe.check(regression, guide, (X, y))
for finding in check.findings:
    print(f"{finding.verdict}: {finding.text}")

gap = prior_and_noise.log_prob(y).item() - fit.elbo
print(f"\nthe gap of the ELBO to the exact log p(y): {gap:.2f} nats")

# %% [markdown]
r"""
It is not: independent normal distributions have to fit into a narrow ridge. (Where $\hat k$ is bad,
the gap that the weights find is too small, too: compare the last two lines.) Is it so for these
data only? `pe.calibration` simulates coefficients and data from the model, fits the guide to each
simulation (`pe.Refit`), and looks for the true coefficients among its draws:
"""


# %%
def refitted(X, y):
    """The guide, fitted to other data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pe.NotConvergedWarning)
        pe.fit(regression, guide, (X, y), progress=False)


refit = pe.Refit(num=2 if SMOKE else 30, fit=refitted)
print(pe.calibration(regression, guide, lambda: (X, regression(X)), refit=refit, num_samples=99))

# %% [markdown]
r"""
So it is the family, with any data: no training mends that. But the guide's *means* are right, and
the way they move when the model is changed a little determines the covariances: that is *linear
response* (Giordano, Broderick & Jordan 2018). With $H$ the Hessian of the ELBO in the guide's
parameters $\eta$ at the optimum, and $g(\eta) = E_q[z]$,

$$\widehat{\mathrm{Cov}}(z) = \frac{\partial g}{\partial \eta}\, (-H)^{-1}\,
\frac{\partial g}{\partial \eta}^\top .$$
"""

# %%
response = pe.linear_response(regression, guide, (X, y), num_samples=200)
print(response)
print()
print("exact sds:", np.round(exact.covariance_matrix.diagonal().sqrt().numpy(), 4))

# %% [markdown]
r"""
The correlation comes with it. Here are draws of $q$, and the ellipses that hold 95% of the
posterior: the exact one and that of linear response are the same.
"""


# %% tags=["figure"]
def ellipse(mean, covariance):
    """Around 95% of a normal distribution in the plane."""
    angle = torch.linspace(0, 2 * math.pi, 200, dtype=mean.dtype)
    circle = torch.stack([angle.cos(), angle.sin()]) * math.sqrt(2 * math.log(20))
    return mean[:, None] + torch.linalg.cholesky(covariance) @ circle


figure, ax = plt.subplots(figsize=(5, 3.4))
tree = pe.from_svi(regression, guide, (X, y), num_samples=500, groups=["posterior"], seed=1)
beta = tree["posterior"]["beta"].values[0]
ax.plot(beta[:, 1], beta[:, 2], ".", markersize=3, color="C0", alpha=0.6, label="draws of q")
ax.plot(*ellipse(exact.mean[1:], exact.covariance_matrix[1:, 1:]), color="0.7", linewidth=4)
ax.lines[-1].set_label("exact")
ax.plot(
    *ellipse(response.mean[1:], response.covariance[1:, 1:]),
    color="C1",
    linewidth=1.2,
    label="linear response",
)
ax.set(xlabel=r"$\beta_1$", ylabel=r"$\beta_2$")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
r"""
Linear response is exact where the posterior is normal, and an approximation elsewhere; `check(...,
linear_response=response)` then judges $q$ by it, and `from_svi(..., linear_response=response)`
keeps it beside the draws. Where the importance weights can be used, `from_svi(corrected=True)` is
the other way (see *Can I trust it?*).

The same derivative answers another question: which data does the result hang on? `pe.sensitivity`
moves the weight of each datum, and the parameters of a prior, if there are any. Here the answer is
known: the mean of $\beta$ moves by $\Sigma x_n (y_n - x_n^\top \mathbb E\beta)$, where $\Sigma$ is
the exact covariance.
"""

# %%
moved = pe.sensitivity(regression, guide, (X, y), num_samples=200)
print(moved)
known = (X * (y - X @ exact.mean)[:, None]) @ exact.covariance_matrix
print(f"\nlargest difference to the exact derivatives: {(moved.by_datum - known).abs().max():.0e}")

# %% [markdown]
r"""
## Too wide

A guide that is too narrow has heavy tailed weights, and $\hat k$ sees it. One that is too wide does
not: its weights are bounded. Here the standard deviations are twice those of the posterior:
"""


# %%
def wide(X, y):
    """The posterior with twice its standard deviations."""
    pyro.sample(
        "beta", dist.MultivariateNormal(exact.mean, covariance_matrix=4 * exact.covariance_matrix)
    )


psis = pe.psis(regression, wide, (X, y))
divergence = pe.fisher_divergence(regression, wide, (X, y))
print(f"k-hat {float(psis.khat):.2f}")
print(divergence)

# %% [markdown]
r"""
The Fisher divergence $E_q (\partial \log q - \partial \log p)^2$, times the variance of $q$, is 0
where $q$ is the posterior, and $(s^2/\sigma^2 - 1)^2 = 9$ where the standard deviation of a latent
that is correlated with no other is twice too large, as that of the intercept nearly is; a wide $q$
along a narrow ridge has more. It needs neither the evidence nor weights, and `check` looks at it,
too.

## A gradient whose noise has a name

Now a VAE of images of digits, binarised. With random steps the noise of the gradient decides how
long the training takes. Which term of the ELBO makes it, and which estimator would help?
"""

# %%
x = (digits().x > 0.5).float()
x = x[torch.randperm(len(x))]
num_held_out = 20 if SMOKE else 200
train, held_out = x[num_held_out:], x[:num_held_out]
model = VAE(10, 64, hidden=(64,), likelihood=BernoulliLikelihood())
encoder = vae.Diagonal(10, 64, hidden=(64,))
noise = pe.gradient_noise(model, encoder, train, batch_size=100, num_samples=20 if SMOKE else 100)
print(noise)

# %%
pe.plot_gradient_noise(noise, parameters="guide")
plt.show()

# %% [markdown]
r"""
A discrete latent has no gradient but that of the score function, whose noise is large. With two
draws or more in a step each can be the baseline of the others, and objectives do that by default
(`baselines="leave_one_out"`). A mixture of two normal distributions, with the component of each
datum drawn by the guide:
"""

# %%
pair = torch.cat([torch.randn(30) - 2, torch.randn(30) + 2])


def mixture(x):
    """Each datum is of one of two components."""
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5)).long()
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)


def components(x):
    """The probability that each is of the second."""
    logits = pyro.param("logits", torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Bernoulli(logits=logits))


pyro.clear_param_store()
draws = {"num_particles": 8, "vectorize_particles": True}
compared = {
    "without": pe.BetaELBO(**draws, baselines="none"),
    "leave-one-out": pe.BetaELBO(**draws),
}
found = pe.gradient_noise(mixture, components, pair, objective=compared)
total = found.to_xarray().noise.sel(parameters="guide", term="total")
for name in compared:
    print(f"noise of the gradient, {name:14s} {float(total.sel(estimator=name)):8.2f} nats²")

# %% [markdown]
r"""
## A fit that ends before it learns the data by heart

`pe.fit` with minibatches takes stochastic steps. An amortised guide and a decoder with many
parameters would go on to explain the training data better and better, and others worse. Given data
that are held out, parameters are compared by these:
"""

# %%
options = {"batch_size": 100, "tolerance": 2.0 if SMOKE else 0.05, "max_time": 10 if SMOKE else 240}
with warnings.catch_warnings():
    warnings.simplefilter("ignore", pe.NotConvergedWarning if SMOKE else pe.UnfinishedWarning)
    fit = pe.fit(model, encoder, train, held_out=held_out, **options)
print(fit)

# %% [markdown]
r"""
## Posteriors repaired datum by datum

Now the decoder stays, and the question is the posterior of each held-out image. Amortisation makes
the encoder good on average and bad for some:
"""

# %%
psis = pe.psis(model, encoder, held_out, num_samples=200 if SMOKE else 1000)
print(psis)

# %% [markdown]
r"""
`pe.repair` looks for the cheapest posterior that passes, for each datum by itself: the guide's
draws with their weights; the best member of the guide's family; a Gaussian with a full covariance;
a mixture of these, where there are several modes; annealed chains. Only data that have not passed
go on to the next one. Where global latents stand beside those of each datum, `level="both"` repairs
the latter given the former, and the former with the latter integrated out.
"""

# %%
quick = {"num_samples": 200, "steps": 50, "methods": ["family", "correlated"]}
repaired = pe.repair(model, encoder, held_out, **quick if SMOKE else {})
print(repaired)

# %% tags=["figure"]
figure, ax = plt.subplots(figsize=(5, 3.6))
before, after = repaired.khat_before.numpy(), repaired.khat_after.numpy()
for i, way in enumerate(("guide", "family", "correlated", "modes", "annealed", "failed")):
    of = repaired.method == way
    if of.any():
        ax.plot(before[of], after[of], ".", color=f"C{i}", label=f"{way} ({of.sum()})")
ax.axvline(0.7, color="0.6", linewidth=0.8)
ax.set(
    xlabel=r"$\hat k$ of the encoder's draws",
    ylabel=r"$\hat k$ of the repaired draws",
    ylim=(0, 0.75),
)
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
r"""
The draws are where other draws are: `repaired.draws["z"]`, and in ArviZ by

```python
pe.from_svi(model, encoder, held_out, repaired=repaired)
```

## An encoder whose posteriors improve themselves

Where all of them should be better, also those of data to come, the encoder can be followed by a few
natural-gradient steps on each datum's own ELBO. `pe.SemiAmortised` is a guide, so that what takes
one takes it:
"""

# %%
improved = pe.SemiAmortised(model, encoder, num_steps=5)
for name, guide in (("encoder", encoder), ("improved", improved)):
    weights = pe.evidence(model, guide, held_out, num_samples=100 if SMOKE else 1000)
    elbo, gap = weights.elbo.mean(), (weights.log_evidence - weights.elbo).mean()
    error = weights.elbo_stderr.square().sum().sqrt() / len(held_out)
    print(f"{name:<9}ELBO {elbo:.3f} ± {error:.3f}, {gap:.3f} nats per datum below log p(x)")

# %% [markdown]
r"""
Gradients go through the steps, so that model and encoder can be trained with them as well
(`SVI(model, improved, ...)`), at the cost of so many more gradients a step.

## A mode that is missed

Draws that never leave one mode have good weights, whatever other modes there are. A posterior with
two modes, of which the guide has found one:
"""


# %%
def square():
    """z has the sign that it likes."""
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(z**2, 0.5), obs=torch.tensor(9.0))


def one_mode():
    """The positive one."""
    pyro.sample("z", dist.Normal(3.0, 0.085))


print(f"k-hat {float(pe.psis(square, one_mode, None).khat):.2f}")
found = pe.repair(square, one_mode, None)
print(found)
z = found.draws["z"]
print(f"\nof the repaired draws {float((z < 0).double().mean()):.0%} are negative")

# %% [markdown]
r"""
Ascents of $\log p(x, z)$ from 16 draws of the prior come to both modes, so that the guide, which
has draws at one of them, does not pass; nor would the best member of its family. A mixture of
Gaussians, one at each mode, has both with their shares. (Its weights hardly vary, and then the tail
of their differences does not matter, whatever its $\hat k$.) Where the latents are few, draws of
the prior show a missed mode as well, by how large $\log p(x)$ is.

## What no cure can do

Both look where the prior is. A needle in it, to which no draw of the prior comes, and no ascent:
"""


# %%
def needle():
    """Half of the mass is at 3, within a thousandth."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    log_ratio = dist.Normal(3.0, 0.001).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    pyro.factor("needle", torch.logaddexp(torch.zeros(()), log_ratio))


def haystack():
    """The prior."""
    pyro.sample("z", dist.Normal(0.0, 1.0))


found = pe.repair(needle, haystack, None)
print(found)
z = found.draws["z"]
print(f"\nof the draws {float(((z - 3).abs() < 0.01).double().mean()):.1%} are in the needle")

# %% [markdown]
r"""
It passes, and no diagnostic reports what is missing: looking at the density here and there cannot
distinguish this program from one without the needle. With many latents most modes are as narrow.
`repair` can speak only for the modes that draws and ascents reach.

## Which cure?

- Not converged, or a learning rate to be guessed: `pe.fit`.
- Means right and standard deviations too small, in a guide of independent normals:
  `pe.linear_response`; or a richer guide.
- $\hat k$ small, moments off: `pe.from_svi(..., corrected=True)`.
- Training that crawls: `pe.gradient_noise`, and the estimator it names.
- The encoder bad for some data: `pe.repair`; for all: train it longer, or `pe.SemiAmortised`.
- $q$ too wide: the Fisher divergence sees it; train longer.
"""
