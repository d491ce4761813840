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

Training ends and leaves an ELBO. Is the posterior behind it any good? The ELBO by itself does not
tell, since

$$\log p(x) = \mathrm{ELBO} + \mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x)),$$

and of the three only one is known. This notebook shows what the KL divergence makes $q$ do wrong,
how the missing nats are found and explained, and which diagnostic sees what: the inference gap,
Pareto $\hat k$, more draws inside the logarithm, and annealing.

You should know what the ELBO is; `01_what_is_the_elbo` and `02_three_derivations` tell.
"""

# %%
import math
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

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

is a mean over draws of $q$. Where $q$ has mass and $p$ has none, the ratio is infinite, and so is
the price. Where $p$ has mass and $q$ has none, no draw ever goes, and the price is nothing. So $q$
hides under $p$ rather than covering it.

To see it, measure the square of a number: $z \sim \mathcal N(0, 1)$ and
$x \sim \mathcal N(z^2, 0.5^2)$. The sign of $z$ cannot be known, and the posterior has two modes.
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
On a grid of $z$ we have the exact posterior. Beside the $q$ that minimises
$\mathrm{KL}(q \,\|\, p)$ we put the one that minimises $\mathrm{KL}(p \,\|\, q)$, the *forward*
divergence: of all normal distributions it is the one with the mean and the variance of $p$. It
needs draws of $p$, which is why it is not what we train.
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
    for where, color, label in (
        (free, "C2", "q / p < 1/100: costs nothing"),
        (dear, "C3", "q / p > 100: costs most"),
    ):
        across = {"transform": ax.get_xaxis_transform(), "alpha": 0.2, "linewidth": 0}
        ax.fill_between(z, 0, 1, where=where, color=color, label=label, **across)
    ax.set(title=f"minimises {name}", xlabel="z", ylabel="density", xlim=(-3.5, 3.5), ylim=(0, 3.6))
    ax.legend(loc="upper left", fontsize=7, ncols=2)
plt.show()

# %% [markdown]
r"""
The left $q$ gives up half of the posterior, and look at how little it pays. Its own mode is fitted
well. Only, it has all of its mass where $p$ has one half, and that costs $\log 2$; the rest is for
the shape of the mode. The right $q$ covers both modes, and by the measure of the left column it
pays for all that it puts where $p$ has nothing.
"""

# %%
print(f"log 2 = {math.log(2):.2f} nats")

# %% [markdown]
r"""
## Correlation and modes, in two dimensions

Two posteriors that differ from $q$ in other ways. One is normal with a strong correlation: that of
probabilistic PCA. The other one has two modes, each of them bent: the product $z_1 z_2$ of two
numbers has been measured, and they may both be positive, or both negative. For each there is a
guide with independent dimensions and one with a full covariance.
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
_, axes = plt.subplots(1, 4, figsize=(12, 3.4))
for ax, ((name, family), q) in zip(axes, posteriors.items(), strict=True):
    p = (log_joints[name] - evidences[name]).exp()
    ax.contourf(axis, axis, p.reshape(401, 401).T, 12, cmap="Greys")
    q_plane = q.log_prob(plane).exp().reshape(401, 401).T
    shares = q_plane.max() * torch.tensor([0.01, 0.1, 0.5])  # of its maximum
    ax.contour(axis, axis, q_plane, shares.tolist(), colors="C0", linewidths=1.3)
    ax.set_title(f"{name}, {family} q\nKL = {kls[name, family]:.2f} nats", fontsize=10)
    ax.set(xlabel=r"$z_1$", ylabel=r"$z_2$", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
plt.show()

# %% [markdown]
r"""
In grey the posterior, in blue $q$. The diagonal guide takes an upright ellipse as wide as the ridge
of the correlated posterior, not as long. Its scales are those of each latent given the other one,
not those of each by itself. The correlation is gone, and with it a large part of the error bars.
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
With a full covariance the correlated posterior is exact, the KL divergence zero. Of two modes it
still takes one, but follows its shape.

## What does not see a missing mode

How would one know without a grid? Weigh draws of $q$ by $w = p(x, z) / q(z)$: they estimate
$\log p(x)$, and the tail of the weights, in the form of Pareto $\hat k$, says how well. Here they
are for the full guide on one mode.
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
What is missing is $\log 2$, the other mode. Yet the standard error is small, and $\hat k$ is that
of the mode that the draws have seen. **No diagnostic that draws from q alone can see a mode where q
never goes.** Something else has to go there. Annealed importance sampling starts chains at draws of
the prior, and moves them to the posterior step by step:
"""

# %%
from_prior = pe.Annealed(start="prior", num_temperatures=5 if SMOKE else 50)
found = pe.evidence(product, one_mode, x_product, method=from_prior, num_samples=num // 20)
print(f"log p(x) by annealing    {found.log_evidence.item():.3f} ± {found.stderr.item():.3f} nats")
print(f"log p(x) on the grid     {evidences['two modes']:.3f}")

# %% [markdown]
r"""
## A real guide: approximation against amortisation

Now a VAE on scikit-learn's images of digits, binarised. Model and guide learn together on most of
them; the rest is held out, and the questions are about those.
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
The model stays as it is from here on. We give it two more guides, trained the same way: one whose
encoder is linear, and one whose $q$ has a full covariance.
"""

# %%
guides = {
    "linear, diagonal": vae.Diagonal(10, 64),
    "neural, diagonal": guide,
    "neural, full covariance": vae.FullCovariance(10, 64, hidden=(64,)),
}
for name in ("linear, diagonal", "neural, full covariance"):
    fit(model, guides[name], guides[name].parameters(), epochs=100)

evidence = pe.evidence(
    model, guides["neural, full covariance"], held_out, num_samples=100 if SMOKE else 5000
)
print(evidence)

# %% [markdown]
r"""
The gap of a guide has two parts. Of all members of its family, some $q^*$ is the best for a datum.
What $q^*$ lacks is the **approximation gap**: only a richer family helps. What the encoder's $q$
lacks to $q^*$ is the **amortisation gap**: a better encoder helps, or longer training.
`pe.inference_gap` finds $q^*$ for each datum by gradients.
"""

# %%
settings = {"steps": 10 if SMOKE else 200, "num_samples": 100 if SMOKE else 1000}
gaps = {
    name: pe.inference_gap(model, guide, held_out, evidence=evidence, **settings)
    for name, guide in guides.items()
}
print(gaps["neural, diagonal"])

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
The first two have the same family, so that their approximation gaps are the same; the linear
encoder loses on amortisation. The third has a richer family and a smaller approximation gap, but
its encoder has more to learn: look at its amortisation gap. Read the figure as advice: the longer
part is what to work on.

## Pareto k-hat: which data can be trusted

A mean gap hides single data. `pe.psis` fits the tail of the importance weights of each datum: below
0.5 its posterior is good, below 0.7 usable, above it is bad.
"""

# %%
psis = {
    name: pe.psis(model, guide, held_out, num_samples=100 if SMOKE else 2000)
    for name, guide in guides.items()
}
for name, result in psis.items():
    bad = (result.khat >= 0.7).double().mean()
    print(f"{name:<25}median k-hat {result.khat.median():.2f}, bad for {bad:.1%} of the data")
print()
print(psis["neural, diagonal"])

# %%
_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
pe.plot_khat(psis["neural, diagonal"], ax=left)
left.legend(loc="upper right", ncols=3, fontsize=8)
left.set_ylim(None, 1.3)
for name in ("linear, diagonal", "neural, diagonal", "neural, full covariance"):
    right.scatter(gaps[name].total, psis[name].khat, s=8, alpha=0.5, linewidths=0, label=name)
right.axhline(0.7, color="0.3", linewidth=1)
right.set(xscale="log", xlabel="log p(x) - ELBO (nats)", ylabel=r"Pareto $\hat k$")
right.set_xticks([0.3, 1, 3], ["0.3", "1", "3"])
right.minorticks_off()
right.legend(loc="lower right", fontsize=8)
plt.show()

# %% [markdown]
r"""
Gap and $\hat k$ rise together, but they are not the same. The gap is about the mean of $\log w$,
and $\hat k$ about the largest $w$. In the table above, "all data together" have a $\hat k$ of their
own, of the product of their weights. It is large wherever there are many data; for data that are
independent it is the $\hat k$ of each that counts.

## More draws inside the logarithm

By Jensen's inequality the gap comes from taking the logarithm of each weight. Average $K$ of them
first, and the bound is tighter (Burda, Grosse & Salakhutdinov 2016): at $K = 1$ it is the ELBO, and
it rises to $\log p(x)$.
"""

# %%
some = held_out[:50]
draws = [1, 3, 10, 30, 100] + ([] if SMOKE else [300, 1000, 3000])
_, ax = plt.subplots()
for name, guide in guides.items():
    repeats = [
        pe.evidence(model, guide, some.repeat(max(1, 100 // k), 1), num_samples=k) for k in draws
    ]
    ax.plot(draws, [r.log_evidence.mean() for r in repeats], ".-", label=name)

annealing = pe.Annealed(num_temperatures=5 if SMOKE else 100)
annealed = pe.evidence(model, guides["neural, diagonal"], some, method=annealing)
ax.axhline(annealed.log_evidence.mean(), color="0.15", linestyle="dashed", label="annealed")
ax.set(xscale="log", xlabel="draws K", ylabel="bound (nats per datum)")
ax.legend()
plt.show()

# %% [markdown]
r"""
All guides rise towards the same number, and the better ones sooner: $\log p(x)$ is the model's and
does not depend on the guide. `pe.ImportanceWeightedELBO(K)` trains on this bound.

Is the number right? Annealing agrees from another side. It can even be enclosed, on data that the
model has simulated. For those the true $z$ are known, exact draws of the posterior, and chains that
go back from there to the prior give an *upper* bound.
"""

# %%
sites = poutine.trace(model).get_trace(num=10 if SMOKE else 50).nodes
simulated, latents = sites["x"]["value"], {"z": sites["z"]["value"]}
settings = {"method": annealing, "latents": latents}
enclosed = pe.evidence(model, guides["neural, diagonal"], simulated, **settings)
print(enclosed)

# %% [markdown]
r"""
Both are bounds on average. They are this far apart, which is how well $\log p(x)$ is known:
"""

# %%
apart = enclosed.upper_bound - enclosed.log_evidence
error = apart.std() / math.sqrt(len(apart))
print(f"upper - lower bound: {apart.mean():.3f} ± {error:.3f} nats per datum")

# %% [markdown]
r"""
## A verdict

`pe.check` runs what takes seconds, and says it in words. It takes 1,000 draws, for which the limit
of $\hat k$ is not quite 0.7. This is for the guide with the linear encoder:
"""

# %%
check = pe.check(model, guides["linear, diagonal"], held_out)
print("Verdict:", check.verdict)
for finding in check.findings:
    print(f"\n{finding.verdict}: {finding.text}")

# %% [markdown]
r"""
## What to take with you

| question | what answers |
|---|---|
| how many nats are missing? | `pe.evidence`, against the ELBO |
| family or encoder? | `pe.inference_gap` |
| for which data? | `pe.psis`, `pe.plot_khat` |
| is the evidence itself right? | `method="annealed"`; on simulated data with `latents=` |
| is there a mode where $q$ never goes? | chains from the prior; nothing that draws from $q$ |
| all of it in a sentence | `pe.check` |

The KL divergence that is minimised makes $q$ too narrow rather than too wide. Error bars of a
diagonal $q$ are those of each latent given the others.
"""
