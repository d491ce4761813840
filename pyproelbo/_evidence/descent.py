"""Minimisation by Adam."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def descend(
    loss: Callable[[int], Tensor], learned: Sequence[Tensor], steps: int, lr: float
) -> None:
    """Minimise a function of tensors in place, with a learning rate that falls to 0.

    Args:
        loss: from the index of the step to the loss, a scalar with a graph.
        learned: leaves; those that a step does not use are unchanged by it.
    """
    optimiser = torch.optim.Adam(learned, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.enable_grad():
        for step in range(steps):
            gradients = torch.autograd.grad(loss(step), learned, allow_unused=True)
            for value, gradient in zip(learned, gradients, strict=True):
                value.grad = gradient
            optimiser.step()
            schedule.step()
    for value in learned:
        value.grad = None
