"""A part of a surgery: the sums over some of the posteriors, at the draws of all data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from pyproelbo._results.result import Result
from pyproelbo._results.tables import Row, Table
from pyproelbo._surgery.draws import DataDraws, concatenated, of_data
from pyproelbo._surgery.guide_aggregate import log_mean
from pyproelbo._surgery.local_latents import LocalLatents
from pyproelbo._surgery.of_sums import surgery_of
from pyproelbo._surgery.over_globals import mean_of
from pyproelbo._surgery.result import Surgery
from pyproelbo._surgery.series import At

if TYPE_CHECKING:
    import xarray


class PosteriorSums(NamedTuple):
    """sum_n q(z | x_n) over some of the data, at draws of all of them, and the draws of the former.

    Attributes:
        draws: of the data of this part.
        log_sums: their logarithms, (M, 1), at all M draws, or at those of ``points``; given other
            latents u (M, 2), of q(z, u) and q(u).
        log_sums_by_dim: of each dimension, (M, K); None where posteriors are normal or unknown.
        codes: (m, K), the draws of a few of all data, by which other draws are told.
        points: the indices of the data at whose draws the sums are; None for all.
        global_kl: log q(w) - log p(w) at the draw of global latents; None where there are none.
    """

    draws: tuple[DataDraws, ...]
    log_sums: Tensor
    log_sums_by_dim: Tensor | None
    codes: Tensor
    points: Tensor | None
    global_kl: float | None

    def surgery(self, which: LocalLatents, num_samples: int) -> Surgery:
        """The surgery, from the sums over all data."""
        at = self.draws if self.points is None else of_data(self.draws, self.points)
        joint, by_dim = log_mean(self.log_sums, self.log_sums_by_dim, len(self.draws[0].rows))
        marginals = None if by_dim is None else At.of(at, by_dim)
        return surgery_of(which, num_samples, self.draws, At.of(at, joint), marginals)


@dataclass(frozen=True, eq=False, repr=False)
class SurgeryPart(Result):
    """The part of a surgery over some of the posteriors, which one of several jobs has computed.

    :func:`~pyproelbo.merge` of all parts, in any order, is one over all posteriors, whose
    :meth:`surgery` is that of one process, to rounding. A part holds a number for each draw of all
    data (K + 1 where posteriors are neither independent nor normal and have marginals), and the
    draws of its own.

    Attributes:
        num_data: N, of the whole.
        num_samples: draws of the guide per datum.
        latents: the latents z.
        sums: the sums, at each draw of the global latents, if there are any.
    """

    _options = ("num_data", "num_samples", "latents", "num_globals")

    num_data: int
    num_samples: int
    latents: LocalLatents
    sums: tuple[PosteriorSums, ...]

    @property
    def num_globals(self) -> int:
        """The number of draws of the global latents; 0 where there are none."""
        return 0 if self.sums[0].global_kl is None else len(self.sums)

    def surgery(self) -> Surgery:
        """The surgery of all data.

        Raises:
            ValueError: where posteriors are missing; and as :func:`surgery` does.
        """
        start, stop = self._ends
        if stop - start < self.num_data:
            missing = self.num_data - (stop - start)
            raise ValueError(
                f"the posteriors of {missing:,} of {self.num_data:,} data are missing, the first "
                f"of them that of row {0 if start else stop}: pe.merge their parts with this one"
            )
        found = [(one.surgery(self.latents, self.num_samples), one.global_kl) for one in self.sums]
        at_globals = [(surgery, kl) for surgery, kl in found if kl is not None]
        return mean_of(at_globals) if at_globals else found[0][0]

    @property
    def _ends(self) -> tuple[int, int]:
        """The index of the first of its data, and that after the last."""
        rows = self.sums[0].draws[0].rows
        return int(rows[0]), int(rows[-1]) + 1

    @classmethod
    def _merged(cls, parts: Sequence[Any]) -> Self:
        first: SurgeryPart = parts[0]
        sums = tuple(map(_added, zip(*(part.sums for part in parts), strict=True)))
        return cls(first.num_data, first.num_samples, first.latents, sums)

    @property
    def notes(self) -> list[str]:
        """How many posteriors are missing."""
        start, stop = self._ends
        if stop - start == self.num_data:
            return ["All posteriors are in these sums: .surgery() is the surgery."]
        return ["pe.merge of the parts over all posteriors has the surgery, .surgery()."]

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset``: ``log_sum``, the sums at each draw of z, jointly.

        Its dims are "global_draw", that of the global latents, and "place", of a draw among all.
        """
        import xarray

        sums = np.stack([one.log_sums[:, 0].cpu().numpy() for one in self.sums])
        start, stop = self._ends
        return xarray.Dataset(
            {"log_sum": (("global_draw", "place"), sums, {"units": "nats"})},
            attrs={"num_data": self.num_data, "start": start, "stop": stop},
        )

    def _table(self) -> Table:
        start, stop = self._ends
        lines = [
            Row("posteriors", (f"{start:,} to {stop - 1:,} of {self.num_data:,}",)),
            Row("at draws of z", (f"{len(self.sums[0].log_sums):,}",)),
        ]
        if self.num_globals:
            lines.append(Row("draws of the global latents", (f"{self.num_globals:,}",)))
        return Table("Part of an ELBO surgery", lines)


def _added(parts: tuple[PosteriorSums, ...]) -> PosteriorSums:
    """The sums over the data of all parts, which follow each other.

    Raises:
        ValueError: where the draws differ.
    """
    first = parts[0]
    if not all(_have_same_draws(first, other) for other in parts):
        raise ValueError(
            "results should be of the same draws: give each part all data, in the same order, not "
            "a loader that shuffles; the same max_pairs; and, for programs that take random "
            "numbers from torch's generator, the same batch_size"
        )
    columns = zip(*(part.draws for part in parts), strict=True)
    by_dim = [part.log_sums_by_dim for part in parts]
    known = [value for value in by_dim if value is not None]
    return first._replace(
        draws=tuple(concatenated(column) for column in columns),
        log_sums=torch.stack([part.log_sums for part in parts]).logsumexp(0),
        log_sums_by_dim=torch.stack(known).logsumexp(0) if known else None,
    )


def _have_same_draws(one: PosteriorSums, other: PosteriorSums) -> bool:
    points = [torch.empty(0) if x.points is None else x.points for x in (one, other)]
    are_close = one.codes.shape == other.codes.shape and torch.allclose(
        one.codes.double(), other.codes.double(), rtol=1e-3, atol=1e-3
    )
    return are_close and torch.equal(*points) and one.log_sums.shape == other.log_sums.shape
