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
posterior, and Bayes' rule with $\ln r \le r - 1$. On paper they end at the same line. Here we carry
out each step of each derivation for a model whose evidence $\log p(x)$ and posterior $p(z \mid x)$
are known, and look at the numbers. Then we watch the gap close while a guide is fitted, by
gradients and, for a mixture, by coordinate ascent.

You should know what a latent variable model and a guide are; see `01_what_is_the_elbo`.
"""

# %%
import math
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal, FullCovariance
from pyproelbo.models.ppca import PPCA

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
pyro.set_rng_seed(1)

# %% [markdown]
r"""
## A model whose answers are known

Probabilistic PCA draws $z \sim \mathcal N(0, I)$ and $x = W z + \mu + \sigma \epsilon$ with
$\epsilon \sim \mathcal N(0, I)$. All distributions derived from it are normal, including $p(x)$ and
the posterior. We use two latents, five features, and data simulated from the model.
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
$q(z \mid x) = \mathcal N(A x + b, \mathrm{diag}(s)^2)$, cannot be exact, which is what we need
here. This is the best of them:
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
column converges to $\log p(x)$. The right column is smaller, and converges to a different value:
the ELBO.

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
Jensen's inequality is an equality if there is nothing to average, that is, if all $w$ are the same.
So the gap depends on their spread. To second order it is half the variance of $\log w$:
"""

# %%
print(f"gap                          {log_p0 - elbo0:.4f} nats")
print(f"half the variance of log w   {log_w.var() / 2:.4f}")
standard = (log_w - elbo0) / log_w.std()
print(f"kurtosis of log w            {standard.pow(4).mean():.1f}  (3 if it were normal)")

# %% [markdown]
r"""
If $\log w$ were normal, that would be the whole gap. Its tails are heavier, and the right tail
dominates $\mathbb E_q[w]$.

## 2. The KL divergence to the posterior

Now we start from the goal: $q$ should be close to $p(z \mid x)$, as measured by

$$
\begin{aligned}
\mathrm{KL}(q(z) \,\|\, p(z \mid x))
  &= \mathbb E_q[\log q(z) - \log p(z \mid x)] \\
  &= \mathbb E_q[\log q(z) - \log p(x, z)] + \log p(x) \\
  &= \log p(x) - \mathrm{ELBO}.
\end{aligned}
$$

There is no inequality so far; the bound follows because a KL divergence is never negative. The step
from the second line to the third even holds without the expectation, draw by draw:

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
So whatever $q$ is, ELBO and KL add up to the same number. Here $q$ is made narrower and wider than
the best one:
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
Maximising the ELBO over $q$ minimises the KL divergence to the posterior, which need not be known.
This is why it is called inference. The peak is at 1, and it does not touch the line, since no $q$
with independent latents equals the posterior.

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
above = int((log_w.max() - log_p0) * 10) + 1  # of the bins of 0.1 nats
bins = (log_p0 + 1e-3 + torch.arange(-60, above + 1) / 10).numpy()  # log p(x) is where one ends
right.hist(log_w.numpy(), bins, density=True, color="0.8", label="log w")
right.hist(at_each_draw.numpy(), bins, density=True, histtype="step", label="log w + 1 - r")
right.axvline(log_p0, color="C3", label="log p(x)")
right.set(xlabel="nats", ylabel="density (per nat)", yscale="log")
right.legend(loc="upper left", fontsize=8)
plt.show()

# %% [markdown]
r"""
In the right panel, $\log w$ lies on both sides of $\log p(x)$: it is a bound only on average. The
new expression never crosses the line: it is a bound for every single draw.
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

`pe.decompositions` computes these forms for any model and guide, over all data. It prints one line
for each form:

- the first is Jensen's, with the log mean weight of 100 draws in place of $\log p(x)$;
- the second and the third are the ELBO itself, written in two ways: as $\mathbb E_q[\log p(x, z)]$,
  which the table calls energy with the sign of $\log p$ (in physics it is the *negative* energy),
  plus the entropy of $q$; or as $\mathbb E_q[\log p(x \mid z)]$, the *reconstruction*, less the
  divergence of $q$ from the prior, $\mathrm{KL}(q(z \mid x) \,\|\, p(z))$, here in closed form;
- the fourth uses the KL divergence to the posterior;
- the fifth is Bayes' rule with the tangent.

Below them, for comparison, are the mean of $\log w$ and half of its variance.
"""

# %%
result = pe.decompositions(model, guide, x, evidence=log_evidence)
print(result)

# %% [markdown]
r"""
The last column has the same number each time, up to the noise of the draws. If $\log p(x)$ is not
known, omit `evidence=`: it is then estimated.

The last form needs care. A number after ± is a standard error, and assumes that the averaged
quantity has a finite variance. The weights $w$, and so $r$ and the slack, do not have one here: the
$1/k$-th moment is the first to be infinite, with $k$ the correlation of the two latents, which is
above $\frac 1 2$. Let us repeat the table with other draws, and count how often the truth is within
two standard errors.
"""

# %%
floor = (precision.diagonal().log().sum() - precision.logdet()).item() / 2  # the exact gap
repeats = [
    pe.decompositions(model, guide, x, evidence=log_evidence, seed=seed)
    for seed in range(10 if SMOKE else 200)
]
print(f"k of the weights {correlation.abs():.3f}, gap {floor:.4f} nats per datum\n")
print("                   standard error, median   actual sd   within 2 standard errors")
for name in ("posterior_kl", "slack"):
    values = torch.tensor([getattr(r, name).value for r in repeats])
    errors = torch.tensor([getattr(r, name).stderr for r in repeats])
    within = ((values - floor).abs() < 2 * errors).float().mean()
    print(f"{name:<19}{errors.median():>22.4f}{values.std():>12.4f}{within:>27.0%}")

# %% [markdown]
r"""
The KL divergence is a mean of $\log w$, which has all moments, and its standard errors are right:
95% of the estimates should be within two of them. The errors of the slack are too small. `pe.psis`
estimates $k$ where it is not known, and reports print a note.

## The gap closes

So far $q$ was the best of its family. Now we train it from a random start: the diagonal guide, and
one with a full covariance, whose family contains the posterior. All forms are recorded on the way.
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
_, axes = plt.subplots(2, 2, figsize=(10, 5), sharex=True, sharey="row")
apart = 0.0  # the largest difference of the three forms that are the same draw by draw
for (top, bottom), (name, path) in zip(axes.T, paths.items(), strict=True):
    elbo = torch.tensor([result.elbo.value for result in path.values()])
    top.axhline(log_evidence.mean(), color="0.15", linestyle="dashed", label="log p(x)")
    top.plot(list(path), elbo, label="mean of log w")
    top.set(title=f"q: {name}")
    difference = {
        form: torch.tensor([result.forms[form] for result in path.values()]) - elbo
        for form in path[0].forms
    }
    *same, reconstruction, slack = sorted(difference, key=lambda form: difference[form].abs().max())
    apart = max(apart, *(difference[form].abs().max().item() for form in same))
    bottom.plot(list(path), difference[same[0]], color="0.6", linewidth=3, label="three forms")
    bottom.plot(list(path), difference[reconstruction], ".-", color="C1", label=reconstruction)
    bottom.plot(list(path), difference[slack], "^-", color="C3", markersize=3, label=slack)
    bottom.set(xlabel="training step", ylim=(-0.14, 0.1))
axes[0, 0].set_ylabel("nats per datum")
axes[1, 0].set_ylabel("form - mean of log w")
axes[0, 1].legend(loc="lower right", fontsize=8)
axes[1, 1].legend(loc="upper right", fontsize=8)
plt.show()
print(f"largest difference between the three forms and the mean of log w: {apart:.1e} nats")

# %% [markdown]
r"""
The upper row shows the ELBO, the lower row the difference of each form from it. Three of the five
forms agree draw by draw; the form with the closed-form KL differs by Monte Carlo noise, and the
form with the slack by the noise of its heavy tail. The distance from the ELBO to the evidence is
$\mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x))$, here on a logarithmic scale: as a mean of $\log
p(x) - \log w$, and as the mean slack $r - 1 - \ln r$, which is non-negative for every draw. For a
diagonal $q$ it has a floor, which is known here: with $P$ the precision matrix of the posterior
it is $\frac 1 2 (\sum_i \log P_{ii} - \log \det P)$.
"""

# %%
_, ax = plt.subplots()
for (name, path), color in zip(paths.items(), ("C0", "C3"), strict=True):
    ax.plot(list(path), [r.posterior_kl.value for r in path.values()], color=color, label=name)
    slack = [result.slack.value for result in path.values()]
    ax.plot(list(path), slack, ":", color=color, label=f"{name}, by the slack")
ax.axhline(floor, color="0.15", linestyle="dashed", label="floor of diagonal guides")
ax.set(yscale="log", xlabel="training step", ylabel="gap (nats per datum)")
ax.set_ylim(bottom=1e-5)
ax.legend(fontsize=8)
plt.show()
for name, path in paths.items():
    last = torch.tensor([result.posterior_kl.value for result in path.values()])[-10:]
    print(
        f"gap of the {name} guide in the end: {path[steps].posterior_kl} nats per datum, "
        f"mean of the last ten {last.mean():.1e}"
    )
print(f"floor of diagonal guides: {floor:.4f}")

# %% [markdown]
r"""
With the full covariance the gap falls to some $10^{-4}$ nats and stays there, because the noise of
Adam's steps keeps $q$ moving around the posterior. At the posterior itself all weights are the
same, Jensen's inequality is an equality, $r = 1$ at each draw, and the tangent touches the
logarithm.

## Reconstruction against the prior

The third form is the one used to train VAEs, and it is a trade-off. Information about $z$ in $q$
helps to reconstruct $x$, but is paid for by the distance of $q$ from the prior.
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
During training, the same numbers are available in the objective's `terms`, for each site of the
model and each datum:
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
## Coordinate ascent: variational EM

Gradients are not the only way to raise the ELBO. Since $\log p_\theta(x) = \mathrm{ELBO}(q,
\theta) + \mathrm{KL}(q \,\|\, p_\theta(z \mid x))$, one can raise the ELBO alternately, over $q$
with the model held fixed, and over $\theta$ with $q$ held fixed. If each turn reaches its maximum
and $q$ may be any distribution, this is the EM algorithm (Dempster, Laird & Rubin 1977; Neal &
Hinton 1998): the E step makes $q$ the posterior, and the ELBO touches $\log p_\theta(x)$. If $q$
is restricted to independent factors, it is *variational EM* (Jordan, Ghahramani, Jaakkola & Saul
1999), and each factor has its own turn: $\log q_j(z_j) = \mathbb E_{q \text{ of the others}}[\log
p(x, z)]$ up to a constant. No turn can lower the ELBO.

The mixture of `01_what_is_the_elbo` has a local latent $c_n$ for each datum and three global
locations $\mu_k$, and we also let it learn the width $\sigma$ of its components. For $q$ we use
independent factors: categorical ones for the $c_n$, and normal ones for the $\mu_k$.
"""


# %%
class Mixture(nn.Module):
    """mu_k ~ N(0, 5^2), c_n uniform on three, x_n ~ N(mu_c, sigma^2)."""

    def __init__(self):
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("components", 3):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(mu[c], self.log_sigma.exp()), obs=x)


class MeanField(nn.Module):
    """q(mu_k) = N(loc_k, scale_k^2) and q(c_n), independent; c is summed out."""

    def __init__(self, x):
        super().__init__()
        start = torch.tensor([-1.0, 0.0, 1.0]).to(x)
        self.loc = nn.Parameter(start)
        self.log_scale = nn.Parameter(torch.zeros(3).to(x))
        self.logits = nn.Parameter(-((x[:, None] - start) ** 2) / 2)  # near places are likely

    @config_enumerate
    def forward(self, x):
        with pyro.plate("components", 3):
            pyro.sample("mu", dist.Normal(self.loc, self.log_scale.exp()))
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=self.logits))


def exact_elbo(model, guide, x):
    """The ELBO in closed form, of all data together."""
    share, precision = guide.logits.softmax(-1), (-2 * model.log_sigma).exp()
    square = (x[:, None] - guide.loc) ** 2 + (2 * guide.log_scale).exp()
    log_likelihood = -0.5 * math.log(2 * math.pi) - model.log_sigma - precision * square / 2
    uniform = dist.Categorical(torch.ones(3))
    kl_c = kl_divergence(dist.Categorical(logits=guide.logits), uniform).sum()
    kl_mu = kl_divergence(dist.Normal(guide.loc, guide.log_scale.exp()), dist.Normal(0.0, 5.0))
    return (share * log_likelihood).sum() - kl_c - kl_mu.sum()


pyro.set_rng_seed(3)
parts = ((-4.0, 20), (0.5, 25), (4.0, 15))
points = torch.cat([dist.Normal(place, 1.0).sample((num,)) for place, num in parts]).double()
mixture, factors = Mixture().double(), MeanField(points)
objective = pe.BetaELBO(num_particles=2 if SMOKE else 50, max_plate_nesting=1)
print(f"ELBO at the start, closed form    {exact_elbo(mixture, factors, points):.2f} nats")
each = [objective.terms(mixture, factors, points).elbo.item() for _ in range(10)]
mean, error = torch.tensor(each).mean(), torch.tensor(each).std() / math.sqrt(10)
print(f"ELBO at the start, pe.BetaELBO    {mean:.2f} ± {error:.2f}")

# %% [markdown]
r"""
Three turns make a sweep. The first two are the E step: the probabilities of the components for each
datum, then the posterior of each location given these probabilities. The third is the M step.
"""

# %%
turns = []
with torch.no_grad():
    for _ in range(30):
        precision, variance = (-2 * mixture.log_sigma).exp(), (2 * factors.log_scale).exp()
        log_density = points[:, None] * factors.loc - (factors.loc**2 + variance) / 2
        factors.logits.copy_(precision * log_density)
        turns.append(exact_elbo(mixture, factors, points).item())

        share = factors.logits.softmax(-1)
        total = 1 / 5.0**2 + precision * share.sum(0)
        factors.log_scale.copy_(-total.log() / 2)
        factors.loc.copy_(precision * (share * points[:, None]).sum(0) / total)
        turns.append(exact_elbo(mixture, factors, points).item())

        square = (points[:, None] - factors.loc) ** 2 + (2 * factors.log_scale).exp()
        mixture.log_sigma.copy_((share * square).sum().div(len(points)).log() / 2)
        turns.append(exact_elbo(mixture, factors, points).item())

rises = torch.tensor(turns).double().diff()
print(f"{len(rises)} turns after the first, of which {(rises < -1e-10).sum()} lower the ELBO")
print(f"least rise of a turn {rises.min():.1e} nats, the last ELBO {turns[-1]:.3f}")

# %% [markdown]
r"""
For comparison we use stochastic variational inference (SVI), as Pyro and this library do: the same
factors from the same start, optimised by Adam with the gradient of the ELBO.
"""

# %%
other, follower = Mixture().double(), MeanField(points)
svi_loss = pe.BetaELBO(max_plate_nesting=1)(other, follower)
optimiser = torch.optim.Adam(svi_loss.parameters(), lr=0.05)
svi_path = []
for _ in range(30 if SMOKE else 1000):
    optimiser.zero_grad()
    svi_loss(points).backward()
    optimiser.step()
    svi_path.append(exact_elbo(other, follower, points).item())

_, ax = plt.subplots()
sweeps = (1 + torch.arange(len(turns))) / 3
ax.plot(sweeps, turns, ".-", markersize=4, label="coordinate ascent, turn by turn")
ax.plot(range(1, len(svi_path) + 1), svi_path, color="C3", label="SVI, step by step")
ax.set(xscale="log", xlabel="passes over the data", ylabel="ELBO (nats, all data)")
ax.set_ylim(turns[2] - 40, max(turns) + 5)
ax.legend()
plt.show()
print(f"ELBO in the end, coordinate ascent {turns[-1]:.3f} nats, SVI {svi_path[-1]:.3f}")
print("places           ", factors.loc.detach().numpy().round(2))
print(f"sigma             {mixture.log_sigma.exp():.2f}")

# %% [markdown]
r"""
How close is the ELBO to the evidence? With three locations the evidence is an integral in three
dimensions, which can be computed on a grid.
"""

# %%
with torch.no_grad():
    grid = torch.linspace(-7.0, 7.0, 41 if SMOKE else 101).double()
    at = dist.Normal(grid[:, None], mixture.log_sigma.exp()).log_prob(points.double())  # (G, N)
    prior = dist.Normal(0.0, 5.0).log_prob(grid) + (grid[1] - grid[0]).log()
    pairs = torch.logaddexp(at[:, None], at)  # (G, G, N)
    planes = [
        (torch.logaddexp(pairs, row).sum(-1) + prior[:, None] + prior).logsumexp((0, 1))
        for row in at
    ]
    log_p = (torch.stack(planes) + prior).logsumexp(0) - len(points) * math.log(3)
print(f"log p(x) on the grid     {log_p:.3f} nats")
print(f"log p(x) - ELBO          {log_p - turns[-1]:.3f}")
print(f"log 3!                   {math.log(6):.3f}")

# %% [markdown]
r"""
Most of the gap is the logarithm of 3!: the components may be numbered in six ways, so the posterior
has six modes of equal mass, and $q$ covers one of them (see `03_how_good_is_q`). The rest is due to
the dependence between $c$ and $\mu$, which independent factors ignore.

Coordinate ascent needs closed-form turns, and each turn needs all data. SVI needs neither, but
takes more steps.

## What each way is good for

- **Jensen** shows when the bound is tight, namely when the weights do not vary, and how to make it
  tighter: by averaging more of them inside the logarithm (`pe.ImportanceWeightedELBO`).
- **KL** identifies the gap as the divergence of $q$ from the posterior. Maximising the ELBO is
  inference.
- **Bayes** with the tangent is a bound at any $z$, before any expectation is taken.

Next, `03_how_good_is_q` examines what the gap reveals about a posterior, and what it does not.
"""
