"""Distributions stacked along a batch dim: steps of a sequence, parts of a mixture."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from pyro.distributions import (
    Independent,
    TorchDistribution,
    TransformedDistribution,  # pyright: ignore[reportAttributeAccessIssue]
)
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.transforms import Transform

from pyproelbo._backend.torch_private import is_validated, validate

# equivalent parameters: of several the first is used
_ALTERNATIVES = (("logits", "probs"), ("scale_tril", "covariance_matrix", "precision_matrix"))

# around a distribution: the number of dims that Independent takes, or transforms
Layer = int | tuple[Transform, ...]


def stack_distributions(parts: Sequence[Distribution]) -> TorchDistribution:
    """One distribution from several with batch shape B and one family: batch shape B + (n,).

    Raises:
        ValueError: if they are of different families, or of one that has no parameters to stack.
    """
    family = Family.of(parts[0])
    columns = zip(*map(family.tensors, parts), strict=True)
    return family.made_of(
        torch.stack(column, dim) for column, dim in zip(columns, family.dims, strict=True)
    )


def concatenate_distributions(parts: Sequence[Distribution]) -> TorchDistribution:
    """As :func:`stack_distributions`, but along their existing rightmost batch dim."""
    family = Family.of(parts[0])
    columns = zip(*map(family.tensors, parts), strict=True)
    return family.made_of(
        torch.cat(column, dim) for column, dim in zip(columns, family.dims, strict=True)
    )


def unstack_distributions(stacked: Distribution) -> list[TorchDistribution]:
    """The distributions along the rightmost batch dim, as before :func:`stack_distributions`."""
    family = Family.of(stacked)
    pairs = zip(family.tensors(stacked), family.dims, strict=True)
    rows = zip(*(tensor.unbind(dim) for tensor, dim in pairs), strict=True)
    return [family.made_of(row) for row in rows]


class Family(NamedTuple):
    """A distribution without the tensors of its parameters.

    Attributes:
        kind: the innermost class.
        names: its parameters.
        event_dims: the dims of each of them that are not batch dims.
        layers: what wraps it, from the outside: the number of dims that ``Independent``
            takes, or the transforms of a ``TransformedDistribution``.
        validate: whether samples are validated.
    """

    kind: type
    names: tuple[str, ...]
    event_dims: tuple[int, ...]
    layers: tuple[Layer, ...]
    validate: bool

    @classmethod
    def of(cls, d: Distribution) -> "Family":
        """The family of a distribution.

        Raises:
            ValueError: if it has no parameters.
        """
        layers, base = _unwrap(d)
        names = tuple(parameters(base))
        if not (names and is_made_of_parameters(base)):
            raise ValueError(
                f"{type(base).__name__} has no parameters that could be stacked, or others than "
                "its arg_constraints list: take another family for the steps of a sequence, the "
                "components of a mixture, or posteriors that are fitted"
            )
        dims = tuple(getattr(base.arg_constraints[name], "event_dim", 0) for name in names)
        return cls(type(base), names, dims, layers, is_validated(base))

    @property
    def dims(self) -> list[int]:
        """Where the rightmost batch dim is in each parameter, or a new one would be."""
        right = 1 + sum(layer for layer in self.layers if isinstance(layer, int))
        return [-right - event_dim for event_dim in self.event_dims]

    def tensors(self, d: Distribution) -> tuple[Tensor, ...]:
        """The parameters of a distribution, of its whole batch shape.

        Raises:
            ValueError: if it is of another family.
        """
        layers, base = _unwrap(d)
        if type(base) is not self.kind:
            raise ValueError(
                "the steps of a sequence should be of one family, got "
                f"{self.kind.__name__} and {type(base).__name__}: give the initial distribution "
                "the family of the others"
            )
        if not _are_same(layers, self.layers):
            raise ValueError(
                "the steps of a sequence have different event dims, or different transforms: let "
                "only the distribution below the transforms change"
            )
        values = []
        for name, event_dim in zip(self.names, self.event_dims, strict=True):
            value = getattr(base, name)
            values.append(value.expand(base.batch_shape + value.shape[value.dim() - event_dim :]))
        return tuple(values)

    def made_of(self, tensors: Iterable[Tensor]) -> TorchDistribution:
        """The distribution with these parameters."""
        make: Callable[..., TorchDistribution] = self.kind
        d = make(**dict(zip(self.names, tensors, strict=True)), validate_args=False)
        validate(d, self.validate)  # of samples: parameters have been checked
        for layer in reversed(self.layers):
            if isinstance(layer, int):
                d = Independent(d, layer)
            else:
                d = TransformedDistribution(d, list(layer))
        return d


def _unwrap(d: Distribution) -> tuple[tuple[Layer, ...], Distribution]:
    """The layers around the innermost distribution, and it."""
    layers: list[Layer] = []
    while True:
        if isinstance(d, torch.distributions.Independent):
            layers.append(d.reinterpreted_batch_ndims)
        elif type(d) is TransformedDistribution:
            layers.append(tuple(d.transforms))  # type: ignore[attr-defined]
        else:
            return tuple(layers), d
        d = d.base_dist  # type: ignore[attr-defined]


def _are_same(a: object, b: object) -> bool:
    """Whether layers are equal; transforms are if they are the same objects."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_are_same, a, b))
    return a is b or (isinstance(a, int) and a == b)


def parameters(d: Distribution) -> list[str]:
    """The names of the parameters of a distribution, without those that others imply."""
    names = [name for name in d.arg_constraints if name in vars(d)] or list(d.arg_constraints)
    for same in _ALTERNATIVES:
        known = [name for name in same if name in names]
        names = [name for name in names if name not in known[1:]]
    return names


def is_made_of_parameters(d: Distribution) -> bool:
    """Whether the constructor of ``d`` takes no more than the parameters in ``arg_constraints``.

    Other arguments would be lost where a distribution is rebuilt from parameters, unless they are
    None or the default.
    """
    return all(
        hasattr(d, name) and (getattr(d, name) is default or getattr(d, name) == default)
        for name, default in _other_arguments(type(d))
        if name not in d.arg_constraints
    )


@cache
def _other_arguments(cls: type) -> tuple[tuple[str, object], ...]:
    """The constructor's arguments with their defaults, but for ``validate_args``."""
    found = list(inspect.signature(cls.__init__).parameters.values())[1:]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(
        (p.name, p.default) for p in found if p.name != "validate_args" and p.kind not in variadic
    )
