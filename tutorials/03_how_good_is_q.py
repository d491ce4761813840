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
# How good is q?

Training ends with an ELBO. Is the posterior behind it any good? The ELBO alone cannot answer this
question, since

$$\log p(x) = \mathrm{ELBO} + \mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x)),$$

and only one of the three terms is known. This notebook shows which errors minimising the KL
divergence causes in $q$, how the missing nats are found and explained, and which diagnostic detects
what: the inference gap, Pareto $\hat k$, more draws inside the logarithm, and annealing.

You should know what the ELBO is; see `01_what_is_the_elbo` and `02_three_derivations`.
"""

# %%
import math
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.polynomial.hermite_e import hermegauss
from pyro import poutine
from scipy.optimize import minimize

import pyproelbo as pe
from pyproelbo.datasets import Minibatches, digits
from pyproelbo.guides import ppca, vae
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vae import VAE, BernoulliLikelihood

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
pyro.set_rng_seed(0)

# %% [markdown]
r"""
## The KL divergence is zero-forcing

$$\mathrm{KL}(q \,\|\, p) = \mathbb E_q\!\left[\log \frac{q(z)}{p(z \mid x)}\right]$$

is a mean over draws from $q$. Where $q$ has mass and $p$ has none, the ratio is infinite, and so is
the price. Where $p$ has mass and $q$ has none, no draw falls, and the price is zero. So $q$ stays
within $p$ rather than covering it.

As an example, measure the square of a number: $z \sim \mathcal N(0, 1)$ and $x \sim \mathcal N(z^2,
0.5^2)$. The sign of $z$ cannot be known, and the posterior has two modes.
"""


# %%
def square(x):
    """A number z, and a measurement of its square."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        pyro.sample("x", dist.Normal(z**2, 0.5).to_event(1), obs=x)


def fit_guide(model, guide, x, steps, lr=0.03):
    """Maximise the ELBO over the guide; the model stays."""
    loss = pe.BetaELBO(num_particles=50, vectorize_particles=True)(model, guide)
    optimiser = torch.optim.Adam(guide.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(x).backward()
        optimiser.step()
    return guide


steps = 20 if SMOKE else 600
x0 = torch.tensor([[3.0]])
guide = fit_guide(square, vae.Diagonal(num_latents=1, num_features=1), x0, steps)

# %% [markdown]
r"""
On a grid of $z$ we can compute the exact posterior. We compare the $q$ that minimises
$\mathrm{KL}(q \,\|\, p)$ with the $q$ that minimises $\mathrm{KL}(p \,\|\, q)$, the *forward*
divergence: this is the normal distribution with the mean and the variance of $p$. The forward
divergence is an expectation under $p$, from which we cannot draw; this is why the other one is used
for training.
"""

# %%
z = torch.linspace(-4.0, 4.0, 4001)
dz = z[1] - z[0]
log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z**2, 0.5).log_prob(x0[0])
log_p = log_joint - (log_joint + dz.log()).logsumexp(0)
mean = (log_p.exp() * z).sum() * dz
scale = ((log_p.exp() * (z - mean) ** 2).sum() * dz).sqrt()

reverse = guide.posterior(x0[0]).base_dist
fits = {
    "KL(q || p)": dist.Normal(reverse.mean.item(), reverse.stddev.item()),
    "KL(p || q)": dist.Normal(mean, scale),
}


def kl(log_a, log_b):
    """KL(a || b) of two densities on the grid."""
    return (log_a.exp() * (log_a - log_b)).sum() * dz


print("q that minimises    mean  scale   KL(q || p)   KL(p || q)   (nats)")
for name, q in fits.items():
    log_q = q.log_prob(z)
    both = kl(log_q, log_p), kl(log_p, log_q)
    print(f"{name:<17}{q.mean:>7.2f}{q.stddev:>7.2f}{both[0]:>13.2f}{both[1]:>13.2f}")

# %%
_, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for ax, (name, q) in zip(axes, fits.items(), strict=True):
    log_q = q.log_prob(z)
    ax.plot(z, log_p.exp(), color="0.15", label="p(z | x)")
    ax.plot(z, log_q.exp(), color="C0", label="q(z)")
    free = (log_q - log_p < math.log(0.01)) & (log_p.exp() > 1e-3)
    dear = (log_q - log_p > math.log(100)) & (log_q.exp() > 1e-3)
    for where, style, label in (
        (free, {"facecolor": "0.88", "linewidth": 0}, "q / p < 1/100: costs nothing"),
        (dear, {"facecolor": "none", "edgecolor": "C3", "hatch": "///"}, "q / p > 100: costs most"),
    ):
        if where.any():
            across = {"transform": ax.get_xaxis_transform(), "zorder": 0}
            ax.fill_between(z, 0, 1, where=where, label=label, **style, **across)
    ax.set(title=f"minimises {name}", xlabel="z", ylabel="density", xlim=(-3.5, 3.5), ylim=(0, 3.6))
    ax.legend(loc="upper left", fontsize=7, framealpha=1, frameon=True, edgecolor="none")
plt.show()

# %% [markdown]
r"""
The left $q$ gives up half of the posterior and pays little for it. It fits one mode well. But all
of its mass lies where $p$ has only half of its mass, which costs $\log 2$; the rest is due to the
shape of the mode. The right $q$ covers both modes; measured by $\mathrm{KL}(q \,\|\, p)$ it pays
heavily for the mass that it puts where $p$ has almost none.
"""

# %%
print(f"log 2 = {math.log(2):.2f} nats")

# %% [markdown]
r"""
## The other direction: expectation propagation, and what lies between

Variational inference involves the choice of a divergence. *Expectation propagation* (EP; Minka
2001) uses the forward one, one factor at a time: the posterior is a product of a prior and of
factors $t_i(z)$, and each factor is replaced by a normal one. Take the approximation without factor
$i$, multiply it by the true $t_i$, and choose the normal factor that reproduces the mean and the
variance of that product. Repeat until nothing changes.

An example with several factors: a person of skill $z \sim \mathcal N(0, 1)$ has solved all of six
tasks, each with probability $\mathrm{sigmoid}(a_i z)$. The posterior has one mode and is skewed to
the right.
"""

# %%
slopes = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 8.0])


def skills(solved):
    """The skill of each person, and which of six tasks each has solved."""
    with pyro.plate("data", len(solved)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=slopes * z).to_event(1), obs=solved)


solved = torch.ones(1, 6)
z = torch.linspace(-3.0, 5.0, 4001).double()
dz = z[1] - z[0]
log_factors = dist.Bernoulli(logits=z[:, None] * slopes).log_prob(solved.double()).T  # (6, G)
log_joint = dist.Normal(0.0, 1.0).log_prob(z) + log_factors.sum(0)
log_p = log_joint - (log_joint + dz.log()).logsumexp(0)


def mean_and_variance(log_density):
    """Those of a density on the grid, known up to a factor."""
    mass = log_density.softmax(0)
    mean = mass @ z
    return mean, mass @ (z - mean) ** 2


def propagate(sweeps=10):
    """EP: the normal factors exp(-precision z^2 / 2 + shift z); the mean and scale of q."""
    precision, shift = torch.zeros(2, 6).double()
    for _ in range(sweeps):
        for i in range(6):
            rest = 1 + precision.sum() - precision[i], shift.sum() - shift[i]
            cavity = -rest[0] * z**2 / 2 + rest[1] * z
            mean, variance = mean_and_variance(cavity + log_factors[i])
            precision[i], shift[i] = 1 / variance - rest[0], mean / variance - rest[1]
    total = 1 + precision.sum()
    return shift.sum() / total, total.rsqrt()


# %% [markdown]
r"""
Between the two directions there is a family. `pe.RenyiELBO(alpha, K)` is the ELBO at $\alpha = 1$;
with a smaller $\alpha > 0$ and many draws $K$ it minimises Rényi's divergence of order $\alpha$ (Li
& Turner 2016), which costs less where $p$ has little mass. `pe.ReweightedWakeSleepELBO(K)` trains
the guide by the forward KL itself, with draws from $q$ that are weighted to represent $p$
(Bornschein & Bengio 2015). We use them with a normal $q$, and compare with the best normal $q$ on
the grid.
"""


# %%
def renyi(parameters, alpha):
    """Rényi's divergence of N(loc, scale^2) from the posterior on the grid; KL at alpha = 1."""
    loc, log_scale = parameters
    log_q = dist.Normal(loc, math.exp(log_scale)).log_prob(z)
    if alpha == 1:
        return (log_q.exp() * (log_q - log_p)).sum().item() * dz.item()
    inner = alpha * log_q + (1 - alpha) * log_p + dz.log()
    return inner.logsumexp(0).item() / (alpha - 1)


def trained(objective, steps=20 if SMOKE else 400):
    """Mean and scale of a normal guide that maximises an objective, of 20 copies of the datum."""
    pyro.set_rng_seed(0)
    guide, copies = vae.Diagonal(num_latents=1, num_features=6), solved.expand(20, 6)
    loss, optimiser = objective(skills, guide), torch.optim.Adam(guide.parameters(), lr=0.03)
    rate = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, total_iters=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(copies).backward()
        optimiser.step()
        rate.step()
    q = guide.posterior(solved[0]).base_dist
    return q.mean.item(), q.stddev.item()


K = 200
many = {"vectorize_particles": True}
objectives = {
    "ELBO, KL(q || p)": (pe.BetaELBO(num_particles=K, **many), 1.0),
    "Rényi, alpha = 0.5": (pe.RenyiELBO(0.5, K, **many), 0.5),
    "Rényi, alpha = 0.1": (pe.RenyiELBO(0.1, K, **many), 0.1),
    "wake-sleep, KL(p || q)": (pe.ReweightedWakeSleepELBO(K, **many), None),
}
posterior_mean, posterior_variance = mean_and_variance(log_p)
print("                            trained            on the grid")
print("                          mean   scale        mean   scale")
for name, (objective, alpha) in objectives.items():
    grid = posterior_mean.item(), posterior_variance.sqrt().item()
    if alpha is not None:
        loc, log_scale = minimize(renyi, [1.0, -0.5], alpha, "Nelder-Mead").x
        grid = loc, math.exp(log_scale)
    loc, scale = trained(objective)
    print(f"{name:<24}{loc:>6.3f}{scale:>8.3f}{grid[0]:>12.3f}{grid[1]:>8.3f}")
loc, scale = propagate()
print(f"{'EP':<24}{'':<14}{loc:>12.3f}{scale:>8.3f}")
print(f"{'posterior':<24}{'':<14}{posterior_mean:>12.3f}{posterior_variance.sqrt():>8.3f}")

# %% [markdown]
r"""
The ELBO gives the narrowest $q$. The scale grows towards the forward KL, whose $q$ has the mean and
the scale of the posterior. (The trained values differ from the grid by gradient noise and, for
Rényi, because $K$ is finite.) EP lies in between: it matches the moments for each factor combined
with the other approximate factors, and not the moments of the whole posterior.

## Correlation and modes, in two dimensions

Two more posteriors differ from $q$ in other ways. The first, from probabilistic PCA, is normal with
a strong correlation. The second has two curved modes: the product $z_1 z_2$ of two numbers has been
measured, and they may both be positive, or both negative. We fit each with a guide with independent
dimensions and with one with a full covariance.
"""


# %%
def product(x):
    """Two numbers z, and a measurement of their product."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z.prod(-1, keepdim=True), 0.4).to_event(1), obs=x)


linear = PPCA(num_latents=2, num_features=3)
with torch.no_grad():
    linear.W.copy_(torch.tensor([[1.2, 1.0], [1.0, 1.1], [0.6, 0.3]]))
    linear.log_sigma.fill_(-1.0)
    x_linear = linear(num=1)
x_product = torch.tensor([[2.0]])

correlated = {
    "diagonal": ppca.Diagonal.optimum(linear),
    "full covariance": ppca.FullCovariance.optimum(linear),
}
two_modes = {
    "diagonal": vae.Diagonal(num_latents=2, num_features=1),
    "full covariance": vae.FullCovariance(num_latents=2, num_features=1),
}
with torch.no_grad():
    posteriors = {("correlated", n): g.posterior(x_linear[0]) for n, g in correlated.items()}
for name, guide in two_modes.items():
    fit_guide(product, guide, x_product, steps)
    with torch.no_grad():
        posteriors["two modes", name] = guide.posterior(x_product[0])

# %%
axis = torch.linspace(-4.0, 4.0, 401)
plane = torch.cartesian_prod(axis, axis)  # (G, 2)
cell = (axis[1] - axis[0]) ** 2
with torch.no_grad():
    likelihood = {
        "correlated": linear.decode(plane).log_prob(x_linear[0]),
        "two modes": dist.Normal(plane.prod(-1), 0.4).log_prob(x_product[0]),
    }
    prior = dist.Normal(0.0, 1.0).log_prob(plane).sum(-1)
    log_joints = {name: prior + value for name, value in likelihood.items()}
    evidences = {name: (value + cell.log()).logsumexp(0) for name, value in log_joints.items()}
    kls = {}
    for (name, family), q in posteriors.items():
        log_q = q.log_prob(plane)
        log_post = log_joints[name] - evidences[name]
        divergence = (log_q.exp() * (log_q - log_post)).sum() * cell
        kls[name, family] = divergence.clamp(min=0)  # but for rounding

print("KL(q || p), nats")
for (name, family), value in kls.items():
    print(f"{name:<12}{family:<17}{value:.3f}")

# %% tags=["figure"]
shares, greys = [0.99, 0.9, 0.5], ["0.88", "0.72", "0.5"]  # shares of the mass


def levels(density):
    """The densities at the edges of the smallest regions that hold these shares of the mass."""
    falling = density.flatten().sort(descending=True).values
    mass = falling.cumsum(0) * cell
    return [falling[(mass < share).sum()].item() for share in shares]


_, axes = plt.subplots(1, 4, figsize=(12, 3.7))
for ax, ((name, family), q) in zip(axes, posteriors.items(), strict=True):
    p = (log_joints[name] - evidences[name]).exp().reshape(401, 401).T
    ax.contourf(axis, axis, p, [*levels(p), p.max()], colors=greys)
    q_plane = q.log_prob(plane).exp().reshape(401, 401).T
    styles = ["dotted", "dashed", "solid"]
    ax.contour(axis, axis, q_plane, levels(q_plane), colors="C0", linewidths=1.6, linestyles=styles)
    ax.set_title(f"{name}, {family} q\nKL = {kls[name, family]:.2f} nats", fontsize=10)
    ax.set(xlabel=r"$z_1$", ylabel=r"$z_2$", xlim=(-3.9, 3.9), ylim=(-3.9, 3.9), aspect="equal")
handles = [Patch(color=c, label=f"p, {s:.0%}") for c, s in zip(greys, shares, strict=True)]
handles += [
    Line2D([], [], color="C0", linestyle=style, label=f"q, {share:.0%}")
    for style, share in zip(styles, shares, strict=True)
]
plt.gcf().legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9)
plt.show()

# %% [markdown]
r"""
The posterior $p$ is grey and $q$ is blue; shown are the smallest regions that contain 50, 90 and
99% of each. In the second panel they coincide. The diagonal guide is an upright ellipse as wide as
the ridge of the correlated posterior, but not as long. Its scales are those of each latent given
the other, and not the marginal ones. The correlation is lost, and with it a large part of the error
bars.
"""

# %%
with torch.no_grad():
    exact = linear.posterior(x_linear[0]).stddev
found = posteriors["correlated", "diagonal"].stddev
print("scales of the posterior   ", exact.numpy().round(3))
print("scales of the diagonal q  ", found.numpy().round(3))
print("ratio                     ", (found / exact).numpy().round(3))

# %% [markdown]
r"""
With a full covariance the correlated posterior is exact, and the KL divergence is zero. Of two
modes $q$ still covers only one, but follows its shape.

## A gap that depends on the model bends the model

If the model is learned as well, the ELBO is $\log p_\theta(x)$ less a gap, and the gap depends on
$\theta$. So the $\theta$ that maximises the ELBO is biased towards models that $q$ fits better, and
may not be the one that maximises $\log p_\theta(x)$ (Turner & Sahani 2011). As an example, three
sizes have been measured, $x_n \sim \mathcal N(e^{\theta z_n}, 0.5^2)$ with $z_n \sim \mathcal N(0,
1)$. For each $\theta$ on a grid we compute the best normal $q$ for each datum, with expectations by
Gauss-Hermite quadrature, and $\log p_\theta(x)$ by a sum over a grid of $z$.
"""

# %%
sizes = torch.tensor([0.2, 1.2, 6.0]).double()
thetas = torch.linspace(0.8, 2.0, 25).double()
nodes, weights = (torch.from_numpy(array) for array in hermegauss(60))
weights = weights / weights.sum()  # expectations under N(0, 1)


def log_joint_of(z):
    """log p(x, z) of each theta and datum, for z (..., T or 1, 3 or 1, Z)."""
    noise = dist.Normal((thetas[:, None, None] * z).exp(), 0.5)
    return dist.Normal(0.0, 1.0).log_prob(z) + noise.log_prob(sizes[:, None])


z = torch.linspace(-8.0, 6.0, 8001).double()
log_p_theta = (log_joint_of(z) + (z[1] - z[0]).log()).logsumexp(-1).sum(-1)  # (T,)

starts_at = torch.tensor([-0.5, 0.5, 1.5]).double()
loc = starts_at[:, None, None].repeat(1, len(thetas), 3).requires_grad_()  # (starts, T, 3)
log_scale = torch.full_like(loc, -1.0).requires_grad_()
optimiser = torch.optim.Adam([loc, log_scale], lr=0.03)
for _ in range(20 if SMOKE else 600):
    optimiser.zero_grad()
    inside = log_joint_of(loc[..., None] + log_scale.exp()[..., None] * nodes) @ weights
    elbo = inside + log_scale + math.log(2 * math.pi * math.e) / 2
    (-elbo.sum()).backward()
    optimiser.step()
best = elbo.detach().max(0).values.sum(-1)  # of the starts, for each theta

_, ax = plt.subplots(figsize=(6, 3))
for name, values, marker in (("log p(x)", log_p_theta, "o"), ("ELBO", best, "^")):
    ax.plot(thetas, values, label=name)
    ax.plot(thetas[values.argmax()], values.max(), marker, color="0.15")
    print(f"{name:<9} is largest at theta = {thetas[values.argmax()]:.2f}: {values.max():.3f} nats")
gap = log_p_theta - best
print(f"the gap rises from {gap[0]:.2f} at {thetas[0]:.1f} to {gap[-1]:.2f} at {thetas[-1]:.1f}")
ax.set(xlabel=r"$\theta$", ylabel="nats, three data")
ax.legend()
plt.show()

# %% [markdown]
r"""
The gap grows with $\theta$, since the posterior becomes more skewed, and so the ELBO prefers a
smaller $\theta$.

## What does not see a missing mode

How would one notice without a grid? Weight draws from $q$ by $w = p(x, z) / q(z)$: the mean of the
weights estimates $p(x)$, and their tail, summarised by Pareto $\hat k$, shows how reliable the
estimate is. Here is the guide with the full covariance, on its one mode.
"""

# %%
one_mode = two_modes["full covariance"]
num = 200 if SMOKE else 10_000
found = pe.evidence(product, one_mode, x_product, num_samples=num)
k_hat = pe.psis(product, one_mode, x_product, num_samples=num)
print(f"log p(x) on the grid           {evidences['two modes']:.3f} nats")
print(f"log p(x) by weighted draws     {found.log_evidence.item():.3f} ± {found.stderr.item():.3f}")
missing = evidences["two modes"] - found.log_evidence.item()
print(f"missing                        {missing:.3f}")
print(f"k-hat                          {k_hat.khat.item():.2f}")

# %% [markdown]
r"""
The missing nats are close to $\log 2$, which is due to the other mode. Yet the standard error is
small, and $\hat k$ describes only the mode in which the draws lie. (It is above 0.5, so the weights
may not have a variance, and the standard error, which assumes one, is too small even for this
mode.) **No diagnostic that draws from q alone can detect a mode where q never goes.** Draws from
elsewhere are needed. Annealed importance sampling starts chains at draws from the prior, and moves
them to the posterior step by step:
"""

# %%
from_prior = pe.Annealed(start="prior", num_temperatures=5 if SMOKE else 50)
found = pe.evidence(product, one_mode, x_product, method=from_prior, num_samples=num // 20)
print(f"log p(x) by annealing    {found.log_evidence.item():.3f} ± {found.stderr.item():.3f} nats")
print(f"log p(x) on the grid     {evidences['two modes']:.3f}")

# %% [markdown]
r"""
## A real guide: approximation against amortisation

The next example is a VAE for scikit-learn's images of digits, binarised. Model and guide are
trained together on most of the images; the rest are held out, and we examine the posteriors of
these.
"""

# %%
x = (digits().x > 0.5).float()
x = x[torch.randperm(len(x))]
train, held_out = x[200:], x[: 20 if SMOKE else 200]


def fit(model, guide, parameters, epochs):
    """Maximise the ELBO on the digits over these parameters; its mean in each epoch."""
    objective = pe.BetaELBO()
    loss, optimiser = objective(model, guide), torch.optim.Adam(parameters, lr=3e-3)
    batches, means = Minibatches(train, batch_size=100), []
    for _ in range(1 if SMOKE else epochs):
        total = 0.0
        for batch in batches:
            optimiser.zero_grad()
            loss(batch).backward()
            optimiser.step()
            total += objective.last_terms.elbo.item()
        means.append(total / len(train))
    return means


model = VAE(10, 64, hidden=(64,), likelihood=BernoulliLikelihood())
guide = vae.Diagonal(10, 64, hidden=(64,))
means = fit(model, guide, [*model.parameters(), *guide.parameters()], epochs=100)
pe.plot_elbo_trace(range(len(means)), {"training data": means}).set_xlabel("epoch")
plt.show()

# %% [markdown]
r"""
The model stays fixed from here on. We give it three new guides: one with a linear encoder, one like
the guide with which it was trained, and one whose $q$ has a full covariance. All three are trained
in the same way, after the model, and each from three random starts.
"""

# %%
kinds = {
    "linear, diagonal": lambda: vae.Diagonal(10, 64),
    "neural, diagonal": lambda: vae.Diagonal(10, 64, hidden=(64,)),
    "neural, full covariance": lambda: vae.FullCovariance(10, 64, hidden=(64,)),
}
starts = {name: [] for name in kinds}
for seed in range(2 if SMOKE else 3):
    for name, kind in kinds.items():
        pyro.set_rng_seed(seed)
        guide = kind()
        fit(model, guide, guide.parameters(), epochs=45)
        starts[name].append(guide)
guides = {name: each[0] for name, each in starts.items()}  # of the first start

evidence = pe.evidence(
    model, guides["neural, full covariance"], held_out, num_samples=100 if SMOKE else 5000
)
print(evidence)

# %% [markdown]
r"""
The gap of a guide has two parts. Of all members of its family, some $q^*$ is the best for a datum.
The KL divergence that remains at $q^*$ is the **approximation gap**: only a richer family helps.
The distance from the encoder's $q$ to $q^*$ is the **amortisation gap**: a better encoder helps, or
longer training. `pe.inference_gap` finds $q^*$ for each datum by gradients.
"""

# %%
settings = {"steps": 10 if SMOKE else 200, "num_samples": 100 if SMOKE else 1000}
all_gaps = {
    name: [
        pe.inference_gap(model, guide, held_out, evidence=evidence, **settings) for guide in each
    ]
    for name, each in starts.items()
}
gaps = {name: each[0] for name, each in all_gaps.items()}
print(gaps["neural, diagonal"])


def over_starts(values):
    """The mean of the values of all starts, and its standard error."""
    values = torch.tensor(values)
    return f"{values.mean():.3f} ± {values.std() / math.sqrt(len(values)):.3f}"


print("\nnats per datum           approximation gap   amortisation gap   (± over the starts)")
for name, each in all_gaps.items():
    approximation = over_starts([gap.approximation.mean() for gap in each])
    amortisation = over_starts([gap.amortisation.mean() for gap in each])
    print(f"{name:<25}{approximation:>17}{amortisation:>19}")

# %%
_, axes = plt.subplots(3, 1, figsize=(8, 5.6), sharex=True)
for ax, (name, gap) in zip(axes, gaps.items(), strict=True):
    pe.plot_evidence_gap(gap, ax=ax)
    ax.set_title(name, fontsize=10, loc="left")
    if ax is not axes[-1]:
        ax.set_xlabel("")
left = min(float(gap.elbo.mean()) for gap in gaps.values())
axes[0].set_xlim(left - 0.1, float(evidence.log_evidence.mean()) + 0.1)
plt.show()

# %% [markdown]
r"""
The figure shows the first start. The first two guides have the same family, so their approximation
gaps are the same; the linear encoder has the larger amortisation gap. The third guide has a richer
family and a smaller approximation gap, but its encoder has more to learn, as its amortisation gap
shows. The figure can be read as advice: work on the longer part.

## Pareto k-hat: whose weights can be used

A mean gap hides single data. `pe.psis` fits the tail of the importance weights of each datum. If
$\hat k$ is below 0.5, the weights have a finite variance. Up to a threshold, 0.7 or a little less
for few draws, weighted means can be used. If it is larger, the draws from $q$ miss important parts
of the posterior (Yao et al. 2018).
"""

# %%
psis = {
    name: pe.psis(model, guide, held_out, num_samples=100 if SMOKE else 2000)
    for name, guide in guides.items()
}
for name, result in psis.items():
    bad = (result.khat >= result.threshold).double().mean()
    print(f"{name:<25}median k-hat {result.khat.median():.2f}, bad for {bad:.1%} of the data")
print()
print(psis["neural, diagonal"])

# %%
_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
pe.plot_khat(psis["neural, diagonal"].khat.sort().values, ax=left)
left.legend(loc="upper left", fontsize=8)
left.set(title="neural, diagonal", xlabel=r"data, in the order of their $\hat k$")
for (name, gap), marker in zip(gaps.items(), "o^s", strict=True):
    dots = {"s": 12, "alpha": 0.6, "linewidths": 0, "marker": marker, "label": name}
    right.scatter(gap.total, psis[name].khat, **dots)
right.axhline(result.threshold, color="0.3", linewidth=1)
right.set(xscale="log", xlabel="log p(x) - ELBO (nats)", ylabel=r"Pareto $\hat k$")
right.set_xticks([0.3, 1, 3], ["0.3", "1", "3"])
right.minorticks_off()
right.legend(loc="lower right", fontsize=8)
plt.show()

# %% [markdown]
r"""
The gap and $\hat k$ increase together, but they are not the same. The gap concerns the mean of
$\log w$, and $\hat k$ the largest $w$. In the table above, "all data together" has its own $\hat
k$, that of the product of the weights of all data. It is large whenever there are many data; for
independent data the $\hat k$ of each datum is the one that matters.

A small $\hat k$ does not certify $q$ either. A $q$ that is too wide covers the posterior, so that
no weight is large, and yet it is a bad approximation. Here is the correlated posterior from above,
with its exact covariance multiplied by the square of a factor:
"""

# %%
print("scale of q / exact     k-hat   log p(x) - ELBO (nats)")
for factor in (1.5, 2.0, 3.0, 5.0):
    wide = ppca.FullCovariance.optimum(linear)
    with torch.no_grad():
        exact = linear.posterior(x_linear[0])
        q = dist.MultivariateNormal(exact.mean, factor**2 * exact.covariance_matrix)
        wide.raw.copy_(wide.family.nearest(q))
        gap = torch.distributions.kl_divergence(wide.posterior(x_linear), exact)
    k_hat = pe.psis(linear, wide, x_linear, num_samples=num)
    print(f"{factor:>6}{k_hat.khat.item():>22.2f}{gap.item():>14.2f}")

# %% [markdown]
r"""
So $\hat k$ shows whether the weights can be used to correct $q$, and the gap how much there is to
correct.

## More draws inside the logarithm

By Jensen's inequality the gap comes from taking the logarithm of each weight. If $K$ weights are
averaged first, the bound is tighter (Burda, Grosse & Salakhutdinov 2016): at $K = 1$ it is the
ELBO, and it rises to $\log p(x)$.
"""

# %%
some = held_out[:50]
draws = [1, 3, 10, 30] + ([] if SMOKE else [100, 300, 1000])


def bound(guide, k):
    """The bound of k draws, mean over the data, and its standard error, by repeating it."""
    repeats = max(10, 1000 // k)
    found = pe.evidence(model, guide, some.repeat(repeats, 1), num_samples=k)
    each = found.log_evidence.reshape(repeats, len(some)).mean(1)
    return each.mean().item(), (each.std() / math.sqrt(repeats)).item()


_, ax = plt.subplots()
for (name, guide), marker in zip(guides.items(), "o^s", strict=True):
    means, errors = zip(*(bound(guide, k) for k in draws), strict=True)
    errors = [2 * error for error in errors]
    ax.errorbar(draws, means, errors, fmt=f"{marker}-", markersize=4, capsize=2, label=name)

annealing = pe.Annealed(num_temperatures=5 if SMOKE else 100)
annealed = pe.evidence(model, guides["neural, diagonal"], some, method=annealing)
ax.axhline(annealed.log_evidence.mean(), color="0.15", linestyle="dashed", label="annealed")
ax.set(xscale="log", xlabel="draws K", ylabel="bound (nats per datum)")
ax.legend()
plt.show()

# %% [markdown]
r"""
The bounds of all guides rise towards the same number, those of the better guides sooner: $\log
p(x)$ is a property of the model and does not depend on the guide. (Bars are two Monte Carlo
standard errors.) `pe.ImportanceWeightedELBO(K)` trains with this bound.

Is the number right? Annealing arrives at nearly the same number by other means, but on average it
is also a lower bound: both may be too low. For data simulated from the model, $\log p(x)$ can be
enclosed. The true $z$ of such data are known and are exact draws from the posterior. Chains that
run backwards from them to the start of the annealing give an *upper* bound.
"""

# %%
sites = poutine.trace(model).get_trace(num=10 if SMOKE else 40).nodes
simulated, latents = sites["x"]["value"], {"z": sites["z"]["value"]}
settings = {"method": annealing, "latents": latents}
enclosed = pe.evidence(model, guides["neural, diagonal"], simulated, **settings)
print(enclosed)

# %% [markdown]
r"""
Both are bounds on average. The distance between them shows how well $\log p(x)$ is known:
"""

# %%
apart = enclosed.upper_bound - enclosed.log_evidence
error = apart.std() / math.sqrt(len(apart))
print(f"upper - lower bound: {apart.mean():.3f} ± {error:.3f} nats per datum")

# %% [markdown]
r"""
## A verdict

`pe.check` runs the quick diagnostics and summarises them in words. It uses 1,000 draws, for which
the threshold of $\hat k$ is 0.67. Here is the guide with the linear encoder:
"""

# %%
check = pe.check(model, guides["linear, diagonal"], held_out)
print("Verdict:", check.verdict)
for finding in check.findings:
    print(f"\n{finding.verdict}: {finding.text}")

# %% [markdown]
r"""
## What to take with you

| question | answered by |
|---|---|
| how many nats are missing? | `pe.evidence`, compared with the ELBO |
| family or encoder? | `pe.inference_gap` |
| for which data can weighted draws be used? | `pe.psis`, `pe.plot_khat` |
| is the evidence itself right? | `method="annealed"`; on simulated data with `latents=` |
| is there a mode where $q$ never goes? | chains from the prior; nothing that draws from $q$ |
| all of this, summarised | `pe.check` |

Minimising $\mathrm{KL}(q \,\|\, p)$ makes $q$ too narrow rather than too wide; Rényi's divergence
and the forward KL make it wider. The error bars of a diagonal $q$ are those of each latent given
the others.
"""
