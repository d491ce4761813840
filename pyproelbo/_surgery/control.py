"""Errors whose means are known to be 0, as control variates."""

from collections.abc import Mapping

import torch
from torch import Tensor


def errors_of(terms: Mapping[str, Tensor], num_again: int) -> Tensor:
    """Log-densities less their expectations, (draws, N, L): what is known to have the mean 0.

    One sum for all latents where so few data were drawn again that many errors would explain the
    changes by chance.
    """
    errors = terms["sampled_kl"] - terms["kl"]
    return errors.sum(-1, keepdim=True) if num_again < 20 * errors.shape[-1] else errors


def controlled(value: Tensor, errors: Tensor) -> Tensor:
    """``value`` less its regression on errors whose means are known to be 0: (draws, N, ...).

    The mean stays, and the noise is the least that a linear function of the errors, (draws, N,
    ..., L), leaves. The noise is what differs between the draws for one datum. The regression
    is linear in ``value``: on the same errors, parts of a sum are controlled as the sum is.
    """
    changes = (part - part[:1] for part in (value, errors))  # exactly 0 where nothing was sampled
    noise, known = ((part - part.mean(0)).nan_to_num() for part in changes)
    squares = torch.einsum("sn...i,sn...j->...ij", known, known)
    products = torch.einsum("sn...i,sn...->...i", known, noise)
    slopes = torch.linalg.pinv(squares, hermitian=True) @ products.unsqueeze(-1)
    return value - (errors * slopes.squeeze(-1)).sum(-1)
