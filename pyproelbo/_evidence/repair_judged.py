"""Whether weighted draws can represent the posterior, row by row."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyproelbo._evidence.pareto import LEAST, pareto_smooth, usable
from pyproelbo._evidence.repair_settings import Weighted
from pyproelbo._evidence.weights import LEAST_ESS


class Judged(NamedTuple):
    """Whether weighted draws can represent the posterior, for each of B rows.

    Attributes:
        smoothed: the smoothed log-weights, (S, B); NaN where all weights are 0.
        khat, effective_sample_size: of them, (B,).
        log_evidence, stderr: log p(x) from them, (B,).
        passes: (B,).
    """

    smoothed: np.ndarray
    khat: Tensor
    effective_sample_size: Tensor
    log_evidence: Tensor
    stderr: Tensor
    passes: Tensor


def judged(found: Weighted, narrow: float) -> Judged:
    """k-hat is usable, the effective sample size is at least 50, and the draws reach far enough.

    Args:
        narrow: the largest factor by which weighted draws may be wider than the draws.
    """
    log_weight = finite(found.log_weight)
    S = len(log_weight)
    assert S >= LEAST
    smoothed, k = pareto_smooth(log_weight)
    khat, weights = torch.from_numpy(k), torch.from_numpy(np.exp(smoothed)).nan_to_num(0.0)
    ess = torch.where(weights.sum(0) > 0, 1 / weights.square().sum(0), 0.0)
    passes = usable(khat, ess, S) & khat.isfinite()
    error = (1 / ess - 1 / S).clamp(min=0).sqrt()
    if not found.equal:
        for value in found.values.values():
            x = value.reshape(*value.shape[:2], -1).cpu().double()
            x = x - x.mean(0)
            if value.is_floating_point():  # numbers of categories have no width
                passes &= ~_is_narrow(x, weights, narrow)
            ess = torch.minimum(ess, least_effective(x, weights))
    passes &= ess >= min(LEAST_ESS, S / 2)
    if found.is_good is not None:
        passes &= found.is_good.cpu()
    log_evidence = log_weight.logsumexp(0) - np.log(S)
    return Judged(smoothed, khat, ess, log_evidence, error, passes)


def _is_narrow(x: Tensor, weights: Tensor, narrow: float) -> Tensor:
    """Whether weighting widens centred draws (S, B, K) by more than a factor, (B,)."""
    w = weights.unsqueeze(-1)
    of_weighted = (w * x.square()).sum(0) - (w * x).sum(0).square()
    return (of_weighted > narrow**2 * x.square().mean(0)).any(-1)


def least_effective(x: Tensor, weights: Tensor) -> Tensor:
    """The number of posterior draws that would give all means and variances as accurately, (B,).

    For a function h with posterior mean m that is sum_s w_s (h_s - m)^2 over sum_s w_s^2 (h_s -
    m)^2, which is below 1 / sum_s w_s^2 where the largest weights are at the largest h.
    """
    w = weights.unsqueeze(-1)
    found = torch.full(x.shape[1:2], torch.inf, dtype=torch.float64, device="cpu")
    x = x - (w * x).sum(0)
    for h in (x, x.square()):
        square = (h - (w * h).sum(0)).square()
        spread, error = (w * square).sum(0), (w.square() * square).sum(0)
        effective = torch.where(error > 0, spread / error, torch.inf)
        found = torch.minimum(found, effective.amin(-1))
    return found


def finite(log_weight: Tensor) -> Tensor:
    """Log-weights with zero weight where they are NaN or +inf."""
    return log_weight.detach().double().cpu().nan_to_num(-torch.inf, -torch.inf, -torch.inf)
