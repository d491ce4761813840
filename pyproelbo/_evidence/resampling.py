"""Equally weighted draws in place of weighted ones."""

import numpy as np
import torch
from torch import Tensor


def systematic(weights: np.ndarray, offset: np.ndarray, num: int) -> np.ndarray:
    """The indices of ``num`` of S draws by their weights, in rising order: (N, num).

    Args:
        weights: not negative, (S, N).
        offset: from 0 to 1, (N,).
    """
    points = (np.arange(num) + offset[:, None]) / num
    edges = weights.cumsum(0)
    picks = [np.searchsorted(edges[:, n] / edges[-1, n], points[n]) for n in range(len(points))]
    return np.stack(picks).clip(max=len(weights) - 1)


def taken(values: Tensor, picks: Tensor) -> Tensor:
    """From draws (S, N, ...), those with indices (num, N)."""
    index = picks.to(values.device).reshape(*picks.shape, *(1,) * (values.dim() - 2))
    return values.gather(0, index.expand(len(picks), *values.shape[1:]))


def shuffled(picks: np.ndarray, random: Tensor) -> Tensor:
    """Indices (N, num) in the order of random numbers (num, N): (num, N)."""
    return torch.from_numpy(picks.T).gather(0, random.argsort(0).cpu())
