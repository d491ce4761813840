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
# ELBO surgery

A VAE spends, say, five nats of KL on each datum. Are these five nats that tell the data from each
other? Or have all codes together just moved to a place where the prior does not expect them? The
ELBO does not care, but you should. Hoffman & Johnson (2016) found that the average KL is a sum of
these two. This notebook takes ELBOs apart in their way: first on paper and on a line, then on
digits, on all data at once and on minibatches.

You should know what the ELBO and a VAE are, and have seen the rate of `04_beta_and_schedules`.
"""

# %%
import math
import os

import matplotlib.pyplot as plt
import pyro
import torch
from torch import nn
from torch.distributions import Normal

import pyproelbo as pe
from pyproelbo.datasets import Minibatches, digits
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.vae import VAE, BernoulliLikelihood

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
pyro.set_rng_seed(0)

# %% [markdown]
r"""
## Three ways to spend the same KL

Let eight data have one latent number each, with the prior $p(z) = \mathcal N(0, 1)$. The mean of
their eight posteriors is the *aggregate posterior*

$$q(z) = \frac 1 N \sum_n q(z \mid x_n).$$

It is the distribution of a code of which nobody says whose it is. Here are three guides, made so
that the average KL divergence of $q(z \mid x_n)$ from the prior is the same.
"""

# %%
N = 8
places = Normal(0.0, 1.0).icdf((torch.arange(N) + 0.5) / N)  # spread like the prior
spread = places.square().mean()


def average_kl(loc, scale):
    """The mean of KL(N(loc_n, scale^2) || N(0, 1)) over the data."""
    return ((loc.square() + scale**2 - 1) / 2 - math.log(scale)).mean()


R = average_kl(places, 0.1)
stretch = ((2 * (R + math.log(0.25)) + 1 - 0.25**2) / spread).sqrt()
toys = {
    "all in the same place": ((2 * R).sqrt().expand(N), 1.0),
    "spread like the prior": (places, 0.1),
    "spread too far": (stretch * places, 0.25),
}

# %%
z = torch.linspace(-6.0, 6.0, 4001)
dz = z[1] - z[0]
log_p = Normal(0.0, 1.0).log_prob(z)


def kl(log_a, log_b):
    """KL(a || b) of densities on the grid."""
    return (log_a.exp() * (log_a - log_b)).sum(-1) * dz


print(f"{'nats per datum':<24}average KL   of each from q(z)   of q(z) from p(z)")
_, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
for ax, (name, (loc, scale)) in zip(axes, toys.items(), strict=True):
    log_q = Normal(loc[:, None], scale).log_prob(z)  # (N, G)
    log_aggregate = log_q.logsumexp(0) - math.log(N)
    parts = [kl(log_q, b).mean() for b in (log_p, log_aggregate)]
    print(f"{name:<24}{parts[0]:>8.3f}{parts[1]:>z16.3f}{kl(log_aggregate, log_p):>20.3f}")
    ax.plot(z, log_q.exp().T / N, color="C0", linewidth=0.8)
    ax.plot(z, log_aggregate.exp(), color="C0", linewidth=2, label="q(z)")
    ax.plot(z, log_p.exp(), color="0.15", linestyle="dashed", label="p(z)")
    ax.set(title=name, xlabel="z", xlim=(-5, 5), ylim=(0, 0.62))
axes[0].set_ylabel("density")
axes[2].legend()
plt.show()
print(f"\nlog N = {math.log(N):.3f}")

# %% [markdown]
r"""
The first guide tells nothing about any datum: all of the KL is for being in the wrong place. The
second spends nearly all of it on telling the data apart, and its $q(z)$ stays near the prior. The
third does both. The two columns at the right add up to the first one. That is the surgery.

## On paper

Draw a datum's number $n$ at random, then $z \sim q(z \mid x_n)$. Under this joint distribution
$q(z)$ is the marginal of $z$. Multiply and divide by it:

$$
\begin{aligned}
\underbrace{\frac 1 N \sum_n \mathrm{KL}(q(z \mid x_n) \,\|\, p(z))}_{\text{average KL}}
  &= \frac 1 N \sum_n \mathbb E_{q(z \mid x_n)}\!\left[
       \log \frac{q(z \mid x_n)}{q(z)} + \log \frac{q(z)}{p(z)}\right] \\
  &= \underbrace{I(n; z)}_{\text{mutual information}}
   + \underbrace{\mathrm{KL}(q(z) \,\|\, p(z))}_{\text{marginal KL}}.
\end{aligned}
$$

The mutual information is what a code tells about which datum it is of. It is not negative, and it
cannot exceed $\log N$, which is all that there is to know about $n$. The second term has nothing to
do with single data. Put into the ELBO,

$$
\mathrm{ELBO}
  = \underbrace{\frac 1 N \sum_n \mathbb E_q[\log p(x_n \mid z)]}_{\text{reconstruction}}
  - I(n; z) - \mathrm{KL}(q(z) \,\|\, p(z)).
$$

## On digits

Scikit-learn's images of digits, each pixel rounded to zero or one, and a VAE with ten latents.
"""

# %%
x = (digits().x > 0.5).float()
x = x[torch.randperm(len(x))]
train = x[297 : 397 if SMOKE else None]
epochs = 1 if SMOKE else 60


def fit(objective, watch=None):
    """A VAE from the same start each time, trained by the objective; ``watch`` sees each epoch."""
    pyro.set_rng_seed(1)
    model = VAE(10, 64, hidden=(64,), likelihood=BernoulliLikelihood())
    guide = Diagonal(10, 64, hidden=(64,))
    loss, batches = objective(model, guide), Minibatches(train, batch_size=100)
    optimiser = torch.optim.Adam(loss.parameters(), lr=3e-3, fused=True)
    for epoch in range(epochs):
        for batch in batches:
            optimiser.zero_grad()
            loss(batch).backward()
            optimiser.step()
        if watch is not None:
            watch(epoch, model, guide)
    return model, guide


model, guide = fit(pe.BetaELBO())

# %% [markdown]
r"""
With a draw $z_n$ of each posterior, every part is a mean over the data of a difference of
log-densities. All it takes is $\log q(z_i \mid x_j)$ of all pairs.
"""

# %%
with torch.no_grad():
    q = guide.posterior(train)  # batch shape (N,)
    z = q.sample()
    pairs = q.log_prob(z[:, None])  # log q(z_i | x_j), (N, N)
    own = pairs.diagonal()
    aggregate = pairs.logsumexp(1) - math.log(len(train))  # log q(z_i)
    log_prior = model.prior().log_prob(z)

print(f"average KL           {(own - log_prior).mean():.3f} nats per datum")
print(f"mutual information   {(own - aggregate).mean():.3f}")
print(f"marginal KL          {(aggregate - log_prior).mean():.3f}")

# %% [markdown]
r"""
`pe.surgery` does this for any model and guide with a latent for each datum, in bounded memory, and
says how uncertain it is. Where it can, it takes a KL in closed form, and uses it to make the others
more precise.
"""

# %%
result = pe.surgery(model, guide, train, num_samples=1 if SMOKE else 10)
print(result)

# %% tags=["figure"]
pe.plot_surgery(result)
plt.show()

# %% [markdown]
r"""
Each bar starts where the one before it ends. The line is $\log N$. Two more terms are in the table,
since the prior has independent dimensions: then the marginal KL is a sum as well. We come to them
below.

## Mutual information: how many data can be told apart

A mutual information of $\log m$ is that of a guide that sorts the data into $m$ groups of the same
size, and knows the group. So $e^{I}$ is a number of groups, at most $N$.
"""

# %%
print(f"N                            {len(train):>8,}")
print(f"exp of mutual information    {math.exp(result.mutual_information):>8.0f}")

# %% [markdown]
r"""
With fewer data, the same codes tell them apart easily. We take the same guide, and others with
$\beta$ below and above 1, and give `pe.surgery` the first 10, 20, ... of the data.
"""

# %%
fits = {beta: fit(pe.BetaELBO(beta)) for beta in ([0.1] if SMOKE else [0.1, 0.3, 2.0])}
fits = dict(sorted((fits | {1.0: (model, guide)}).items()))
found = {beta: pe.surgery(*pair, train) for beta, pair in fits.items()}
sizes = [10, 20, 50, 100, 200, 500, 1000, 1500]
sizes = [size for size in sizes if size <= len(train)]

# %%
_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for beta, pair in fits.items():
    parts = [pe.surgery(*pair, train[:size], num_samples=3) for size in sizes]
    left.plot(sizes, [s.mutual_information for s in parts], ".-", label=rf"$\beta$ = {beta:g}")
left.plot(sizes, [math.log(size) for size in sizes], color="0.15", ls="dashed", label="log N")
left.set(xscale="log", xlabel="data N", ylabel="mutual information (nats per datum)")
left.set_xticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1,000"])
left.minorticks_off()
left.legend()
labels = [f"{beta:g}" for beta in found]
information = [s.mutual_information for s in found.values()]
right.bar(labels, information, color="C0", label="mutual information")
marginals = [s.marginal_kl for s in found.values()]
right.bar(labels, marginals, bottom=information, color="C1", label="marginal KL")
right.axhline(math.log(len(train)), color="0.15", linestyle="dashed", label="log N")
right.set(xlabel=r"$\beta$", ylabel="average KL (nats per datum)")
right.legend()
plt.show()

# %%
print("nats per datum   average KL   mutual information   marginal KL   distance to log N")
for beta, s in found.items():
    parts = f"{s.average_kl:>13.2f}{s.mutual_information:>16.3f}{s.marginal_kl:>18.2f}"
    print(f"beta {beta:<9g}{parts}{s.log_n - s.mutual_information:>17.3f}")

# %% [markdown]
r"""
On the left, each curve leaves the line when the guide begins to confuse data. With a small $\beta$
it never does: every code says which of all images it is of. That is as much as there is to say, so
whatever else is spent goes into the marginal KL. The right panel shows it: from the second bar to
the first, the blue part hardly grows. These nats buy narrower posteriors further away from each
other, as in the third toy.

So **mutual information near $\log N$ means that a code is a name tag of its datum**, and near 0,
that it says nothing (posterior collapse). Both may have the KL that you hoped for.

## Marginal KL: draws of the prior that are nobody's code

If $q(z)$ is not the prior, then draws of the prior are not what the decoder has been trained on.
Below, codes of all data against the prior, in the two dimensions with the largest KL: on the left
for the smallest $\beta$, on the right for $\beta = 1$.
"""

# %%
smallest = min(fits)
_, axes = plt.subplots(1, 2, figsize=(10, 4))
for ax, beta in zip(axes, (smallest, 1.0), strict=True):
    s = found[beta]
    a, b = s.kl_per_dim.argsort(descending=True)[:2].tolist()
    pe.plot_aggregate_posterior(s, dims=(a, b), ax=ax)
    ax.set_title(
        rf"$\beta$ = {beta:g}, marginal KL {s.marginal_kl:.2f} nats per datum", fontsize=10
    )
    ax.set(xlim=(-5, 5), ylim=(-5, 5))
axes[0].get_legend().remove()
plt.show()

# %% [markdown]
r"""
On the left some codes have left the prior. That is the smaller part of it. The posteriors are
narrow, and in ten dimensions there is a lot of room between them. How much smaller than $p(z)$ is
$q(z)$ where a draw of the prior falls?
"""

# %%
somewhere = torch.randn(1000, 10)
for beta in (smallest, 1.0):
    with torch.no_grad():
        q = fits[beta][1].posterior(train)
        log_aggregate = pe.log_aggregate_posterior(somewhere, q.mean, q.stddev)
        missing = model.prior().log_prob(somewhere) - log_aggregate
    print(
        f"beta = {beta:g}: log p(z) - log q(z) at draws of p(z), median {missing.median():.1f} nats"
    )

# %% [markdown]
r"""
With the small $\beta$, the prior draws from places that hardly any datum has ever been coded to.
This is what the decoder makes of them:
"""

# %%
with torch.no_grad():
    decoder, encoder = fits[smallest]
    somebody = train[torch.randint(len(train), (10,))]
    from_prior = decoder.decode(torch.randn(10, 10)).mean
    from_codes = decoder.decode(encoder.posterior(somebody).sample()).mean

rows = torch.stack([somebody, from_codes, from_prior]).reshape(3, 10, 8, 8)
picture = nn.functional.pad(rows, (0, 1, 0, 1), value=0.15).transpose(1, 2).flatten(2).flatten(0, 1)
_, ax = plt.subplots(figsize=(8, 2.6))
ax.imshow(picture, cmap="Greys", vmin=0, vmax=1)
ax.set_yticks([3.5, 12.5, 21.5], ["data", "of z from q(z | x)", "of z from p(z)"])
ax.set_xticks([9 * i + 3.5 for i in range(10)], [str(i) for i in range(10)])
ax.set(xlabel=rf"image, $\beta$ = {smallest:g}")
ax.tick_params(length=0)
ax.spines[:].set_visible(False)
plt.show()

# %% [markdown]
r"""
The second row is what a draw of $q(z)$ looks like, since it is a draw for a random datum. The third
is what the model claims that data look like. The remedy is another prior, one that is learned: the
notebook `06_vampprior`.

## Dimensions: total correlation

Where the prior's dimensions are independent, the marginal KL is again a sum (Chen et al. 2018):

$$
\mathrm{KL}(q(z) \,\|\, p(z))
  = \underbrace{\mathrm{KL}\Big(q(z) \,\Big\|\, \prod_d q(z_d)\Big)}_{\text{total correlation}}
  + \underbrace{\sum_d \mathrm{KL}(q(z_d) \,\|\, p(z_d))}_{\text{dimension-wise KL}}.
$$

The total correlation says how far the dimensions of $z$ are from independent, over all data. The
rest says how each of them by itself misses the prior. Here is each dimension of the VAE with
$\beta = 1$: the KL of $q(z_d \mid x)$, and how much of it is marginal.
"""

# %%
pe.plot_kl_per_dim(result)
plt.show()

# %% [markdown]
r"""
Each dimension by itself is nearly distributed as the prior asks. What is left of the marginal KL is
total correlation.

`pe.TotalCorrelationELBO` has a weight for each of the parts. With a weight on the total correlation
alone it is $\beta$-TCVAE: it asks for independent dimensions, without charging for information. A
$\beta$ on all of the KL charges for both.
"""

# %%
weights = [4.0] if SMOKE else [3.0, 10.0, 30.0]
independent = {
    weight: fit(pe.TotalCorrelationELBO(beta=weight, dataset_size=len(train))) for weight in weights
}
found_tc = {weight: pe.surgery(*pair, train) for weight, pair in independent.items()}
print("nats per datum       mutual information   total correlation   reconstruction    ELBO")
for name, surgeries in {"beta": found, "weight of TC": found_tc}.items():
    for weight, s in surgeries.items():
        parts = f"{s.mutual_information:>14.2f}{s.total_correlation:>21.2f}"
        print(f"{name:<15}{weight:<5g}{parts}{s.reconstruction:>18.2f}{s.elbo:>11.2f}")

# %%
_, ax = plt.subplots()
lines = {
    r"weight $\beta$ of the KL": found,
    "weight of total correlation": {1.0: found[1.0], **found_tc},
}
for name, surgeries in lines.items():
    points = [(s.mutual_information, s.total_correlation) for s in surgeries.values()]
    ax.plot(*zip(*points, strict=True), "o-", label=name)
    for weight, point in zip(surgeries, points, strict=True):
        ax.annotate(f"{weight:g}", point, xytext=(6, 4), textcoords="offset points", fontsize=8)
ax.set(xlabel="mutual information (nats per datum)", ylabel="total correlation (nats per datum)")
ax.set_yscale("symlog", linthresh=0.1, linscale=0.1)  # in a quick run it may be negative
ax.set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
r"""
Both remove total correlation as their weights rise. The weight on all of the KL takes the
information with it; the one on total correlation does not. Neither is for free: look at the
reconstruction.

## From a minibatch

All of the above needs $q(z)$, a sum over all data, and training sees a minibatch at a time. There
are estimates, which `pe.SurgeryELBO` records in every step and `pe.TotalCorrelationELBO` trains
with. Both replace $q(z_i)$ by $\sum_j w_{ij}\, q(z_i \mid x_j)$ over the $B$ data of the batch:

- "stratified", the default: $w_{ii} = \frac 1 N$, and the others share the rest. It is unbiased for
  $q(z)$. Its logarithm is not unbiased for $\log q(z)$: too low, by Jensen's inequality.
- "weighted": $w_{ij} = \frac 1 {N B}$. They do not add up to 1, so that $q(z)$ is too small, and by
  more, the more posteriors overlap.

The exact values are known here, so let us see how far off they are.
"""

# %%
batch_sizes = [10, 100] if SMOKE else [10, 30, 100, 300, len(train)]
kinds = ("stratified", "weighted")
estimates = {kind: [] for kind in kinds}  # for each batch size: (batches, parts)
for kind in kinds:
    objective = pe.SurgeryELBO(len(train), estimator=kind)
    for size in batch_sizes:
        each = []
        for _ in range(2 if SMOKE else max(5, 4000 // size)):
            batch = train[torch.randperm(len(train))[:size]]
            s = objective.surgery(objective.terms(model, guide, batch))
            each.append(torch.stack([s.mutual_information, s.marginal_kl, s.total_correlation]))
        estimates[kind].append(torch.stack(each))

# %%
names = {
    "mutual_information": "mutual information",
    "marginal_kl": "marginal KL",
    "total_correlation": "total correlation",
}
_, axes = plt.subplots(1, 3, figsize=(11, 3.4))
for i, (ax, part) in enumerate(zip(axes, names, strict=True)):
    for kind in kinds:
        mean = [each[:, i].mean() for each in estimates[kind]]
        ax.errorbar(
            batch_sizes, mean, [e[:, i].std() for e in estimates[kind]], fmt=".-", label=kind
        )
    ax.axhline(getattr(result, part), color="0.15", linestyle="dashed", label="exact")
    ax.set(xscale="log", xlabel="batch size B", title=names[part])
axes[0].set_ylabel("nats per datum")
axes[2].legend()
plt.show()

# %%
print("mean estimate - exact, nats per datum")
print("                     B    mutual information    marginal KL    total correlation")
for kind in kinds:
    for size, each in zip(batch_sizes, estimates[kind], strict=True):
        bias = each.mean(0) - torch.tensor([getattr(result, part) for part in names])
        print(f"{kind:<12}{size:>10,}{bias[0]:>z18.2f}{bias[1]:>z19.2f}{bias[2]:>z19.2f}")

# %% [markdown]
r"""
The whiskers are the standard deviation over batches. Mutual information is overestimated, and what
it has too much the marginal KL has too little: it may even be negative. The stratified estimate is
better the larger the batch, and correct where the batch is all data. It never passes $\log N$. The
weighted one is far off at any size, and its total correlation has nothing to do with the truth.
Much of its error is a constant, which has no gradient, so that Chen et al. (2018) could train with
it. As a number, do not look at it.

The same while training. Dots are the minibatch's, of the last step of each epoch; the lines are
those of `pe.surgery`, of all data.
"""

# %%
objective = pe.SurgeryELBO(len(train))
path, exact = [], {}


def watch(epoch, model, guide):
    """Record the estimate of each epoch's last step, and sometimes the exact parts."""
    path.append(objective.last_surgery)
    if epoch % 4 == 3 or SMOKE:
        exact[epoch] = pe.surgery(model, guide, train)


fit(objective, watch)
_, ax = plt.subplots()
for (part, name), color in zip(names.items(), ("C0", "C1", "C2"), strict=True):
    ax.plot([getattr(s, part) for s in path], ".", color=color, label=f"{name}, B = 100")
    ax.plot(list(exact), [getattr(s, part) for s in exact.values()], color=color, label=name)
ax.set(xlabel="epoch", ylabel="nats per datum")
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
r"""
The curves have the right shape and the wrong height. That is what they are for: to see during the
training that something happens. For a number that you report, take `pe.surgery`.

## What to take with you

| part | near zero | large |
|---|---|---|
| mutual information | posterior collapse: $z$ says nothing | at $\log N$: a code names its datum |
| marginal KL | draws of the prior are like codes | the prior does not fit: learn it |
| total correlation | dimensions are independent | the prior misses how they hang together |
| dimension-wise KL | each dimension fits the prior | some dimension has a wrong place or scale |

All four may hide behind the same KL. `print(pe.surgery(model, guide, x))` shows them, and says in a
sentence what stands out.
"""
