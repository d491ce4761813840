"""The pseudo-inputs of a VampPrior."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from torch import Tensor

from pyproelbo.plots.axes import array, axes
from pyproelbo.plots.images import images, is_image, sheet, show


def plot_pseudo_inputs(
    pseudo_inputs: ArrayLike | Tensor,
    weights: ArrayLike | Tensor | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    num: int = 40,
    ax: Axes | None = None,
) -> Axes:
    """A gallery of pseudo-inputs with their weights, the largest first.

    Args:
        pseudo_inputs: (K, *S), such as ``prior.pseudo_inputs``.
        weights: (K,), shares that sum to 1, such as ``pe.priors.usage(prior, codes).usage``, or
            the prior's own weights; 1 / K each by default, in the order of the components.
        shape: of one input, where S is flat. (H, W), (H, W, 1), (H, W, 3) or (1, H, W), (3, H, W)
            is an image; others are shown as the rows of a heat map.
        num: the largest number to show.

    Raises:
        ValueError: for no inputs, another number of weights, or none to show.
    """
    u = array(pseudo_inputs)
    K = len(u) if u.ndim else 0
    if u.ndim < 2 or K == 0:
        raise ValueError(f"pseudo_inputs should have shape (K, ...), got {u.shape}")
    w = np.full(K, 1 / K) if weights is None else array(weights)
    if w.shape != (K,):
        raise ValueError(f"weights should have shape ({K},), one for each input, got {w.shape}")
    if num < 1:
        raise ValueError(f"num should be at least 1, got {num}")
    order = np.argsort(-w, kind="stable")[:num]
    shape = u.shape[1:] if shape is None else shape
    if math.prod(shape) != math.prod(u.shape[1:]):
        raise ValueError(
            f"shape {shape} has {math.prod(shape)} numbers, but a pseudo-input has "
            f"{math.prod(u.shape[1:])}"
        )
    u, labels = u[order].reshape(len(order), -1), [f"{100 * share:.2g}%" for share in w[order]]
    columns = min(len(order), 10)
    ax = axes(ax, (7.0, 0.5 + 0.85 * math.ceil(len(order) / columns)) if is_image(shape) else None)
    if is_image(shape):
        _gallery(images(u, shape), labels, columns, ax)
    else:
        _heat_map(u, labels, ax)
    more = f"the first {len(order)} of {K} pseudo-inputs" if len(order) < K else "pseudo-inputs"
    ax.set_title(f"{more}, and the share of each".capitalize())
    return ax


def _gallery(pictures: np.ndarray, labels: list[str], columns: int, ax: Axes) -> None:
    tall, wide = pictures.shape[1:3]
    gap = (math.ceil(0.35 * tall), max(1, wide // 8))  # for the label below
    show(sheet(pictures, columns, gap), ax, pictures.min(), pictures.max())
    for i, label in enumerate(labels):
        row, column = divmod(i, columns)
        x = column * (wide + gap[1]) + wide / 2 - 0.5
        y = row * (tall + gap[0]) + tall - 0.5 + 0.05 * tall
        ax.text(x, y, label, ha="center", va="top", fontsize="x-small")
    ax.set_ylim(top=-0.5, bottom=len(range(0, len(labels), columns)) * (tall + gap[0]) - 0.5)
    ax.set(xticks=[], yticks=[])


def _heat_map(rows: np.ndarray, labels: list[str], ax: Axes) -> None:
    picture = ax.imshow(rows, aspect="auto", interpolation="nearest")
    step = math.ceil(len(labels) / 20)
    ax.set_yticks(range(0, len(labels), step), labels[::step], fontsize="x-small")
    ax.set(xlabel="feature", ylabel="share of the pseudo-input")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.figure.colorbar(picture, ax=ax, label="value")
