"""Fitting a run: Lightning does it, and callbacks trace it, show it and let it be stopped."""

import functools
import logging
import math
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyproelbo.cli.rows import Rows, features, take
from pyproelbo.cli.runs import Config
from pyproelbo.datasets import Minibatches
from pyproelbo.elbo import TermsELBO
from pyproelbo.lightning import ELBOTask, UnfinishedScheduleWarning

CHECKPOINT = "last.ckpt"
_TERMS = ("objective", "elbo", "reconstruction", "kl")
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning")


class DivergedError(ArithmeticError):
    """The ELBO is no longer finite."""


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
            raise DivergedError(
                f"the ELBO is {row['train_elbo']} at step {row['step']}: try a smaller --lr, and "
                "data of the size of 1"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self.rows), "sums": self._sums.cpu(), "num": self._num}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self._sums, self._num = state_dict["sums"], state_dict["num"]


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


class Stopper(Callback):
    """Ends a fit after the step at hand, by Ctrl-C or at ``max_steps``, with a checkpoint there.

    Within an epoch the checkpoint comes before the epoch's end does, which resuming then reaches.
    A second Ctrl-C stops at once.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint, self.interrupted, self.saved = checkpoint, False, False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ends = self.interrupted or trainer.global_step == trainer.max_steps
        if ends and not trainer.is_last_batch:
            trainer.save_checkpoint(self.checkpoint)
            self.saved = True
        if self.interrupted:
            trainer.should_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C as the wish to stop."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class _Batches(Minibatches):
    """Minibatches of data of one or several tensors."""

    def __init__(self, data: Rows, batch_size: int, *, seed: int) -> None:
        super().__init__(torch.arange(len(features(data))), batch_size, seed=seed)
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (take(self.data, rows) for rows in super().__iter__())


def fit(
    config: Config, task: ELBOTask, train: Rows, val: Rows, folder: Path, accelerator: str
) -> tuple[list[dict[str, float]], bool]:
    """Train, from the folder's checkpoint if it has one.

    Returns:
        The rows of the trace, and whether Ctrl-C ended it.
    """
    batches = _Batches(train, config.batch_size, seed=config.seed)
    checkpoint = folder / CHECKPOINT
    trace, stopper = Trace(), Stopper(checkpoint)
    with quiet():
        trainer = Trainer(
            max_epochs=config.epochs,
            max_steps=config.max_steps,
            accelerator=accelerator,
            devices=1,
            callbacks=[trace, Bar(num_steps(config, len(features(train)))), stopper],
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
        resume = str(checkpoint) if checkpoint.is_file() else None
        # Numbers that validation would refuse end a fit by a DivergedError.
        with stopper.listening(), pyro.validation_enabled(False):
            trainer.fit(task, batches, held_out, ckpt_path=resume, weights_only=True)
        if not stopper.saved:
            trainer.save_checkpoint(checkpoint)
    return trace.rows, stopper.interrupted


def make_task(config: Config, train: Rows, compile: bool = False) -> ELBOTask:
    """Model, guide, objective and optimiser of a run, not trained."""
    model, guide = config.build(features(train))
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
