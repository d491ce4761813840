"""Data beside what the model makes of their codes."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pyproelbo.plots.axes import axes, tidy


def plot_reconstructions(
    data: Any, reconstructions: Any, *, shape: tuple[int, ...] | None = None, ax: Axes | None = None
) -> Axes:
    """Data beside their reconstructions: images in two rows, vectors as lines on each other.

    Args:
        data: (n, D), few rows.
        reconstructions: (n, D), of the same rows.
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
    if shape is None or not _is_image(shape):
        return _lines(data, reconstructions, ax)
    images = [_images(rows, shape) for rows in (data, reconstructions)]
    tall, wide = images[0].shape[1:3]
    gap = max(1, tall // 8)
    padding = [(0, 0), (0, gap), (0, gap)] + [(0, 0)] * (images[0].ndim - 3)
    rows = [
        np.concatenate(list(np.pad(i, padding, constant_values=np.nan)), axis=1) for i in images
    ]
    picture = np.ma.masked_invalid(np.concatenate(rows, axis=0)[:-gap, :-gap])
    if picture.ndim == 3:
        low, high = data.min(), data.max()
        scaled = (picture.filled(high) - low) / max(high - low, 1e-12)
        ax.imshow(scaled.clip(0, 1), interpolation="nearest")
    else:
        ax.imshow(picture, cmap="gray", interpolation="nearest", vmin=data.min(), vmax=data.max())
    ax.set_yticks([tall / 2 - 0.5, tall * 1.5 + gap - 0.5], ["data", "reconstruction"])
    ax.set_xticks(
        [i * (wide + gap) + wide / 2 - 0.5 for i in range(len(data))],
        [str(i) for i in range(len(data))],
    )
    ax.set_xlabel("datum")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and bool({shape[0], shape[-1]} & {1, 3}))


def _images(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(n, H, W) or (n, H, W, 3)."""
    images = rows.reshape(len(rows), *shape)
    if images.ndim == 4 and shape[-1] not in (1, 3):
        images = np.moveaxis(images, 1, -1)
    return images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images


def _lines(data: np.ndarray, reconstructions: np.ndarray, ax: Axes) -> Axes:
    """One pair of lines above the other, as far apart as the data are wide."""
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
