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

A VAE spends, say, five nats of KL on each datum. Do these five nats distinguish the data from each
other? Or do the codes as a whole simply lie away from the prior? The ELBO is the same in both
cases, but the model is not. Hoffman & Johnson (2016) found that the average KL is a sum of these
two parts. This notebook applies their decomposition: first on paper and to a toy in one dimension,
then to images of digits, over all data at once and over minibatches. It also asks whether single
dimensions represent single factors of the data.

You should know what the ELBO and a VAE are, and have seen the rate of `04_beta_and_schedules`.
"""

# %%
import math
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
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

Suppose that there are eight data with one latent number each, and the prior $p(z) = \mathcal N(0,
1)$. The mean of their eight posteriors is the *aggregate posterior*

$$q(z) = \frac 1 N \sum_n q(z \mid x_n).$$

It is the distribution of a code when we are not told which datum it came from. (In this notebook
$q(z)$ is always this mixture, and $q(z \mid x_n)$ the posterior of one datum.) Here are three
guides, constructed so that the average KL divergence of $q(z \mid x_n)$ from the prior is the same.
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
The codes of the first guide carry no information about any datum: all of the KL is the cost of
being in the wrong place. The second guide spends nearly all of its KL on distinguishing the data,
and its $q(z)$ stays close to the prior. The third guide does both. The two columns on the right add
up to the first one. This decomposition is the surgery.

## On paper

Draw the index $n$ of a datum at random, then $z \sim q(z \mid x_n)$. Under this joint distribution
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

The mutual information measures how much a code reveals about the datum it came from. It is
non-negative, and cannot exceed $\log N$, the entropy of $n$. The second term does not involve
single data. Inserted into the ELBO, this gives

$$
\mathrm{ELBO}
  = \underbrace{\frac 1 N \sum_n \mathbb E_q[\log p(x_n \mid z)]}_{\text{reconstruction}}
  - I(n; z) - \mathrm{KL}(q(z) \,\|\, p(z)).
$$

## With $1/N$ or without?

The ELBO of a data set is the *sum* over its data. This sum bounds $\log p(x_1, \dots, x_N)$, just
as the energy of a system is the sum over its particles; objectives and `terms` of this library,
like Pyro's, use the sum. The formulas above, and all reports, use the *mean*, in nats per datum:
only then is $q(z)$ a distribution, with $n$ drawn with probability $\frac 1 N$, and only then can
data sets of different sizes be compared. The factor does not move the optimum. Adam's steps do not
depend on the scale of the loss, so it takes the same steps with either, apart from its epsilon. The
factor does matter for anything that is counted once and not $N$ times: the KL of a global latent is
divided by $N$ in the mean, and a capacity or free bits in nats per datum have to be multiplied by
$N$ in the sum.

## On digits

The data are scikit-learn's images of digits, each pixel rounded to zero or one, and the model is a
VAE with ten latents.
"""

# %%
x = (digits().x > 0.5).float()
x = x[torch.randperm(len(x))]
train = x[297 : 397 if SMOKE else None]
epochs = 1 if SMOKE else 40


def fit(objective, watch=None, seed=1):
    """A VAE from the same start for a seed, trained by an objective; ``watch`` sees each epoch."""
    pyro.set_rng_seed(seed)
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
Given a draw $z_n$ from each posterior, every part is a mean over the data of a difference of
log-densities. It only requires $\log q(z_i \mid x_j)$ for all pairs.
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
`pe.surgery` does this for any model and guide with a latent for each datum, in bounded memory, with
standard errors. Where possible, it computes a KL in closed form, and uses this to make the other
parts more precise. Its numbers are means; those of the objective are sums.
"""

# %%
result = pe.surgery(model, guide, train, num_samples=1 if SMOKE else 10)
print(result)
total = pe.BetaELBO().terms(model, guide, train).elbo
print(f"\nthe sum over the data, one draw of each    {total:,.0f} nats")
print(f"divided by N = {len(train):,}                     {total / len(train):.2f}")

# %% tags=["figure"]
pe.plot_surgery(result)
plt.show()

# %% [markdown]
r"""
Each bar starts where the preceding one ends. The line is $\log N$. The table has two more terms,
since the prior has independent dimensions, in which case the marginal KL is a sum as well. We
return to them below.

## Mutual information: how many data can be told apart

A guide that sorts the data into $m$ groups of the same size, and encodes nothing but the group, has
a mutual information of $\log m$. So $e^{I}$ can be read as a number of groups, at most $N$.
"""

# %%
print(f"N                            {len(train):>8,}")
print(f"exp of mutual information    {math.exp(result.mutual_information):>8.0f}")

# %% [markdown]
r"""
If there are fewer data, the same codes distinguish them easily. We use the same guide, and others
trained with $\beta$ below and above 1, each from three random starts, and apply `pe.surgery` to the
first 10, 20, ... data.
"""

# %%
seeds = (1, 2) if SMOKE else (1, 2, 3)
betas = [0.1, 1.0] if SMOKE else [0.1, 0.3, 1.0, 2.0]
all_fits = {beta: [fit(pe.BetaELBO(beta), seed=seed) for seed in seeds] for beta in betas}
all_found = {beta: [pe.surgery(*pair, train) for pair in each] for beta, each in all_fits.items()}
fits = {beta: each[0] for beta, each in all_fits.items()}  # of the first start
found = {beta: each[0] for beta, each in all_found.items()}


def over_starts(surgeries, part):
    """The mean of a part over starts, and its standard error."""
    values = torch.tensor([getattr(s, part) for s in surgeries])
    return f"{values.mean():.2f} ± {values.std() / math.sqrt(len(values)):.2f}"


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
print(f"nats per datum, mean of the starts ± its standard error; log N = {result.log_n:.2f}")
print("                average KL    mutual information      marginal KL")
for beta, each in all_found.items():
    parts = ("average_kl", 16), ("mutual_information", 22), ("marginal_kl", 17)
    print(f"beta {beta:<5g}" + "".join(over_starts(each, part).rjust(w) for part, w in parts))

# %% [markdown]
r"""
(The figure shows the first start.) On the left, each curve leaves the line when the guide begins to
confuse data. With the smallest $\beta$ this hardly happens: nearly every code identifies its image.
No more information can be transmitted, so any further nats go into the marginal KL, as the right
panel shows: from the second bar to the first, the blue part hardly grows. These nats buy narrower
posteriors further away from each other, as in the third toy example.

So **mutual information near $\log N$ means that a code is a name tag of its datum**. Mutual
information near 0 means that the code carries no information (posterior collapse). Both may occur
at the KL that you hoped for.

## Marginal KL: draws of the prior that are the code of no datum

If $q(z)$ differs from the prior, the decoder has not been trained on draws from the prior. The
figure shows the codes of all data and the prior, in the two dimensions with the largest KL: on the
left for the smallest $\beta$, on the right for $\beta = 1$.
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
On the left some codes have left the prior. This is the smaller part of the marginal KL. The
posteriors are narrow, and in ten dimensions there is a lot of room between them. How much smaller
than $p(z)$ is $q(z)$ at a draw from the prior?
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
With the small $\beta$, draws from the prior fall in regions to which hardly any datum is encoded.
The decoder turns them into these images:
"""

# %%
with torch.no_grad():
    decoder, encoder = fits[smallest]
    some = train[torch.randint(len(train), (10,))]
    from_prior = decoder.decode(torch.randn(10, 10)).mean
    from_codes = decoder.decode(encoder.posterior(some).sample()).mean

rows = torch.stack([some, from_codes, from_prior]).reshape(3, 10, 8, 8)
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
The codes of the second row are draws from $q(z)$, since each is a posterior draw for a random
datum. The third row shows what data look like according to the model. The remedy is another prior,
one that is learned: see `06_vampprior`.

## Dimensions: total correlation

If the dimensions of the prior are independent, the marginal KL is again a sum (Chen et al. 2018):

$$
\mathrm{KL}(q(z) \,\|\, p(z))
  = \underbrace{\mathrm{KL}\Big(q(z) \,\Big\|\, \prod_d q(z_d)\Big)}_{\text{total correlation}}
  + \underbrace{\sum_d \mathrm{KL}(q(z_d) \,\|\, p(z_d))}_{\text{dimension-wise KL}}.
$$

The total correlation measures how far the dimensions of $z$ are from independent, over all data.
The dimension-wise KL measures how far the distribution of each single dimension is from the prior.
Here is each dimension of the VAE with $\beta = 1$: the KL of $q(z_d \mid x)$, and how much of it is
marginal.
"""

# %%
pe.plot_kl_per_dim(result)
plt.show()

# %% [markdown]
r"""
Taken singly, each dimension is distributed nearly as in the prior. The rest of the marginal KL is
total correlation.

`pe.TotalCorrelationELBO` has a weight for each of the parts. With a weight on the total correlation
alone it is the $\beta$-TCVAE: it encourages independent dimensions without charging for
information. A $\beta$ on the whole KL charges for both.
"""

# %%
weights = [4.0] if SMOKE else [3.0, 10.0, 30.0]
found_tc = {weight: [] for weight in weights}
for weight, seed in ((weight, seed) for weight in weights for seed in seeds):
    objective = pe.TotalCorrelationELBO(beta=weight, dataset_size=len(train))
    found_tc[weight].append(pe.surgery(*fit(objective, seed=seed), train))

print(
    "nats per datum     mutual information    total correlation    reconstruction             ELBO"
)
parts = "mutual_information", "total_correlation", "reconstruction", "elbo"
for name, surgeries in {"beta": all_found, "weight of TC": found_tc}.items():
    for weight, each in surgeries.items():
        columns = (
            over_starts(each, p).rjust(w) for p, w in zip(parts, (20, 20, 19, 18), strict=True)
        )
        print(f"{name:<13}{weight:<4g}{''.join(columns)}")

# %%
_, ax = plt.subplots()
lines = {
    r"weight $\beta$ of the KL": all_found,
    "weight of total correlation": {1.0: all_found[1.0], **found_tc},
}
for (name, surgeries), marker in zip(lines.items(), "o^", strict=True):
    runs = torch.tensor(
        [[(s.mutual_information, s.total_correlation) for s in each] for each in surgeries.values()]
    )
    points, errors = runs.mean(1), 2 * runs.std(1) / math.sqrt(len(seeds))
    ax.errorbar(*points.T, *errors.T.flip(0), fmt=f"{marker}-", capsize=2, label=name)
    for weight, point in zip(surgeries, points.tolist(), strict=True):
        ax.annotate(f"{weight:g}", point, xytext=(6, 4), textcoords="offset points", fontsize=8)
ax.set(xlabel="mutual information (nats per datum)", ylabel="total correlation (nats per datum)")
ax.set_yscale("symlog", linthresh=0.1, linscale=0.1)  # in a quick run it may be negative
ax.set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
r"""
(Bars are two standard errors over the starts.) Both weights remove total correlation; from a weight
of 10 upwards little is left to remove. The weight on the whole KL removes information as well; the
weight on the total correlation does not. Neither is free, as the reconstruction shows.

## From a minibatch

All of the above requires $q(z)$, a sum over all data, whereas training uses one minibatch at a
time. There are estimates, which `pe.SurgeryELBO` records in every step and which
`pe.TotalCorrelationELBO` uses for training. The two kinds of estimates both replace $q(z_i)$ by
$\sum_j w_{ij}\, q(z_i \mid x_j)$ over the $B$ data of the batch:

- "stratified", the default: $w_{ii} = \frac 1 N$, and the other weights share the rest. The
  estimate of $q(z)$ is unbiased. Its logarithm is biased: by Jensen's inequality it is below $\log
  q(z)$ on average.
- "weighted": $w_{ij} = \frac 1 {N B}$. These weights do not add up to 1. The estimate of $q(z)$ is
  therefore too small, and the more the posteriors overlap, the smaller it is.

The exact values are known here, so we can see how far off the estimates are.
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
axes[2].set_ylim(-0.5, 1.5)  # the weighted estimates are far above: see the table
axes[0].legend()
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
The whiskers are the standard deviation over batches; the weighted estimates of the total
correlation are above the third panel. Mutual information is overestimated, and the marginal KL is
underestimated by the same amount: it may even be negative. The stratified estimate improves with
the size of the batch, and is correct if the batch contains all data. It never exceeds $\log N$. The
weighted estimate is far off at any size, and its total correlation bears no relation to the true
value. Much of its error is a constant, which has no gradient, so that Chen et al. (2018) could
train with it. Do not report it as a number.

The next figure makes the same comparison during training. Dots are estimates from the minibatch in
the last step of each epoch; lines are `pe.surgery` over all data.
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
for (part, name), color, m in zip(names.items(), ("C0", "C1", "C2"), ".^x", strict=True):
    dots = {"ls": "", "marker": m, "markersize": 4, "label": f"{name}, B = 100"}
    ax.plot([getattr(s, part) for s in path], color=color, **dots)
    ax.plot(list(exact), [getattr(s, part) for s in exact.values()], color=color, label=name)
ax.set(xlabel="epoch", ylabel="nats per datum")
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
r"""
The estimates have the right shape and the wrong height. They are useful for noticing changes during
training. For numbers that you report, use `pe.surgery`.

## Disentanglement: factors and dimensions

Images are generated by factors, such as the position and the size of an object. Does each *factor*
have its own dimension? This is *disentanglement*, for which a large $\beta$ and a weight on total
correlation were proposed (Higgins et al. 2017; Chen et al. 2018). It can be measured if the factors
are known, as in dSprites (Matthey et al. 2017). Here is a small data set of this kind: squares of 5
sizes at 11 by 11 positions, each once.
"""

# %%
factors = torch.cartesian_prod(torch.arange(11), torch.arange(11), torch.arange(2, 7))  # (N, 3)
factor_names = ("x", "y", "size")
across, down, sizes_of = factors[:, :, None].unbind(1)
pixels = torch.arange(16)
in_columns = (pixels >= across) & (pixels < across + sizes_of)  # (N, 16)
in_rows = (pixels >= down) & (pixels < down + sizes_of)
squares = (in_rows[:, :, None] & in_columns[:, None, :]).float().flatten(1)  # (N, 256)

_, axes = plt.subplots(1, 8, figsize=(8, 1.2))
for ax, n in zip(axes, torch.linspace(0, len(squares) - 1, 8).long().tolist(), strict=True):
    ax.imshow(squares[n].reshape(16, 16), cmap="Greys")
    ax.set(xticks=[], yticks=[])
    ax.set_title(", ".join(str(int(value)) for value in factors[n]), fontsize=8)
plt.show()
print(f"{len(squares)} images; above them x, y and size")

# %% [markdown]
r"""
The *mutual information gap* (MIG; Chen et al. 2018) of a factor $v$ is the difference between the
two largest values, over dimensions, of the information about $v$, in units of the entropy $H(v)$ of
the factor:

$$
\mathrm{MIG} = \frac 1 {H(v)} \big(I(z_{d_1}; v) - I(z_{d_2}; v)\big), \qquad
I(z_d; v) = \mathbb E_v\, \mathrm{KL}(q(z_d \mid v) \,\|\, q(z_d)),
$$

and its mean over factors is reported. Just as $q(z)$ is the mixture of all posteriors, $q(z_d \mid
v)$ is the mixture of the posteriors of the data with this value of $v$. Both are densities in one
dimension, and the integral is a sum over a grid, without sampling or minibatches.
"""

# %%
line = torch.linspace(-8.0, 8.0, 2001).double()
step = line[1] - line[0]


def information(loc, scale, values):
    """I(z_d; v) for each dimension d, for posteriors N(loc, scale^2) of (N, K): (K,), nats."""
    found = []
    for d in range(loc.shape[1]):
        each = Normal(loc[:, d, None].double(), scale[:, d, None].double()).log_prob(line).exp()
        groups = [each[values == value] for value in values.unique()]
        shares = torch.tensor([len(group) for group in groups]).double() / len(each)
        given, aggregate = torch.stack([group.mean(0) for group in groups]), each.mean(0)
        inner = torch.special.xlogy(given, given) - torch.special.xlogy(given, aggregate)
        found.append(shares @ inner.sum(1) * step)
    return torch.stack(found)


def informations(loc, scale):
    """I(z_d; v) / H(v) for each factor and dimension: (3, K)."""
    rows = []
    for values in factors.T:
        share = values.unique(return_counts=True)[1] / len(values)
        rows.append(information(loc, scale, values) / -(share * share.log()).sum())
    return torch.stack(rows)


def mig(table):
    """The mean over factors of the gap between the two largest."""
    first, second = table.topk(2, dim=1).values.T
    return (first - second).mean().item()


# %% [markdown]
r"""
Before any training we compute the gap for three dimensions that encode one factor each, and for the
same codes, rotated.
"""

# %%
ranks = (factors - factors.min(0).values) / (factors.max(0).values - factors.min(0).values)
aligned = Normal(0.0, 1.0).icdf(0.05 + 0.9 * ranks)
pyro.set_rng_seed(2)
rotation = torch.linalg.qr(torch.randn(3, 3)).Q
narrow = torch.full_like(aligned, 0.2)


class Codes(nn.Module):
    """q(z | x_n) = N(loc_n, 0.2^2) and p(z) = N(0, I); x says nothing beyond n."""

    def __init__(self, loc):
        super().__init__()
        self.loc = loc

    def guide(self, n):
        with pyro.plate("data", len(n)):
            pyro.sample("z", dist.Normal(self.loc[n], 0.2).to_event(1))

    def forward(self, n):
        with pyro.plate("data", len(n)):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


print("                average KL   mutual information   marginal KL   TC      MIG")
for name, loc in {"aligned": aligned, "rotated": aligned @ rotation}.items():
    codes = Codes(loc)
    s = pe.surgery(codes, codes.guide, torch.arange(len(loc)), num_samples=4 if SMOKE else 50)
    score = mig(informations(loc, narrow))
    parts = f"{s.average_kl:>10.3f}{s.mutual_information:>18.3f}{s.marginal_kl:>18.3f}"
    print(f"{name:<16}{parts}{s.total_correlation:>8.2f}{score:>8.3f}")

# %% [markdown]
r"""
The prior is invariant to rotation, so a rotation changes neither the KL nor its two parts, and a
decoder can undo it: the ELBO stays the same, but the MIG does not. So the ELBO alone cannot favour
disentanglement (Locatello et al. 2019). Disentanglement has to come from the network, the data, or
a weight that depends on single dimensions, such as that on the total correlation. Does it occur
here?
"""

# %%
migs, tables = {}, {}
for name, weight in {"ELBO": None, "weight 6 of TC": 6.0}.items():
    each = []
    for seed in seeds:
        pyro.set_rng_seed(seed)
        model = VAE(6, 256, hidden=(64,), likelihood=BernoulliLikelihood())
        guide = Diagonal(6, 256, hidden=(64,))
        objective = (
            pe.BetaELBO()
            if weight is None
            else pe.TotalCorrelationELBO(beta=weight, dataset_size=len(squares))
        )
        loss, batches = objective(model, guide), Minibatches(squares, batch_size=121)
        optimiser = torch.optim.Adam(loss.parameters(), lr=3e-3, fused=True)
        for _ in range(1 if SMOKE else 200):
            for batch in batches:
                optimiser.zero_grad()
                loss(batch).backward()
                optimiser.step()
        with torch.no_grad():
            q = guide.posterior(squares)
        each.append((pe.surgery(model, guide, squares), informations(q.mean, q.stddev)))
    migs[name], tables[name] = torch.tensor([mig(table) for _, table in each]), each[0][1]
    spread = migs[name].std() / math.sqrt(len(seeds))
    print(
        f"{name:<16}MIG {migs[name].mean():.2f} ± {spread:.2f}, total correlation "
        f"{over_starts([s for s, _ in each], 'total_correlation')} nats"
    )

print("\nI(z_d; v) / H(v), first start, dimensions in columns")
for name, table in tables.items():
    for factor, row in zip(factor_names, table, strict=True):
        print(f"{name:<16}{factor:<6}" + "".join(f"{value:>7.2f}" for value in row))

# %% [markdown]
r"""
In these runs it does not. With a weight on it the total correlation is small, but the MIG is,
within its errors, no larger than without the weight, and far below that of the aligned codes.
Independent dimensions need not be the dimensions of the factors.

The quadrature can be checked in two ways. With the index of the datum as the factor, $I(z_d; n)$
equals the KL of a dimension less its marginal part, as `pe.surgery` computes them. And with draws
$z_d \sim q(z_d \mid x_n)$, $I(z_d; v)$ is the mean of $\log q(z_d \mid v) - \log q(z_d)$. We check
both for the last of the guides; the factor of the second check is the size.
"""

# %%
s = pe.surgery(model, guide, squares, num_samples=2 if SMOKE else 20)
by_surgery, error = s.kl_per_dim - s.marginal_kl_per_dim, s.stderr["marginal_kl_per_dim"]
by_quadrature = information(q.mean, q.stddev, torch.arange(len(squares)))
sizes_v = factors[:, 2]
draws = q.sample((2 if SMOKE else 20,)).double()  # (S, N, 6)
print("         I(z_d; n), nats                      I(z_d; size), nats")
print("d        surgery             quadrature       draws               quadrature")
exact = information(q.mean, q.stddev, sizes_v)
same = (sizes_v[:, None] == sizes_v).double()  # (N, N): of the same size
for d in range(6):
    pairs = Normal(q.mean[:, d].double(), q.stddev[:, d].double()).log_prob(draws[..., d, None])
    own = (pairs + same.log()).logsumexp(-1) - same.sum(1).log()
    ratio = own - pairs.logsumexp(-1) + math.log(len(squares))
    means = ratio.mean(1)
    first = f"{by_surgery[d]:>9.4f} ± {error[d]:.4f}{by_quadrature[d]:>15.4f}"
    second = f"{means.mean():>13.4f} ± {means.std() / math.sqrt(len(means)):.4f}{exact[d]:>15.4f}"
    print(f"{d:<4}{first}{second}")

# %% [markdown]
r"""
## What to take with you

| part | near zero | large |
|---|---|---|
| mutual information | collapse: $z$ has no information | $\log N$: a code identifies its datum |
| marginal KL | draws of the prior are like codes | the prior does not fit: learn it |
| total correlation | dimensions are independent | the prior misses their dependence |
| dimension-wise KL | each dimension fits the prior | some dimension has a wrong location or scale |

The same KL may hide any of these. `print(pe.surgery(model, guide, x))` shows them, and a sentence
points out anything unusual.
"""
