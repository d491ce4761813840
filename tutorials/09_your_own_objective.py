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
# Your own objective

The ELBO is one number, and training uses nothing else. Perhaps you want to change it: give one
latent a weight of its own, put a different price on the KL, or ignore corrupted data. This notebook
writes such objectives, in a few lines each, and then trains with them: with Pyro's `SVI`, with a
torch optimiser, and with Lightning on one process and on several. It also shows how to stop and
resume a run, and how to make steps faster.

You should know the two terms of the ELBO: see `01_what_is_the_elbo`. All values are in nats.
"""

# %%
import copy
import itertools
import logging
import os
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Trainer
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyproelbo as pe
from pyproelbo.datasets import Minibatches, digits
from pyproelbo.guides.gmm import Softmax
from pyproelbo.lightning import ELBOTask
from pyproelbo.models.gmm import GMM
from pyproelbo.schedules import Linear

SMOKE = "PYPROELBO_SMOKE" in os.environ  # a quick run, to see that all works
pyro.set_rng_seed(0)

# %% [markdown]
r"""
## The programs

Any Pyro model and guide will do. These two are for scikit-learn's images of digits, with pixels of
0 or 1. There are two latents for each image, a small `a` and a larger `b`, so that they can be
given different weights. (A `PyroModule` is an `nn.Module` whose parameters `SVI` finds, too.)
"""


# %%
def normal(size):
    """N(0, I) of this size."""
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


class Model(PyroModule):
    """Two latents of each image, and its pixels."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", normal(2))
            b = pyro.sample("b", normal(8))
            logits = self.decoder(torch.cat([a, b], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class Guide(PyroModule):
    """q(a | x) q(b | x), both normal with independent dimensions."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 20))

    def forward(self, x):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        q = dist.Normal(loc, log_scale.exp())
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(q.loc[:, :2], q.scale[:, :2]).to_event(1))
            pyro.sample("b", dist.Normal(q.loc[:, 2:], q.scale[:, 2:]).to_event(1))


x = (digits().x > 0.5).float()
x = x[torch.randperm(len(x))]
held_out, train = x[:200], x[200 : 400 if SMOKE else 1700]
print(f"{len(train)} images to train on, {len(held_out)} held out, of {x.shape[1]} pixels")

# %% [markdown]
r"""
## What there is to weigh

An objective receives `Terms`, the contributions of the sample sites to the ELBO. They keep the
dimensions of the plates, so that here there is a value for each image.
"""

# %%
terms = pe.BetaELBO().terms(Model(), Guide(), train)
for part in ("log_likelihood", "log_prior", "log_q", "kl"):
    for site, value in getattr(terms, part).items():
        print(f"terms.{part:<15}[{site!r}]  {tuple(value.shape)}, mean {value.mean():>8.3f} nats")
print("KL in closed form:", sorted(terms.analytic))

# %% [markdown]
r"""
Their sums have names: `data_fit` is the side against which the KL is weighed, namely the
log-likelihood (and anything that `pyro.factor` adds); `shrinkage` is the sum of the KLs;
`data_fit - shrinkage` is the ELBO. As an objective, this is a subclass of `pe.TermsELBO` with one
method, which returns the scalar to maximise:
"""


# %%
class Plain(pe.TermsELBO):
    """The ELBO."""

    def objective(self, terms):
        return terms.data_fit - terms.shrinkage


# %% [markdown]
r"""
With the same random numbers it equals Pyro's loss up to rounding:
"""

# %%
model, guide = Model(), Guide()
for objective in (Plain(), TraceMeanField_ELBO()):
    pyro.set_rng_seed(1)
    loss = objective.loss(model, guide, train)
    print(f"{type(objective).__name__:<20} loss {loss / len(train):.5f} nats per image")

# %% [markdown]
r"""
## An objective that leaves out what does not fit

Real data have errors in them. Here about one image in ten has been stored with black and white
swapped, and nothing marks these images in the training data.
"""

# %%
is_swapped = torch.rand(len(train)) < 0.1
dirty = torch.where(is_swapped[:, None], 1 - train, train)
print(f"{int(is_swapped.sum())} of {len(dirty)} images are swapped")

# %% [markdown]
r"""
The classical cure is a trimmed mean, which leaves out the data with the lowest values in each
batch. The terms already contain a value for each image, so the objective takes five lines. (With
several particles the values would have one more dimension, on the left; here there is one
particle.)
"""


# %%
class Trimmed(pe.TermsELBO):
    """The ELBO of the best 80% of a batch."""

    def objective(self, terms):
        elbo = terms.log_likelihood["x"] - terms.kl["a"] - terms.kl["b"]
        return elbo.topk(int(0.8 * len(elbo))).values.sum()


# %% [markdown]
r"""
To train, `objective(model, guide)` is an `nn.Module` whose forward is the loss. We train five times
with each objective, from different starts and with batches in a different order, to see how much is
due to chance.
"""


# %%
SEEDS = range(1 if SMOKE else 5)


def fit(objective, x, epochs, seed):
    """Model and guide that maximise the objective on x."""
    pyro.set_rng_seed(seed)
    model, guide = Model(), Guide()
    loss = objective(model, guide)
    optimiser = torch.optim.Adam(loss.parameters(), lr=3e-3, fused=True)
    batches = Minibatches(x, batch_size=100)
    for _ in range(1 if SMOKE else epochs):
        for batch in batches:
            optimiser.zero_grad()
            loss(batch).backward()
            optimiser.step()
    return model, guide


def elbo_of_each(programs, x):
    """The ELBO of each row of x, the mean of some draws."""
    terms = pe.BetaELBO(num_particles=20, vectorize_particles=True).terms(*programs, x)
    return (terms.log_likelihood["x"] - terms.kl["a"] - terms.kl["b"]).mean(0)


fits = {
    "all data": [fit(Plain(), dirty, 60, seed) for seed in SEEDS],
    "trimmed": [fit(Trimmed(), dirty, 60, seed) for seed in SEEDS],
}

num = int(is_swapped.sum())
print("ELBO, nats per image, and how many of the images with the lowest ELBO are swapped ones")
print(f"{'trained on':<12}{'run':>3}{'held out':>11}{'swapped':>10}{f'of the lowest {num}':>22}")
for name, runs in fits.items():
    for run, programs in enumerate(runs):
        elbos = [elbo_of_each(programs, images).mean() for images in (held_out, 1 - held_out)]
        lowest = is_swapped[elbo_of_each(programs, dirty).argsort()[:num]].double().mean()
        print(f"{name:<12}{run:>3}{elbos[0]:>11.2f}{elbos[1]:>10.2f}{lowest:>22.0%}")

# %% [markdown]
r"""
Both models describe correct digits equally well. With all data the swapped images are learned too,
as if they were another kind of digit. With the trimmed objective four runs of five have not learned
them, so that the ELBO finds the errors in the training data. Run 2 has learned them in part. The
data that are left out depend on the model, and the model depends on them; the trimmed objective
therefore has several maxima, and the start determines which one is reached. The figure shows run 0
of each:
"""

# %% tags=["figure"]
_, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True, sharey=True)
for ax, (name, runs) in zip(axes, fits.items(), strict=True):
    values = elbo_of_each(runs[0], dirty)
    bins = torch.linspace(-90, 0, 61).numpy()
    ax.hist(values[~is_swapped], bins, color="C0", alpha=0.7, label="correct")
    ax.hist(values[is_swapped], bins, color="C1", alpha=0.7, label="swapped")
    ax.set(title=name, xlabel="ELBO (nats per image)", ylabel="images")
    ax.legend(loc="upper left", fontsize=8)
plt.show()

# %% [markdown]
r"""
## Weights that change

A weight may be a schedule: a number that depends on the training step. Name it in the constructor,
and `self.weights(terms)` contains its value at the current step. This objective phases in the KL of
`b` gradually:
"""


# %%
class LateB(pe.TermsELBO):
    """The ELBO, in which the KL of b counts more and more."""

    def __init__(self, steps, **kwargs):
        super().__init__(schedules={"b": Linear(0.0, 1.0, steps)}, **kwargs)

    def objective(self, terms):
        weighted = self.weights(terms)["b"] * terms.kl["b"]
        return terms.data_fit - terms.mean([terms.kl["a"], weighted])


# %% [markdown]
r"""
`terms.mean` is the sum over plates and the mean over particles, so that the objective is right for
several draws of the guide, too. The step is counted by backward passes through the loss:
"""

# %%
objective = LateB(steps=4)
loss = objective(Model(), Guide())
for _ in range(6):
    weight = objective.current_weights()["b"]
    print(f"step {objective.step}: weight of b {weight:.2f}")
    loss(train).backward()

# %% [markdown]
r"""
## A weight for each site

For this you need no class: the `beta` of `pe.BetaELBO` may be a number or a schedule for each
latent site. Which latent carries the information about an image if one is cheap and the other
expensive? Here are the means over three runs for each setting, with standard errors:
"""

# %%
prices = {
    "both 1": 1.0,
    "b costs 4": {"a": 1.0, "b": 4.0},
    "a costs 4": {"a": 4.0, "b": 1.0},
    "b free at first": {"a": 1.0, "b": Linear(0.0, 1.0, steps=600)},
}
precise = pe.BetaELBO(num_particles=20, vectorize_particles=True)


def over_runs(values):
    """Their mean, and its standard error where there are several."""
    error = f" ± {values.std() / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{error}"


def parts_of(programs):
    """The ELBO of the held-out images, and its parts, in nats per image."""
    terms = precise.terms(*programs, held_out)
    parts = terms.elbo, terms.data_fit, terms.mean([terms.kl["a"]]), terms.mean([terms.kl["b"]])
    return torch.stack(parts) / len(held_out)


table = {}
print(f"{'nats per image':<17}{'ELBO':>15}{'fit':>15}{'KL of a':>14}{'KL of b':>14}")
for name, beta in prices.items():
    found = [parts_of(fit(pe.BetaELBO(beta), train, 60, seed)) for seed in SEEDS[:3]]
    table[name] = torch.stack(found)  # (runs, 4)
    elbo, data_fit, kl_a, kl_b = (over_runs(part) for part in table[name].T)
    print(f"{name:<17}{elbo:>15}{data_fit:>15}{kl_a:>14}{kl_b:>14}")

# %%
_, ax = plt.subplots(figsize=(7, 2.8))
left = torch.zeros(len(table))
for i, (site, dims, color) in enumerate((("a", 2, "C1"), ("b", 8, "C0"))):
    kl = torch.stack([runs[:, 2 + i] for runs in table.values()])
    mean, label = kl.mean(1), f"{site}, {dims} dimensions"
    error = kl.std(1) / kl.shape[1] ** 0.5 if kl.shape[1] > 1 else None
    ax.barh(list(table), mean, left=left, xerr=error, color=color, ecolor="0.3", label=label)
    left = left + mean
ax.invert_yaxis()
ax.set(xlabel="KL to the prior (nats per image)", ylabel="weights")
ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=2)
plt.show()

# %% [markdown]
r"""
At equal prices `b`, which is large enough for a digit by itself, carries most of the information.
If `b` is expensive, `a` takes over as far as two numbers can, and the fit is worse. If `b` is free
at first, it takes up nearly all of the information before `a` can. Whatever the weights,
`terms.elbo` is the true ELBO, so that the rows can be compared: all but the second are close to
each other.

## Where it fits in: SVI, torch, Lightning

An objective can be used wherever Pyro's `Trace_ELBO` can. Here are three ways to train, from the
same start, with the same batches and the same random numbers:
"""

# %%
epochs = 1 if SMOKE else 10
pyro.set_rng_seed(0)
start = Model(), Guide()
quiet = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")  # advice on loaders, mostly


def by_svi(model, guide):
    """Pyro's loop: parameters are found by name, each with its own optimiser."""
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), loss=LateB(steps=100))
    batches = Minibatches(train, batch_size=100)
    for _ in range(epochs):
        for batch in batches:
            svi.step(batch)


def by_torch(model, guide):
    """Torch's loop."""
    loss = LateB(steps=100)(model, guide)
    optimiser = torch.optim.Adam(loss.parameters(), lr=3e-3)
    batches = Minibatches(train, batch_size=100)
    for _ in range(epochs):
        for batch in batches:
            optimiser.zero_grad()
            loss(batch).backward()
            optimiser.step()


def by_lightning(model, guide):
    """No loop: Lightning has it. The loss is that of one datum."""
    task = ELBOTask(model, guide, LateB(steps=100), partial(torch.optim.Adam, lr=3e-3))
    trainer = Trainer(max_epochs=epochs, devices=1, **quiet)
    trainer.fit(task, Minibatches(train, batch_size=100))


trained = {}
for train_by in (by_svi, by_torch, by_lightning):
    programs = copy.deepcopy(start)
    pyro.set_rng_seed(1)
    train_by(*programs)
    trained[train_by] = programs
    parameters = [p for program in programs for p in program.parameters()]
    others = [p for program in trained[by_svi] for p in program.parameters()]
    apart = max((p - q).abs().max() for p, q in zip(parameters, others, strict=True))
    elbo = elbo_of_each(programs, held_out).mean()
    print(f"{train_by.__name__:<14}ELBO {elbo:.3f} nats, parameters differ by {apart:.0e} at most")

# %% [markdown]
r"""
The first two do the same arithmetic. Lightning's loss is divided by the number of data, which makes
no difference to Adam apart from rounding.

## Several processes

Lightning's Trainer divides a batch among several processes. Each process computes the gradients for
its part, and the Trainer averages them. The loss of `ELBOTask` is per datum, so the average is the
gradient for the whole batch, provided that your objective is a sum over data. (`Trimmed` is not: it
would leave out the worst data of each process.)

To show that this is exact, we use a model without random numbers: a mixture of Gaussians whose
guide is enumerated. All data form one batch, on one process and on two. The strategy
`"ddp_notebook"` forks this notebook; scripts use `"ddp"`.
"""


# %%
class Enumerated(Softmax):
    """A guide whose discrete latent is summed over, not drawn."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(x), infer={"enumerate": "parallel"})


points = torch.cat([torch.randn(200, 2) + shift for shift in (-3.0, 0.0, 3.0)])
shared = {}
for num in (1, 2):
    pyro.set_rng_seed(0)
    task = ELBOTask(GMM(3, 2), Enumerated(3, 2), pe.BetaELBO(), partial(torch.optim.Adam, lr=0.03))
    strategy = "ddp_notebook" if num > 1 else "auto"
    trainer = Trainer(max_epochs=3 if SMOKE else 100, devices=num, strategy=strategy, **quiet)
    trainer.fit(task, DataLoader(TensorDataset(points), batch_size=len(points) // num))
    shared[num] = task
    elbo = task.terms(points).elbo / len(points)
    print(f"processes: {num}, steps: {task.objective.step}, ELBO {elbo:.6f} nats per point")

pairs = zip(shared[1].parameters(), shared[2].parameters(), strict=True)
print(f"parameters differ by {max((p - q).abs().max() for p, q in pairs):.0e} at most")

# %% [markdown]
r"""
## Stop and resume

A run that was stopped should resume as if it had not been interrupted. For this, more than the
parameters has to be saved: the state of the optimiser, the positions in the sequence of batches and
in that of random numbers, and the step of the objective, on which its schedules depend. Lightning's
checkpoints contain all of these.
"""

# %%
half, whole = (1, 2) if SMOKE else (5, 10)


def run(epochs, checkpoint=None):
    """A run, or the rest of one; its task and trainer."""
    pyro.set_rng_seed(2)
    task = ELBOTask(Model(), Guide(), LateB(steps=100), partial(torch.optim.Adam, lr=3e-3))
    trainer = Trainer(max_epochs=epochs, devices=1, **quiet)
    trainer.fit(task, Minibatches(train, batch_size=100), ckpt_path=checkpoint)
    return task, trainer


def difference(task, other):
    """The largest difference of two tasks' parameters."""
    pairs = zip(task.parameters(), other.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "half.ckpt"
    in_one_go, _ = run(whole)
    stopped, trainer = run(half)
    trainer.save_checkpoint(file)
    resumed, _ = run(whole, file)

for name, task in {"stopped": stopped, "resumed": resumed}.items():
    weight = task.objective.current_weights()["b"]
    print(f"{name}: step {task.objective.step}, weight of b {weight}")
    print(f"  parameters differ from those in one go by {difference(task, in_one_go)}")

# %% [markdown]
r"""
In your own loop you have to save the following parts. `loss.state_dict()` contains the model, the
guide and the step.
"""

# %%
objective = LateB(steps=100)
loss = objective(Model(), Guide())
optimiser = torch.optim.Adam(loss.parameters(), lr=3e-3)
batches = Minibatches(train, batch_size=100)
parts = {"loss": loss, "optimiser": optimiser, "batches": batches}
elbos = []


def epoch():
    """One pass over the data."""
    for batch in batches:
        optimiser.zero_grad()
        loss(batch).backward()
        optimiser.step()
        elbos.append(objective.last_terms.elbo.item() / len(batch))


with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "half.pt"
    for _ in range(half):
        epoch()
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save(state | {"random": torch.get_rng_state()}, file)
    for _ in range(whole - half):
        epoch()
    first, elbos = elbos, []

    saved = torch.load(file)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["random"])
    for _ in range(whole - half):
        epoch()

again = range(len(first) - len(elbos), len(first))
ax = pe.plot_elbo_trace(range(len(first)), {"in one go": first})
ax.plot(again, elbos, ".", color="C1", markersize=4, label="from the file")
ax.legend(loc="lower right")
plt.show()
apart = max(abs(a - b) for a, b in zip(first[again[0] :], elbos, strict=True))
print(f"largest difference of the ELBO: {apart} nats per image")

# %% [markdown]
r"""
## Faster steps

With networks of this size a step is mostly bookkeeping: Pyro's handlers, autograd, and one
optimiser for each parameter. There are two ways to avoid it:

- `pe.SharedOptim` has the interface of Pyro's optimisers, but uses one torch optimiser for all
  parameters.
- `compile=True` runs the programs once, keeps the step and its gradients as a graph of tensor
  operations, and from then on runs the graph. The graph is compiled in the background, and the
  compiled step takes over when it is ready. The random numbers are the same as without
  `compile=True`. Programs that cannot be captured run as before, with a warning.

Both work with any objective, including your own. Compiling takes time, once for every shape of a
batch. `pe.Capture(background=False)`, used below, waits for the compiler before training continues,
and `pe.Capture(backend="eager")` runs the graph without compiling it.
"""

# %%
svi_adam = partial(pyro.optim.Adam, {"lr": 3e-3})
shared_adam = partial(pe.SharedOptim, torch.optim.Adam, {"lr": 3e-3})
ways = {
    "Pyro's Adam": (svi_adam, False),
    "SharedOptim": (shared_adam, False),
    "SharedOptim, graph": (shared_adam, pe.Capture(backend="eager")),
}
if not SMOKE:
    ways["SharedOptim, compiled"] = (shared_adam, pe.Capture(background=False))

batch = train[:100]
seconds, firsts, losses = {}, {}, {}
for name, (make, compile) in ways.items():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(Model(), Guide(), make(), loss=LateB(steps=100, compile=compile))
    at = [time.perf_counter()]
    for _ in range(5 if SMOKE else 1000):
        losses[name] = svi.step(batch)
        at.append(time.perf_counter())
    each = [end - begin for begin, end in itertools.pairwise(at)]
    seconds[name], firsts[name] = statistics.quantiles(each[3:], n=10)[0], sum(each[:3])

print(f"{'':<23}{'ms per step':>12}{'first 3 steps, s':>18}{'last loss, nats':>17}")
for name, value in seconds.items():
    print(f"{name:<23}{1000 * value:>12.2f}{firsts[name]:>18.1f}{losses[name]:>17.3f}")
print(f"\nfaster by a factor of {seconds[next(iter(ways))] / min(seconds.values()):.1f}")

# %%
_, ax = plt.subplots(figsize=(7, 2.4))
ax.barh(list(seconds), [1000 * value for value in seconds.values()], color="C0")
ax.invert_yaxis()
ax.set(xlabel="time of a training step (ms)", ylabel="way to train")
plt.show()

# %% [markdown]
r"""
The losses after all steps agree up to rounding. The times are 10th percentiles: other work on the
machine can only slow a step down, so the fast steps are the best measure. Your machine will give
other times; run the cell there.

## What to take with you

- An objective is a function of `Terms`, which contain a value for each site and each datum.
- `schedules=` gives it weights that change with the step; a mapping gives `pe.BetaELBO` one for
  each site.
- It trains with `SVI`, with torch, and with Lightning, and gives the same numbers; it can use
  several processes if it is a sum over data.
- Save its `state_dict()` with the other parts, and a run resumes as if it had not been stopped.
- Use `compile=True` and `pe.SharedOptim` if steps are mostly bookkeeping.
"""
