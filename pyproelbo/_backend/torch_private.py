"""What torch does not promise, each with what becomes of the library without it."""

from typing import Any

import torch
from torch import Tensor


def gradient_of_gamma(concentration: Tensor, value: Tensor) -> Tensor:
    """``value``, a draw of Gamma(concentration, 1), with its gradient by the concentration.

    That of draws whose value of the distribution function stays as it is (implicit
    reparameterisation), which torch has for its own draws.
    """
    if not (concentration.requires_grad and torch.is_grad_enabled()):
        return value
    return _Gamma.apply(concentration, value)  # type: ignore[return-value]


class _Gamma(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, concentration: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(concentration, value)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * _gamma_gradient(*ctx.saved_tensors), None


_gamma_gradient: Any = torch._standard_gamma_grad  # pyright: ignore
