"""Errors with known mean 0, as control variates."""

from collections.abc import Mapping

import torch
from torch import Tensor


def errors_of(terms: Mapping[str, Tensor], num_again: int) -> Tensor:
    """Log-densities minus their expectations, (draws, N, L), which have mean 0.

    One sum for all latents where so few data were drawn again that several errors would explain the
    changes by chance.
    """
    errors = terms["sampled_kl"] - terms["kl"]
    return errors.sum(-1, keepdim=True) if num_again < 20 * errors.shape[-1] else errors


def controlled(value: Tensor, errors: Tensor) -> Tensor:
    """``value`` minus its regression on errors with known mean 0: (draws, N, ...).

    The mean is unchanged, and the noise is the least that any linear function of the errors,
    (draws, N, ..., L), leaves. The noise is the difference between the draws for one datum. The
    regression is linear in ``value``: with the same errors, parts of a sum are controlled as the
    sum is.
    """
    changes = (part - part[:1] for part in (value, errors))  # exactly 0 where nothing was sampled
    noise, known = ((part - part.mean(0)).nan_to_num() for part in changes)
    squares = torch.einsum("sn...i,sn...j->...ij", known, known)
    products = torch.einsum("sn...i,sn...->...i", known, noise)
    slopes = torch.linalg.pinv(squares, hermitian=True) @ products.unsqueeze(-1)
    return value - (errors * slopes.squeeze(-1)).sum(-1)
