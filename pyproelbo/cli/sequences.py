"""Files of sequences."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyproelbo.datasets import load

_NAMES = ("x", "lengths", "observed")


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; empty for any other, or one that cannot be read."""
    if path.suffix != ".npz" or not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception:  # zip files break in many ways; pyproelbo.datasets.load says what to do
        return {}


def load_sequences(path: Path) -> dict[str, Tensor]:
    """Sequences from a file, by the arguments of the models' programs.

    Args:
        path: ``.npy`` with an array x (N, T, D); or ``.npz`` with ``x`` and optionally ``lengths``
            (N,), the steps of each sequence, and ``observed`` (N, T), False where x_t is missing.

    Returns:
        ``x``, up to the end of the longest, 0 where it does not count; ``lengths`` if they vary;
        ``observed`` if some are missing.

    Raises:
        ValueError: for a file without such arrays; the message says what to do.
    """
    arrays = arrays_of(path)
    if len(arrays) < 2:
        x, shape = load(path)
        arrays = {"x": x.numpy().reshape(-1, *shape)}
    if "x" not in arrays or not set(arrays) <= set(_NAMES):
        raise ValueError(
            f"{path.name} should hold x, with lengths and observed if any, but holds "
            f"{', '.join(arrays)}: save it with numpy.savez(file, x=x, lengths=lengths)"
        )
    return _checked(path.name, **arrays)


def _checked(
    name: str,
    x: np.ndarray,
    lengths: np.ndarray | None = None,
    observed: np.ndarray | None = None,
) -> dict[str, Tensor]:
    if x.ndim != 3 or not x.size or x.dtype.kind not in "biuf":
        raise ValueError(
            f"{name} should hold sequences, numbers x of shape (N, T, D), got {x.dtype} of shape "
            f"{x.shape}: give it a dim of time, or fit a VAE to its rows, without --model"
        )
    num, steps = x.shape[:2]
    lengths = np.full(num, steps) if lengths is None else lengths
    if lengths.shape != (num,) or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"lengths in {name} should be whole numbers, one for each of the {num} sequences, got "
            f"{lengths.dtype} of shape {lengths.shape}"
        )
    if lengths.min() < 1 or lengths.max() > steps:
        raise ValueError(
            f"lengths in {name} should be from 1 to the {steps} steps of x, got {lengths.min()} "
            f"to {lengths.max()}: leave empty sequences out"
        )
    observed = np.ones((num, steps), bool) if observed is None else observed
    if observed.shape != (num, steps) or not np.isin(observed, (0, 1)).all():
        raise ValueError(
            f"observed in {name} should be bool of shape ({num}, {steps}), one for each step, got "
            f"{observed.dtype} of shape {observed.shape}"
        )
    own, longest = np.arange(steps) < lengths[:, None], int(lengths.max())
    seen = own & observed.astype(bool)
    counts = torch.from_numpy(seen).unsqueeze(-1)
    with np.errstate(over="ignore"):  # numbers that are too large become infinite, and are refused
        values = torch.from_numpy(x.astype(np.float64)).to(torch.get_default_dtype())
    if not (values.isfinite() | ~counts).all():
        raise ValueError(
            f"x in {name} is NaN or infinite at steps that count: save it with lengths, or with "
            f"observed, bool of shape ({num}, {steps}), False where x is missing"
        )
    found = {"x": torch.where(counts, values, 0.0)[:, :longest]}
    if lengths.min() < longest:
        found["lengths"] = torch.from_numpy(lengths.astype(np.int64))
    if (seen < own).any():
        found["observed"] = torch.from_numpy(seen)[:, :longest]
    return found
