"""What a distribution wraps: masks, event dims, transforms, and the innermost distribution."""

from collections.abc import Iterator

from torch.distributions import Distribution


def layers(d: Distribution | None) -> Iterator[Distribution]:
    """``d`` and everything that it wraps, from the outside; nothing for None."""
    while d is not None:
        yield d
        d = getattr(d, "base_dist", None)


def innermost(d: Distribution) -> Distribution:
    """The innermost distribution."""
    while (base := getattr(d, "base_dist", None)) is not None:
        d = base
    return d
