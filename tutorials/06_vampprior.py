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
# A prior that is learned

Most VAEs use the prior $p(z) = \mathcal N(0, I)$, mainly because it is convenient. Which prior
would be best? The surgery of `05_elbo_surgery` has an answer for the training data, and the answer
is a trap: with that prior the guide fails on any other data.

Priors can be ordered by how much of the data they use. At one end is a fixed prior such as
$\mathcal N(0, I)$, which uses nothing. At the other is the distribution of the codes of all
training data, which memorises them; a Bayesian would call this using the data twice. Between them
is *empirical Bayes*: a prior with some parameters, which are fitted to the data by maximising the
evidence, here its lower bound. The VampPrior (Tomczak & Welling 2018) is of this kind: a mixture of
the guide's own posteriors at a few learned inputs. This notebook goes from one end to the other.

You should know what the ELBO and a VAE are, and what mutual information and marginal KL are.
"""

# %%
import copy
import math
import os

import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.patheffects import withStroke
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import constraints

import pyproelbo as pe
from pyproelbo.datasets import Minibatches, digits
from pyproelbo.guides import hvae, vae
from pyproelbo.models.hvae import HVAE
from pyproelbo.models.vae import VAE, BernoulliLikelihood
from pyproelbo.priors import AggregatePosterior, RowsOf

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
pyro.set_rng_seed(0)

# %% [markdown]
r"""
## The best prior

With the aggregate posterior $q(z) = \frac 1 N \sum_n q(z \mid x_n)$, the mean ELBO of the data is

$$
\mathrm{ELBO} = \text{reconstruction} - I(n; z) - \mathrm{KL}(q(z) \,\|\, p(z)).
$$

The prior appears in the last term only. So for any guide and decoder, the prior with the highest
ELBO is the one for which this term is zero, $p(z) = q(z)$: a mixture of the posteriors of all $N$
data. The price is that every training step has to encode all data, and that this prior memorises
the training data. The VampPrior is a mixture of $K \ll N$ posteriors,

$$p(z) = \frac 1 K \sum_k q(z \mid u_k).$$

The *pseudo-inputs* $u_k$ have the form of data, but are parameters, learned with everything else.
The shape of the prior is learned as well, since $q(z \mid u)$ is the guide's encoder, which is
trained anyway.

The data are scikit-learn's images of digits, each pixel rounded to zero or one.
"""

# %%
x = (digits().x > 0.5).float()
order = torch.randperm(len(x))
x, labels = x[order], torch.from_numpy(load_digits().target)[order]
train, held_out = x[397 : 497 if SMOKE else None], x[: 100 if SMOKE else 397]
labels = labels[397:][: len(train)]
print("to train on:", tuple(train.shape), " held out:", tuple(held_out.shape))


# %% [markdown]
r"""
## Another prior, and nothing else

We first train a VAE with the standard normal prior and ten latents.
"""


# %%
def train_on(model, guide, epochs):
    """Maximise the ELBO over the parameters of both; those of the prior are the model's."""
    loss, batches = pe.BetaELBO()(model, guide), Minibatches(train, batch_size=100)
    optimiser = torch.optim.Adam(loss.parameters(), lr=3e-3, fused=True)
    for _ in range(1 if SMOKE else epochs):
        for batch in batches:
            optimiser.zero_grad()
            loss(batch).backward()
            optimiser.step()
    return model, guide


def fit(num_latents):
    """A VAE with the standard normal prior, and its guide."""
    guide = vae.Diagonal(num_latents, 64, hidden=(64,))
    model = VAE(num_latents, 64, hidden=(64,), likelihood=BernoulliLikelihood())
    return train_on(model, guide, epochs=60)


start = fit(num_latents=10)

# %% [markdown]
r"""
A prior in this library is a module; a call returns the distribution of $z$. (In a model of your own
write `pyro.sample("z", prior())`.) So we can copy the VAE and give the copy another prior: a
VampPrior, whose pseudo-inputs start at $K$ random data and stay in the unit interval, or the
aggregate posterior itself.
"""


# %%
def with_prior(kind, start):
    """A copy of model and guide with a prior of K components, of all data ("N"), or its own."""
    pyro.set_rng_seed(1)
    model, guide = copy.deepcopy(start)
    if kind == "N":
        model.prior = AggregatePosterior(guide.posterior, train)
    elif kind is not None:
        images = constraints.unit_interval
        model.prior = pe.VampPrior(guide.posterior, kind, RowsOf(train), constraint=images)
    return model, guide


kinds = [None, 10, "N"] if SMOKE else [None, 1, 10, 50, 200, 1000, "N"]
names = {None: "N(0, I)", "N": f"N = {len(train):,}"}
names |= {kind: f"{kind:,}" for kind in kinds if isinstance(kind, int)}


def show(surgeries):
    """A table of what the priors change."""
    print("nats per datum     ELBO   reconstruction   mutual information   marginal KL")
    for kind, s in surgeries.items():
        parts = f"{s.reconstruction:>14.2f}{s.mutual_information:>18.2f}{s.marginal_kl:>z17.2f}"
        print(f"K: {names[kind]:<12}{s.elbo:>8.2f}{parts}")


num = 1 if SMOKE else 10
show({kind: pe.surgery(*with_prior(kind, start), train, num_samples=num) for kind in kinds})

# %% [markdown]
r"""
Nothing has been trained after the change of prior. Reconstruction and mutual information depend on
the guide and the decoder, and stay the same apart from the random draws. Any gain or loss of the
ELBO is therefore marginal KL. A few posteriors of single data form a bad prior, since most codes
are far away from all of them. A thousand are better than the standard normal, and no prior can be
better than that with $K = N$. (Pseudo-inputs start slightly inside the unit interval, where they
can move, so they are not exactly data.)

## Trained on, in two dimensions

Now guide, decoder and prior are trained together. With two latents we can plot the result. Dots are
codes of the training data, and the colours are the digits, which were not used in training. The
lines bound the smallest regions with 50, 90 and 99% of the prior.
"""

# %%
flat_start = fit(num_latents=2)
flat = {k: train_on(*with_prior(k, flat_start), epochs=30) for k in (None, 10, "N")}
flat_surgeries = {kind: pe.surgery(*pair, train) for kind, pair in flat.items()}

# %% tags=["figure"]
titles = {None: "standard normal", 10: "VampPrior, K = 10", "N": "all data, K = N"}
outline = [withStroke(linewidth=3, foreground="white")]
_, axes = plt.subplots(1, 3, figsize=(12, 4.4), sharex=True, sharey=True)
for ax, (kind, s) in zip(axes, flat_surgeries.items(), strict=True):
    with torch.no_grad():
        prior = flat[kind][0].prior()
    pe.plot_aggregate_posterior(s, prior, labels=labels, ax=ax)
    ax.set_title(f"{titles[kind]}\nmarginal KL {s.marginal_kl:z.2f} nats per datum", fontsize=10)
    for digit in range(10):  # at the median code of its images
        place = torch.as_tensor(s.codes)[labels == digit].median(0).values
        ax.text(*place, str(digit), ha="center", va="center", weight="bold", path_effects=outline)
widest = 0.4 + max(float(torch.as_tensor(s.codes).abs().max()) for s in flat_surgeries.values())
axes[0].set(xlim=(-widest, widest), ylim=(-widest, widest))
for ax in axes[:2]:
    ax.get_legend().remove()
plt.show()

# %% [markdown]
r"""
(One run for each prior; a digit stands at the median code of its images.) On the left, the codes
are pulled towards a single round cluster. In the middle, the prior has adapted to the codes, and
the codes to the prior. On the right, the prior and the distribution of the codes are the same by
definition. The surgery of the three:
"""

# %%
show(flat_surgeries)

# %% [markdown]
r"""
Two numbers cannot encode much of an image, whatever the prior. So we return to ten.

## From nothing to all

With each of the priors, training continues from the initial VAE for the same number of steps, and
all of this is repeated from three random starts. We evaluate the ELBO on the training data and on
the held-out data. On the held-out data we also estimate $\log p(x)$, in two ways. `pe.evidence`
weights 200 draws from the guide for each datum. The other way does not need a guide at all: it
averages $p(x \mid z)$ over 100,000 draws from the model's own prior. Both are too low on average,
so the larger one should be closer to the truth.
"""


# %%
@torch.no_grad()
def by_prior(model, x, num=1000 if SMOKE else 100_000, chunk=1000 if SMOKE else 10_000):
    """log p(x_n) by draws of the prior, the same for all data: (N,)."""
    parts = []
    for _ in range(num // chunk):
        logits = model.decode(model.prior().sample((chunk,))).base_dist.logits  # (chunk, 64)
        log_p = x @ logits.T - nn.functional.softplus(logits).sum(-1)  # (N, chunk)
        parts.append(log_p.double().logsumexp(-1))
    return torch.stack(parts).logsumexp(0) - math.log(num)


pairs = {}  # of the first start
surgeries, found = ({kind: [] for kind in kinds} for _ in range(2))
for seed in (1, 2) if SMOKE else (1, 2, 3):
    pyro.set_rng_seed(seed)
    begin = fit(num_latents=10) if seed > 1 else start
    for kind in kinds:
        pair = train_on(*with_prior(kind, begin), epochs=25)
        pairs.setdefault(kind, pair)
        surgeries[kind].append(pe.surgery(*pair, train))
        e = pe.evidence(*pair, held_out, num_samples=10 if SMOKE else 200)
        values = e.elbo, e.log_evidence, by_prior(pair[0], held_out)
        draws = float(e.effective_sample_size.median())
        found[kind].append([*(float(value.mean()) for value in values), draws])


# %%
def over_starts(values, digits=2):
    """The mean over starts, and its standard error."""
    values = torch.tensor(values)
    return f"{values.mean():,.{digits}f} ± {values.std() / math.sqrt(len(values)):,.{digits}f}"


print("training data, nats per datum, mean of the starts ± its standard error")
print(f"{'':<13}{'ELBO':>16}{'reconstruction':>18}{'mutual information':>20}{'marginal KL':>14}")
for kind, each in surgeries.items():
    columns = (
        [s.elbo for s in each],
        [s.reconstruction for s in each],
        [s.mutual_information for s in each],
        [max(s.marginal_kl, 0.0) for s in each],
    )
    shown = (over_starts(c).rjust(w) for c, w in zip(columns, (16, 18, 20, 14), strict=True))
    print(f"K: {names[kind]:<10}{''.join(shown)}")

print("\nheld out                 ELBO    log p(x), draws of q    effective    draws of the prior")
for kind, each in found.items():
    elbo, by_guide, prior_draws, draws = (list(column) for column in zip(*each, strict=True))
    digits = 0 if kind == "N" else 2
    shown = over_starts(elbo, digits).rjust(18), over_starts(by_guide, digits).rjust(24)
    effective = f"{sum(draws) / len(draws):.1f}".rjust(13)
    print(f"K: {names[kind]:<10}{''.join(shown)}{effective}{over_starts(prior_draws).rjust(22)}")

# %%
ticks = [names[kind] for kind in kinds]
at = range(len(kinds))


def line(ax, values, **style):
    """Means over starts with two standard errors."""
    values = torch.tensor(values)
    errors = 2 * values.std(1) / math.sqrt(values.shape[1])
    ax.errorbar(range(len(values)), values.mean(1), errors, capsize=2, **style)


_, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8))
elbos = [[run[0] for run in each] for each in found.values()]
better = [[max(run[1:3]) for run in each] for each in found.values()]
line(
    left,
    [[s.elbo for s in each] for each in surgeries.values()],
    fmt="o-",
    label="ELBO, training data",
)
line(left, better, fmt="s--", color="C2", label="log p(x), held out, by the better way")
line(left, elbos[:-1], fmt="^-", color="C3", label="ELBO, held out")
off = f"ELBO, held out:\n{torch.tensor(elbos[-1]).mean():,.0f}"
arrow = {"arrowstyle": "-|>", "color": "C3"}
left.annotate(
    off, (at[-1], -21), (at[-1], -20.2), color="C3", ha="center", fontsize=8, arrowprops=arrow
)
left.set(ylabel="nats per datum", ylim=(-21, -10))
information = [[s.mutual_information for s in each] for each in surgeries.values()]
line(right, information, fmt="o-", label="mutual information")
marginal = [[s.marginal_kl for s in each] for each in surgeries.values()]
line(right, marginal, fmt="^-", color="C3", label="marginal KL")
right.axhline(math.log(len(train)), color="0.15", linestyle="dashed", label="log N")
right.set(ylabel="nats per datum, training data")
for ax in (left, right):
    ax.set_xlabel("components K of the prior")
    ax.set_xticks(at, ticks, fontsize=8)
    ax.legend(fontsize=8)
plt.show()

# %% [markdown]
r"""
On the training data, more components are better. On the held-out data, the ELBO rises up to a
point, then falls, and at $K = N$ it drops by thousands of nats. Look at $\log p(x)$ before you
blame the prior. Estimated from draws of the guide it falls as well. But estimated from draws of the
prior, which do not involve the guide, it shows that the model with $K = N$ is only one or two nats
worse than the others. **It is the guide that fails.** With a component for each datum the guide may
make its posteriors as narrow as it likes, since the prior follows. The marginal KL is zero and
mutual information approaches its bound $\log N$. The posterior for a new datum is then a needle as
well, in between all the others, where the prior has next to no mass. The components that would
explain the datum are elsewhere. No estimate that relies on draws from the guide can be used there,
as the effective sample size shows (the median over the data; one draw has all the weight), and any
use of the codes of new data fails for the same reason.

At $K = 1{,}000$ the same happens on a smaller scale: the held-out ELBO is lower than at 200 while
$\log p(x)$ is higher. Only at $K = N$ has the model itself become worse than that with the standard
prior, by less than a nat.

One component is a single normal distribution with a learned location and scale, which is no better
than the standard normal.

## Pseudo-inputs

What do the pseudo-inputs look like? `pe.priors.usage` counts the codes for which each component is
responsible, by $p(k \mid z)$; the components that are used most are shown, for the first start.
"""

# %%
shown = 10 if SMOKE else 50
model, guide = pairs[shown]
usage = pe.priors.usage(model.prior, surgeries[shown][0].codes)
print(usage)
ax = pe.plot_pseudo_inputs(model.prior.pseudo_inputs, usage.usage, shape=(8, 8), num=30)
ax.images[0].set_cmap("Greys")  # black on white, as all the others here
plt.show()

# %% [markdown]
r"""
Nothing requires the pseudo-inputs to be images. Any input will do if the encoder maps it to a
location and a scale that are useful to the prior. These started at images, and still look like
images. Yet they are not quite like data: the posterior of a datum covers one code, whereas a
component has to be wide enough for the codes of many data.
"""

# %%
with torch.no_grad():
    u = model.prior.pseudo_inputs
    nearest = torch.cdist(u, train).argmin(1)
    moved = (u - train[nearest]).abs().mean()
    of_nearest = guide.posterior(train[nearest]).stddev
    of_prior = model.prior().components.stddev
print(f"mean difference of a pixel to that of the nearest datum    {moved:.3f}")
print(f"mean scale of q(z | x) at the nearest datum                {of_nearest.mean():.3f}")
print(f"mean scale of q(z | u), pseudo-inputs                      {of_prior.mean():.3f}")

# %% [markdown]
r"""
A component is a part of the prior from which one can draw. On the left below, each column is one of
the components with the most codes: its pseudo-input, and the images that the model generates from
four draws of $q(z \mid u_k)$. On the right are forty draws from the model with the standard prior.
"""

# %%
most = usage.usage.argsort(descending=True)[:8]
with torch.no_grad():
    some = model.prior().components.sample((4,))[:, most]  # (4, 8, 10)
    of_component = model.decode(some).mean
    of_standard = pairs[None][0].decode(torch.randn(5, 8, 10)).mean
    columns = torch.cat([model.prior.pseudo_inputs[most][None], of_component])

_, axes = plt.subplots(1, 2, figsize=(10, 3.4))
panels = {"component of the VampPrior, by its share of codes": columns, "": of_standard}
for ax, (name, images) in zip(axes, panels.items(), strict=True):
    images = nn.functional.pad(images.reshape(5, 8, 8, 8), (0, 1, 0, 1), value=0.15)
    picture = images.transpose(1, 2).flatten(2).flatten(0, 1)
    ax.imshow(picture, cmap="Greys", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[], xlabel=name)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
places = [9 * i + 3.5 for i in range(8)]
axes[0].set_xticks(places, [f"{share:.1%}" for share in usage.usage[most]], fontsize=8)
axes[0].set_yticks(places[:5], ["pseudo-input", *["draw"] * 4])
axes[1].set_xlabel("forty draws of the standard prior")
plt.show()

# %% [markdown]
r"""
## Two levels

A hierarchical VAE has a second latent above the first: $z_2 \sim p(z_2)$, then $z_1 \sim p(z_1 \mid
z_2)$, and $x$ given both. Its guide draws $z_2 \sim q(z_2 \mid x)$ and then $z_1 \sim q(z_1 \mid x,
z_2)$. Tomczak & Welling (2018) put a VampPrior on $z_2$, and found more of its dimensions in use
than with the standard prior. We proceed as above, with five latents in each level: first the
standard prior, then $K = 50$, in one run each.
"""


# %%
guide = hvae.Diagonal((5, 5), 64, hidden=(64,))
model = HVAE((5, 5), 64, hidden=(64,), likelihood=BernoulliLikelihood())
levels_start = train_on(model, guide, epochs=60)
levels = {kind: train_on(*with_prior(kind, levels_start), epochs=30) for kind in (None, shown)}

# %% [markdown]
r"""
`pe.surgery` decomposes each level: $z_2$ alone, and $z_1$ given $z_2$. By the chain rule, the
mutual information and the marginal KL of the two levels add up to those of $(z_1, z_2)$. As $q(z_1
\mid x, z_2)$ has to be evaluated for each pair of data, we use 500 data.
"""

# %%
some = train[:100] if SMOKE else train[:500]
print("nats per datum                 mutual information   marginal KL   active units")
for kind, pair in levels.items():
    upper = pe.surgery(*pair, some, site="z2")
    lower = pe.surgery(*pair, some, site="z1", given="z2")
    for site, s in {"z2": upper, "z1 given z2": lower}.items():
        parts = f"{s.mutual_information:>14.2f}{s.marginal_kl:>16.2f}"
        active = f"{int(s.active_units.sum())} of {len(s.active_units)}"
        print(f"K: {names[kind]:<16}{site:<13}{parts}{active:>15}")

print()
for kind, pair in levels.items():
    found = pe.evidence(*pair, held_out, num_samples=num)
    elbo, log_p = found.elbo.mean(), found.log_evidence.mean()
    print(f"K: {names[kind]:<16}held out: ELBO {elbo:.2f}, log p(x) {log_p:.2f} nats per datum")

# %% [markdown]
r"""
Here all dimensions of the upper level are in use with either prior, and this level carries more
information than the lower one. With two small levels and easy images there is no reason to abandon
it, and these runs do not show the gain in dimensions that Tomczak & Welling report. The VampPrior
removes a part of the marginal KL of $z_2$, and that of $z_1$ given $z_2$ remains. Its prior $p(z_1
\mid z_2)$ is learned already, but it is a normal distribution for each $z_2$. The held-out data
gain, as they did with one level.

## What to take with you

- The best prior for given codes is their distribution, $q(z)$. Fitting the prior removes the
  marginal KL, and leaves the guide free to transmit more.
- Priors differ in how much of the data they use: a fixed prior nothing, empirical Bayes some, the
  aggregate posterior all. The more components, the better on the training data. Choose $K$ on
  held-out data.
- A falling held-out ELBO may be the fault of the guide and not of the model: compare $\log p(x)$,
  estimated from draws that do not come from the guide.
- `pe.VampPrior(guide.posterior, K, RowsOf(x))` can be used wherever a prior can, including in your
  own models. `pe.priors.GaussianMixture`, a mixture without an encoder, is available for
  comparison.
- `pe.surgery` shows whether there is marginal KL to be saved, `pe.priors.usage` whether the
  components are used.
"""
