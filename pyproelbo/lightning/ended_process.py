"""What the other processes say when one has ended, or no longer answers."""

from typing import TYPE_CHECKING

from lightning.pytorch import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_LOST = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout")
_LOST += ("remote process",)  # as NCCL says


class NoteOnEndedProcess(Callback):
    """Adds to the error of a lost connection what it means, and how to go on."""

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Add the note."""
        is_lost = any(words in str(exception).lower() for words in _LOST)
        if trainer.world_size == 1 or not isinstance(exception, RuntimeError) or not is_lost:
            return
        exception.add_note(
            f"Process {trainer.global_rank} of {trainer.world_size} cannot reach another one, "
            "which has ended or hangs: its own messages say why, if it was not killed. This "
            "training cannot go on: start all its processes again, with the last checkpoint, "
            "Trainer.fit(..., ckpt_path=...)."
        )
