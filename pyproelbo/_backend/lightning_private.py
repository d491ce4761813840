"""What Lightning does not promise."""

from typing import Any


def attached_trainer(module: Any) -> Any:
    """The trainer of a LightningModule, None where it has none."""
    return module._trainer


def training_data(trainer: Any) -> Any:
    """The loaders of a fit, before it has begun."""
    return trainer.fit_loop._data_source.dataloader()
