"""Smoothed weights as ArviZ has them, row by row."""

import numpy as np


def psislw(log_weights):
    """Those of log-weights (B, S), and k, (B,)."""
    try:
        from arviz_stats.base import array_stats  # type: ignore[import-not-found]
    except ImportError:  # ArviZ before 1.0
        from arviz import psislw

        return psislw(np.array(log_weights, float))
    return array_stats.psislw(-np.asarray(log_weights))
