"""Distributions put beside each other along a batch dim: the steps of a sequence."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution

# parameters that say the same thing: where several are at hand, the first is taken
_ALTERNATIVES = (("logits", "probs"), ("scale_tril", "covariance_matrix", "precision_matrix"))


def stack(parts: Sequence[Any]) -> Any:
    """One distribution of several of one batch shape B and one family: batch shape B + (n,).

    Raises:
        ValueError: if they are of different families, or of one that has no parameters to put
            beside each other.
    """
    return _together(parts, torch.stack, -1)


def concatenate(parts: Sequence[Any]) -> Any:
    """As :func:`stack`, but along the rightmost batch dim that they have already."""
    return _together(parts, torch.cat, -1)


def _together(parts: Sequence[Any], join: Callable[..., Tensor], dim: int) -> Any:
    first = parts[0]
    kind = type(first)
    if any(type(part) is not kind for part in parts):
        names = sorted({type(part).__name__ for part in parts})
        raise ValueError(
            f"the steps of a sequence should be of one family, got {' and '.join(names)}: give "
            "the initial distribution the family of the others"
        )
    if isinstance(first, Independent):
        n = first.reinterpreted_batch_ndims
        return kind(_together([part.base_dist for part in parts], join, dim - n), n)
    if kind.__name__ == TransformedDistribution.__name__:
        if any(s is not t for p in parts for s, t in zip(first.transforms, p.transforms)):  # noqa: B905
            raise ValueError(
                "the steps of a sequence are transformed each in its own way: write the step "
                "so that only the distribution below the transforms changes"
            )
        base = _together([part.base_dist for part in parts], join, dim)
        return kind(base, first.transforms)
    names = _parameters(first)
    if not names:
        raise ValueError(
            f"{kind.__name__} has no parameters that could be put beside each other: take "
            "another family for the steps of a sequence"
        )
    joined = {name: _join(name, parts, join, dim) for name in names}
    result = kind(**joined, validate_args=False)
    result._validate_args = first._validate_args  # of values: the parameters have been checked
    return result


def _parameters(d: Distribution) -> list[str]:
    names = [name for name in d.arg_constraints if name in vars(d)] or list(d.arg_constraints)
    for same in _ALTERNATIVES:
        known = [name for name in same if name in names]
        names = [name for name in names if name not in known[1:]]
    return names


def _join(name: str, parts: Sequence[Any], join: Callable[..., Tensor], dim: int) -> Tensor:
    event_dim = getattr(parts[0].arg_constraints[name], "event_dim", 0)
    values = []
    for part in parts:
        value = getattr(part, name)
        values.append(value.expand(part.batch_shape + value.shape[value.dim() - event_dim :]))
    return join(values, dim - event_dim)
