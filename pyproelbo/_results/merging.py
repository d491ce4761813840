"""Results on parts of the data, as the result on all of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyproelbo._results.origin import Origin, Simulations, joined
from pyproelbo._results.result import Result

R = TypeVar("R", bound=Result)


_OTHERWISE = {
    "Surgery": "parts of it are of pe.surgery_part; or give pe.surgery an executor=",
}


def merge(results: Iterable[R]) -> R:
    """The result on all data, from results on their parts, in any order.

    Each is of a :class:`~pyproelbo.Shard` of the data, of the same report, model and guide, with
    the same seed and the same options; the parts follow each other without a gap. What is merged
    is what one process would have found, up to rounding, where all draws can be made by row (see
    :func:`evidence`). ``a + b`` is ``merge([a, b])``. Calibrations add up to one of more
    simulations, which have other seeds.

    Raises:
        ValueError: for results of other kinds, programs, seeds or options; for rows that are
            missing; for rows or simulations that are counted twice; for results that are no sums
            over rows, as of a surgery, whose q(z) is one over all data: :func:`surgery_part`.

    >>> import torch
    >>> import pyproelbo as pe
    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> x = torch.randn(20, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> parts = [pe.Shard(x[:15]), pe.Shard(x[15:], start=15)]
    >>> whole = pe.merge([pe.evidence(ppca, Exact(ppca), part) for part in parts])
    >>> len(whole.log_evidence), whole.rows
    (20, range(0, 20))
    """
    parts = list(results)
    if not parts:
        raise ValueError("results should have at least one result, got none")
    kinds = {type(part) for part in parts}
    if len(kinds) > 1 or not issubclass(type(parts[0]), Result):
        names = sorted(kind.__name__ for kind in kinds)
        raise ValueError(f"results should be of one report, got {', '.join(names)}")
    kind = type(parts[0])
    if kind._merged.__func__ is Result._merged.__func__:
        raise ValueError(
            f"a {kind.__name__} is no sum over rows: "
            + _OTHERWISE.get(kind.__name__, "compute it at once, from all data")
        )
    known = [(part.origin, part) for part in parts]
    if any(origin is None for origin, _ in known):
        raise ValueError(
            f"a {kind.__name__} can be merged as its report has returned it, for each row "
            "separately: one that was changed since, or is of latents that all data share, has no "
            "rows"
        )
    known.sort(key=lambda pair: pair[0].place)  # type: ignore[union-attr]
    origin = joined([origin for origin, _ in known if origin is not None])
    _check_options([part for _, part in known])
    return stamped(kind._merged([part for _, part in known]), origin)


def rows_merged(parts: Sequence[R]) -> R:
    """The first of results that are dataclasses, with the tensors of all, whose rows are data."""

    def of_all(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            return torch.cat(list(values))
        if isinstance(first, np.ndarray):
            return np.concatenate(values)
        if isinstance(first, Mapping):
            return {key: of_all([value[key] for value in values]) for key in first}
        return first

    names = [field.name for field in fields(parts[0])]  # type: ignore[arg-type]
    found = {name: of_all([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **found)  # type: ignore[type-var]


def stamped(result: R, origin: Origin | Simulations | None) -> R:
    """The same result, which knows its rows, or its simulations."""
    object.__setattr__(result, "_origin", origin)  # of frozen dataclasses
    return result


def _check_options(parts: Sequence[Result]) -> None:
    """
    Raises:
        ValueError: where the parts have other options.
    """
    for name in parts[0]._options:
        values = [getattr(part, name) for part in parts]
        if any(value != values[0] for value in values):
            other = next(value for value in values if value != values[0])
            raise ValueError(
                f"results should have the same {name}, got {values[0]!r} and {other!r}"
            )
