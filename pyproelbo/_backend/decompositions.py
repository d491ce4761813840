"""What inductor computes in place of some functions of torch, for float32 on CPUs.

The softplus and the logarithm of the sigmoid take log(1 + z) for z in [0, 1]. Vectorised libraries
compute it for any z, with twice the digits in between, which is a tenth of a small VAE's step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_TERMS = 8  # of the series, after which 1e-9 is left where z = 1


def log1p_of_unit(z: Tensor) -> Tensor:
    r"""log(1 + z) for z in [0, 1], to three units in the last place of float32.

    .. math:: \log(1 + z) = 2 \operatorname{artanh} s = 2 s \sum_k \frac{s^{2k}}{2k + 1},
        \quad s = \frac{z}{2 + z} \le \frac13
    """
    s = z / (z + 2.0)
    square = s * s
    series = square * (1.0 / (2 * _TERMS - 1))
    for k in reversed(range(1, _TERMS - 1)):
        series = (series + 1.0 / (2 * k + 1)) * square
    return 2.0 * s * (series + 1.0)


def log_sigmoid_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of -softplus(-x), and what the backward pass takes of it."""
    z = torch.exp(-x.abs())
    return torch.minimum(x.new_zeros(()), x) - log1p_of_unit(z), z


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + exp(beta x)) / beta, and x from where beta x is above the threshold."""
    scaled = x if beta == 1.0 else x * beta
    smooth = torch.maximum(scaled, x.new_zeros(())) + log1p_of_unit(torch.exp(-scaled.abs()))
    return torch.where(scaled > threshold, x, smooth if beta == 1.0 else smooth / beta)


def own(decompositions: dict[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """Those above, which leave other dtypes and devices to those that there are."""
    aten = torch.ops.aten
    found = {aten.log_sigmoid_forward.default: log_sigmoid_forward, aten.softplus.default: softplus}
    return {
        op: _where_known(f, decompositions[op]) for op, f in found.items() if op in decompositions
    }


def _where_known(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    def either(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_known = x.dtype == torch.float32 and x.device.type == "cpu"
        return (ours if is_known else theirs)(x, *args, **kwargs)

    return either
