"""What Lightning does not promise."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


def attached_trainer(module: "LightningModule") -> "Trainer | None":
    """The trainer of a LightningModule, None where it has none."""
    return module._trainer


def callbacks_of(trainer: "Trainer") -> "list[Callback]":
    """Those of a trainer."""
    return trainer.callbacks  # type: ignore[attr-defined]


def training_data(trainer: "Trainer") -> object:
    """The loaders of a fit, before it has begun."""
    return trainer.fit_loop._data_source.dataloader()
