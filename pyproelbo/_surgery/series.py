"""Values by draw and datum, and log-densities at some of the draws."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._surgery.draws import DataDraws, concatenated


class At(NamedTuple):
    """A value at draws of some data.

    Attributes:
        draws: these; the first contains all of those data, in ascending order.
        values: of each, (rows, ...).
    """

    draws: Sequence[DataDraws]
    values: Sequence[Tensor]

    @classmethod
    def of(cls, draws: Sequence[DataDraws], values: Tensor) -> "At":
        """From values (M, ...) of all draws, draw after draw."""
        return cls(draws, values.split([len(part.rows) for part in draws]))

    @classmethod
    def joined(cls, parts: Sequence["At"]) -> "At":
        """Several groups of data together."""
        draws, values = [], []
        columns = zip(*(zip(*part, strict=True) for part in parts), strict=True)
        for column in columns:
            drawn, of = zip(*column, strict=True)
            whole = concatenated(drawn)
            order = whole.rows.argsort()
            draws.append(whole.at(order))
            values.append(torch.cat(of)[order])
        return cls(draws, values)


class Series:
    """Values by draw and datum, (draws, N, ...), on the CPU; NaN where a datum was not drawn.

    Attributes:
        draws: these.
        rows: (N,), the indices of the data, ascending.
        num_data: N.
        num_dims: K.
        num_again: the number of data with a further draw, draw by draw.
    """

    def __init__(self, draws: Sequence[DataDraws]) -> None:
        self.draws, self.rows = draws, draws[0].rows.cpu()
        self.num_data, self.num_dims = draws[0].by_dim["z"].shape
        self._places = [torch.searchsorted(self.rows, part.rows.cpu()) for part in draws]
        self.num_again = sum(map(len, self._places[1:]))

    def of(self, parts: Iterable[Tensor]) -> Tensor:
        """The series of a value of each draw, (rows, ...)."""
        parts = list(parts)
        shape = (len(parts), self.num_data, *parts[0].shape[1:])
        value = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
        for s, part in enumerate(parts):
            value[s, self._places[s]] = part.double().cpu()
        return value

    def by_name(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The series of several values."""
        return {name: self.of(part[name] for part in parts) for name in parts[0]}

    def by_dim(self, name: str, dims: slice) -> Tensor:
        """A value of the draws by dimension, for some dimensions."""
        return self.of(part.by_dim[name][:, dims] for part in self.draws)
