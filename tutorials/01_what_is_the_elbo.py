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
# What is the ELBO?

You have data $x$ and want their distribution $p(x)$. It is complicated, so you build it from simple
parts with the help of an unobserved variable $z$. The price is an integral. This notebook shows
where the integral comes from, how the evidence lower bound (ELBO) gets around it, and what the two
terms of the ELBO do to a posterior.

It assumes only that you know probability densities. All values are in *nats*, that is, natural
logarithms are used.
"""

# %%
import math
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from IPython.display import Image, display
from matplotlib.animation import FuncAnimation
from matplotlib.patches import Circle, FancyBboxPatch
from pyro.infer.inspect import get_model_relations
from torch import nn

import pyproelbo as pe
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.gmm import GMM
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vae import VAE, GaussianLikelihood

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
pyro.set_rng_seed(0)

# %% [markdown]
r"""
## A complicated p(x), from copies of a simple one

Here is a density with three bumps: a mixture of Gaussians, `GMM` in the library's collection of
models. In this notebook it plays the role of the unknown truth, and we only see draws from it.
"""


# %%
def mixture(weights, loc, scale):
    """A GMM of one feature with these parameters."""
    gmm = GMM(len(weights), num_features=1)
    with torch.no_grad():
        gmm.logits.copy_(torch.tensor(weights).log())
        gmm.loc.copy_(torch.as_tensor(loc)[:, None])
        gmm.log_scale.copy_(torch.tensor(scale).log()[:, None])
    return gmm


truth = mixture([0.3, 0.45, 0.25], loc=[-4.0, 0.5, 4.0], scale=[0.8, 1.2, 0.6])
x = truth(num=200 if SMOKE else 1000).detach()
print("data:", tuple(x.shape))

# %% [markdown]
r"""
Now take the simplest density there is, $p(z) = \mathcal N(0, 1)$, shift seven copies of it to
different places, and add them up. With equal weights the sum is a poor fit. With better weights,
found by maximising the mean of $\log p(x)$ over the data, the fit is decent.
"""

# %%
places = torch.linspace(-5.0, 5.0, 7)
equal = mixture([1 / 7] * 7, places, [1.0] * 7)
tuned = mixture([1 / 7] * 7, places, [1.0] * 7)

optimiser = torch.optim.Adam([tuned.logits], lr=0.1)
for _ in range(20 if SMOKE else 300):
    optimiser.zero_grad()
    (-tuned.log_evidence(x).mean()).backward()
    optimiser.step()

print("mean log p(x), nats per datum")
for name, gmm in {"truth": truth, "equal weights": equal, "tuned weights": tuned}.items():
    print(f"{name:<16}{gmm.log_evidence(x).mean():.4f}")

# %%
grid = torch.linspace(-8.0, 8.0, 400)


@torch.no_grad()
def density(gmm):
    """p(x) on the grid, and the weighted copies that it is the sum of, (G, K)."""
    copies = dist.Normal(gmm.loc.T, gmm.scale.T).log_prob(grid[:, None]).exp() * gmm.weights
    return gmm.log_evidence(grid[:, None]).exp(), copies


_, axes = plt.subplots(2, 2, figsize=(8, 5), sharex=True)
axes[0, 0].hist(x[:, 0].numpy(), bins=50, density=True, color="0.85", label="data")
axes[0, 0].plot(grid, density(truth)[0], color="C3", label="p(x)")
axes[0, 1].plot(grid, dist.Normal(0.0, 1.0).log_prob(grid).exp(), label="p(z)")
for ax, gmm, name in ((axes[1, 0], equal, "equal weights"), (axes[1, 1], tuned, "tuned weights")):
    total, copies = density(gmm)
    ax.plot(grid, copies, color="C0", linewidth=0.8)
    ax.plot(grid, total, color="C0", linewidth=2, label=f"copies, {name}")
    ax.plot(grid, density(truth)[0], color="C3", linestyle="dashed", label="p(x)")
    ax.set(ylim=(0, 0.22))
for ax, variable in zip(axes.flat, "xzxx", strict=True):
    ax.legend(loc="upper right", fontsize=8)
    ax.set(xlabel=variable, ylabel="density")
plt.show()

# %% [markdown]
r"""
Which copy a datum came from is a *latent variable* $z$: it is part of the story, but not of the
data. The weights are its prior $p(z)$, the shifted copies are $p(x \mid z)$, and adding up is

$$p(x) = \sum_z p(x \mid z)\, p(z).$$

## From a sum to an integral

If $z$ is a real number, there is a copy for every value of $z$:

$$p(x) = \int p(x \mid z)\, p(z)\, dz. \tag{1}$$

In Pyro a model is a program that draws $z$ and then $x$. Here $z \sim \mathcal N(0, 1)$ is the
logarithm of a size, and $x$ is a measurement of the size, with noise of scale $0.5$.
"""

# %%
NOISE = 0.5


def model(x):
    """The logarithm z of a size, and a measurement x of it, for each datum."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.exp(), NOISE), obs=x)


def log_joint(x, z):
    """log p(x, z) = log p(x | z) + log p(z)."""
    return dist.Normal(z.exp(), NOISE).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(z)


# %% [markdown]
r"""
With a single number $z$ we can afford the integral: a sum over a fine grid. The left panel shows a
handful of the copies, all with the same weight, at the deciles of $p(z)$; the right panel shows
their sum over all $z$.
"""

# %%
z_grid = torch.linspace(-5.0, 4.0, 2001)
dz = z_grid[1] - z_grid[0]
sizes = torch.linspace(-2.0, 8.0, 300)
log_p = (log_joint(sizes[:, None], z_grid) + dz.log()).logsumexp(-1)
deciles = dist.Normal(0.0, 1.0).icdf(torch.linspace(0.05, 0.95, 10))
copies = dist.Normal(deciles.exp(), NOISE).log_prob(sizes[:, None]).exp() / len(deciles)

_, (left, right) = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
left.plot(sizes, copies, color="C0", linewidth=0.8)
left.plot(sizes, copies.sum(-1), color="C0", label="10 copies")
right.plot(sizes, log_p.exp(), color="C3", label="p(x), all copies")
for ax in (left, right):
    ax.set(xlabel="measured size x", ylabel="density")
    ax.legend()
plt.show()

# %% [markdown]
r"""
A grid is seldom affordable. With $k$ latent numbers and 100 points for each, it has $100^k$ points:
"""

# %%
for k in (1, 2, 5, 10, 40):
    print(f"k = {k:>2}: {100.0**k:.0e} points")

# %% [markdown]
r"""
Random points do not help as long as they are drawn from the prior. Most of them explain the datum
badly, and the more latents there are, the fewer points explain it at all. To see this we need a
model whose true $\log p(x)$ is known, such as probabilistic PCA. We estimate (1) by the mean of
$p(x \mid z)$ over draws of $p(z)$.
"""

# %%
num_draws = 100 if SMOKE else 1000
dims, exact, estimated = [1, 2, 3, 5, 8, 12], [], []
with torch.no_grad():
    for k in dims:
        ppca = PPCA(num_latents=k, num_features=2 * k)
        ppca.log_sigma.fill_(-1.0)
        data = ppca(num=200)
        z = ppca.prior().sample((num_draws, len(data)))
        log_mean = ppca.decode(z).log_prob(data).logsumexp(0) - math.log(num_draws)
        exact.append(ppca.log_evidence(data).mean().item())
        estimated.append(log_mean.mean().item())

_, ax = plt.subplots()
ax.plot(dims, exact, "o-", color="0.15", label="exact")
ax.plot(dims, estimated, "o-", color="C1", label=f"{num_draws:,} draws from the prior")
ax.set(xlabel="number of latents k", ylabel="mean log p(x) (nats per datum)")
ax.legend()
plt.show()
print("missing, nats per datum:", [f"{e - s:.2f}" for e, s in zip(exact, estimated, strict=True)])

# %% [markdown]
r"""
## Ask where z may have been

Not all $z$ matter for a datum $x$, only those that could have produced it. Suppose that we have a
density $q(z)$ that is large where these $z$ are. Multiply and divide by it, and the integral is a
mean over draws from $q$. The logarithm is concave, so the mean of a logarithm is at most the
logarithm of the mean (Jensen's inequality):

$$
\log p(x) = \log \int q(z)\, \frac{p(x, z)}{q(z)}\, dz
          = \log \mathbb E_q\!\left[\frac{p(x, z)}{q(z)}\right]
          \ge \mathbb E_q\!\left[\log \frac{p(x, z)}{q(z)}\right]
          = \underbrace{\mathbb E_q[\log p(x, z)]}_{\text{minus the energy}}
          + \underbrace{\mathcal H[q]}_{\text{entropy}}. \tag{2}
$$

The right-hand side is the **ELBO**, the lower bound on the *evidence* $\log p(x)$. It is a mean
over draws of $q$, so it can be estimated and maximised, and the bound holds whatever $q$ is.

The terms come from physics, where a state $z$ of energy $E(z)$ has a probability proportional to
$e^{-E(z)}$. So the energy is $E(z) = -\log p(x, z)$, and the first term, $\mathbb E_q[\log p(x,
z)]$, is the *negative* mean energy. The ELBO is the negative of the variational free energy, which
is mean energy less entropy: raising the ELBO lowers the free energy. The library's `terms.energy`
keeps the sign of $\log p$; it is $\mathbb E_q[\log p(x, z)]$.

In Pyro $q$ is a program, too, the *guide*. This one is a normal distribution with a location and a
scale to learn.
"""


# %%
class NormalGuide(nn.Module):
    """q(z) = N(loc, scale^2)."""

    def __init__(self, loc, scale):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    @property
    def q(self):
        """The distribution of z."""
        return dist.Normal(self.loc, self.log_scale.exp())

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.q)


# %% [markdown]
r"""
We take one measurement, and a first guess at its $z$. `pe.BetaELBO()` is the ELBO, and `terms`
returns its parts.
"""

# %%
x0 = torch.tensor([1.2])
log_p0 = (log_joint(x0, z_grid) + dz.log()).logsumexp(-1)

objective = pe.BetaELBO(num_particles=1000, vectorize_particles=True)
terms = objective.terms(model, NormalGuide(0.0, 1.0), x0)
print(f"E[log p(x, z)]   {terms.energy:>8.3f} nats")
print(f"entropy          {terms.entropy:>8.3f}")
print(f"their sum        {terms.energy + terms.entropy:>8.3f}")
print(f"log p(x)         {log_p0:>8.3f}")

# %% [markdown]
r"""
The bound holds, and there is room for improvement. What does each of the two terms do to $q$?

## The energy alone: q collapses to a point

Suppose $q$ only minimised its mean energy, that is, maximised $\mathbb E_q[\log p(x, z)]$. This is
a weighted mean of the values of $\log p(x, z)$, with weights given by $q$. The mean is largest if
all weight is on the largest value: then $q$ is a Dirac delta at the maximum of $p(x, z)$.

An objective of your own is a class with one method. Here it leaves the entropy out:
"""


# %%
class EnergyOnly(pe.TermsELBO):
    """E_q[log p(x, z)], without the entropy."""

    def objective(self, terms):
        return terms.energy


def fit(objective, guide, steps):
    """Train the guide on x0; location, log scale, E[log p(x, z)] and entropy at each step."""
    loss = objective(model, guide)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.03)
    path = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss(x0).backward()
        now = objective.last_terms
        parameters = [p.detach().clone() for p in guide.parameters()]
        path.append(torch.stack([*parameters, now.energy, now.entropy]))
        optimiser.step()
    return torch.stack(path)


steps = 30 if SMOKE else 400
particles = {"num_particles": 100, "vectorize_particles": True}
collapsing = fit(EnergyOnly(**particles), NormalGuide(-1.5, 1.0), steps)
fitting = fit(pe.BetaELBO(**particles), NormalGuide(-1.5, 1.0), steps)


# %%
def show(ax, path, step):
    """q at a step, above p(x0, z)."""
    loc, log_scale, *_ = path[step]
    joint = log_joint(x0, z_grid).exp()
    ax.fill_between(z_grid, joint / joint.max(), color="0.85", label="p(x, z)")
    q = dist.Normal(loc, log_scale.exp()).log_prob(z_grid).exp()
    ax.plot(z_grid, q / q.max(), color="C0", label="q(z)")
    ax.set(title=f"step {step}, scale of q {log_scale.exp():.2f}", xlabel="z", xlim=(-4, 2))
    ax.title.set_size(9)


frames = [round(f * (steps - 1)) for f in (0, 0.15, 0.4, 1)]
_, axes = plt.subplots(1, 4, figsize=(10, 2.6), sharey=True)
for ax, step in zip(axes, frames, strict=True):
    show(ax, collapsing, step)
axes[0].set_ylabel("density / its maximum")
axes[-1].legend(loc="upper left", fontsize=8)
plt.show()

# %% [markdown]
r"""
## The entropy spreads it

Certainty costs entropy. The entropy of a uniform density on $(z_0 - \epsilon, z_0 + \epsilon)$ is
$\log 2 \epsilon$, that of a normal one $\frac 1 2 \log 2 \pi e \sigma^2$. Both fall without limit
as the width goes to 0: a Dirac delta has the entropy $-\infty$.
"""

# %%
widths = torch.logspace(-3, 1, 100)
_, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for scale in (2.0, 0.5, 0.1):
    q = dist.Normal(0.0, scale)
    label = rf"$\sigma$ = {scale}: {q.entropy():.2f} nats"
    left.plot(z_grid, q.log_prob(z_grid).exp(), label=label)
left.set(xlabel="z", ylabel="density")
right.plot(widths, dist.Uniform(-widths, widths).entropy(), label=r"uniform, width $2 \epsilon$")
right.plot(widths, dist.Normal(0.0, widths).entropy(), label=r"normal, scale $\sigma$")
right.axhline(0, color="0.6", linewidth=0.8)
right.set(xscale="log", xlabel=r"$\epsilon$ or $\sigma$ (units of z)", ylabel="entropy (nats)")
for ax in (left, right):
    ax.legend(loc="upper left", fontsize=8)
plt.show()

# %% [markdown]
r"""
Energy and entropy together pull $q$ to the peak of $p(x, z)$, and make it as wide as the peak
allows:
"""

# %%
_, axes = plt.subplots(1, 4, figsize=(10, 2.6), sharey=True)
for ax, step in zip(axes, frames, strict=True):
    show(ax, fitting, step)
axes[0].set_ylabel("density / its maximum")
axes[-1].legend(loc="upper left", fontsize=8)
plt.show()

# %% [markdown]
r"""
The next cell animates the two runs side by side:
"""

# %% tags=["animation"]
runs = {"E[log p(x, z)] alone": collapsing, "the ELBO": fitting}
picture, axes = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)


def frame(step):
    """Both q at a step."""
    for ax, (name, path) in zip(axes, runs.items(), strict=True):
        ax.clear()
        show(ax, path, step)
        bound = path[step, 2] + path[step, 3]
        ax.set_title(f"maximised: {name}\nstep {step}, ELBO {bound:.2f} nats", fontsize=9)
        ax.set_ylim(0, 1.05)
    axes[0].set_ylabel("density / its maximum")
    axes[1].legend(loc="upper left", fontsize=8)


early = range(0, min(steps, 160), 4)
late = range(160, steps, 24)
moving = FuncAnimation(picture, frame, frames=[*early, *late], interval=100)
with tempfile.TemporaryDirectory() as folder:
    moving.save(Path(folder) / "q.gif", writer="pillow")
    display(Image((Path(folder) / "q.gif").read_bytes(), format="gif"))
plt.close(picture)

# %% [markdown]
r"""
![q at each step of the two runs](figures/01_what_is_the_elbo.gif)

The next figure shows the same two runs in nats. On the left, the entropy falls without limit, and
so does the sum. On the right, the sum climbs towards $\log p(x)$ and stops below it. The jitter is
Monte Carlo noise.
"""

# %%
_, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for ax, (name, path) in zip(axes, runs.items(), strict=True):
    energy, entropy = path[:, 2:].T
    ax.plot(energy, color="C1", label="E[log p(x, z)]")
    ax.plot(entropy, color="C2", label="entropy")
    ax.plot(energy + entropy, color="C0", label="ELBO")
    ax.axhline(log_p0, color="0.15", linestyle="dashed", label="log p(x)")
    ax.set(title=f"maximised: {name}", xlabel="training step", ylabel="nats", ylim=(-8, 3))
axes[1].legend(ncols=2)
plt.show()

# %% [markdown]
r"""
How close does it get? We average the ELBO of the last step's $q$ over many draws.
"""

# %%
loc, log_scale = fitting[-1, :2].tolist()
best = NormalGuide(loc, math.exp(log_scale))
found = pe.evidence(model, best, x0, num_samples=1000 if SMOKE else 100_000)
elbo, error = found.elbo.item(), found.elbo_stderr.item()
print(f"ELBO of the fitted q          {elbo:.4f} ± {error:.4f} nats")
print(f"log p(x), on the grid         {log_p0:.4f}")
print(f"gap                           {log_p0.item() - elbo:.4f}")

# %% [markdown]
r"""
The gap is due to the shape of $p(x, z)$, which is skewed, as no normal density is. The notebook
`03_how_good_is_q` examines such differences.

## Local and global latents, and one guide for all data

Latents are of two kinds (Blei, Kucukelbir & McAuliffe 2017). A *local* latent belongs to one datum,
such as the size of what has been measured; there are $N$ of them. A *global* latent is shared by
all data, such as the locations of the components in a mixture. Here are a program of each kind, and
the graphical models derived from the programs. Circles are random, grey ones observed, and a box
stands for copies: one for each datum, or for each component. Solid arrows belong to the model;
dashed arrows lead from the guide's inputs to the latents that it infers. (Where Graphviz is
installed, `pyro.render_model(model, model_args=(x,))` draws the model as well.)
"""


# %%
def components(x):
    """Three places mu, shared by all data; and for each datum which of them it is at."""
    with pyro.plate("components", 3):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(mu[c], 1.0), obs=x)


def draw(ax, program, places, inferred, title):
    """The graphical model of a program; its sites at these places, the guide's arrows dashed."""
    found = get_model_relations(program, (torch.zeros(2),))
    arrow = {"arrowstyle": "-|>", "color": "0.15", "shrinkA": 15, "shrinkB": 15}
    for child, parents in found["sample_sample"].items():
        for parent in parents:
            ax.annotate("", places[child], places[parent], arrowprops=arrow)
    for child in inferred:
        bent = {"linestyle": "dashed", "connectionstyle": "arc3,rad=0.45", "color": "C0"}
        ax.annotate("", places[child], places["x"], arrowprops=arrow | bent)
    for site, place in places.items():
        colour = "0.8" if site in found["observed"] else "white"
        ax.add_patch(Circle(place, 0.28, facecolor=colour, edgecolor="0.15"))
        ax.text(*place, {"mu": r"$\mu_k$"}.get(site, f"${site}_n$"), ha="center", va="center")
    for name, inside in found["plate_sample"].items():
        across, up = zip(*(places[site] for site in inside), strict=True)
        corner, width = (min(across) - 0.5, min(up) - 0.6), max(across) - min(across) + 1.15
        box = FancyBboxPatch(corner, width, max(up) - min(up) + 1.1, "round,pad=0.05", fill=False)
        ax.add_patch(box)
        ax.text(corner[0] + width, corner[1], name, ha="right", va="bottom", fontsize=8)
    ax.set(title=title, xlim=(-1, 3), ylim=(-0.8, 2.2), aspect="equal")
    ax.axis("off")


_, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
draw(left, model, {"z": (1, 1.5), "x": (1, 0)}, ["z"], "local z")
draw(
    right,
    components,
    {"c": (0, 1.5), "mu": (2, 1.5), "x": (0, 0)},
    ["c", "mu"],
    "local c, global mu",
)
plt.show()

# %% [markdown]
r"""
| | local, $z_n$ | global, $\mu$ |
|---|---|---|
| how many | grow with the data | fixed |
| posterior | depends on $x_n$ alone, given the globals | depends on all data |
| guide | a $q$ for each, or *amortised*: a function of $x_n$ | parameters of its own |
| in a minibatch | those of its data, scaled by $N / B$ | all, counted once |
| here | this notebook, from here on | the end of `02_three_derivations`; `08_arviz` |

A $q$ for each datum needs a location and a scale for each. *Amortisation* replaces them by a
function from $x$ to the location and scale of $q(z \mid x)$, a neural network that is learned once.
The model becomes learnable, too: instead of a given `exp`, $p_\theta(x \mid z)$ is a neural network
applied to $z$. Both networks together form a variational autoencoder (VAE).

Back to the data with three bumps. Can a network bend $\mathcal N(0, 1)$ into them?
"""

# %%
vae = VAE(num_latents=1, num_features=1, hidden=(32, 32), likelihood=GaussianLikelihood(0.8))
guide = Diagonal(num_latents=1, num_features=1, hidden=(32, 32))

learned = sum(p.numel() for p in guide.parameters())
print(f"numbers to learn in the guide, for any number of data: {learned:,}")
for num in (len(x), 1_000_000):
    print(f"numbers to learn with a q of its own for each of {num:,} data: {2 * num:,}")

# %% [markdown]
r"""
One objective trains both. A step of the guide that raises the ELBO brings it closer to $\log p(x)$,
which stays fixed. A step of the model raises $\log p_\theta(x) - \mathrm{KL}$. As a rule the
evidence rises, but the step may instead make the posterior easier for $q$ to fit. The best model by
the ELBO is therefore not necessarily the one with the largest $\log p_\theta(x)$
(`03_how_good_is_q` has an example). Since $z$ is one number, we can compare with the true $\log
p_\theta(x)$, on the grid as before.
"""


# %%
@torch.no_grad()
def log_evidence(vae, x):
    """log p(x) of the rows of x (N, 1), by a sum over a grid of z."""
    z = torch.linspace(-6.0, 6.0, 601)[:, None]
    prior = vae.prior().log_prob(z) + torch.tensor(12 / 600).log()
    return (vae.decode(z).log_prob(x[:, None]) + prior).logsumexp(-1)


loss = pe.BetaELBO()(vae, guide)
optimiser = torch.optim.Adam(loss.parameters(), lr=1e-2)
precise = pe.BetaELBO(num_particles=30, vectorize_particles=True)
at, elbos, evidences = [], [], []
for step in range(60 if SMOKE else 2000):
    optimiser.zero_grad()
    loss(x).backward()
    optimiser.step()
    if step % 20 == 0:
        at.append(step)
        elbos.append(precise.terms(vae, guide, x).elbo.item() / len(x))
        evidences.append(log_evidence(vae, x).mean().item())

pe.plot_elbo_trace(at, {"ELBO": elbos, "log p(x)": evidences}, ylabel="ELBO and evidence")
plt.show()
above = max(elbo - evidence for elbo, evidence in zip(elbos, evidences, strict=True))
print(f"largest ELBO - log p(x) on the way: {above:.3f} nats per datum")

# %% [markdown]
r"""
The ELBO stays below the evidence, and in this run they rise together. What has been learned?
"""

# %%
x_grid = grid[:, None]
z = torch.linspace(-3.0, 3.0, 300)[:, None]
_, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.plot(z, vae.decode(z).mean.detach())
left.set(xlabel="z", ylabel="mean of p(x | z), units of x")
right.hist(x[:, 0].numpy(), bins=50, density=True, color="0.85", label="data")
right.plot(grid, density(truth)[0], color="C3", linestyle="dashed", label="truth")
right.plot(grid, log_evidence(vae, x_grid).exp(), color="C0", label="p(x) of the VAE")
right.set(xlabel="x", ylabel="density")
right.legend()
plt.show()

# %% [markdown]
r"""
The decoder is flat where there are many data and steep where there are few: in this way it
concentrates the mass of $\mathcal N(0, 1)$ in three places.

## The ELBO against log p(x), datum by datum

In higher dimensions a grid is impossible. `pe.evidence` estimates $\log p(x)$ for each datum, with
any model and guide, from weighted draws of the guide; the ELBO is estimated from the same draws.
"""

# %%
found = pe.evidence(vae, guide, x, num_samples=100 if SMOKE else 2000)
print(found)
difference = (found.log_evidence - log_evidence(vae, x)).abs()
worst = difference.argmax()
print(f"\ndifference to the grid, median {difference.median():.4f} nats")
print(f"                        largest {difference[worst]:.4f} nats")
print(f"the latter's effective sample size {found.effective_sample_size[worst]:.1f}")
print(f"\nmean log p(x) of the truth      {truth.log_evidence(x).mean():.4f} nats per datum")

# %%
_, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
left.scatter(found.log_evidence, found.elbo, s=8, alpha=0.4, linewidths=0)
line = torch.tensor([found.elbo.min(), found.log_evidence.max()])
left.plot(line, line, color="0.15", linewidth=1, label="ELBO = log p(x)")
left.set(xlabel="log p(x) (nats)", ylabel="ELBO (nats)")
left.legend()
right.scatter(x[:, 0], found.log_evidence - found.elbo, s=8, alpha=0.4, linewidths=0)
right.set(xlabel="x", ylabel="log p(x) - ELBO (nats)", ylim=(0, None))
plt.show()

# %% [markdown]
r"""
Every datum is on or below the line: the ELBO is a *lower* bound for each single datum. The distance
to the line shows how well $q(z \mid x)$ fits there. It is largest where the decoder changes from
flat to steep.

## What to take with you

- A latent variable builds a complicated $p(x)$ from simple parts; the price is the integral (1).
- The ELBO replaces it by a mean over draws from $q$. It is a bound for any $q$.
- The energy pulls $q$ to the peak of $p(x, z)$, the entropy spreads it.
- Local latents can share one guide, a function of $x$; the posterior of global latents depends on
  all data.
- The guide and the model are trained by one objective, and the gap that remains can be measured.

Next: `02_three_derivations` derives the same bound in three ways, and `03_how_good_is_q` examines
the gap.
"""
