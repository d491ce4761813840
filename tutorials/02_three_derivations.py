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
# Three derivations of the ELBO, in numbers

There are three ways to the evidence lower bound: Jensen's inequality, the KL divergence to the
posterior, and Bayes' rule with $\ln r \le r - 1$. On paper they end at the same line. Here we take
each step of each way on a model whose evidence $\log p(x)$ and posterior $p(z \mid x)$ are known,
and look at what the numbers do. In the end the gap closes while a guide is fitted.

You should know what a latent variable model and a guide are; `01_what_is_the_elbo` tells.
"""

# %%
import math
import os

import matplotlib.pyplot as plt
import pyro
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal, FullCovariance
from pyproelbo.models.ppca import PPCA

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
pyro.set_rng_seed(1)

# %% [markdown]
r"""
## A model that knows all answers

Probabilistic PCA draws $z \sim \mathcal N(0, I)$ and $x = W z + \mu + \sigma \epsilon$ with
$\epsilon \sim \mathcal N(0, I)$. All that follows from it is normal: the evidence and the
posterior, too. We take two latents, five features, and data that the model has simulated.
"""

# %%
model = PPCA(num_latents=2, num_features=5)
with torch.no_grad():
    model.W[:, 1] = 0.9 * model.W[:, 0] + 0.6 * model.W[:, 1]  # columns that resemble each other
    x = model(num=50 if SMOKE else 300)
    log_evidence = model.log_evidence(x)
    precision = model.posterior(x[0]).precision_matrix
    covariance = model.posterior(x[0]).covariance_matrix

print(f"mean log p(x)                {log_evidence.mean():.4f} nats per datum")
correlation = covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()
print(f"correlation of z given x     {correlation:.3f}")

# %% [markdown]
r"""
The posterior has correlated latents. A guide with independent ones,
$q(z \mid x) = \mathcal N(A x + b, \mathrm{diag}(s)^2)$, cannot be exact, which is just what we
need. This is the best of them:
"""

# %%
guide = Diagonal.optimum(model)
x0 = x[0]
with torch.no_grad():
    log_p0 = model.log_evidence(x0)
    q = guide.posterior(x0)
    posterior = model.posterior(x0)

print("posterior scales  ", posterior.stddev.numpy().round(3))
print("q's scales        ", q.stddev.numpy().round(3))
print(f"log p(x)           {log_p0:.4f} nats, of the first datum")

# %% [markdown]
r"""
## 1. Jensen's inequality

Multiply and divide by $q$, and the evidence is the logarithm of a mean of *weights*:

$$
\log p(x) = \log \int q(z)\, \frac{p(x, z)}{q(z)}\, dz = \log \mathbb E_q[w],
\qquad w = \frac{p(x, z)}{q(z)}.
$$

So draw $z$ from $q$ and compute the weights of the first datum.
"""

# %%
num_draws = 2000 if SMOKE else 100_000
with torch.no_grad():
    z = q.sample((num_draws,))
    log_joint = model.prior().log_prob(z) + model.decode(z).log_prob(x0)
    log_w = log_joint - q.log_prob(z)

print("draws      log mean w    mean log w")
for num in (10, 100, 1000, num_draws):
    first = log_w[:num]
    print(f"{num:>7,}{first.logsumexp(0) - math.log(num):>14.4f}{first.mean():>14.4f}")
print(f"log p(x)   {log_p0:>10.4f}")

# %% [markdown]
r"""
The logarithm is concave: the mean of a logarithm is at most the logarithm of the mean. The left
column goes to $\log p(x)$. The right column is smaller, and goes to something else: the ELBO.

$$\log \mathbb E_q[w] \ge \mathbb E_q[\log w] = \mathrm{ELBO}.$$
"""

# %%
elbo0 = log_w.mean()
_, ax = plt.subplots()
ax.hist(log_w.numpy(), bins=200, density=True, color="0.8", label="draws from q")
ax.axvline(elbo0, color="C0", label="mean of log w: the ELBO")
ax.axvline(log_p0, color="C3", label="log of the mean of w: log p(x)")
ax.set(xlabel="log w (nats)", ylabel="density (per nat)")
ax.set_xlim(log_p0 - 3, log_p0 + 3)
ax.legend(loc="upper right")
plt.show()

# %% [markdown]
r"""
Jensen's inequality is an equality where there is nothing to average: where all $w$ are the same. So
the gap has to do with their spread. To second order it is half the variance of $\log w$:
"""

# %%
print(f"gap                          {log_p0 - elbo0:.4f} nats")
print(f"half the variance of log w   {log_w.var() / 2:.4f}")
standard = (log_w - elbo0) / log_w.std()
print(f"kurtosis of log w            {standard.pow(4).mean():.1f}  (3 if it were normal)")

# %% [markdown]
r"""
Were $\log w$ normal, that would be all. Its tails are heavier than those of a normal distribution,
and the weights of the right one count for more.

## 2. The KL divergence to the posterior

Now start from the goal. $q$ should be near $p(z \mid x)$, as measured by

$$
\begin{aligned}
\mathrm{KL}(q(z) \,\|\, p(z \mid x))
  &= \mathbb E_q[\log q(z) - \log p(z \mid x)] \\
  &= \mathbb E_q[\log q(z) - \log p(x, z)] + \log p(x) \\
  &= \log p(x) - \mathrm{ELBO}.
\end{aligned}
$$

There is no inequality up to here; the bound is there because a KL divergence is never negative. And
the step from the second line to the third holds without any expectation, draw by draw:

$$\log w + \log \frac{q(z)}{p(z \mid x)} = \log p(x) \quad \text{for every } z.$$
"""

# %%
log_ratio = q.log_prob(z) - posterior.log_prob(z)
print("     log w   log q - log p(z|x)       sum")
for w, ratio in zip(log_w[:5], log_ratio[:5], strict=True):
    print(f"{w:>10.4f}{ratio:>21.4f}{w + ratio:>10.4f}")

q_normal = MultivariateNormal(q.mean, covariance_matrix=q.variance.diag())
kl = kl_divergence(q_normal, posterior)
print(f"\nKL, mean over draws         {log_ratio.mean():.4f} nats")
print(f"KL, in closed form          {kl:.4f}")
print(f"log p(x) - ELBO             {log_p0 - elbo0:.4f}")

# %% [markdown]
r"""
So whatever $q$ is, ELBO and KL add up to the same number. Here $q$ gets narrower and wider than the
best one:
"""

# %%
widths = torch.logspace(-0.7, 0.5, 60)
kls = []
for c in widths:
    stretched = MultivariateNormal(q.mean, covariance_matrix=(c * q.stddev).square().diag())
    kls.append(kl_divergence(stretched, posterior))
elbos = log_p0 - torch.stack(kls)

_, ax = plt.subplots()
ax.plot(widths, elbos, color="C0", label="ELBO")
ax.fill_between(widths, elbos, log_p0, color="C1", alpha=0.4, linewidth=0, label="KL")
ax.axhline(log_p0, color="0.15", linestyle="dashed", label="log p(x)")
ax.set(xscale="log", xlabel="scale of q / scale of the best diagonal q", ylabel="nats")
ax.set_xticks([0.2, 0.5, 1, 2, 3], ["0.2", "0.5", "1", "2", "3"])
ax.minorticks_off()
ax.legend(loc="lower center")
plt.show()

# %% [markdown]
r"""
Maximising the ELBO over $q$ is minimising the KL divergence, without knowing the posterior: that is
why it is called inference. The peak is at 1, and it does not touch the line, since no $q$ with
independent latents is the posterior.

## 3. Bayes' rule and the tangent of the logarithm

Bayes' rule, solved for the evidence and with $\log q$ added and subtracted, holds at any $z$:

$$
\ln p(x) = \ln p(x, z) - \ln q(z) - \ln r, \qquad r = \frac{p(z \mid x)}{q(z)}.
$$

The logarithm lies below its tangent at 1, $\ln r \le r - 1$, so that

$$\ln p(x) \ge \ln p(x, z) - \ln q(z) + 1 - r \quad \text{at any } z.$$

The expectation of $r$ under $q$ is $\int p(z \mid x)\, dz = 1$. The last two terms vanish on
average, and the ELBO remains.
"""

# %%
r = (-log_ratio).exp()
slack = r - 1 - r.log()
at_each_draw = log_w + 1 - r

_, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
curve = torch.linspace(0.03, 4.0, 400)
left.plot(curve, curve.log(), color="C0", label="ln r")
left.plot(curve, curve - 1, color="C3", label="r - 1")
left.fill_between(curve, curve.log(), curve - 1, color="0.9", label="slack")
left.plot(r[:300], torch.full((300,), -3.6), "|", color="0.3", label="r of draws from q")
left.set(xlabel="r", ylabel="nats", xlim=(0, 4), ylim=(-4, 3))
left.legend(loc="upper left", fontsize=8)
bins = (log_p0 + 1e-3 + torch.arange(-60, 21) / 10).numpy()  # log p(x) is where a bin ends
right.hist(log_w.numpy(), bins, density=True, color="0.8", label="log w")
right.hist(at_each_draw.numpy(), bins, density=True, histtype="step", label="log w + 1 - r")
right.axvline(log_p0, color="C3", label="log p(x)")
right.set(xlabel="nats", ylabel="density (per nat)", yscale="log")
right.legend(loc="upper left", fontsize=8)
plt.show()

# %% [markdown]
r"""
See the right panel: $\log w$ lies on both sides of $\log p(x)$ and is a bound on average only. The
new expression never crosses the line. Every single draw is a bound.
"""

# %%
print(f"draws with log w above log p(x)            {(log_w > log_p0).float().mean():.1%}")
print(f"largest (log w + 1 - r) - log p(x)         {(at_each_draw - log_p0).max():.1e} nats")
print(f"mean of r                                  {r.mean():.4f}")
print(f"mean of log w + 1 - r                      {at_each_draw.mean():.4f} nats")
print(f"mean of log w, the ELBO                    {elbo0:.4f} nats")
print(f"mean slack r - 1 - ln r, once more the gap {slack.mean():.4f} nats")

# %% [markdown]
r"""
## All of them at once

`pe.decompositions` does this for any model and guide, for all data. One line for each form:

- the first is Jensen's, with the log mean weight of 100 draws in the place of $\log p(x)$;
- the second and the third are the ELBO itself in two ways. $\mathbb E_q[\log p(x, z)]$ and the
  entropy of $q$; or $\mathbb E_q[\log p(x \mid z)]$, the *reconstruction*, less the divergence of
  $q$ from the prior, $\mathrm{KL}(q(z \mid x) \,\|\, p(z))$, here in closed form;
- the fourth is that of the KL divergence to the posterior;
- the fifth is Bayes' rule with the tangent.

Below them, for comparison, are the mean of $\log w$ as it is, and half of its variance.
"""

# %%
result = pe.decompositions(model, guide, x, evidence=log_evidence)
print(result)

# %% [markdown]
r"""
The last column says the same each time, up to the draws. Where $\log p(x)$ is not known, leave out
`evidence=`: it is then estimated.

## The gap closes

So far $q$ was the best there is. Now we learn it, from its random start: the diagonal guide, and
one with a full covariance, which has the posterior among its members. All forms are recorded on the
way.
"""


# %%
def fit(guide, steps):
    """Train the guide, the model stays; the decompositions at some of the steps."""
    objective = pe.BetaELBO(num_particles=10, vectorize_particles=True)
    loss = objective(model, guide)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.02)
    path = {}
    for step in range(steps + 1):
        if step % every == 0:
            path[step] = pe.decompositions(model, guide, x, evidence=log_evidence)
        optimiser.zero_grad()
        loss(x).backward()
        optimiser.step()
    return path


steps, every = (10, 5) if SMOKE else (180, 6)
guides = {"diagonal": Diagonal(2, 5), "full covariance": FullCovariance(2, 5)}
paths = {name: fit(guide, steps) for name, guide in guides.items()}

# %%
_, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
for ax, (name, path) in zip(axes, paths.items(), strict=True):
    ax.axhline(log_evidence.mean(), color="0.15", linestyle="dashed", label="log p(x)")
    for form, width in zip(path[0].forms, (12, 9, 6, 3, 1), strict=True):
        values = [result.forms[form] for result in path.values()]
        ax.plot(list(path), values, linewidth=width, label=form)
    ax.set(title=f"q: {name}", xlabel="training step", ylabel="nats per datum")
    ax.set_ylim(log_evidence.mean() - 4, log_evidence.mean() + 0.5)
axes[1].legend(loc="lower right", fontsize=8)
plt.show()

# %% [markdown]
r"""
Five lines of five widths are one curve, at each step. Its distance to the evidence is
$\mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x))$, drawn on a logarithmic scale, as the mean slack
$r - 1 - \ln r$, which no draw makes negative. For a diagonal $q$ it has a floor, which is known
here: with $P$ the precision matrix of the posterior it is
$\frac 1 2 (\sum_i \log P_{ii} - \log \det P)$.
"""

# %%
floor = (precision.diagonal().log().sum() - precision.logdet()).item() / 2
_, ax = plt.subplots()
for name, path in paths.items():
    ax.plot(list(path), [result.slack.value for result in path.values()], label=name)
ax.axhline(floor, color="0.15", linestyle="dashed", label="floor of diagonal guides")
ax.set(yscale="log", xlabel="training step", ylabel="gap (nats per datum)")
ax.legend()
plt.show()
for name, path in paths.items():
    print(f"gap of the {name} guide in the end: {path[steps].slack} nats per datum")
print(f"floor of diagonal guides: {floor:.4f}")

# %% [markdown]
r"""
With the full covariance the gap goes on falling: where $q$ is the posterior, all weights are the
same, Jensen's inequality is an equality, $r = 1$ at each draw, and the tangent touches.

## Reconstruction against the prior

The third form is the one that VAEs are trained by, and it is a trade-off. What $q$ learns about $z$
helps to reconstruct $x$, and is paid for by its distance to the prior.
"""

# %%
_, axes = plt.subplots(1, 2, figsize=(9, 3.2))
for name, path in paths.items():
    axes[0].plot(list(path), [result.reconstruction.value for result in path.values()], label=name)
    axes[1].plot(list(path), [result.kl.value for result in path.values()], label=name)
start = paths["full covariance"][steps].reconstruction.value
axes[0].set(ylabel="reconstruction (nats per datum)", ylim=(start - 6, start + 1))
axes[1].set(ylabel="KL to the prior (nats per datum)")
for ax in axes:
    ax.set_xlabel("training step")
    ax.legend()
plt.show()

# %% [markdown]
r"""
While training, the same numbers are in the objective's `terms`, for each site of the model and each
datum:
"""

# %%
objective = pe.BetaELBO()
terms = objective.terms(model, guides["full covariance"], x)
print(f"reconstruction {terms.reconstruction / len(x):>9.4f} nats per datum")
print(f"KL             {terms.shrinkage / len(x):>9.4f}, in closed form: {set(terms.analytic)}")
print(f"ELBO           {terms.elbo / len(x):>9.4f}, of one draw for each datum")
print("the KL of the first three data:", terms.kl["z"][:3].numpy().round(3))

# %% [markdown]
r"""
## What each way is good for

- **Jensen** says when the bound is tight, when the weights do not vary, and how to make it tighter:
  average more of them inside the logarithm (`pe.ImportanceWeightedELBO`).
- **KL** says what the gap *is*: how far $q$ is from the posterior. Maximising the ELBO is
  inference.
- **Bayes** with the tangent is a bound at any $z$, before any expectation is taken.

Next: `03_how_good_is_q` asks what the gap tells about a posterior, and what it does not.
"""
