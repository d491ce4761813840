"""Data beside their reconstructions."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from pyproelbo.plots.axes import axes, tidy
from pyproelbo.plots.images import images, is_image, sheet, show


def plot_reconstructions(
    data: ArrayLike,
    reconstructions: ArrayLike,
    *,
    shape: tuple[int, ...] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Data beside their reconstructions: images in two rows, vectors as overlaid lines.

    Args:
        data: (n, D), few rows.
        reconstructions: (n, D), for the same rows.
        shape: of one datum. (H, W), (H, W, 1), (H, W, 3) or (1, H, W), (3, H, W) is an image;
            any other, or none, a vector.
    """
    data, reconstructions = np.asarray(data, float), np.asarray(reconstructions, float)
    if data.shape != reconstructions.shape or data.ndim != 2:
        raise ValueError(
            "data and reconstructions should have one shape (n, D), got "
            f"{data.shape} and {reconstructions.shape}"
        )
    ax = axes(ax)
    if shape is None or not is_image(shape):
        return _lines(data, reconstructions, ax)
    pictures = images(np.concatenate([data, reconstructions]), shape)
    tall, wide = pictures.shape[1:3]
    gap = max(1, tall // 8)
    show(sheet(pictures, len(data), (gap, gap)), ax, data.min(), data.max())
    ax.set_yticks([tall / 2 - 0.5, tall * 1.5 + gap - 0.5], ["data", "reconstruction"])
    ax.set_xticks(
        [i * (wide + gap) + wide / 2 - 0.5 for i in range(len(data))],
        [str(i) for i in range(len(data))],
    )
    ax.set_xlabel("datum")
    return ax


def _lines(data: np.ndarray, reconstructions: np.ndarray, ax: Axes) -> Axes:
    """Pairs of lines one above the other, as far apart as the range of the data."""
    offset = 1.1 * max(np.ptp(data), 1e-12)
    features = np.arange(data.shape[1])
    for i, (x, mean) in enumerate(zip(data, reconstructions, strict=True)):
        label = ("data", "reconstruction") if i == 0 else (None, None)
        ax.plot(features, x - i * offset, color="0.3", linewidth=1, marker=".", label=label[0])
        ax.plot(features, mean - i * offset, color="C1", linewidth=1.5, label=label[1])
    centres = data.mean(1) - offset * np.arange(len(data))
    ax.set_yticks(centres, [str(i) for i in range(len(data))])
    ax.set(xlabel="feature", ylabel="datum (values shifted)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(top=data[0].max() + offset)  # room for the legend
    ax.legend(frameon=False, loc="upper right", ncols=2)
    return tidy(ax)
