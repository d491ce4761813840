"""Fitting a run by Lightning, with callbacks that trace it, show it and can stop it."""

import functools
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyproelbo._backend import rng
from pyproelbo.cli.checkpoints import Checkpoints, DivergedError, StoppedError, WholeFiles
from pyproelbo.cli.interrupts import Interrupts
from pyproelbo.cli.rows import InMemory, Rows, features, num_rows, take
from pyproelbo.cli.runs import CHECKPOINT, STATE, Config, damaged, load_tensors, save_state
from pyproelbo.datasets import Files, Minibatches
from pyproelbo.datasets.minibatches import Epochs
from pyproelbo.elbo import TermsELBO
from pyproelbo.lightning import ELBOTask, UnfinishedScheduleWarning

FAR = 10.0  # times as bad as untrained counts as diverged
NO_CURE = "start a new run with another --out, or restore the file"
_TERMS = ("objective", "elbo", "reconstruction", "kl")
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning")


class Trace(Callback):
    """A row for each epoch: means of the terms in training, and on held-out data."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._sums, self._num = torch.zeros(len(_TERMS), dtype=torch.float64), 0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: InMemory,
        batch_idx: int,
    ) -> None:
        """Add the terms of a batch to the sums of the epoch, weighted by its rows."""
        names = [f"train_{name}" for name in _TERMS]
        values = torch.stack([trainer.callback_metrics[n].detach().double() for n in names])
        num = len(features(batch))
        self._sums = self._sums.to(values.device) + values * num
        self._num += num

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Assemble the epoch's row; a DivergedError if its training ELBO is not finite."""
        if self._num == 0:  # resumed after the epoch's row was written
            return
        means = (self._sums / self._num).tolist()
        metrics = trainer.callback_metrics
        objective = pl_module.objective
        assert isinstance(objective, TermsELBO)
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row["beta"] = objective.schedules["beta"](max(objective.step - 1, 0))
        row |= {f"train_{n}": mean for n, mean in zip(_TERMS, means, strict=True)}
        row |= {f"val_{n}": float(metrics.get(f"val_{n}", math.nan)) for n in _TERMS}
        self.rows.append(row)
        self._sums, self._num = torch.zeros_like(self._sums), 0
        if not math.isfinite(row["train_elbo"]):
            raise DivergedError(row["train_elbo"], trainer.global_step)

    def state_dict(self) -> dict[str, object]:
        """This callback's part of a checkpoint: the rows so far, and the current epoch's sums."""
        return {"rows": list(self.rows), "sums": self._sums.cpu(), "num": self._num}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; a ValueError for an invalid one."""
        rows, sums, num = (state_dict[name] for name in ("rows", "sums", "num"))
        if type(num) is not int or sums.shape != self._sums.shape:
            raise ValueError("the sums of its trace are none")
        if not all(type(value) in (int, float) for row in rows for value in row.values()):
            raise ValueError("the rows of its trace are none")
        self.rows, self._sums, self._num = list(rows), sums, num


class Bar(Callback):
    """One progress bar for the whole fit."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar, at the step that a resumed fit has reached."""
        start = trainer.global_step
        self.bar = tqdm(
            total=self.num_steps, initial=start, unit="step", disable=None, dynamic_ncols=True
        )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Advance by a step; every tenth shows the terms of its batch."""
        step = trainer.global_step
        if not self.bar.disable and (step % 10 == 0 or step == self.num_steps):
            shown = {
                label: f"{float(trainer.callback_metrics[name]):.2f}"
                for label, name in (
                    ("ELBO", "train_elbo"),
                    ("reconstruction", "train_reconstruction"),
                    ("KL", "train_kl"),
                    ("beta", "beta"),
                )
            }
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is."""
        self.bar.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the bar as it is, with the error below it."""
        if hasattr(self, "bar"):
            self.bar.close()


class _Batches(Minibatches):
    """Minibatches of data of one or several tensors."""

    def __init__(self, data: InMemory, batch_size: int, *, seed: int) -> None:
        super().__init__(torch.arange(num_rows(data)), batch_size, seed=seed)
        self.data = data

    def __iter__(self) -> Iterator[InMemory]:  # type: ignore[override]
        return (take(self.data, rows) for rows in super().__iter__())


def _batches(data: Rows, batch_size: int, seed: int) -> Epochs:
    """Minibatches to train on."""
    size = min(batch_size, num_rows(data))
    if isinstance(data, Files):
        return data.shuffled(size, seed=seed)
    return _Batches(data, size, seed=seed)


def _in_order(data: Rows, batch_size: int) -> Iterable[object]:
    """Batches of all data."""
    if isinstance(data, Files):
        return data.batched(batch_size)
    return DataLoader(
        range(num_rows(data)),  # type: ignore[arg-type]
        batch_size=batch_size,
        collate_fn=lambda rows: take(data, rows),
    )


def train(
    config: Config,
    task: ELBOTask,
    train: Rows,
    val: Rows,
    folder: Path,
    accelerator: str,
    interrupts: Interrupts,
) -> list[dict[str, float]]:
    """Train, from the folder's checkpoint if any; write the options, checkpoints and the state.

    Returns:
        The rows of the trace.

    Raises:
        DivergedError: if the ELBO has diverged.
        StoppedError: if it was interrupted before its first step.
        ValueError: for a checkpoint that cannot be resumed.
    """
    batches = _batches(train, config.batch_size, config.seed)
    checkpoint = folder / CHECKPOINT
    resume = checkpoint if checkpoint.is_file() else None
    trace = Trace()

    def begin(trainer: Trainer) -> None:
        if resume is not None:
            with damaged(resume, NO_CURE):
                _check_restored(trainer, task, trace, batches)
        config.save(folder)

    keeper = Checkpoints(checkpoint, interrupts, config.max_steps, begin)
    with quiet(), interrupts.deferred():
        trainer = Trainer(
            max_epochs=config.epochs,
            accelerator=accelerator,
            devices=1,
            callbacks=[trace, Bar(num_steps(config, num_rows(train))), keeper],
            plugins=[WholeFiles()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        # Numbers that validation would refuse end a fit with a DivergedError.
        with pyro.validation_enabled(False), _restoring(resume, keeper):
            trainer.fit(task, batches, _in_order(val, 256), ckpt_path=resume, weights_only=True)
        _check_fit(config, task, train)
        if not keeper.ended:
            keeper.write(trainer)
        save_state(folder, task.model, task.guide)  # type: ignore[arg-type]
    return trace.rows


def _check_restored(trainer: Trainer, task: ELBOTask, trace: Trace, batches: Epochs) -> None:
    """Raise a ValueError if restored parts are from different steps."""
    step = trainer.global_step
    epoch, batch = divmod(step, len(batches))
    # between two epochs there is no order of batches to continue
    order = {"epoch": epoch, "batch": batch} if batch else batches.state_dict()
    progress = trainer.fit_loop.epoch_progress.current
    epochs = {len(trace.rows), progress.processed}  # type: ignore[attr-defined]
    if task.objective.step != step or epochs != {epoch} or batches.state_dict() != order:
        raise ValueError("its parts are from different steps")


@contextmanager
def _restoring(checkpoint: Path | None, keeper: Checkpoints) -> Iterator[None]:
    """Until training has resumed from a checkpoint, attribute errors to the checkpoint."""
    try:
        yield
    except Exception as error:
        if checkpoint is None or keeper.begun or isinstance(error, StoppedError):
            raise
        with damaged(checkpoint, NO_CURE):
            raise


def steps_done(folder: Path) -> int:
    """The number of steps of a folder's checkpoint; a ValueError if there is none."""
    path = folder / CHECKPOINT
    if not path.is_file():
        ended = (folder / STATE).exists()
        cure = NO_CURE if ended else f"begin it anew by --out {folder}, with its data and options"
        raise ValueError(f"{folder} has no {CHECKPOINT} to continue from: {cure}")
    with damaged(path, NO_CURE):
        step = load_tensors(path)["global_step"]
        if type(step) is not int or step < 0:
            raise TypeError(f"global_step is {step!r}")
    return step


def finished(task: ELBOTask, folder: Path) -> list[dict[str, float]]:
    """Load a folder's checkpoint for a report; returns the rows of the trace."""
    with damaged(folder / CHECKPOINT, NO_CURE):
        state = load_tensors(folder / CHECKPOINT)
        task.load_state_dict(state["state_dict"])
        rows = state["callbacks"]["Trace"]["rows"]
    save_state(folder, task.model, task.guide)  # type: ignore[arg-type]
    return rows


def _check_fit(config: Config, task: ELBOTask, train: Rows) -> None:
    """Raise a DivergedError if a fit is far worse than an untrained one, on the first rows.

    Mostly by its reconstruction: with beta near 0 a good fit may have a large KL.
    """
    first = train.first(256) if isinstance(train, Files) else take(train, slice(256))
    with rng.put_aside():  # draws made here do not affect the continued fit
        now, before = task.terms(first), make_task(config, train).terms(first)
    fits, kl, fitted = (
        float(value / now.num_data)
        for value in (now.reconstruction, now.shrinkage, before.reconstruction)
    )
    size = max(abs(fitted), features(first)[0].numel())
    if not (fits > fitted - FAR * size and kl < FAR**6 * size):
        raise DivergedError(fits - kl, task.objective.step)


def make_task(config: Config, train: Rows, compile: bool = False) -> ELBOTask:
    """Model, guide, objective and optimiser of a run, untrained."""
    model, guide = config.build(train)
    beta = config.schedule()
    objective = config.kind.objective(beta=beta, max_plate_nesting=1, compile=compile)
    return ELBOTask(model, guide, objective, functools.partial(torch.optim.Adam, lr=config.lr))


def num_steps(config: Config, num_train: int) -> int:
    """The total number of steps of a run."""
    steps = config.epochs * -(-num_train // config.batch_size)
    return steps if config.max_steps == -1 else min(steps, config.max_steps)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress Lightning's notes and tips within this context."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", category=UnfinishedScheduleWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
