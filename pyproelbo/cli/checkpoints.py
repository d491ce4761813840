"""The checkpoints of a fit: when they are written, and how they stop it."""

import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import TorchCheckpointIO

from pyproelbo.cli import files
from pyproelbo.cli.interrupts import Interrupts

EVERY = 30.0  # seconds from one checkpoint to the next
COST = 20.0  # times the duration of a checkpoint, before the next at a new best


class DivergedError(ArithmeticError):
    """The ELBO has diverged, after some number of steps."""

    def __init__(self, elbo: float, step: int) -> None:
        super().__init__(f"the ELBO is {elbo:.4g} at step {step}")


class StoppedError(Exception):
    """Interrupted before there was anything to keep."""


class Checkpoints(Callback):
    """Keeps a checkpoint of the fit, and stops it after the current step when interrupted.

    A checkpoint is written every half minute; at an epoch's end with the best held-out ELBO so far,
    unless one was written recently relative to its cost; and when the fit ends. One from within an
    epoch precedes the epoch's end, which resuming then reaches.

    Args:
        path: of the checkpoint's file.
        interrupts: the signals deferred for this.
        max_steps: where the fit also ends; Lightning's own limit makes it miscount epochs.
        begin: called when all is ready for training, including resumed state.
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
        """Take over the signals from Lightning, and begin; a StoppedError if one has come."""
        self.interrupts.listen()  # Lightning's own handler of SIGTERM would end the fit at once
        if self.interrupts.num:
            raise StoppedError
        self.begun = True
        self.begin(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Stop the fit at an interrupt or at ``max_steps``; within an epoch, write what is due."""
        stops = self.interrupts.num > 0 or trainer.global_step == self.max_steps
        if not trainer.is_last_batch:
            self.ended = stops
            if stops or time.monotonic() - self._time >= EVERY:
                self.write(trainer)
        if stops:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint if one is due, or if the held-out ELBO is the best so far."""
        if self.ended or trainer.should_stop:  # the final checkpoint is written, or will be
            return
        if "val_elbo" not in trainer.callback_metrics:  # resumed after the epoch's own checkpoint
            return
        elbo = float(trainer.callback_metrics["val_elbo"])
        since = time.monotonic() - self._time
        is_best, self._best = elbo > self._best, max(self._best, elbo)
        if since >= EVERY or (is_best and since >= COST * self._cost):
            self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """Write the checkpoint, or raise a DivergedError if the fit has diverged."""
        elbo = float(trainer.callback_metrics["train_elbo"])
        if not math.isfinite(elbo):
            raise DivergedError(elbo, trainer.global_step)
        start = time.monotonic()
        trainer.save_checkpoint(self.path)
        self._time = time.monotonic()
        self._cost = self._time - start

    def state_dict(self) -> dict[str, float]:
        """The best held-out ELBO so far, in nats per datum, for a checkpoint."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue from :meth:`state_dict`; a ValueError if its ELBO is not a number."""
        if type(state_dict["best"]) is not float:
            raise ValueError("its best ELBO is none")
        self._best = state_dict["best"]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Raise a ValueError for a checkpoint of none or several optimisers or processes."""
        for name in ("optimizer_states", "pyproelbo.rng"):  # Lightning continues without them
            if type(checkpoint[name]) is not list or len(checkpoint[name]) != 1:
                raise ValueError(f"it should have one of {name}")


class WholeFiles(TorchCheckpointIO):
    """Checkpoints whose files are always complete."""

    def save_checkpoint(
        self, checkpoint: dict[str, object], path: str | Path, storage_options: object = None
    ) -> None:
        """Write a checkpoint to its file, completely or not at all."""
        file = io.BytesIO()
        torch.save(checkpoint, file)
        files.write(Path(path), file.getvalue())
