"""Ranks of true quantities among those of draws: latents, densities, a distance."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._distributions.row_noise import Noise
from pyproelbo._rows.plate import by_row
from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.traces import Plate, Traces

DENSITIES = ("log p(x, z)", "log p(x | z)")
DISTANCE = "distance to a reference point"


class Ranks(NamedTuple):
    """(rank + U) / (S + 1) of K quantities in N rows, (N, K), their labels, and S.

    With the reason why the last fit to each row stopped, where known for any.
    """

    values: Tensor
    dims: tuple[str, ...]
    num_samples: int
    ended: tuple[str | None, ...] | None = None


class Reference(NamedTuple):
    """The reference points of N rows for distances, and the unit of each of K dimensions.

    Attributes:
        point: (N, K).
        unit: (K,); infinite where a dimension does not count.
    """

    point: Tensor
    unit: Tensor

    @classmethod
    def of(cls, truth: Tensor, is_continuous: Tensor) -> "Reference | None":
        """For each row the true point of the next, with the standard deviations of all as units.

        None for a single row, and where no dimension is continuous.

        Args:
            truth: (N, K).
            is_continuous: (K,).
        """
        if len(truth) < 2 or not is_continuous.any():
            return None
        truth = truth.double()
        counts = is_continuous & (truth != truth[0]).any(0)
        return cls(truth.roll(-1, 0), torch.where(counts, truth.std(0), torch.inf))

    def row(self, n: int) -> "Reference":
        """The reference of one row."""
        return self._replace(point=self.point[n : n + 1])

    def distance(self, z: Tensor) -> Tensor:
        """From points (S, N, K), or (N, K): (S, N, 1), or (N, 1)."""
        return ((z.double() - self.point) / self.unit).norm(dim=-1, keepdim=True)


def densities(traces: Traces, plate: Plate | None) -> dict[str, Tensor]:
    """log p(x, z) and log p(x | z) of each row, (S, N, 1) each, in nats."""
    terms, num = terms_of(traces, "sampled"), traces.num_particles
    rows = 1 if plate is None else plate.size
    likelihood = by_row([*terms.log_likelihood.values(), *terms.factors.values()], num, plate)
    joint = likelihood + by_row(terms.log_prior.values(), num, plate)

    def rounded(value: Tensor) -> Tensor:  # values equal up to rounding are ties
        return value.expand(num, rows).double().round(decimals=6).unsqueeze(-1)

    return dict(zip(DENSITIES, map(rounded, (joint, likelihood)), strict=True))


class Counts(NamedTuple):
    """How many of the first ``num`` draws are below the true values, and equal to them.

    Both are stacked, (2, N, K), by name.
    """

    num: int = 0
    by_name: Mapping[str, Tensor] = {}

    def and_of(self, values: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> "Counts":
        """The counts with S more draws, (S, N, K) each, of quantities with true values (N, K).

        Raises:
            ValueError: for draws that are NaN.
        """
        found = {}
        for name, value in values.items():
            if value.isnan().any():
                raise ValueError(
                    f"{name} is NaN at a draw of the guide, and has no rank: look at the guide's "
                    "parameters; where it is refitted, take a smaller lr"
                )
            counts = torch.stack([(value < true[name]).sum(0), (value == true[name]).sum(0)])
            found[name] = self.by_name.get(name, 0) + counts
        num = len(next(iter(values.values())))
        return Counts(self.num + num, found)

    def __add__(self, other: "Counts") -> "Counts":  # type: ignore[override]
        """The counts of the draws of both."""
        found = {name: self.by_name[name] + value for name, value in other.by_name.items()}
        return Counts(self.num + other.num, found)

    def ranks(self, *key: int) -> Tensor:
        """(rank + U) / (num + 1) of all quantities, (N, K), with U from the key."""
        columns = []
        for name, counts in self.by_name.items():
            below, ties = counts.double().cpu()
            noise = Noise.of_site(name, key, range(1), 0, None, None)
            columns.append(below + noise.uniform(below, below.shape) * (ties + 1))
        return torch.cat(columns, 1) / (self.num + 1)
