"""Fitting a run: Lightning does it, and callbacks trace it, show it and let it be stopped."""

import functools
import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import TorchCheckpointIO
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyproelbo.cli import files
from pyproelbo.cli.interrupts import Interrupts
from pyproelbo.cli.rows import Rows, features, take
from pyproelbo.cli.runs import CHECKPOINT, STATE, Config, damaged, load_tensors, save_state
from pyproelbo.datasets import Minibatches
from pyproelbo.elbo import TermsELBO
from pyproelbo.lightning import ELBOTask, UnfinishedScheduleWarning

EVERY = 30.0  # seconds from one checkpoint to the next
COST = 20.0  # of the time that a checkpoint takes, so much before the next at a new best
FAR = 10.0  # times as bad as without training is diverged
NO_CURE = "begin a new run with another --out, or restore the file"
_TERMS = ("objective", "elbo", "reconstruction", "kl")
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning")


class DivergedError(ArithmeticError):
    """The ELBO is no longer that of a fit, after so many steps."""

    def __init__(self, elbo: float, step: int) -> None:
        super().__init__(f"the ELBO is {elbo:.4g} at step {step}")


class StoppedError(Exception):
    """Interrupted before there was anything to keep."""


class Trace(Callback):
    """A row for each epoch: means of the terms while training, and those of held-out data."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._sums, self._num = torch.zeros(len(_TERMS), dtype=torch.float64), 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        names = [f"train_{name}" for name in _TERMS]
        values = torch.stack([trainer.callback_metrics[n].detach().double() for n in names])
        num = len(features(batch))
        self._sums = self._sums.to(values.device) + values * num
        self._num += num

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
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

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self.rows), "sums": self._sums.cpu(), "num": self._num}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
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
        start = trainer.global_step
        self.bar = tqdm(
            total=self.num_steps, initial=start, unit="step", disable=None, dynamic_ncols=True
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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
        self.bar.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class Checkpoints(Callback):
    """Keeps a checkpoint of the fit, and ends it after the step at hand when it is interrupted.

    A checkpoint is written every half a minute; at an epoch's end where the held-out ELBO is the
    best so far, unless that has just been done at some cost; and where the fit ends. One from
    within an epoch comes before the epoch's end does, which resuming then reaches.

    Args:
        path: of the checkpoint's file.
        interrupts: what has been deferred for this.
        max_steps: where the fit ends, too; Lightning's own limit makes it miscount epochs.
        begin: is called when all is ready to be trained, resumed state included.
    """

    def __init__(
        self,
        path: Path,
        interrupts: Interrupts,
        max_steps: int,
        begin: Callable[[Trainer], None],
    ) -> None:
        self.max_steps = max_steps
        self.path, self.interrupts, self.begin = path, interrupts, begin
        self.begun = self.ended = False
        self._best, self._time, self._cost = -math.inf, time.monotonic(), 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interrupts.listen()  # Lightning's own handler of SIGTERM would end the fit at once
        if self.interrupts.num:
            raise StoppedError
        self.begun = True
        self.begin(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stops = self.interrupts.num > 0 or trainer.global_step == self.max_steps
        if not trainer.is_last_batch:
            self.ended = stops
            if stops or time.monotonic() - self._time >= EVERY:
                self.write(trainer)
        if stops:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ended or trainer.should_stop:  # the checkpoint of the end is written, or will be
            return
        if "val_elbo" not in trainer.callback_metrics:  # resumed after the epoch's own checkpoint
            return
        elbo = float(trainer.callback_metrics["val_elbo"])
        since = time.monotonic() - self._time
        if since >= EVERY or (elbo > self._best and since >= COST * self._cost):
            self.write(trainer)
        self._best = max(self._best, elbo)

    def write(self, trainer: Trainer) -> None:
        """Write the checkpoint, a DivergedError in place of one that is not worth it."""
        elbo = float(trainer.callback_metrics["train_elbo"])
        if not math.isfinite(elbo):
            raise DivergedError(elbo, trainer.global_step)
        start = time.monotonic()
        trainer.save_checkpoint(self.path)
        self._time = time.monotonic()
        self._cost = self._time - start

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if type(state_dict["best"]) is not float:
            raise ValueError("its best ELBO is none")
        self._best = state_dict["best"]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for name in ("optimizer_states", "pyproelbo.rng"):  # Lightning goes on without them
            if type(checkpoint[name]) is not list or len(checkpoint[name]) != 1:
                raise ValueError(f"it should have one of {name}")


class _Whole(TorchCheckpointIO):
    """Checkpoints whose files are whole whatever happens."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        file = io.BytesIO()
        torch.save(checkpoint, file)
        files.write(Path(path), file.getvalue())


class _Batches(Minibatches):
    """Minibatches of data of one or several tensors."""

    def __init__(self, data: Rows, batch_size: int, *, seed: int) -> None:
        num = len(features(data))
        super().__init__(torch.arange(num), min(batch_size, num), seed=seed)
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (take(self.data, rows) for rows in super().__iter__())


def fit(
    config: Config,
    task: ELBOTask,
    train: Rows,
    val: Rows,
    folder: Path,
    accelerator: str,
    interrupts: Interrupts,
) -> list[dict[str, float]]:
    """Train, from the folder's checkpoint if it has one; write the options, checkpoints, the state.

    Returns:
        The rows of the trace.

    Raises:
        DivergedError: if the ELBO is no longer that of a fit.
        StoppedError: if it was interrupted before its first step.
        ValueError: for a checkpoint that cannot be gone on from.
    """
    batches = _Batches(train, config.batch_size, seed=config.seed)
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
            callbacks=[trace, Bar(num_steps(config, len(features(train)))), keeper],
            plugins=[_Whole()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        held_out = DataLoader(
            range(len(features(val))),  # type: ignore[arg-type]
            batch_size=256,
            collate_fn=lambda rows: take(val, rows),
        )
        # Numbers that validation would refuse end a fit by a DivergedError.
        with pyro.validation_enabled(False), _restoring(resume, keeper):
            trainer.fit(task, batches, held_out, ckpt_path=resume, weights_only=True)
        _check_fit(config, task, train)
        if not keeper.ended:
            keeper.write(trainer)
        save_state(folder, task.model, task.guide)  # type: ignore[arg-type]
    return trace.rows


def _check_restored(trainer: Trainer, task: ELBOTask, trace: Trace, batches: Minibatches) -> None:
    """Raise a ValueError where parts of what was restored are not of the same step."""
    step = trainer.global_step
    epoch, batch = divmod(step, len(batches))
    # between two epochs there is no order of batches to go on with
    order = {"epoch": epoch, "batch": batch} if batch else batches.state_dict()
    progress: Any = trainer.fit_loop.epoch_progress.current
    epochs = {len(trace.rows), progress.processed}
    if task.objective.step != step or epochs != {epoch} or batches.state_dict() != order:
        raise ValueError("its parts are of different steps")


@contextmanager
def _restoring(checkpoint: Path | None, keeper: Checkpoints) -> Iterator[None]:
    """Until training has begun from a checkpoint, an error is the checkpoint's."""
    try:
        yield
    except Exception as error:
        if checkpoint is None or keeper.begun or isinstance(error, StoppedError):
            raise
        with damaged(checkpoint, NO_CURE):
            raise


def steps_done(folder: Path) -> int:
    """How many steps a folder's checkpoint has had, a ValueError if there is none."""
    path = folder / CHECKPOINT
    if not path.is_file():
        ended = (folder / STATE).exists()
        cure = NO_CURE if ended else f"begin it anew by --out {folder}, with its data and options"
        raise ValueError(f"{folder} has no {CHECKPOINT} to go on from: {cure}")
    with damaged(path, NO_CURE):
        step = load_tensors(path)["global_step"]
        if type(step) is not int or step < 0:
            raise TypeError(f"global_step is {step!r}")
    return step


def finished(task: ELBOTask, folder: Path) -> list[dict[str, float]]:
    """Load what a folder's checkpoint has, to be reported; it returns the rows of the trace."""
    with damaged(folder / CHECKPOINT, NO_CURE):
        state = load_tensors(folder / CHECKPOINT)
        task.load_state_dict(state["state_dict"])
        rows = state["callbacks"]["Trace"]["rows"]
    save_state(folder, task.model, task.guide)  # type: ignore[arg-type]
    return rows


def _check_fit(config: Config, task: ELBOTask, train: Rows) -> None:
    """Raise a DivergedError if a fit is far worse than one that has not begun, on the first rows.

    By its reconstruction, mostly: with beta near 0 a good fit may have a large KL.
    """
    first = take(train, slice(256))
    with torch.random.fork_rng():  # what is drawn here is not missed when the fit goes on
        now, before = task.terms(first), make_task(config, train).terms(first)
    fits, kl, fitted = (
        float(value / now.num_data)
        for value in (now.reconstruction, now.shrinkage, before.reconstruction)
    )
    size = max(abs(fitted), features(first)[0].numel())
    if not (fits > fitted - FAR * size and kl < FAR**6 * size):
        raise DivergedError(fits - kl, task.objective.step)


def make_task(config: Config, train: Rows, compile: bool = False) -> ELBOTask:
    """Model, guide, objective and optimiser of a run, not trained."""
    model, guide = config.build(train)
    beta = config.schedule()
    objective = config.kind.objective(beta=beta, max_plate_nesting=1, compile=compile)
    return ELBOTask(model, guide, objective, functools.partial(torch.optim.Adam, lr=config.lr))


def num_steps(config: Config, num_train: int) -> int:
    """How many steps a run has in all."""
    steps = config.epochs * -(-num_train // config.batch_size)
    return steps if config.max_steps == -1 else min(steps, config.max_steps)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out Lightning's notes and tips, for as long as this lasts."""
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
