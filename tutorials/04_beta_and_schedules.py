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
# Beta and schedules

The ELBO of a variational autoencoder weighs two things against each other: how well the latents $z$
reconstruct $x$, and what they cost, the KL divergence from the prior. This notebook puts a weight
$\beta$ on the cost. First $\beta$ is one number, and moves along a curve of possible codes. Then it
changes while we train, to get out of a trap: *posterior collapse*, where $z$ says nothing at all.

You should know what the ELBO and a VAE are; `01_what_is_the_elbo` tells.
"""

# %%
import os
from itertools import pairwise

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyproelbo as pe
from pyproelbo.datasets import Minibatches, digits
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.nets import mlp
from pyproelbo.models.vae import VAE, BernoulliLikelihood
from pyproelbo.priors import StandardNormal
from pyproelbo.schedules import Cosine, Cyclical, Linear, Sigmoid

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
pyro.set_rng_seed(0)

# %% [markdown]
r"""
## Rate and distortion

The data are scikit-learn's images of digits, each of their 64 pixels rounded to zero or one.
"""

# %%
x = (digits().x > 0.5).float()
x = x[torch.randperm(len(x))]
train, held_out = x[297 : 397 if SMOKE else None], x[:297]
print("to train on:", tuple(train.shape), " held out:", tuple(held_out.shape))

# %% [markdown]
r"""
Write the mean ELBO of the data as $-D - R$, with the two parts

$$
D = -\mathbb E_q[\log p(x \mid z)], \qquad R = \mathrm{KL}(q(z \mid x) \,\|\, p(z)).
$$

$D$ is the *distortion*: how badly $z$ tells what $x$ was. $R$ is the *rate*: how many nats are
spent on a datum. To maximise the ELBO is to minimise $D + R$, at a price of one nat for a nat. With
another price $\beta$ we minimise $D + \beta R$ (Higgins et al. 2017), which is what
`pe.BetaELBO(beta)` does.

Training is a plain loop. An objective and two programs make a module whose value is the loss. After
each step, `last_terms` has the true ELBO and its parts, whatever was weighed.
"""

# %%
BATCH = 100


def fit(model, guide, objective, epochs):
    """Maximise the objective; rate R and ELBO in each epoch, nats per datum."""
    loss = objective(model, guide)
    optimiser = torch.optim.Adam(loss.parameters(), lr=3e-3, fused=True)
    batches, path = Minibatches(train, BATCH), []
    for _ in range(epochs):
        rate = elbo = 0.0
        for batch in batches:
            optimiser.zero_grad()
            loss(batch).backward()
            optimiser.step()
            rate += objective.last_terms.shrinkage.item() / len(train)
            elbo += objective.last_terms.elbo.item() / len(train)
        path.append((rate, elbo))
    return path


epochs = 1 if SMOKE else 60
steps = epochs * len(train) // BATCH
betas = [0.1, 4.0] if SMOKE else [0.03, 0.1, 0.3, 1.0, 2.0, 4.0]
models, guides = {}, {}
for beta in betas:
    pyro.set_rng_seed(1)
    model = VAE(10, 64, hidden=(64,), likelihood=BernoulliLikelihood())
    guide = Diagonal(10, 64, hidden=(64,))
    fit(model, guide, pe.BetaELBO(beta), epochs)
    models[beta], guides[beta] = model, guide

# %% [markdown]
r"""
`pe.surgery` evaluates the ELBO of a whole data set, and says where its KL goes. For now we need the
ELBO, $D$ and $R$, which it calls the average KL, and the number of *active units*: dimensions of
$z$ whose posterior mean differs between data.
"""

# %%
fits = {beta: pe.surgery(models[beta], guides[beta], train) for beta in betas}
others = {beta: pe.surgery(models[beta], guides[beta], held_out) for beta in betas}
print("nats per datum        train                   held out")
print("beta        D       R      ELBO    active         ELBO")
for beta, s in fits.items():
    parts = f"{-s.reconstruction:>7.2f}{s.average_kl:>8.2f}{s.elbo:>10.2f}"
    print(f"{beta:<6}{parts}{int(s.active_units.sum()):>10}{others[beta].elbo:>13.2f}")

# %% tags=["figure"]
ax = pe.plot_rate_distortion({rf"$\beta$ = {beta:g}": s for beta, s in fits.items()})
ax.set_xlim(right=1.12 * max(s.average_kl for s in fits.values()))
plt.show()

# %% [markdown]
r"""
Each point is a fit, and they lie on a curve. At its right end everything is spent on codes: $D$ is
small, $R$ is large. At its left end next to nothing is: $R$ is nearly 0, and the decoder gives
nearly the same answer for every $z$. The grey line has the slope $-1$, and all its points have the
same ELBO; it touches the curve where $\beta = 1$. There the ELBO is the largest, on the training
data and on the others.

That is no accident. If the fits are as good as they can be, then $D + \beta R$ is smallest on the
curve where its slope is $-\beta$. So $\beta$ is a price: what one nat of rate has to save in
distortion. Between two neighbours on the curve, what it saves should lie between their two prices.
"""

# %%
print("nats of distortion that a nat of rate saves, between the fits of two betas")
for low, high in pairwise(betas):
    a, b = fits[low], fits[high]
    saved = (b.reconstruction - a.reconstruction) / (b.average_kl - a.average_kl)
    print(f"beta {low:>4} and {high:>4}: {saved:>7.3f}")

# %% [markdown]
r"""
What do these numbers look like? On the left, the reconstructions of held-out digits: the mean of
$p(x \mid z)$ where $z$ is the mean of $q(z \mid x)$. On the right, what the model makes of $z$
drawn from the prior, below other data. A row is a fit.
"""

# %%
num = 8
shown = betas if SMOKE else [0.03, 0.3, 1.0, 2.0, 4.0]
prior_draws = torch.randn(num, 10)
with torch.no_grad():
    codes = {beta: guides[beta].posterior(held_out[:num]).mean for beta in shown}
    reconstructed = [models[beta].decode(codes[beta]).mean for beta in shown]
    drawn = [models[beta].decode(prior_draws).mean for beta in shown]


def gallery(ax, rows, names, xlabel):
    """Images of 8 x 8 pixels in rows with names."""
    pictures = torch.stack(rows).reshape(len(rows), -1, 8, 8)
    pictures = nn.functional.pad(pictures, (0, 1, 0, 1), value=0.15)
    ax.imshow(pictures.transpose(1, 2).flatten(2).flatten(0, 1), cmap="Greys", vmin=0, vmax=1)
    ax.set_yticks([9 * i + 3.5 for i in range(len(rows))], names)
    ax.set_xticks([9 * i + 3.5 for i in range(num)], [str(i) for i in range(num)])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(xlabel)


names = [rf"$\beta$ = {beta:g}" for beta in shown]
_, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
gallery(left, [held_out[:num], *reconstructed], ["data", *names], "held-out datum")
gallery(right, [held_out[num : 2 * num], *drawn], ["data", *names], "draw from the prior")
plt.show()

# %% [markdown]
r"""
A small $\beta$ reconstructs well, and its draws are a mess: the codes of the data have left the
region where the prior puts its mass, and the decoder has never seen what is there. A large $\beta$
forgets the digits one by one, until all that remains is the average image.

## Weights that change: schedules

A weight may also depend on the training step. A schedule is a function from a step to a number; it
stands wherever a number does, and the objective counts its steps.
"""

# %%
schedules = {
    "Linear(0, 1, 600)": Linear(0.0, 1.0, steps=600),
    "Cosine(0, 1, 600)": Cosine(0.0, 1.0, steps=600),
    "Sigmoid(0, 1, 600)": Sigmoid(0.0, 1.0, steps=600),
    "Cyclical(0, 1, 250, cycles=3)": Cyclical(0.0, 1.0, period=250, cycles=3),
    "Linear(2, 1, 600) * Sigmoid(0, 1, 200)": Linear(2.0, 1.0, 600) * Sigmoid(0.0, 1.0, 200),
}
_, ax = plt.subplots()
for name, schedule in schedules.items():
    ax.plot([schedule(step) for step in range(1000)], label=name)
ax.set(xlabel="training step", ylabel="weight")
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
r"""
What are they for? At the start of a training the decoder is random, and $z$ is noise to it. The
reconstruction gives $q$ hardly any reason to let $z$ depend on $x$. The KL divergence gives it a
reason not to, from the first step on: it is smallest, zero, where $q(z \mid x)$ is the prior for
every $x$. And where $z$ says nothing about $x$, the decoder learns to ignore it, so that there is
even less of a reason. That is the trap.

## Posterior collapse, seen

A model that can do without $z$ walks right into it. Here each pixel depends on $z$, and on the nine
pixels before it, in the order of reading: its neighbours on the left and above. Strokes are thick,
so the neighbours alone are a good guess. The network from $z$ is deep, which makes it slow to
start. It is an ordinary Pyro program; nothing in the library knows of it.
"""


# %%
class NeighboursAndLatents(nn.Module):
    """z ~ N(0, I), x_d ~ Bernoulli(logit f_d(z) + sum of w_de x_e over the 9 pixels e before d)."""

    def __init__(self, num_latents=10, hidden=(64, 64, 64), activation=nn.Tanh):
        super().__init__()
        self.prior = StandardNormal(num_latents)
        self.decoder = mlp(num_latents, hidden, 64, activation)
        self.weights = nn.Parameter(torch.zeros(64, 64))
        self.register_buffer("before", torch.ones(64, 64).triu(1).tril(9))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            logits = self.decoder(z) + x @ (self.weights * self.before)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def fit_neighbours(objective):
    """The model and its guide, from the same start each time, and the path of the training."""
    pyro.set_rng_seed(1)
    model, guide = NeighboursAndLatents(), Diagonal(10, 64, hidden=(64, 64, 64))
    return model, guide, fit(model, guide, objective, epochs)


runs = {"ELBO": fit_neighbours(pe.BetaELBO())}
print(pe.surgery(*runs["ELBO"][:2], train))

# %% [markdown]
r"""
`pe.surgery` has a word for it. The KL is gone, no dimension of $z$ is active, and $z$ might as well
not be there. Is that the best that this model can do, or only where the training got stuck?

## Cured

*Annealing* (Bowman et al. 2016) lets $\beta$ rise from 0 to 1, here over the first half of the
steps. While it is small, $z$ is nearly free, and the decoder learns to use it. When the price
comes, $z$ is worth it. *Cyclical annealing* (Fu et al. 2019) does it several times, and each time
starts from better codes. *Free bits* (Kingma et al. 2016) leave $\beta = 1$, but do not charge for
the first $\lambda$ nats of KL, so that there is nothing to gain from going below. As $\lambda$ is a
weight, it can have a schedule as well; ours goes to 0, so that in the end all three objectives are
the ELBO.
"""

# %%
half, third = max(1, steps // 2), max(1, steps // 3)
runs |= {
    "annealed": fit_neighbours(pe.BetaELBO(Linear(0.0, 1.0, steps=half))),
    "cyclical": fit_neighbours(pe.BetaELBO(Cyclical(0.0, 1.0, third, ramp=0.8, cycles=3))),
    "free bits": fit_neighbours(pe.FreeBitsELBO(Linear(5.0, 0.0, steps=half))),
}

# %%
_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
at = [(epoch + 1) * steps // epochs for epoch in range(epochs)]
rates = {name: [rate for rate, _ in path] for name, (_, _, path) in runs.items()}
elbos = {name: [elbo for _, elbo in path] for name, (_, _, path) in runs.items()}
pe.plot_elbo_trace(at, rates, ylabel="rate R", ax=left)
left.set_ylim(-0.2, 8)
pe.plot_elbo_trace(at, elbos, ax=right)
right.set_ylim(-24, -17)
plt.show()

# %%
cured = {name: pe.surgery(model, guide, train) for name, (model, guide, _) in runs.items()}
print("nats per datum       train                             held out")
print("                 ELBO       R      active units            ELBO")
for name, s in cured.items():
    other = pe.surgery(*runs[name][:2], held_out)
    active = int(s.active_units.sum())
    print(f"{name:<12}{s.elbo:>9.2f}{s.average_kl:>8.2f}{active:>10}{other.elbo:>22.2f}")
gain = cured["annealed"].elbo - cured["ELBO"].elbo
print(f"\nannealed, better than the ELBO by {gain:.2f} nats per datum")

# %% [markdown]
r"""
The last column of numbers answers the question. All four are the same model and the same guide,
from the same start, after as many steps, and the ELBO is the true one. Those that were helped have
a higher ELBO, on the training data and on the others: the collapse was a trap and not the optimum.
Look at the left panel, too. The annealed run spends many nats at first, loses nearly all of them as
the price rises, and recovers in time. The run without help never starts.
"""

# %%
print("rate, nats per datum       largest    least     last")
for name in ("ELBO", "annealed"):
    path = rates[name]
    print(f"{name:<25}{max(path):>9.2f}{min(path):>9.2f}{path[-1]:>9.2f}")

# %% [markdown]
r"""
One dimension of $z$ is in use, although there are ten. These cures prevent that all is lost; they
do not promise that everything is used.

## Capacity: a rate to order

`pe.CapacityELBO` asks for a rate: it charges $\gamma\, |R - C|$, whatever side $R$ is on (Burgess
et al. 2018). Let $C$ rise from 0, and a VAE (that of the first section) takes up some dimensions
first, and others when these have been filled. Each curve on the left is the KL of a dimension.
"""

# %%
pyro.set_rng_seed(1)
model = VAE(10, 64, hidden=(64,), likelihood=BernoulliLikelihood())
guide = Diagonal(10, 64, hidden=(64,))
blocks, every = (2, 1) if SMOKE else (30, 3)  # epochs in a block
capacity = Linear(0.0, 12.0, steps=blocks * every * len(train) // BATCH)
objective = pe.CapacityELBO(capacity, gamma=10.0)
found = {}
for _ in range(blocks):
    fit(model, guide, objective, every)
    found[capacity(objective.step)] = pe.surgery(model, guide, train)

# %%
asked = list(found)
by_dim = torch.stack([s.kl_per_dim for s in found.values()])
_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
left.plot(asked, by_dim)
left.set(xlabel="capacity C (nats per datum)", ylabel="KL of a dimension (nats per datum)")
right.plot(asked, [s.average_kl for s in found.values()], label="rate R")
right.plot(asked, [s.mutual_information for s in found.values()], label="mutual information")
right.plot(asked, asked, color="0.15", linestyle="dashed", linewidth=1, label="C")
right.set(xlabel="capacity C (nats per datum)", ylabel="nats per datum")
right.legend()
plt.show()

# %% [markdown]
r"""
The rate does as it is told. The other curve on the right is a warning. The *mutual information* is
what of the rate tells the data from each other; the notebook `05_elbo_surgery` is about it. At
first the rate is there, and it says nothing. Asked for nats, $q$ may also just move away from the
prior, by the same amount for all $x$. For the model that collapses this is fatal:
"""

# %%
runs["capacity"] = fit_neighbours(pe.CapacityELBO(Linear(0.0, 3.0, steps=half), gamma=10.0))
s = pe.surgery(*runs["capacity"][:2], train)
print(f"asked for            {3.0:>8.2f} nats per datum")
print(f"rate R               {s.average_kl:>8.2f}")
print(f"mutual information   {s.mutual_information:>z8.2f}")
print(f"ELBO                 {s.elbo:>8.2f}   (collapsed: {cured['ELBO'].elbo:.2f})")

# %% [markdown]
r"""
The KL is as large as we wanted, it looks cured, and $z$ still says nothing. **A KL above zero does
not show that a posterior has not collapsed.** Look at the active units, or at the mutual
information.

## What to take with you

| | maximises | use it |
|---|---|---|
| `pe.BetaELBO(beta)` | $-D - \beta R$ | to choose a point of the curve |
| `pe.BetaELBO(Linear(0, 1, steps))` | the same, $\beta$ rising | against collapse, first |
| `pe.BetaELBO(Cyclical(0, 1, period))` | the same, again and again | where once is not enough |
| `pe.FreeBitsELBO(free_bits)` | $-D - \max(\lambda, R)$ | where $\beta$ should stay 1 |
| `pe.CapacityELBO(C, gamma)` | $-D - \gamma \lvert R - C \rvert$ | to watch codes grow; with care |

Whatever you train with, compare by the true ELBO: `last_terms.elbo`, `pe.surgery`, `pe.evidence`.
"""
