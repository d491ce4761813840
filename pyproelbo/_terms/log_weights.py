"""Weights by their logarithms: their mean and effective number."""

import math

from torch import Tensor


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """log (1/S) sum_s w_s over the first dim."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum_s w_s)^2 / sum_s w_s^2 over the first dim: from 1 to S."""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()
