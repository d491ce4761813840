"""Figures of results: each function draws into one matplotlib ``Axes`` and returns it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

NATS = "nats per datum"
ACTIVE, INACTIVE = "C0", "0.75"


def plot_elbo_trace(
    steps: Any, traces: Mapping[str, Any], *, ylabel: str = "ELBO", ax: Axes | None = None
) -> Axes:
    """Curves over training steps, for example the ELBO of training and of held-out data.

    The first values of a training are far below the rest. The axis leaves out what is further
    below than the range of the last nine tenths of the steps, so that these can be read.

    Args:
        steps: (T,), the step of each value.
        traces: values (T,) in nats per datum by their names in the legend; NaN is a gap.
        ylabel: what the values are.
    """
    ax = _axes(ax)
    steps = np.asarray(steps)
    curves = {name: np.asarray(values, dtype=float) for name, values in traces.items()}
    for name, values in curves.items():
        marker = "o" if np.isfinite(values).sum() < 2 else None
        ax.plot(steps, values, label=name, linewidth=1.5, marker=marker)
    late = [v[len(v) // 10 :] for v in curves.values()]
    shown = np.concatenate([v[np.isfinite(v)] for v in late]) if late else np.array([])
    if shown.size and np.ptp(shown) > 0:
        margin = 0.05 * np.ptp(shown)
        ax.set_ylim(shown.min() - margin, shown.max() + margin)
    ax.set(xlabel="training step", ylabel=f"{ylabel} ({NATS})")
    if len(curves) > 1:
        ax.legend(frameon=False)
    return _tidy(ax)


def plot_kl_per_dim(
    kl: Any, *, active: Any = None, threshold: float = 0.01, ax: Axes | None = None
) -> Axes:
    """What each latent dimension holds about a datum: bars, the largest first.

    Args:
        kl: (D,), the KL of each dimension averaged over data, in nats.
        active: (D,) booleans, which dimensions are in use; by default those with a KL above
            ``threshold``.
    """
    ax = _axes(ax)
    kl = np.asarray(kl, dtype=float)
    if kl.ndim != 1:
        raise ValueError(f"kl should have shape (D,), one for each dimension, got {kl.shape}")
    in_use = kl > threshold if active is None else np.asarray(active, dtype=bool)
    order = np.argsort(-kl, kind="stable")
    for chosen, color, label in ((True, ACTIVE, "active"), (False, INACTIVE, "inactive")):
        at = np.flatnonzero(in_use[order] == chosen)
        if at.size:
            name = f"{label} ({at.size} of {kl.size})"
            ax.bar(at, kl[order][at], color=color, label=name, width=0.8)
    ax.set(xlabel="rank of the latent dimension", ylabel=f"KL ({NATS})", ylim=(0, None))
    if kl.size <= 40:  # so many names fit
        ax.set_xticks(range(kl.size), [str(d) for d in order])
        ax.set_xlabel("latent dimension, sorted")
        ax.tick_params(axis="x", labelsize=8 if kl.size > 20 else None)
    ax.legend(frameon=False)
    return _tidy(ax)


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
    ax = _axes(ax)
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
    return _tidy(ax)


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def _tidy(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax
