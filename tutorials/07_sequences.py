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
# Sequences

In a sequence $x_0, \dots, x_{T-1}$ each step has a latent $z_t$ that depends on those before it.
The ELBO becomes a sum over time. For each step one can ask how well it is explained, what the
explanation costs, and how many nats are missing. We do this first for a model whose answers are
known, then for music.

You should know the two terms of the ELBO: see `01_what_is_the_elbo`. The ELBO of a sequence is
derived, with each step checked numerically, in `12_sequences_step_by_step`. All values are in nats.
"""

# %%
import contextlib
import io
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from pyro import poutine

import pyproelbo as pe
from pyproelbo.datasets import Minibatches
from pyproelbo.guides import dmm, lgssm
from pyproelbo.models.dmm import DMM
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.schedules import Linear

try:
    with contextlib.redirect_stderr(io.StringIO()):  # where it sees a notebook, it resizes figures
        from music21 import corpus  # the extra "music"
except ImportError:
    corpus = None

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
pyro.set_rng_seed(0)

# %% [markdown]
r"""
## The ELBO of a sequence

Model and guide are products over time:

$$
p(x, z) = \prod_t p(x_t \mid z_t)\, p(z_t \mid z_{t-1}), \qquad
q(z \mid x) = \prod_t q(z_t \mid z_{t-1}, x).
$$

Their logarithms are sums, and the terms of step $t$ do not depend on the latents after it:

$$
\log p(x) \ge \sum_t \mathbb E_{q(z_0, \dots, z_{t-1})}\Big[
\mathbb E_{q(z_t)}[\log p(x_t \mid z_t)]
- \mathrm{KL}\big(q(z_t \mid z_{t-1}, x) \,\|\, p(z_t \mid z_{t-1})\big)\Big].
$$

Each step has the two terms of an ELBO, under the expectation over the past.

## A model with all answers known

In the linear-Gaussian state space model a hidden point rotates and decays, is perturbed by noise,
and is measured with noise. We draw some sequences, and keep the hidden points for later comparison.
"""

# %%
num_steps = 8 if SMOKE else 20
model = LGSSM(num_latents=2, num_features=3)
sites = poutine.trace(model).get_trace(num=200, num_steps=num_steps).nodes
z, x = (sites[name]["value"].detach() for name in ("z", "x"))
print("z:", tuple(z.shape), " x:", tuple(x.shape), " (sequences, timesteps, numbers)")

# %% [markdown]
r"""
The Kalman *filter* computes $p(z_t \mid x_0, \dots, x_t)$, and with it $\log p(x)$. The *smoother*
computes $p(z_t \mid x)$, which uses the future as well.
"""

# %%
with torch.no_grad():
    filtered, smoothed = model.filter(x), model.smooth(x)
    log_p = model.log_evidence(x)

_, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
t = np.arange(num_steps)
for ax, result, name in ((axes[0], filtered, "filter"), (axes[1], smoothed, "smoother")):
    loc = result.loc[0, :, 0]
    scale = result.covariance[0, :, 0, 0].sqrt()
    ax.fill_between(t, loc - 1.96 * scale, loc + 1.96 * scale, alpha=0.25, label="95%")
    ax.plot(t, loc, label=f"mean of the {name}")
    ax.plot(t, z[0, :, 0], "o", color="0.15", markersize=3, label="truth")
    ax.set(title=name, xlabel="timestep", ylabel="$z_t$, first dimension")
    ax.xaxis.get_major_locator().set_params(integer=True)
axes[0].legend(fontsize=8)
plt.show()

for name, result in (("filter", filtered), ("smoother", smoothed)):
    variance = result.covariance[..., 0, 0].mean()
    error = (result.loc - z)[..., 0].square().mean()
    print(f"{name:<9} variance {variance:.3f}, squared error {error:.3f} (squared units of z)")

# %% [markdown]
r"""
## Four guides

- `Exact` is the smoothing posterior as a chain, $p(z_t \mid z_{t-1}, x_t, \dots, x_{T-1})$.
- `ExactFilter` is the exact posterior of a step without the future, $p(z_t \mid z_{t-1}, x_t)$,
  which is the best choice for each step taken separately.
- `Filtering` has the same inputs as `ExactFilter`, but is trained on the ELBO of the whole
  sequence.
- `MeanField` uses all of $x$, but its steps are independent of each other. It is trained, too.
"""


# %%
def trained(guide):
    """The guide at the ELBO's maximum, or near it."""
    loss = pe.SequentialELBO()(model, guide)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.02, fused=True)
    num_iterations = 10 if SMOKE else 500
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_iterations)
    for _ in range(num_iterations):
        optimiser.zero_grad()
        loss(x).backward()
        optimiser.step()
        falling.step()
    return guide


guides = {
    "smoothing": lgssm.Exact(model),
    "filtering": lgssm.ExactFilter(model),
    "filtering, trained": trained(lgssm.Filtering(num_latents=2, num_features=3)),
    "mean field": trained(lgssm.MeanField(num_latents=2, num_features=3)),
}

# %% [markdown]
r"""
`pe.SequentialELBO` is the ELBO, and keeps the contribution of each step. The KLs are in closed form
given the sampled past. (A *frame* in the table is one timestep of one sequence.)
"""

# %%
objective = pe.SequentialELBO(num_particles=3 if SMOKE else 200, vectorize_particles=True)
terms = {name: objective.terms(model, guide, x) for name, guide in guides.items()}
print(terms["filtering"].by_time)

# %%
print("nats per sequence")
print(f"{'log p(x), by Kalman':<26}{log_p.mean():>9.2f}")
for name, of_guide in terms.items():
    by_time = of_guide.reconstruction_by_time - of_guide.kl_by_time  # (T, particles, sequences)
    elbo = by_time.sum(0).mean(-1)
    missing, error = log_p.mean() - elbo.mean(), elbo.std() / len(elbo) ** 0.5
    print(f"{'ELBO, ' + name:<26}{elbo.mean():>9.2f}    missing {missing:>6.2f} ± {error:.2f}")

# %% [markdown]
r"""
(± is the Monte Carlo error of the draws of $z$; the sequences are the same for all.) The trained
filter has the same information as the exact one, and a better ELBO. The exact filter maximises the
term of each step given the past; the ELBO is a sum under the *guide's own* past, and later terms
profit from narrower steps than the exact ones:
"""

# %%
with torch.no_grad():
    sds = {
        name: guides[name].posterior(x).steps(z).covariance_matrix[:, 1:].det().mean() ** 0.25
        for name in ("filtering", "filtering, trained")
    }
for name, sd in sds.items():
    print(f"{name:<20}sd of z_t given the past: {sd:.3f} (geometric mean of the two axes)")

# %% [markdown]
r"""
## Where the nats are missing

The terms of the steps up to $t$ sum to a lower bound on $\log p(x_0, \dots, x_t)$. The filter
computes the exact value for each $t$, so we can see how the gap develops:
"""

# %%
running = filtered.log_evidence_by_time.cumsum(-1).mean(0)
styles = {"smoothing": "C0.-", "filtering": "C1.-", "filtering, trained": "C1.--"}
_, ax = plt.subplots(figsize=(7, 3.4))
for name, of_guide in terms.items():
    by_time = of_guide.reconstruction_by_time - of_guide.kl_by_time  # (T, particles, sequences)
    bound = by_time.mean((1, 2)).cumsum(0)
    ax.plot(t, running - bound, styles.get(name, "k.:"), label=name)
ax.axhline(0.0, color="0.6", linewidth=0.8)
ax.set(xlabel="timestep t", ylabel="log p(x_0, ..., x_t) - bound (nats)")
ax.xaxis.get_major_locator().set_params(integer=True)
ax.legend(title="guide")
plt.show()

# %% [markdown]
r"""
- **Filtering**, exact or trained, loses nats at every step: it cannot revise $z_t$ once $x_{t+1}$
  has arrived.
- **Smoothing** chooses $z_t$ with regard to later $x$, whose terms are not yet in the sum. Its
  bound is therefore loose on the way. At the end no later $x$ remains, and the gap closes: the
  whole sum is $\log p(x)$.
- **Mean field** loses nats at every step as well, because it ignores the dependence of $z_t$ on
  $z_{t-1}$.

What does the cost look like, sequence by sequence? `pe.plot_kl_by_time` draws a row for each
sequence, here for the first 40, with the mean below. Both guides are on the same scales.
"""

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 5))
precise = pe.SequentialELBO(num_particles=3 if SMOKE else 200, vectorize_particles=True)
for ax, name in zip(axes, ("filtering", "smoothing"), strict=True):
    upper = pe.plot_kl_by_time(precise.terms(model, guides[name], x[:40]), ax=ax)
    upper.set_title(name)
    upper.images[0].set_clim(0, 1.5)
for lower in figure.axes[2::2]:  # each panel adds the curve below and the colour bar
    lower.set_ylim(0, 2)
plt.show()

# %% [markdown]
r"""
The smoother pays more at the first step, for a $z_0$ that suits the whole sequence, and about as
much as the filter from then on. The last steps are cheap, because less and less future remains to
prepare for. The cost of the filter jumps where an $x_t$ is surprising. The smoother has access to
$x_t$ in advance and spreads the cost over the preceding steps, so that its rows are more even.

A filtering guide can be more useful than its ELBO suggests. A particle filter draws several $z_t$,
and continues from those that explain $x_t$ well. The logarithm of its estimate of $p(x)$ is, on
average, also a lower bound, and a tighter one. (`pe.ParticleFilterELBO` trains on it as well.)
"""

# %%
print(f"{'particles':>9}{'missing':>10}   (nats per sequence)")
for num in (1, 10, 100):
    bounds = []
    for _ in range(2 if SMOKE else 10):
        with torch.no_grad():
            result = pe.ParticleFilterELBO(num).filter(model, guides["filtering"], x)
        bounds.append(result.log_evidence)
    missing = log_p - torch.stack(bounds).mean(0)
    print(f"{num:>9}{missing.mean():>10.3f} ± {missing.std() / len(x) ** 0.5:.3f}")

# %% [markdown]
r"""
## Music

The next model uses neural networks. We fit the deep Markov model (Krishnan, Shalit & Sontag 2017)
to the chorales of Bach, beat by beat: $x_t$ indicates for each key of a keyboard whether it sounds.
The scores come with [music21](https://music21.org): `pip install pyproelbo[music]`.

**Without music21 the data are not Bach's.** They are generated by the rules in `generated`: chords
of C major that follow each other at random, in four voices. The next cell but one prints which data
this notebook was executed with.
"""

# %%
LOWEST, KEYS = 36, 48  # MIDI pitches: from C2 to B5
PHRASE = 16  # beats


def beats_of(score):
    """The pitches that sound at each beat, transposed to a key signature without accidentals."""
    flat = score.flatten()
    sharps = next((key.sharps for key in flat.getElementsByClass("KeySignature")), 0)
    shift = (-7 * sharps + 6) % 12 - 6  # semitones
    beats = [set() for _ in range(int(score.quarterLength))]
    for note in flat.notes:
        start, end = float(note.offset), float(note.offset + note.quarterLength)
        for t in range(int(np.ceil(start)), min(int(np.ceil(end)), len(beats))):
            beats[t] |= {pitch.midi + shift for pitch in note.pitches}
    return beats


def generated(num_beats):
    """Chords of C major in four voices, each of which goes to a near tone of the next chord."""
    follows = {0: (3, 4, 5), 3: (0, 4), 4: (0, 5), 5: (3, 4)}  # I, IV, V, vi
    scale, degree = (0, 2, 4, 5, 7, 9, 11), 0
    voices, beats = [48, 55, 64, 72], []
    while len(beats) < num_beats:
        tones = [scale[(degree + third) % 7] for third in (0, 2, 4)]
        for i, centre in enumerate((48, 57, 64, 71)):
            near = [p for p in range(centre - 7, centre + 8) if p % 12 in tones]
            near = [p for p in near if p % 12 == tones[0]] if i == 0 else near
            near.sort(key=lambda p: abs(p - voices[i]) + 3 * torch.rand(()).item())
            voices[i] = near[0]
        beats += [set(voices)] * int(torch.randint(1, 3, ()))
        degree = follows[degree][int(torch.randint(len(follows[degree]), ()))]
    return beats[:num_beats]


def phrases(pieces):
    """Phrases (N, PHRASE, KEYS) of zeros and ones, and their lengths (N,)."""
    rows = [beats[i : i + PHRASE] for beats in pieces for i in range(0, len(beats) - 3, PHRASE)]
    x = torch.zeros(len(rows), PHRASE, KEYS)
    for row, beats in zip(x, rows, strict=True):
        for beat, pitches in zip(row, beats, strict=False):
            beat[[p - LOWEST for p in pitches if 0 <= p - LOWEST < KEYS]] = 1.0
    return x, torch.tensor([len(beats) for beats in rows])


# %%
if corpus is None or SMOKE:
    source, num_pieces = "generated chords (not Bach's)", 8 if SMOKE else 80
    pieces = [generated(54) for _ in range(num_pieces)]
else:
    source, num_pieces = "chorales of Bach, read by music21", 80
    pieces = [beats_of(score) for score in corpus.chorales.Iterator(1, num_pieces)]

held_out = phrases(pieces[: num_pieces // 8])
train = phrases(pieces[num_pieces // 8 :])
print(f"data: {num_pieces} {source}")
print(f"{len(train[0])} phrases of up to {PHRASE} beats to train on, {len(held_out[0])} held out")

# %% [markdown]
r"""
Each beat has 16 latent numbers. The guide reads the phrase from its end, since the posterior of a
latent depends on the present and the future. Phrases have different lengths, and padding
contributes exactly zero. The weight of the KL rises during the first half of training (see
`04_beta_and_schedules` for the reason).
"""

# %%
pyro.set_rng_seed(0)
music = DMM(16, KEYS, hidden=(64,), transition=64)
reader = dmm.Smoothing(16, KEYS, hidden=64)
num_epochs = 2 if SMOKE else 250
batches = Minibatches(torch.arange(len(train[0])), batch_size=40)

objective = pe.SequentialELBO(Linear(0.1, 1.0, steps=num_epochs * len(batches) // 2))
loss = objective(music, reader)
optimiser = torch.optim.Adam(loss.parameters(), lr=4e-3, fused=True)
at, elbos = [], []
for _ in range(num_epochs):
    for rows in batches:
        x, lengths = train[0][rows], train[1][rows]
        optimiser.zero_grad()
        (loss(x, lengths) / lengths.sum()).backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
        optimiser.step()
        at.append(objective.step)
        elbos.append(objective.last_terms.elbo.item() / lengths.sum().item())

ax = pe.plot_elbo_trace(at, {"training phrases": elbos})
ax.set_ylabel("ELBO (nats per beat)")
plt.show()

# %% [markdown]
r"""
How good is the model, in this one run, on held-out pieces? For comparison we use a model in which
each key sounds independently, with its frequency in the training data. $\log p(x)$ is estimated in
two ways: by weighted draws of the guide (`pe.evidence`), and by four runs of a particle filter with
as many particles. Both are lower bounds on average.
"""

# %%
x, lengths = held_out
num_beats = lengths.sum()
precise = pe.SequentialELBO(num_particles=3 if SMOKE else 20, vectorize_particles=True)
of_music = precise.terms(music, reader, x, lengths)
num_draws = 10 if SMOKE else 2000
found = pe.evidence(music, reader, (x, lengths), num_samples=num_draws)
particles = pe.ParticleFilterELBO(num_draws)
runs = [particles.filter(music, reader, x, lengths).log_evidence for _ in range(4)]
by_filter = torch.stack(runs).sum(1) / num_beats

often = ((train[0].sum((0, 1)) + 0.5) / (train[1].sum() + 1.0)).clamp(max=0.999)
of_each = x * often.log() + (1 - x) * (1 - often).log()
there = torch.arange(PHRASE) < lengths[:, None]

print("held out, nats per beat")
print(f"{'keys by frequency':<26}{of_each.sum(-1)[there].mean():>7.3f}")
print(f"{'deep Markov model, ELBO':<26}{of_music.elbo / num_beats:>7.3f}")
error = found.stderr.square().sum().sqrt() / num_beats
by_weights = found.log_evidence.sum() / num_beats
print(f"{'log p(x), weighted draws':<26}{by_weights:>7.3f} ± {error:.3f}")
error = by_filter.std() / len(runs) ** 0.5
print(f"{'log p(x), particle filter':<26}{by_filter.mean():>7.3f} ± {error:.3f}")
ess = found.effective_sample_size
print(f"\neffective sample size of {num_draws} weighted draws: median {ess.median():.1f}")
uncertain = found.is_uncertain.double().mean()
print(f"phrases whose log p(x) is uncertain by weighted draws: {uncertain:.0%}")

# %% [markdown]
r"""
The two estimates differ by far more than their ±. With so small an effective sample size the ± of
the weighted draws means little, and `is_uncertain` flags it. The particle filter, which continues
from the good draws at each beat, gives the estimate to quote.
"""

# %%
_, ax = plt.subplots(figsize=(7, 4.4))
pe.plot_kl_by_time(of_music, ax=ax).set_title("held out")
plt.show()

# %% [markdown]
r"""
At the first beat the prior has no past to build on, and the latents have to identify the chord.
From then on the prior anticipates common continuations, and a beat costs less.

## Listening with the eyes

A *piano roll* has a row for each key and a column for each beat. The upper row shows two phrases
from the data, the lower row two phrases generated by the model: latents from the transition, keys
from $p(x_t \mid z_t)$.
"""

# %%
pyro.set_rng_seed(1)
with torch.no_grad():
    made = music(num=2 if SMOKE else 200, num_steps=PHRASE)
full = train[0][train[1] == PHRASE]
rows = [("data", full[0]), ("data", full[-1]), ("model", made[0]), ("model", made[1])]

# %% tags=["figure"]
_, axes = plt.subplots(2, 2, figsize=(10, 5.4), sharex=True, sharey=True)
octaves = range(LOWEST, LOWEST + KEYS, 12)
for ax, (name, roll) in zip(axes.flat, rows, strict=True):
    extent = (-0.5, PHRASE - 0.5, LOWEST - 0.5, LOWEST + KEYS - 0.5)
    ax.imshow(roll.T, origin="lower", aspect="auto", extent=extent, cmap="Blues")
    ax.set_title(name, fontsize=10)
    for octave in octaves:
        ax.axhline(octave - 0.5, color="0.85", linewidth=0.8)
    ax.set_yticks(octaves, [f"C{octave // 12 - 1}" for octave in octaves])
for ax in axes[1]:
    ax.set_xlabel("time (beats)")
for ax in axes[:, 0]:
    ax.set_ylabel("key (name of the note)")
plt.show()

# %% [markdown]
r"""
Are the generated phrases like the data? We compare three statistics for which the model has not
been trained:
"""

# %%
white = torch.tensor([(LOWEST + key) % 12 in (0, 2, 4, 5, 7, 9, 11) for key in range(KEYS)])


def numbers(x):
    """Keys per beat, the share of white keys, the share of keys that sound on in the next beat."""
    kept = (x[:, 1:] * x[:, :-1]).sum() / x[:, :-1].sum()
    return x.sum(-1).mean(), x[..., white].sum() / x.sum(), kept


chance = torch.bernoulli(often.expand(len(made), PHRASE, KEYS))
print(f"{'':<20}{'keys per beat':>14}{'white keys':>12}{'sound on':>10}")
for name, roll in {"data": full, "model": made, "keys by frequency": chance}.items():
    keys, share, kept = numbers(roll)
    print(f"{name:<20}{keys:>14.2f}{share:>12.1%}{kept:>10.1%}")

# %% [markdown]
r"""
The frequencies of the keys reproduce the first two statistics as well. The third one needs a model
with a past. With a larger model, all of the chorales and more time this becomes the experiment in
the paper; `tests/benchmarks/jsb.py` runs it.

## What to take with you

- The ELBO of a sequence is a sum over time; `pe.SequentialELBO` keeps the terms of each step.
- A guide without access to the future loses nats at each step. A smoothing guide has a loose bound
  on the way, and a tight one at the end.
- A particle filter compensates for much of the loss of a filtering guide.
- Models and guides of sequences are functions of one step: `pe.sequences`, `models.dmm`.
"""
