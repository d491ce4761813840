"""Trainings by two processes of Lightning's DDP, and the same by one: what they find.

As a script it is one of the two: ``python two_processes.py FOLDER NAME...`` makes the trainings of
these names, and saves what each has found in the folder.
"""

import functools
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyproelbo as pe
from pyproelbo.datasets import Minibatches
from pyproelbo.lightning import ELBOTask

ADAM = functools.partial(torch.optim.Adam, lr=0.05)
NUM = 23  # by two processes with batches of 5: 5 and 5, 5 and 5, 2 and 1


class Fixed(dist.Normal):
    """A normal distribution whose noise comes with the data."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, shape, _instance=None):
        return Fixed(self.loc.expand(shape), self.scale.expand(shape), self.noise)

    def rsample(self, shape=()):
        return self.loc + self.scale * self.noise


class Model(PyroModule):
    """mu ~ N(0, 1) for all data, z ~ N(mu, 1) and x ~ N(W z + b, 1) for each."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 3)

    def forward(self, rows):
        x = rows[:, :3]
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", NUM, subsample=x):
            z = pyro.sample("z", dist.Normal(mu.expand(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Branching(Model):
    """What no graph can be captured of."""

    def forward(self, rows):
        if rows.sum() > -1e9:
            super().forward(rows)


class Guide(PyroModule):
    """At noise that comes with the data, for z in the last two columns, or as it is drawn."""

    def __init__(self, noise=None):
        super().__init__()
        self.net = nn.Linear(3, 4)
        self.loc, self.noise = nn.Parameter(torch.tensor(0.3)), noise

    def forward(self, rows):
        loc, raw = self.net(rows[:, :3]).chunk(2, -1)
        mu, z = dist.Normal(self.loc, 0.7), dist.Normal(loc, raw.exp())
        if self.noise is not None:
            mu = Fixed(self.loc, torch.tensor(0.7), torch.tensor(self.noise))
            z = Fixed(loc, raw.exp(), rows[:, 3:])
        pyro.sample("mu", mu)
        with pyro.plate("data", NUM, subsample=rows):
            pyro.sample("z", z.to_event(1))


class Watch(Callback):
    """What happens in a training; it may end at a step, or kill a process."""

    def __init__(self, stop=None, path=None, kill=None):
        self.stop, self.path, self.kill = stop, path, kill
        self.logged, self.gradients, self.validated, self.began = [], [], [], None

    def on_train_batch_start(self, trainer, task, batch, index):
        if self.began is None:
            self.began = torch.get_rng_state()
        if self.kill == (trainer.global_rank, trainer.global_step):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_after_backward(self, trainer, task):
        self.gradients.append({n: p.grad.clone() for n, p in task.named_parameters()})

    def on_train_batch_end(self, trainer, task, *args):
        self.logged.append(numbers(trainer, "train"))
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True

    def on_validation_end(self, trainer, task):
        if not trainer.sanity_checking:
            self.validated.append(numbers(trainer, "val"))


def numbers(trainer, part):
    return {n: x.item() for n, x in trainer.callback_metrics.items() if n.startswith(part)}


def data(num=NUM):
    rows = torch.randn(num, 5, generator=torch.Generator().manual_seed(5))
    return rows * torch.tensor([3.0, 1.0, 0.2, 1.0, 1.0])


def trained(
    num, epochs, callbacks=(), resume=None, objective=None, noise=None, size=10, sampler=False
):
    """A training by ``num`` processes in batches of ``size`` in all, and what is known of it."""
    torch.manual_seed(3)
    task = ELBOTask(Model(), Guide(noise), objective or pe.BetaELBO(beta=0.5), ADAM)
    watch = next((each for each in callbacks if isinstance(each, Watch)), Watch())
    loaders = [Minibatches(x, size // num, distributed=num > 1) for x in (data(), data(11))]
    if sampler:
        loaders = [DataLoader(batches.x, batches.batch_size) for batches in loaders]
    fit(task, *loaders, [watch, *(c for c in callbacks if c is not watch)], num, epochs, resume)
    return {
        "parameters": {n: p.detach().clone() for n, p in task.named_parameters()},
        "logged": watch.logged,
        "gradients": watch.gradients,
        "validated": watch.validated,
        "generators": [watch.began, torch.get_rng_state()],  # of the first step, and in the end
        "step": task.objective.step,
    }


def fit(task, train, val=None, callbacks=(), num=2, epochs=1, resume=None):
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=num,
        strategy="ddp" if num > 1 else "auto",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=saves,
    )
    trainer.fit(task, train, val, ckpt_path=resume)


# The trainings


def with_given_noise(num, compile=False):
    """Of a global latent, local ones and uneven batches, all at given noise."""
    objective = pe.BetaELBO(beta=0.5, compile=compile)
    return trained(num, 3, objective=objective, noise=0.4)


NOISE = (0.4, -1.1)  # of two processes


def with_own_noise(folder):
    """A step of all data, 12 in one process and 11 in the other."""
    return trained(2, 1, noise=NOISE[int(os.environ["LOCAL_RANK"])], size=30)


def straight(folder):
    return trained(2, 4)


def killed(folder):
    saver = ModelCheckpoint(folder, filename="after-{epoch}", save_last=True, save_top_k=-1)
    return trained(2, 4, [Watch(kill=(1, 8)), saver])


def resumed(folder, path="mid.ckpt"):
    """With other random numbers before."""
    torch.randn(17)
    return trained(2, 4, resume=folder / path)


def stopped(folder):
    return trained(2, 4, [Watch(5, folder / "mid.ckpt")])


def straight_by_sampler(folder):
    return trained(2, 4, sampler=True)


def resumed_by_sampler(folder):
    """From the checkpoint after the second epoch."""
    trained(2, 2, [ModelCheckpoint(folder / "sampler", save_last=True)], sampler=True)
    torch.randn(17)
    return trained(2, 4, resume=folder / "sampler" / "last.ckpt", sampler=True)


def of_sampler(folder):
    """By a DataLoader, whose sampler repeats one of 23 data, in validation the first.

    With two more warnings: of a schedule, and of a step that cannot be captured.
    """
    rows = data()
    rows[:, 0] = torch.arange(NUM)
    seen = []

    class Seen(Callback):
        def on_validation_batch_start(self, trainer, task, batch, *args):
            seen.extend(batch[0][:, 0].tolist())

    loaders = [DataLoader(TensorDataset(rows), 5) for _ in range(2)]
    beta = pe.schedules.Linear(0.0, 1.0, steps=1000)
    task = ELBOTask(Branching(), Guide(), pe.BetaELBO(beta=beta, compile=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(task, *loaders, [Seen()])
    return {"seen": seen, "warnings": ours(caught)}


def of_batches_that_pass_for_all(folder):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    found = []
    for x in (data()[:20, 0], torch.ones(20)):  # the second are the same in all processes
        task = ELBOTask(model, AutoNormal(model), pe.BetaELBO())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(task, DataLoader(x, 10))
        found.append(ours(caught))
    return {"warnings": found}


def ours(caught):
    return [str(w.message) for w in caught if w.category.__module__.startswith("pyproelbo")]


def refused(folder):
    """Loaders that would let one process wait, or give all the same."""
    rank = int(os.environ["LOCAL_RANK"])
    batches = list(data().split(5))

    class Unsized:
        def __iter__(self):
            yield from batches[: 2 + rank]

    class Sized(Unsized):
        def __len__(self):
            return 2 + rank

    own = data(22)[rank::2]
    loaders = {
        "unequal": Sized(),
        "unsized": Unsized(),
        "same": Minibatches(data(), 5),
        "parts of parts": Minibatches(own, 5, distributed=True),
        "parts": Minibatches(own, 5),
    }
    found = {}
    for name, loader in loaders.items():
        try:
            fit(ELBOTask(Model(), Guide(), pe.BetaELBO()), loader)
        except ValueError as error:
            found[name] = str(error)
    return found


def alone(folder):
    """A training by each process for itself, longer in one than in the other."""
    rank = int(os.environ["LOCAL_RANK"])
    return trained(1, 1 + rank)


NAMED = {
    "given": lambda folder: with_given_noise(2),
    "captured": lambda folder: with_given_noise(2, pe.Capture(backend="eager")),
    "own": with_own_noise,
    "straight": straight,
    "stopped": stopped,
    "resumed": resumed,
    "killed": killed,
    "after kill": lambda folder: resumed(folder, "last.ckpt"),
    "straight by sampler": straight_by_sampler,
    "resumed by sampler": resumed_by_sampler,
    "sampler": of_sampler,
    "partial": of_batches_that_pass_for_all,
    "refused": refused,
    "alone": alone,
}


def launch(folder, names):
    """Two processes that make these trainings: their exit codes, and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    command = [sys.executable, __file__, str(folder), *names]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [
        subprocess.Popen(command, env={**os.environ, **own, "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    return [process.returncode for process in both], printed


def main(folder, names):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    for name in names:
        torch.save(NAMED[name](folder), folder / f"{name}-{rank}.pt")
    torch.distributed.barrier()
    # gloo's threads abort the interpreter's end unless the group goes first
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
