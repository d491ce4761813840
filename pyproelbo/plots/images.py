"""Images from rows of numbers."""

import numpy as np
from matplotlib.axes import Axes


def is_image(shape: tuple[int, ...] | None) -> bool:
    """Whether a datum of this shape is an image: (H, W), (H, W, 1 or 3) or (1 or 3, H, W)."""
    if shape is None:
        return False
    return len(shape) == 2 or (len(shape) == 3 and bool({shape[0], shape[-1]} & {1, 3}))


def images(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """From rows (n, D): (n, H, W) or (n, H, W, 3)."""
    pictures = rows.reshape(len(rows), *shape)
    if pictures.ndim == 4 and shape[-1] not in (1, 3):
        pictures = np.moveaxis(pictures, 1, -1)
    return pictures[..., 0] if pictures.ndim == 4 and pictures.shape[-1] == 1 else pictures


def sheet(pictures: np.ndarray, columns: int, gap: tuple[int, int]) -> np.ma.MaskedArray:
    """Pictures (n, H, W) or (n, H, W, 3) row by row on one sheet, ``gap`` pixels apart.

    Pixels without a picture are masked.
    """
    rows = -(-len(pictures) // columns)
    after = [(0, rows * columns - len(pictures)), (0, gap[0]), (0, gap[1])]
    after += [(0, 0)] * (pictures.ndim - 3)
    tiles = np.pad(pictures, after, constant_values=np.nan)
    tiles = tiles.reshape(rows, columns, *tiles.shape[1:])
    whole = np.concatenate(np.concatenate(tiles, axis=1), axis=1)
    return np.ma.masked_invalid(whole[: len(whole) - gap[0], : whole.shape[1] - gap[1]])


def show(picture: np.ma.MaskedArray, ax: Axes, low: float, high: float) -> None:
    """Draw a sheet, in grey from ``low`` to ``high`` or in colour, without axis lines."""
    if picture.ndim == 3:
        scaled = (picture.filled(high) - low) / max(high - low, 1e-12)
        ax.imshow(scaled.clip(0, 1), interpolation="nearest")
    else:
        ax.imshow(picture, cmap="gray", interpolation="nearest", vmin=low, vmax=high)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
