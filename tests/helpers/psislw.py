"""Smoothed weights as ArviZ has them, row by row."""

import arviz
import numpy as np

IS_OLD = int(arviz.__version__.split(".")[0]) < 1


def psislw(log_weights):
    """Those of log-weights (B, S), and k, (B,)."""
    if IS_OLD:
        return arviz.psislw(np.array(log_weights, float))
    from arviz_stats.base import array_stats  # type: ignore[import-not-found]

    return array_stats.psislw(-np.asarray(log_weights))
