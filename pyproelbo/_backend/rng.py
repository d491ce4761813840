"""The generators of random numbers, torch's, NumPy's and Python's, put aside and back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor


class State(TypedDict):
    """The states of all generators: torch's on the CPU and on each GPU, NumPy's and Python's."""

    torch: Tensor
    cuda: list[Tensor]
    numpy: tuple[str, list[int], int, int, float]
    python: tuple[int, tuple[int, ...], float | None]


def state() -> State:
    """Those of all generators, of types that ``torch.load(weights_only=True)`` takes.

    Of devices that have not been used there is none, and asking makes none.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (str(kind), [int(key) for key in keys], *rest),  # type: ignore[typeddict-item]
        "python": random.getstate(),
    }


def restore(state: State) -> None:
    """Go on from what :func:`state` has returned."""
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count() and state["cuda"]:
        torch.cuda.set_rng_state_all([cuda.cpu() for cuda in state["cuda"]])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # type: ignore[arg-type]
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))


@contextmanager
def put_aside(seed: int | None = None) -> Iterator[None]:
    """All generators are afterwards what they were; meanwhile they begin with a seed."""
    before = state()
    try:
        if seed is not None:
            begin(seed)
        yield
    finally:
        restore(before)


def seed_of(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def begin(seed: int) -> None:
    """Let all generators begin with a seed."""
    torch.manual_seed(int(seed))
    np.random.seed(int(seed) % 2**32)
    random.seed(int(seed))
