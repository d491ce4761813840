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
# Sequences, step by step

`07_sequences` starts from the ELBO of a sequence as a sum over time. This notebook derives that sum
line by line, and evaluates each line. For a linear-Gaussian model every expectation is exact, so
lines that should be equal agree up to rounding. For a variational recurrent network, whose prior
remembers all of the past, expectations are means over draws, with standard errors. The last two
sections are about agents built on this bound: the memory of MERLIN, and the belief of DVRL.

The equations are numbered as in [ELBO: What & Why](https://yunfanj.com/blog/2021/01/11/ELBO.html)
(Jiang 2021); the stationary case is in `02_three_derivations`. All values are in nats.
"""

# %%
import math
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import kl_divergence

import pyproelbo as pe
from pyproelbo.guides import lgssm, vrnn
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.vae import BernoulliLikelihood
from pyproelbo.models.vrnn import VRNN
from pyproelbo.schedules import Linear
from pyproelbo.sequences import Emission, MarkovChain

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
torch.set_default_dtype(torch.float64)  # to see what agrees to rounding
torch.set_grad_enabled(False)  # but for training
pyro.set_rng_seed(0)

# %% [markdown]
r"""
## Equation 8: Jensen's inequality for sequences

A model has observations $x_{0:t} = (x_0, \dots, x_t)$ and latents $z_{0:t}$. As for a single $x$,
multiply and divide by $q$, and move the logarithm inside:

$$
\begin{aligned}
\log p(x_{0:t}) &= \log \int p(x_{0:t}, z_{0:t})\, dz_{0:t}
= \log \mathbb E_{q(z_{0:t} \mid x_{0:t})}\left[
\frac{p(x_{0:t}, z_{0:t})}{q(z_{0:t} \mid x_{0:t})}\right] \\
&\ge \mathbb E_{q(z_{0:t} \mid x_{0:t})}\left[
\log \frac{p(x_{0:t}, z_{0:t})}{q(z_{0:t} \mid x_{0:t})}\right].
\end{aligned}
\qquad \tag{8}
$$

In the linear-Gaussian model the Kalman filter computes $\log p(x_{0:t})$. The guide is a chain that
uses the past and present $x$, trained on other sequences.
"""

# %%
T = 6  # steps: t = 5
linear = LGSSM(num_latents=2, num_features=3)
x = linear(num=1, num_steps=T)[0]  # one sequence, (T, 3)


@torch.enable_grad()
def train(objective, modules, data, num_iterations, lr=0.02):
    """Maximise the objective on the batches that data() makes, at a learning rate that falls."""
    parameters = [p for module in modules for p in module.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=lr, fused=True)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_iterations)
    for _ in range(num_iterations):
        batch, inputs = data()
        optimiser.zero_grad()
        (objective(batch, inputs=inputs) / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        falling.step()


def of_linear():
    """A batch of sequences of the linear model."""
    return linear(num=50, num_steps=T), None


guide = lgssm.Filtering(2, 3)
train(pe.SequentialELBO()(linear, guide), [guide], of_linear, 10 if SMOKE else 300)

# %% [markdown]
r"""
$\log p(x, z) - \log q(z \mid x)$ is quadratic in $z$ here, and $q$ is normal. The expectation of a
quadratic $f$ follows exactly from its values at the mean and at one unit of noise to either side in
each direction, $\mathbb E f = f(\mu) + \frac12 \sum_i [f(\mu + \ell_i) + f(\mu - \ell_i) - 2
f(\mu)]$, where the $\ell_i$ are the columns of a factor of the covariance:
"""


# %%
def expected(f, chain):
    """E[f(z)] of a quadratic f of a linear-Gaussian chain z, (T, k); exact."""
    unit = torch.eye(chain.num_steps * 2)
    noise = torch.cat([torch.zeros(1, len(unit)), unit, -unit]).unflatten(-1, (-1, 2))
    values = f(chain.of_noise(noise))
    return values[0] + 0.5 * (values[1:] - values[0]).sum(0)


def joint(chain):
    """A linear-Gaussian chain as one normal distribution of all its numbers."""
    origin = chain.of_noise(torch.zeros(T, 2)).flatten()
    unit = torch.eye(T * 2).unflatten(-1, (T, 2))
    factor = (chain.of_noise(unit).flatten(1) - origin).T
    return dist.MultivariateNormal(origin, factor @ factor.T)


def log_w(z):
    """log p(x, z) - log q(z | x)."""
    return linear.prior(T).log_prob(z) + linear.decode(z).log_prob(x).sum(-1) - q.log_prob(z)


pyro.set_rng_seed(1)
q = guide.posterior(x)
log_p = linear.log_evidence(x).item()
draws = log_w(q.sample((1000 if SMOKE else 200_000,)))
w = (draws - log_p).exp()
elbo = expected(log_w, q).item()
kl = kl_divergence(joint(q), joint(linear.posterior(x))).item()


def with_error(values):
    """The mean of draws and its standard error."""
    return f"{values.mean():>11.4f} ± {values.std() / len(values) ** 0.5:.4f}"


print(f"log p(x), Kalman's filter          {log_p:>11.4f}")
log_mean, error = log_p + w.mean().log(), w.std() / w.mean() / len(w) ** 0.5
print(f"log of the mean of p/q, by draws   {log_mean:>11.4f} ± {error:.4f}")
print(f"mean of the log of p/q, by draws   {with_error(draws)}   (8)")
print(f"mean of the log of p/q, exact      {elbo:>11.4f}            (8)")
print(f"log p(x) - KL(q || p(z | x))       {log_p - kl:>11.4f}")
print(f"difference of the last two: {abs(elbo - log_p + kl):.0e}")

# %% [markdown]
r"""
The first two lines are the same quantity, computed exactly and estimated by draws. The third line
estimates by draws what the fourth gives exactly. The last two lines agree up to rounding, although
the KL divergence was computed in another way, between two joint normal distributions of all
components of $z$. The step from the second line to the third is Jensen's inequality:
"""

# %%
_, ax = plt.subplots(figsize=(7, 3))
ax.hist(draws, 100, color="0.8")
ax.axvline(elbo, color="C0", linestyle="--", label="mean of log p/q: the ELBO")
ax.axvline(log_p, color="C1", label="log of the mean of p/q: log p(x)")
ax.set(xlabel="log p(x, z) - log q(z | x) of a draw (nats)", ylabel="draws")
ax.set_xlim(float(draws.quantile(0.001)), float(draws.max()))
ax.legend(loc="upper left")
plt.show()

# %% [markdown]
r"""
## Equations 9 and 10: the full past

So far time plays no part. Now model and guide are factorised along it:

$$
p(x_{0:t}, z_{0:t}) = \prod_{\tau=0}^t p(x_\tau \mid z_\tau)\, p(z_\tau \mid z_{0:\tau-1}),
\qquad \tag{9}
$$

$$
q(z_{0:t} \mid x_{0:t}) = \prod_{\tau=0}^t q(z_\tau \mid z_{0:\tau-1}, x_{0:\tau}).
\qquad \tag{10}
$$

Each latent may depend on *all* earlier latents, and the guide uses $x$ up to the present. The
linear model is a special case, in which only $z_{\tau-1}$ matters. In a variational recurrent
network (Chung et al. 2015) the full past matters: a recurrent network remembers it. (In
`models.vrnn` $x_\tau$ may depend on the memory as well; the model here follows equation 9 exactly.)
Its data repeat themselves after three steps, so that there is something to remember.
"""


# %%
class Recurrent(VRNN):
    """A VRNN in which x_t depends on z_t alone."""

    def decode(self, z, s, *u):
        return super().decode(z, torch.zeros_like(s), *u)


def echoes():
    """A batch of sequences with x_t = 0.95 x_{t-3} + noise."""
    x = torch.randn(100, T, 2)
    for t in range(3, T):
        x[:, t] = 0.95 * x[:, t - 3] + 0.3 * x[:, t]
    return x, None


recurrent = Recurrent(num_latents=2, num_features=2, state=16, hidden=(16,))
causal = vrnn.Filtering(recurrent, hidden=16)
num_iterations = 5 if SMOKE else 600
annealed = pe.SequentialELBO(Linear(0.05, 1.0, steps=num_iterations // 2))  # 04_beta_and_schedules
train(annealed(recurrent, causal), [recurrent, causal], echoes, num_iterations, lr=0.01)
smoothing = vrnn.Smoothing(recurrent, hidden=16)
num_iterations = 5 if SMOKE else 200
train(pe.SequentialELBO()(recurrent, smoothing), [smoothing], echoes, num_iterations, lr=0.01)
y = echoes()[0][:1]  # one sequence, (1, T, 2)
z = causal.posterior(y).sample()

# %% [markdown]
r"""
Does the program implement equation 9? We compare the product of its factors, computed one after
another, with Pyro's trace of the program:
"""

# %%
s, by_factor = recurrent.start.expand(1, -1), 0.0
for tau in range(T):
    z_tau = z[:, tau]
    by_factor += recurrent.decode(z_tau, s).log_prob(y[:, tau]) + recurrent.step(s).log_prob(z_tau)
    s = recurrent.advance(s, z_tau)
trace = poutine.trace(poutine.condition(recurrent, {"z": z})).get_trace(y)
print(f"log p(x, z), the program  {trace.log_prob_sum().item():.12f}")
print(f"             equation 9   {by_factor.item():.12f}")

# %% [markdown]
r"""
Which step depends on which? The derivatives of the mean of each $z_\tau$ show the dependence. The
first two panels are priors: the linear prior depends on one step back, the recurrent prior on all
earlier steps. The other two are guides: the third has the form of equation 10, and the fourth,
which smooths, uses the future as well.
"""


# %%
@torch.enable_grad()
def dependence(mean_of, given):
    """How much the mean of step tau depends on step s of what is given: (T, T)."""
    jacobian = torch.autograd.functional.jacobian(mean_of, given)  # (T, k, T, D)
    return jacobian.square().sum((1, 3)).sqrt()


panels = {
    "linear prior": ("z", lambda z: linear.prior(T).steps(z).mean, z[0]),
    "recurrent prior": ("z", lambda z: recurrent.prior(T).steps(z).mean, z[0]),
    "guide that filters": ("x", lambda x: causal.posterior(x[None]).steps(z).mean[0], y[0]),
    "guide that smooths": ("x", lambda x: smoothing.posterior(x[None]).steps(z).mean[0], y[0]),
}
_, axes = plt.subplots(1, 4, figsize=(11, 3), sharex=True, sharey=True)
for ax, (name, (of, mean_of, given)) in zip(axes, panels.items(), strict=True):
    found = dependence(mean_of, given)
    logs = torch.where(found > 0, found.log10(), torch.nan)
    image = ax.imshow(logs, vmin=-3, vmax=0)
    ax.set(title=name, xlabel=f"step $s$ of ${of}$")
    above = torch.triu(found, 1).max()  # the future
    print(f"{name:<20}largest derivative of z_tau by a later {of}: {above:.1e}")
axes[0].set_ylabel(r"step $\tau$ of $z$")
plt.colorbar(image, ax=axes, label="log10 of the derivative")
plt.show()

# %% [markdown]
r"""
Steps with no dependence at all are white. The recurrent prior has learned that the data repeat
after three steps, and remembers the other steps as well. The following derivation relies on the
white upper triangles of the first three panels.

## Equation 11: a sum over time

The logarithm of both products is a sum, and the expectation of a sum is the sum of expectations:

$$
\mathbb E_{z_{0:t}}\left[\log \frac{p(x_{0:t}, z_{0:t})}{q(z_{0:t} \mid x_{0:t})}\right]
= \sum_{\tau=0}^t \mathbb E_{z_{0:t}}\big[\log p(x_\tau \mid z_\tau)
+ \log p(z_\tau \mid z_{0:\tau-1}) - \log q(z_\tau \mid z_{0:\tau-1}, x_{0:\tau})\big].
\qquad \tag{11}
$$

Call the term in brackets $f_\tau$.

**Trick 1.** $f_\tau$ does not contain the latents after $\tau$, so that they integrate to one:
$\mathbb E_{z_{0:t}}[f_\tau] = \mathbb E_{z_{0:\tau}}[f_\tau]$. By equation 10 the distribution of
$z_{0:\tau}$ depends on $x_{0:\tau}$ only, so the sequence may be cut off after $\tau$.

**Trick 2.** The product rule separates the last step from the past,

$$
q(z_{0:\tau} \mid x_{0:\tau}) = q(z_\tau \mid z_{0:\tau-1}, x_{0:\tau})\;
q(z_{0:\tau-1} \mid x_{0:\tau-1}),
\qquad \tag{11-B}
$$

so that $\mathbb E_{z_{0:\tau}} = \mathbb E_{z_{0:\tau-1}} \mathbb E_{z_\tau}$: the past is drawn
first, and then the present given the past. The last factor does not contain $x_\tau$, because the
guide has drawn the past without it. Does 11-B hold for our guides? We compare the logarithms of its
two sides for each $\tau$:
"""


# %%
def sides(guide, x, z):
    """The logarithms of both sides of 11-B, for each tau."""
    for tau in range(1, T):
        whole, past = guide.posterior(x[..., : tau + 1, :]), guide.posterior(x[..., :tau, :])
        until = z[..., : tau + 1, :]
        last = whole.steps(until).log_prob(until)[..., -1]
        yield whole.log_prob(until), last + past.log_prob(until[..., :-1, :])


checked = {
    "linear, filters": (guide, x, q.sample()),
    "recurrent, filters": (causal, y, z),
    "recurrent, smooths": (smoothing, y, z),
}
for name, arguments in checked.items():
    apart = max((left - right).abs().max() for left, right in sides(*arguments))
    print(f"{name:<20}the two sides differ by {apart:.0e} nats at most")

# %% [markdown]
r"""
It holds up to rounding for guides of the form of equation 10, but not for a guide that used
$x_\tau$ when it drew the past. The ELBO of such a guide is a sum over time as well, with all of $x$
behind each bar. But its terms up to $\tau$ are not those of the sequence cut off there.

## Equation 12: reconstruction and KL of each step

The last two terms of $f_\tau$ become a KL divergence when the innermost expectation is taken:

$$
\sum_{\tau=0}^t \mathbb E_{z_{0:\tau-1}} \mathbb E_{z_\tau}[f_\tau]
= \sum_{\tau=0}^t \mathbb E_{z_{0:\tau-1}}\Big[
\mathbb E_{z_\tau}[\log p(x_\tau \mid z_\tau)] - \mathrm{KL}\big(q(z_\tau \mid z_{0:\tau-1},
x_{0:\tau}) \,\|\, p(z_\tau \mid z_{0:\tau-1})\big)\Big].
\qquad \tag{12}
$$

For the linear model all three forms can be computed exactly:
"""


# %%
def terms_of(z, q):
    """f_tau of all steps of z, (..., T)."""
    prior = linear.prior(z.shape[-2]).steps(z)
    seen = linear.decode(z).log_prob(x[: z.shape[-2]])
    return seen + prior.log_prob(z) - q.steps(z).log_prob(z)


def given_past(tau, past):
    """The bracket of equation 12, for z_{0:tau-1} (..., tau, 2)."""
    filled = torch.cat([past, torch.zeros(*past.shape[:-2], 1, 2)], -2)  # z_tau is not looked at
    q_tau = guide.posterior(x[: tau + 1]).steps(filled)
    p_tau = linear.prior(tau + 1).steps(filled)
    mean, covariance = q_tau.mean[..., -1, :], q_tau.covariance_matrix[..., -1, :, :]
    spread = (linear.H @ covariance @ linear.H.T).diagonal(dim1=-2, dim2=-1)
    seen = linear.decode(mean).log_prob(x[tau]) - 0.5 * (spread / linear.sigma**2).sum(-1)
    return seen - kl_divergence(q_tau, p_tau)[..., -1]


of_all = expected(lambda z: terms_of(z, q), q)
until, nested = [], []
for tau in range(T):
    cut = guide.posterior(x[: tau + 1])
    until.append(expected(lambda z, cut=cut: terms_of(z, cut)[..., -1], cut))
    if tau == 0:
        nested.append(given_past(0, torch.zeros(0, 2)))
    else:
        past = guide.posterior(x[:tau])
        nested.append(expected(lambda z, tau=tau: given_past(tau, z), past))

print("tau       (11)   trick 1      (12)")
columns = of_all.tolist(), torch.stack(until).tolist(), torch.stack(nested).tolist()
for tau, row in enumerate(zip(*columns, strict=True)):
    print(f"{tau:<5}" + "".join(f"{value:>10.5f}" for value in row))
sums = [sum(column) for column in columns]
print("sum  " + "".join(f"{value:>10.5f}" for value in sums))
print(f"\n(8), from above: {elbo:.5f}; largest difference {max(abs(s - elbo) for s in sums):.0e}")

# %% [markdown]
r"""
For the recurrent network expectations are means over draws. For the first column we draw whole
sequences (`pe.SequentialELBO(kl="sampled")`). For the second we draw again, from the sequence cut
off after $\tau$. For the third we draw the past, take the KL in closed form, and draw $z_\tau$ for
the reconstruction only (`pe.SequentialELBO(kl="analytic")`).
"""

# %%
num_draws = 200 if SMOKE else 20_000


def by_time(kl, x):
    """f_tau of each draw, (T, draws), with a sampled KL or one in closed form."""
    objective = pe.SequentialELBO(kl=kl, num_particles=num_draws, vectorize_particles=True)
    terms = objective.terms(recurrent, causal, x)
    return (terms.reconstruction_by_time - terms.kl_by_time).squeeze(-1)


whole = by_time("sampled", y)
cut = torch.stack([by_time("sampled", y[:, : tau + 1])[-1] for tau in range(T)])
inner = by_time("analytic", y)
found = {"(11)": whole, "trick 1": cut, "(12)": inner}
print("tau" + "".join(f"{name:>20}" for name in found))
for tau in range(T):
    print(f"{tau:<3}" + "".join(f"{with_error(f[tau]):>20}" for f in found.values()))
print("sum" + "".join(f"{with_error(f.sum(0)):>20}" for f in found.values()))

errors = {name: f.std(1) / num_draws**0.5 for name, f in found.items()}
for name in ("trick 1", "(12)"):
    off = (found[name].mean(1) - whole.mean(1)) / (errors[name] ** 2 + errors["(11)"] ** 2).sqrt()
    print(f"{name} and (11) differ by at most {off.abs().max():.1f} standard errors")

# %%
_, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharex=True)
for i, (name, f) in enumerate(found.items()):
    at, style = torch.arange(T) + 0.2 * (i - 1), f"C{i}" + "osD"[i]
    off = f.mean(1) - inner.mean(1)
    axes[0].plot(torch.arange(T) + 0.2 * (i - 1), f.mean(1), style, label=name)
    axes[1].errorbar(at, off, 2 * errors[name], fmt=style, capsize=3, label=name)
axes[0].set(xlabel=r"step $\tau$", ylabel=r"$E[f_\tau]$ (nats)")
axes[1].set(xlabel=r"step $\tau$", ylabel="less the mean of (12) (nats)")
axes[1].axhline(0.0, color="0.6", linewidth=0.8)
axes[0].legend()
plt.show()

# %% [markdown]
r"""
The three forms have the same mean. The right panel shows the differences, with two standard errors.
The standard errors are not smaller with the KL in closed form: near the posterior $\log p - \log q$
as a whole hardly varies, but with a closed-form KL nothing cancels the noise of the reconstruction.
For gradients, and far from the posterior, the closed form is better (`help(pe.SequentialELBO)`).

How far is the bound from $\log p(x)$? There is no Kalman filter here, but a particle filter comes
close, from below on average:
"""

# %%
runs = [
    pe.ParticleFilterELBO(100 if SMOKE else 2000).filter(recurrent, causal, y).log_evidence
    for _ in range(4 if SMOKE else 20)
]
print(f"bound, (12)                {with_error(inner.sum(0))}")
print(f"log p(x), particle filter  {with_error(torch.cat(runs))}")

# %% [markdown]
r"""
## Equation 13: an ELBO in each step

Put together,

$$
\log p(x_{0:t}) \ge \sum_{\tau=0}^t \mathbb E_{z_{0:\tau-1}}\Big[\underbrace{
\mathbb E_{z_\tau}[\log p(x_\tau \mid z_\tau)] - \mathrm{KL}\big(q(z_\tau \mid z_{0:\tau-1},
x_{0:\tau}) \,\|\, p(z_\tau \mid z_{0:\tau-1})\big)}_{\text{the ELBO of a single } x}\Big].
\qquad \tag{13}
$$

The brackets contain the ELBO of a single observation (equation 6, in `02_three_derivations`), with
the prediction from the past in place of the prior. `07_sequences` continues from here and shows
which guide loses how much, and at which step.

## MERLIN: what a memory saves

In MERLIN (Wayne et al. 2018) an agent that observes its world only in part trains its memory with
this bound; the gradient of its policy does not enter the memory. The prior of $z_\tau$ is computed
from the memory, so the KL measures the surprise that memory has not predicted. Here is the smallest
possible world. There are two rooms, each with one of two colours; the agent starts in the first
room and moves at random. The action $u_\tau$ is the room that it goes to, and $x_\tau$ the colour
that it sees there. A new room carries $\log 2$ nats of surprise, and a known room none.
"""

# %%
torch.set_default_dtype(torch.float32)
pyro.set_rng_seed(0)


def walks(num):
    """Colours (num, T, 1), actions (num, T, 2), and whether the room was known, (num, T)."""
    colours, rooms = torch.rand(num, 2).round(), torch.randint(2, (num, T))
    rooms[:, 0] = 0
    known = torch.stack([(rooms[:, :t] == rooms[:, t, None]).any(1) for t in range(T)], 1)
    return colours.gather(1, rooms).unsqueeze(-1), nn.functional.one_hot(rooms).float(), known


class Forgetful(VRNN):
    """The same without a memory: the state stays at 0."""

    def advance(self, s, z, *u):
        return torch.zeros_like(s)


x, u, known = walks(100 if SMOKE else 2000)
precise = pe.SequentialELBO(num_particles=10, vectorize_particles=True)


def run(kind, num_iterations, seed):
    """The bound of whole walks, of new and of known rooms, and the KL of new and of known rooms."""
    pyro.set_rng_seed(seed)
    likelihood, num_iterations = BernoulliLikelihood(), 5 if SMOKE else num_iterations
    model = kind(4, 1, state=24, hidden=(24,), num_inputs=2, likelihood=likelihood)
    filtering = vrnn.Filtering(model, hidden=24)
    objective = pe.SequentialELBO(Linear(0.1, 1.0, steps=num_iterations // 2))
    modules = [model, filtering]
    train(objective(*modules), modules, lambda: walks(100)[:2], num_iterations, lr=0.01)
    terms = precise.terms(model, filtering, x, inputs=u)
    kl = terms.kl_by_time.mean(1).T
    bound = terms.reconstruction_by_time.mean(1).T - kl
    return torch.stack(
        [bound.sum(1).mean(), *(v[i].mean() for v in (bound, kl) for i in (~known, known))]
    )


print(
    f"{'nats':<10}"
    + "".join(f"{of:>18}" for of in ("a walk", "new room", "known room", "KL: new", "KL: known"))
)
whole = -math.log(2) * (~known).sum(1).float().mean()
print(f"{'exact':<10}{whole:>8.3f}{-math.log(2):>18.3f}{0:>18.3f}")
for name, kind, num_iterations in (("memory", VRNN, 800), ("no memory", Forgetful, 300)):
    runs = torch.stack([run(kind, num_iterations, seed) for seed in range(2 if SMOKE else 3)])
    errors = runs.std(0) / len(runs) ** 0.5
    cells = (f"{m:.3f} ± {e:.3f}" for m, e in zip(runs.mean(0), errors, strict=True))
    print(f"{name:<10}" + "".join(f"{cell:>18}" for cell in cells))

# %% [markdown]
r"""
With a memory the prior predicts the colour of a known room, and the KL is spent in new rooms.
Without a memory a known room is as surprising as a new one. (Means over three runs of each, with
standard errors.) MERLIN's memory is a table that is read and written, its policy acts on what is
read, and the model predicts rewards, too; the bound has the same form.

## DVRL: a belief of particles

In a partly observed world the agent does not know the state. It can compute only the *belief*
$p(z_\tau \mid x_{0:\tau}, u_{1:\tau})$, and has to act on it. Deep variational reinforcement
learning (Igl et al. 2018) represents the belief by weighted particles, and trains the model and the
proposal with the bound of the particle filter that generates them: $\mathbb E[\log Z]$, where $Z$
estimates $p(x_{0:t} \mid u_{1:t})$ without bias.

A robot is in a corridor with three doors, and does not know where. Its sensor reports whether there
is a door, and is wrong one time in twenty; its steps are not exact. On a grid of positions the
belief can be enumerated.
"""


# %%
class Corridor(PyroModule):
    """z_t: where the robot is; u_t: its step; x_t: whether it sees a door."""

    def __init__(self, length):
        super().__init__()
        self.length = nn.Parameter(torch.tensor(length))  # of a step
        self.doors = torch.tensor([-4.0, -1.0, 3.0])

    def sensor(self, z):
        near = torch.exp(-0.5 * ((z - self.doors) / 0.4) ** 2).amax(-1)
        return dist.Bernoulli(0.05 + 0.9 * near)

    def move(self, z, u):
        return dist.Normal(z + self.length * u, 0.2).to_event(1)

    def prior(self, u):
        start = dist.Normal(torch.zeros(len(u), 1), 3.0).to_event(1)
        return MarkovChain(start, self.move, inputs=u)

    def forward(self, x, u):
        with pyro.plate("data", len(u)):
            z = pyro.sample("z", self.prior(u))
            return pyro.sample("x", Emission(self.sensor, z), obs=x)


class Moves(PyroModule):
    """The proposal: z_t as the model moves it, without a look at x_t."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, u):
        with pyro.plate("data", len(u)):
            return pyro.sample("z", self.model.prior(u))


def episodes(num, num_steps=12):
    """Positions, observations and actions; the robot mostly goes on in one direction."""
    way = torch.where(torch.rand(num, 1, 1) < 0.5, 1.0, -1.0)
    u = torch.where(torch.rand(num, num_steps, 1) < 0.85, way, -way)
    nodes = poutine.trace(Corridor(1.0)).get_trace(None, u).nodes
    return nodes["z"]["value"], nodes["x"]["value"], u


def enumerated(model, x, u, grid):
    """log p(x | u), (B,), and the belief of each step on a grid of G positions, (T, B, G)."""
    apart = grid[1] - grid[0]
    door = model.sensor(grid[:, None]).probs
    moves = {way: model.move(grid[:, None], way).log_prob(grid[:, None, None]) for way in (-1, 1)}
    to_right, to_left = (moves[way].exp() * apart for way in (1, -1))  # (to, from)
    belief, beliefs, log_p = dist.Normal(0.0, 3.0).log_prob(grid).exp() * apart, [], 0.0
    belief = belief.expand(len(x), -1)
    for t in range(x.shape[1]):
        if t > 0:
            belief = torch.where(u[:, t] > 0, belief @ to_right.T, belief @ to_left.T)
        belief = belief * torch.where(x[:, t, None] > 0, door, 1 - door)
        total = belief.sum(-1, keepdim=True)
        belief, log_p = belief / total, log_p + total.squeeze(-1).log()
        beliefs.append(belief)
    return log_p, torch.stack(beliefs)


pyro.set_rng_seed(0)
z, x, u = episodes(20 if SMOKE else 100)
world, grid = Corridor(1.0), torch.arange(-24.0, 24.0, 0.0625)
log_p, exact = enumerated(world, x, u, grid)

WIDTH = 0.5  # of the bins in which beliefs are compared
num_bins = 96


def in_bins(position, weights):
    """The probability of each bin, (T, B, 96), of weighted positions (T, B, K)."""
    bins = ((position + 24.0) / WIDTH).long().clamp(0, num_bins - 1).expand(weights.shape)
    return torch.zeros(*weights.shape[:2], num_bins).scatter_add(2, bins, weights)


exact_bins = in_bins(grid, exact)
print(f"log p(x | u) by enumeration: {log_p.mean():.3f} nats per episode")
print("particles        missing nats   distance of beliefs (total variation)")
for num in (10, 100, 1000):
    objective = pe.ParticleFilterELBO(num)
    missing = log_p - objective.filter(world, Moves(world), x, u).log_evidence
    particles, weights = objective.beliefs(world, Moves(world), x, u)
    bins = in_bins(particles.squeeze(-1).movedim(1, -1), weights.movedim(1, -1))
    distance = 0.5 * (bins - exact_bins).abs().sum(-1).mean(0)
    print(f"{num:<9}{with_error(missing):>20}{with_error(distance):>22}")

# %% [markdown]
r"""
With more particles the bound approaches $\log p(x \mid u)$, and the belief approaches the exact
one. Here is one episode. At first the robot may be at any of the three doors, or between them; as
it moves and observes, a single position remains:
"""

# %% tags=["figure"]
doubt = exact_bins.clamp(min=1e-30)
entropy = -(doubt * doubt.log()).sum(-1)
one = int((entropy[2] - entropy[-1]).argmax())  # the one that learns most
_, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharex=True, sharey=True)
for ax, name, belief in zip(
    axes, ("enumerated", f"{num} particles"), (exact_bins, bins), strict=True
):
    extent = (-0.5, z.shape[1] - 0.5, -24, 24)
    shown = {"origin": "lower", "aspect": "auto", "extent": extent, "cmap": "Blues"}
    image = ax.imshow(belief[:, one].T, vmin=0, vmax=0.6, **shown)
    ax.plot(z[one, :, 0], ".:", color="C1", label="the robot")
    for door in world.doors:
        ax.axhline(door, color="0.6", linewidth=0.6)
    ax.set(title=name, xlabel="step", ylim=(-12, 12))
axes[0].set_ylabel("position (doors are lines)")
axes[0].legend(loc="lower left")
plt.colorbar(image, ax=axes, label=f"probability in a bin of {WIDTH}")
plt.show()

# %% [markdown]
r"""
The bound can be maximised as well. The model starts with a wrong length of the robot's steps, 0.7,
and learns it from observations and actions. DVRL's gradient ignores the dependence of resampling on
the parameters; `gradient="unbiased"` includes it. Here are the means over four runs of each, and
the maximum of the exact likelihood on the grid:
"""

# %%
z, x, u = episodes(20 if SMOKE else 100)
num_iterations = 2 if SMOKE else 60
for gradient in ("biased", "unbiased"):
    found = []
    for seed in range(2 if SMOKE else 4):
        pyro.set_rng_seed(seed)
        learned = Corridor(0.7)
        loss = pe.ParticleFilterELBO(50, gradient=gradient)(learned, Moves(learned))
        optimiser = torch.optim.Adam([learned.length], lr=0.03)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_iterations)
        with torch.enable_grad():
            for _ in range(num_iterations):
                optimiser.zero_grad()
                loss(x, u).backward()
                optimiser.step()
                falling.step()
        found.append(learned.length.detach())
    print(f"length of a step, {gradient:<18}{with_error(torch.stack(found))}")
lengths = torch.linspace(0.9, 1.1, 3 if SMOKE else 21)
likelihoods = [enumerated(Corridor(length.item()), x, u, grid)[0].sum() for length in lengths]
best = lengths[torch.stack(likelihoods).argmax()]
print(f"length of a step, {'exact likelihood':<18}{best:>11.2f}   (the world's is 1)")

# %% [markdown]
r"""
Here both reach the exact maximum, up to their errors. In general the biased gradient does not
(`help(pe.ParticleFilterELBO)` has an example). In DVRL the proposal is a network with input
$x_\tau$, and the policy is a network applied to the particles; both are trained with the model, by
this bound together with the loss of the policy.

## What to take with you

- Equation 8 is Jensen's inequality; equations 9 to 12 arrange it by time. Two properties make this
  possible: no latent depends on later ones, and the guide draws the past without looking ahead.
- `pe.SequentialELBO` computes equation 12, or with `kl="sampled"` equation 11.
- The value of a memory is the KL that it saves.
- A particle filter represents the belief, and its bound trains the model: `pe.ParticleFilterELBO`.
"""
