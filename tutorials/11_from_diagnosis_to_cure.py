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
the cures: a fit that stops by itself, standard deviations that a mean-field guide cannot provide, a
gradient whose noise is traced to its source, and posteriors that are repaired datum by datum. It
ends with a case that no cure can help.
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

The first example is a linear regression whose two covariates carry nearly the same information:
their correlation is 0.97. Everything is normal, so the posterior is known exactly, and we can see
precisely what a cure does. The guide is Pyro's `AutoNormal`, an independent normal distribution for
each latent.
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
function, and maximises this function by L-BFGS. It increases the number of draws until the loss
from using finitely many is below `tolerance` nats. For other programs it takes stochastic steps: it
finds a learning rate, lowers it, and stops when lowering it further gains nothing.
"""

# %%
guide = AutoNormal(regression)
fit = pe.fit(regression, guide, (X, y))
print(fit)

# %% [markdown]
r"""
The method can be chosen: `method=pe.FixedDraws()` or `method=pe.Stochastic()`, with their options.
`fit.history` contains the ELBO of each step. If there are few latents, scrambled Sobol points
(`pe.Sobol`) are better than independent draws: here they estimate the ELBO of the same guide with a
smaller standard error.
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
the weights also underestimate the gap: compare the last two lines.) Does this happen with these
data only? `pe.calibration` simulates coefficients and data from the model, fits the guide to each
simulation (`pe.Refit`), and finds the ranks of the true coefficients among the guide's draws:
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
So the family is at fault, whatever the data, and no amount of training helps. But the guide's
*means* are right, and the way in which they respond to small changes of the model determines the
covariances. This is *linear response* (Giordano, Broderick & Jordan 2018). With $H$ the Hessian of
the ELBO in the guide's parameters $\eta$ at the optimum, and $g(\eta) = E_q[z]$,

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
The covariance includes the correlation. The figure shows draws of $q$, and the ellipses that
contain 95% of the posterior: the exact ellipse and the one from linear response coincide.
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
Linear response is exact where the posterior is normal, and an approximation elsewhere. `check(...,
linear_response=response)` then judges $q$ against it, and `from_svi(..., linear_response=response)`
stores it with the draws. Where the importance weights can be used, `from_svi(corrected=True)` is
the alternative (see *Can I trust it?*).

The same derivative answers another question: on which data does the result depend most?
`pe.sensitivity` differentiates with respect to the weight of each datum, and to the parameters of a
prior, if there are any. Here the answer is known: per unit of weight the mean of $\beta$ moves by
$\Sigma x_n (y_n - x_n^\top \mathbb E\beta)$, where $\Sigma$ is the exact covariance.
"""

# %%
moved = pe.sensitivity(regression, guide, (X, y), num_samples=200)
print(moved)
known = (X * (y - X @ exact.mean)[:, None]) @ exact.covariance_matrix
print(f"\nlargest difference to the exact derivatives: {(moved.by_datum - known).abs().max():.0e}")

# %% [markdown]
r"""
## Too wide

A guide that is too narrow has heavy-tailed weights, which $\hat k$ detects. A guide that is too
wide has bounded weights, and $\hat k$ is small. Here the standard deviations are twice those of the
posterior:
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
if $q$ is the posterior. It is $(s^2/\sigma^2 - 1)^2 = 9$ if a latent that is uncorrelated with the
others has a standard deviation $s$ twice as large as the posterior's $\sigma$; the intercept is
nearly such a latent. For a wide $q$ along a narrow ridge it is larger. It needs neither the
evidence nor weights, and `check` uses it as well.

## A gradient whose noise has a name

The next example is a VAE for binarised images of digits. With stochastic steps the noise of the
gradient determines how long training takes. Which term of the ELBO causes the noise, and which
estimator would reduce it?
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
For a discrete latent the only gradient is that of the score function, whose noise is large. With
two or more draws per step, each draw can serve as a baseline for the others, and objectives use
this by default (`baselines="leave_one_out"`). The example is a mixture of two normal distributions;
the guide draws the component of each datum:
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
parameters would continue to explain the training data better, and new data worse. Given held-out
data, `pe.fit` keeps the parameters that explain these best:
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

Now the decoder stays fixed, and we ask for the posterior of each held-out image. The encoder, being
amortised, is good on average but bad for some images:
"""

# %%
psis = pe.psis(model, encoder, held_out, num_samples=200 if SMOKE else 1000)
print(psis)

# %% [markdown]
r"""
`pe.repair` finds, separately for each datum, the cheapest posterior that passes. It tries the
guide's draws with their weights; the best member of the guide's family; a Gaussian with a full
covariance; a mixture of Gaussians, if there are several modes; annealed chains. Only data that have
not passed are given to the next method. If a model has both global and local latents,
`level="both"` repairs the local latents given the global ones, and the global latents with the
local ones integrated out.
"""

# %%
quick = {"num_samples": 200, "steps": 50, "methods": ["family", "correlated"]}
repaired = pe.repair(model, encoder, held_out, **quick if SMOKE else {})
print(repaired)

# %% tags=["figure"]
repaired.plot()
plt.show()

# %% [markdown]
r"""
The draws are in `repaired.draws["z"]`, and ArviZ receives them by

```python
pe.from_svi(model, encoder, held_out, repaired=repaired)
```

## An encoder whose posteriors improve themselves

To improve all posteriors, including those of future data, the encoder can be followed by a few
natural-gradient steps on each datum's own ELBO. `pe.SemiAmortised` is itself a guide, and can be
used wherever a guide can:
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
Gradients pass through these steps, so that the model and the encoder can be trained with them as
well (`SVI(model, improved, ...)`). Each training step then costs as many extra gradients as there
are natural-gradient steps.

## A mode that is missed

If all draws stay in one mode, their weights look good, however many other modes there are. Here is
a posterior with two modes, and a guide that has found only one of them:
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
Ascents of $\log p(x, z)$ from 16 draws of the prior reach both modes. The guide, whose draws are
all at one of them, therefore does not pass; nor would the best member of its family. A mixture of
Gaussians, one at each mode, represents both in the right proportions. (Its weights hardly vary, and
then the tail of their differences does not matter, whatever its $\hat k$.) If there are few
latents, draws of the prior reveal a missed mode as well: their estimate of $\log p(x)$ is larger.

## What no cure can do

Both searches start from the prior. Here is a needle in the prior, which no draw and no ascent
reaches:
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
The guide passes, although half of the posterior is missing, and no diagnostic reports it:
evaluating the density at finitely many points cannot distinguish this program from one without the
needle. With many latents most modes are as narrow as this. The verdict of `repair` covers only the
modes that draws and ascents reach.

## Which cure?

- The fit has not converged, or the learning rate is a guess: `pe.fit`.
- The means are right and the standard deviations too small, in a guide of independent normals:
  `pe.linear_response`, or a richer guide.
- $\hat k$ is small, but moments are wrong: `pe.from_svi(..., corrected=True)`.
- Training is slow: `pe.gradient_noise`, and the estimator that it recommends.
- The encoder is bad for some data: `pe.repair`. If it is bad for all, train it longer, or use
  `pe.SemiAmortised`.
- $q$ is too wide, which the Fisher divergence detects: train longer.
"""
