"""What a distribution wraps: masks, event dims, transforms, and what is below them."""

from collections.abc import Iterator
from typing import Any


def layers(d: Any) -> Iterator[Any]:
    """``d`` and everything that it wraps, from the outside."""
    while d is not None:
        yield d
        d = getattr(d, "base_dist", None)


def innermost(d: Any) -> Any:
    """What is below all that is wrapped around it."""
    *_, last = layers(d)
    return last
