"""Distributions put beside each other along a batch dim: the steps of a sequence."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution

# parameters that say the same thing: where several are at hand, the first is taken
_ALTERNATIVES = (("logits", "probs"), ("scale_tril", "covariance_matrix", "precision_matrix"))


def stack(parts: Sequence[Any]) -> Any:
    """One distribution of several of one batch shape B and one family: batch shape B + (n,).

    Raises:
        ValueError: if they are of different families, or of one that has no parameters to put
            beside each other.
    """
    return _map(parts, lambda values, dim: [torch.stack(values, dim)], -1)[0]


def concatenate(parts: Sequence[Any]) -> Any:
    """As :func:`stack`, but along the rightmost batch dim that they have already."""
    return _map(parts, lambda values, dim: [torch.cat(values, dim)], -1)[0]


def unstack(stacked: Any) -> list[Any]:
    """The distributions along the rightmost batch dim, as before :func:`stack`."""
    return _map([stacked], lambda values, dim: values[0].unbind(dim), -1)


Change = Callable[[list[Tensor], int], Sequence[Tensor]]


def _map(parts: Sequence[Any], change: Change, dim: int) -> list[Any]:
    """Distributions whose parameters are what ``change`` makes of those of ``parts``.

    ``change`` is given a parameter of each part, all expanded, and where ``dim`` is in it.
    """
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
        return [kind(d, n) for d in _map([part.base_dist for part in parts], change, dim - n)]
    if kind.__name__ == TransformedDistribution.__name__:
        transforms = first.transforms
        if any(t is not s for p in parts for t, s in zip(p.transforms, transforms, strict=True)):
            raise ValueError(
                "the steps of a sequence are transformed each in its own way: write the step "
                "so that only the distribution below the transforms changes"
            )
        return [kind(d, transforms) for d in _map([p.base_dist for p in parts], change, dim)]
    names = parameters(first)
    if not names:
        raise ValueError(
            f"{kind.__name__} has no parameters that could be put beside each other: take "
            "another family for the steps of a sequence"
        )
    changed = []
    for name in names:
        event_dim = getattr(first.arg_constraints[name], "event_dim", 0)
        values = [_expanded(getattr(part, name), part.batch_shape, event_dim) for part in parts]
        changed.append(change(values, dim - event_dim))
    results = []
    for values in zip(*changed, strict=True):
        result = kind(**dict(zip(names, values, strict=True)), validate_args=False)
        result._validate_args = first._validate_args  # of samples: parameters have been checked
        results.append(result)
    return results


def _expanded(value: Tensor, batch_shape: torch.Size, event_dim: int) -> Tensor:
    return value.expand(batch_shape + value.shape[value.dim() - event_dim :])


def parameters(d: Any) -> list[str]:
    """The names of parameters that make a distribution: none that another one implies."""
    names = [name for name in d.arg_constraints if name in vars(d)] or list(d.arg_constraints)
    for same in _ALTERNATIVES:
        known = [name for name in same if name in names]
        names = [name for name in names if name not in known[1:]]
    return names
