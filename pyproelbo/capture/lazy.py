"""A loss that waits for its device only when it is read."""

from typing import Self

from torch import Tensor

from pyproelbo._backend.torch_private import PLAIN_RESULTS


class LazyLoss(Tensor):
    """The loss that ``SVI.step`` returns with ``Capture(lazy_loss=True)``: a scalar on its device.

    ``float(loss)`` waits for it, as does printing; arithmetic gives tensors, and a sum over steps
    waits for none of them.

    >>> import torch
    >>> loss = torch.tensor(1.5).as_subclass(LazyLoss)
    >>> loss.item() is loss, float(loss), f"{loss:.2f}"
    (True, 1.5, '1.50')
    """

    # results are plain tensors
    __torch_function__ = PLAIN_RESULTS

    def item(self) -> Self:  # type: ignore[override]
        """Itself: SVI passes it on in this way."""
        return self

    def __format__(self, format_spec: str) -> str:
        return format(float(self), format_spec)
