"""Variables of an ``xarray.Dataset``: names and dims for the sites of programs."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyproelbo._arviz.layout import Layout

if TYPE_CHECKING:
    import xarray

SAMPLE_DIMS = ("chain", "draw")

_STEP = re.compile(r"(.+)_(\d+)")


@dataclass(frozen=True)
class Variable:
    """A site, or several together: those of the steps of a loop.

    Attributes:
        name: the site's, or the common part of the sites' names.
        layout: of each site.
        sites: their names.
        steps: the indices of the sites; None for a single one.
        step_dim: the dim of steps, None where there is none.
    """

    name: str
    layout: Layout
    sites: tuple[str, ...]
    steps: tuple[int, ...] | None = None
    step_dim: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a draw: plates, steps, event."""
        num = len(self.layout.plates)
        steps = () if self.steps is None else (len(self.steps),)
        return (*self.layout.shape[:num], *steps, *self.layout.shape[num:])

    def dims(self, named: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """The names of the dims of ``shape``.

        Args:
            named: the user's names for dims of an event, by variable.

        Raises:
            ValueError: if their number is not that of the event's dims.
        """
        plates = tuple(plate.name for plate in self.layout.plates)
        steps = () if self.step_dim is None else (self.step_dim,)
        num = len(self.shape) - len(plates) - len(steps)
        event = tuple(named.get(without_slash(self.name), ())) if self.layout.event_shape else ()
        if event and len(event) != num:
            raise ValueError(
                f"dims[{self.name!r}] should name {num} dims, those of a value other than "
                f"{[*SAMPLE_DIMS, *plates, *steps]}, got {list(event)}"
            )
        names = (*plates, *steps, *(event or (f"{self.name}_dim_{i}" for i in range(num))))
        return tuple(map(without_slash, names))

    def by_site(self, values: Tensor) -> dict[str, Tensor]:
        """Views of draws (S, *shape), by site."""
        parts = (values,) if self.steps is None else values.unbind(1 + len(self.layout.plates))
        return dict(zip(self.sites, parts, strict=True))


class Columns:
    """The draws of the variables of a group, on the CPU, to be filled in parts.

    Args:
        variables: of the group.
        num_samples: S.
        dtype: of all values; None for that of each variable's draws.

    Attributes:
        num_filled: the number of rows, from the first, that have draws.
    """

    def __init__(
        self, variables: list[Variable], num_samples: int, dtype: torch.dtype | None = None
    ) -> None:
        self.variables, self._num, self._dtype = variables, num_samples, dtype
        self.num_filled = 0
        self.values: dict[str, Tensor] = {}  # (S, *shape) by variable
        self.by_site: dict[str, Tensor] = {}  # views of them

    def put(self, start: int, draws: Mapping[str, Tensor]) -> None:
        """Put the draws of each site (num, ...) into the rows from ``start`` on."""
        stop = start
        for variable in self.variables:
            if variable.name not in self.values:
                dtype = self._dtype or draws[variable.sites[0]].dtype
                if dtype == torch.bfloat16:  # which NumPy lacks
                    dtype = torch.float32
                values = torch.empty((self._num, *variable.shape), dtype=dtype, device="cpu")
                self.values[variable.name] = values
                self.by_site |= variable.by_site(values)
            for site in variable.sites:
                stop = start + len(draws[site])
                self.by_site[site][start:stop] = draws[site]
        self.num_filled = stop

    def change(self, of: Callable[[Variable, Tensor], Tensor]) -> None:
        """Replace the draws of each variable."""
        for variable in self.variables:
            values = of(variable, self.values[variable.name][: self.num_filled])
            self.values[variable.name][: self.num_filled] = values

    def cut(self, num: int) -> None:
        """Drop all draws except the first ones."""
        self.num_filled = num
        self.values = {name: values[:num] for name, values in self.values.items()}
        self.by_site = {name: values[:num] for name, values in self.by_site.items()}


def variables_of(layouts: Mapping[str, Layout], time: str | None) -> list[Variable]:
    """The variables of the sites of a group.

    Sites whose names differ only in a number at the end, such as ``z_0`` and ``z_1``, become one
    variable. Its dim of steps is named after the ``pyro.plate`` that the loop runs over, or
    ``time``; where that is None, every site is a variable.
    """
    if time is None:
        return [Variable(name, layout, (name,)) for name, layout in layouts.items()]
    alike: dict[tuple[str, Layout], dict[int, str]] = {}
    for name, layout in layouts.items():
        if match := _STEP.fullmatch(name):
            alike.setdefault((match[1], layout), {})[int(match[2])] = name
    bases = [base for base, _ in alike]
    variables, done = [], set()
    for name, layout in layouts.items():
        match = _STEP.fullmatch(name)
        key = (match[1], layout) if match else ("", layout)
        steps = alike.get(key, {})
        if len(steps) > 1 and bases.count(key[0]) == 1 and key[0] not in layouts:
            if key not in done:
                numbers = tuple(sorted(steps))
                dim = layout.loops[-1] if layout.loops else time
                sites = tuple(steps[n] for n in numbers)
                variables.append(Variable(key[0], layout, sites, numbers, dim))
            done.add(key)
        else:
            step_dim = time if layout.is_sequence else None
            variables.append(Variable(_short(name), layout, (name,), None, step_dim))
    return variables


def _short(name: str) -> str:
    """x for x_0+x_1+x_2, data whose only known density is that of all steps together."""
    parts = name.split("+")
    if len(parts) == 1:
        return name
    matches = (_STEP.fullmatch(part) for part in parts)
    bases = (match[1] if match else part for match, part in zip(matches, parts, strict=True))
    return "+".join(dict.fromkeys(bases))


def without_slash(name: str) -> str:
    """A name for a variable of an ``xarray.DataTree``, where a slash separates paths."""
    return name.replace("/", ".")


@dataclass(frozen=True)
class Labels:
    """The user's names for dims and labels for their elements. Slashes in names become points.

    Attributes:
        dims: the names of the dims of a variable's events.
        coords: the labels of a dim's elements; 0, 1, ... for others.
    """

    dims: Mapping[str, Sequence[str]]
    coords: Mapping[str, ArrayLike]

    @classmethod
    def of(cls, dims: Mapping[str, Sequence[str]], coords: Mapping[str, ArrayLike]) -> "Labels":
        """The labels for names as in the sites."""
        return cls(
            {without_slash(name): names for name, names in dims.items()},
            {without_slash(name): labels for name, labels in coords.items()},
        )

    def without(self, dims: Iterable[str]) -> "Labels":
        """The labels of all dims except some."""
        left_out = set(map(without_slash, dims))
        return Labels(self.dims, {n: v for n, v in self.coords.items() if n not in left_out})

    def drawn(self, variable: Variable, values: Tensor) -> "xarray.DataArray":
        """The array of a variable's draws (S, *shape)."""
        dims = (*SAMPLE_DIMS, *variable.dims(self.dims))
        return self.array(variable.name, values[None].numpy(), dims, _steps(variable))

    def fixed(self, variable: Variable, value: Tensor) -> "xarray.DataArray":
        """The array of a variable's single value."""
        value = value.float() if value.dtype == torch.bfloat16 else value
        return self.array(variable.name, value.numpy(), variable.dims(self.dims), _steps(variable))

    def constant(self, name: str, value: ArrayLike | Tensor) -> "xarray.DataArray":
        """The array of a value that belongs to no site."""
        value = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        variable = Variable(name, Layout((), torch.Size(value.shape)), (name,))
        return self.array(name, value, variable.dims(self.dims))

    def array(
        self,
        name: str,
        values: np.ndarray,
        dims: Sequence[str],
        coords: Mapping[str, np.ndarray] | None = None,
    ) -> "xarray.DataArray":
        """An ``xarray.DataArray`` whose every dim has coordinates.

        Raises:
            ValueError: for names that clash, and for coordinates of another length.
        """
        import xarray

        name = without_slash(name)
        if name in dims or len(set(dims)) < len(dims):
            raise ValueError(
                f"variable {name!r} has the dims {tuple(dims)}, where all names should differ: "
                "name its dims by dims= or time=, or rename the site or its plates"
            )
        found = dict(coords or {})
        for dim, size in zip(dims, values.shape, strict=True):
            if dim in self.coords:
                found[dim] = np.asarray(self.coords[dim])
            elif dim not in found:
                found[dim] = np.arange(size)
            if len(found[dim]) != size:
                raise ValueError(
                    f"coords[{dim!r}] should have {size} labels, one for each element, got "
                    f"{len(found[dim])}"
                )
        return xarray.DataArray(values, found, dims, name)

    def check(self, arrays: Mapping[str, Sequence["xarray.DataArray"]]) -> None:
        """Raise a ValueError for dims of an absent variable, or coordinates of an absent dim."""
        every = [array for part in arrays.values() for array in part]
        names = {
            "dims": {str(a.name) for a in every},
            "coords": {str(d) for a in every for d in a.dims},
        }
        for argument, known in names.items():
            if unknown := set(getattr(self, argument)) - known:
                raise ValueError(
                    f"{argument} names {sorted(unknown)}, but there are only {sorted(known)}"
                )


def _steps(variable: Variable) -> dict[str, np.ndarray]:
    return {} if variable.steps is None else {str(variable.step_dim): np.array(variable.steps)}


def dataset(arrays: Sequence["xarray.DataArray"], attrs: Mapping[str, object]) -> "xarray.Dataset":
    """An ``xarray.Dataset``; where a variable lacks an element of a dim that others have, NaN."""
    import xarray

    names = [str(array.name) for array in arrays]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several variables have the name {twice[0]!r}: rename a site")
    aligned = xarray.align(*arrays, join="outer", copy=False)
    return xarray.Dataset({array.name: array for array in aligned}, attrs=dict(attrs))
