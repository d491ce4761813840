"""Shared by all figures: new axes, their look, numbers with their errors."""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor

from pyproelbo._results.numbers import parts

NATS = "nats per datum"


def axes(ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
    """``ax``, or new axes in a new figure, ``size`` inches wide and high."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def tidy(ax: Axes) -> Axes:
    """``ax`` without the lines at its top and right."""
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def array(x: ArrayLike | Tensor) -> np.ndarray:
    """Numbers as a NumPy array, also from a tensor on any device."""
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, float)


def number(value: float, error: float = 0.0) -> str:
    """A number and its standard error, with as many digits as in tables.

    >>> number(3.39628, 0.01604), number(0.5)
    ('3.396 ± 0.016', '0.5000')
    """
    text, spread = parts(value, error)
    return text.replace("-", "\N{MINUS SIGN}") + (f" ± {spread}" if spread else "")
