"""The distance of q from the posterior by gradients of log-densities: no evidence needed."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pyro
import torch
from torch import Tensor

from pyproelbo._evidence.coordinates import Coordinates, NotContinuousError
from pyproelbo._messages.arguments import check_counts, check_executor, check_shared
from pyproelbo._results.merging import rows_merged
from pyproelbo._results.per import Per, dim, num_rows
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Number, Row, Table
from pyproelbo._rows.batches import Arguments, Batch, ReportData
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.evaluating import constant, evaluating
from pyproelbo._rows.passes import Pass, by_batch
from pyproelbo._rows.report_data import rows_of
from pyproelbo._rows.runs import Use
from pyproelbo._rows.shelf import columns_joined, columns_of
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray

_SHOWN = 20  # lines of a table
_WHY = "the Fisher divergence needs gradients with respect to latents: it is for continuous ones"


@dataclass(frozen=True, eq=False, repr=False)
class FisherDivergence(Result):
    r"""The Fisher divergence of q from the posterior, in each coordinate of the guide's draws.

        E_q (d/du_k log q(u | x) - d/du_k log p(x, u))^2,

    with u the guide's unconstrained draws. It is 0 where q is the posterior. It needs neither
    evidence nor weights, and holds even where weights cannot be used: a q that is too wide, or that
    misses the posterior, has a large divergence too. Multiplied by the variance of q it has no
    unit: where q is N(m, s^2) and the posterior N(mu, sigma^2), that is

        (s^2 / sigma^2 - 1)^2 + s^2 (m - mu)^2 / sigma^4:

    0.10 for an sd that is 1.15 times too large, 0.48 for 1.3 times; 0.01 for a mean off by 0.1 sds.
    Like every quantity computed at draws of q, it does not detect a mode that q lacks.

    Attributes:
        dims: the labels of the K coordinates, by the guide's sites, such as "z[0]".
        divergence: in 1 / units of u squared, (N, K); ``divergence_stderr`` is its Monte Carlo
            error.
        scaled: multiplied by the variance of q, (N, K): without a unit; ``scaled_stderr`` likewise.
        num_samples: S.
        per: the meaning of a row: a "datum"; or the "data set", where a latent is global, and N is
            1.
    """

    _options = ("dims", "num_samples", "per")

    dims: tuple[str, ...]
    divergence: Tensor
    divergence_stderr: Tensor
    scaled: Tensor
    scaled_stderr: Tensor
    num_samples: int
    per: Per = "datum"

    @classmethod
    def _merged(cls, parts: Sequence[Any]) -> Self:
        return rows_merged(parts)

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dims "datum" or "data_set", and "latent_dim"."""
        import xarray

        units = {"divergence": "1 / unit of the coordinate squared", "scaled": "1"}
        values: dict[str, Any] = {
            f"{name}{end}": (
                (dim(self.per), "latent_dim"),
                getattr(self, name + end).numpy(),
                {"units": unit},
            )
            for name, unit in units.items()
            for end in ("", "_stderr")
        }
        attributes = {"num_samples": self.num_samples, "per": self.per}
        return xarray.Dataset(values, {"latent_dim": list(self.dims)}, attributes)

    def _table(self) -> Table:
        worst = self.scaled.amax(0)
        order = worst.argsort(descending=True, stable=True)[:_SHOWN].sort().values.tolist()
        rows = [Row(self.dims[k], self._cells(k)) for k in order]
        left = len(self.dims) - len(order)
        if left:
            rows.append(Row(f"and {left:,} that are smaller", ()))
        heads = ("coordinate", "divergence", "times q's variance")
        if self.per == "datum":
            heads = ("coordinate", "median, times q's variance", "largest")
        of = num_rows(self.per, len(self.scaled))
        return Table(f"Fisher divergence ({of}, draws: {self.num_samples:,})", rows, heads)

    def _cells(self, k: int) -> tuple[Number, ...]:
        if self.per == "datum":
            of = self.scaled[:, k]
            return Number(float(of.median()), None, 3), Number(float(of.max()), None, 3)
        return (
            Number(float(self.divergence[0, k]), float(self.divergence_stderr[0, k])),
            Number(float(self.scaled[0, k]), float(self.scaled_stderr[0, k])),
        )


def fisher_divergence(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    num_samples: int = 200,
    plate: str | None = None,
    batch_size: int = 256,
    chunk: int | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool = True,
) -> FisherDivergence:
    """The error of q by the gradients of log-densities (see :class:`FisherDivergence`).

    Args:
        model, guide, data, arguments, plate, batch_size, chunk, seed, executor, progress:
            as in :func:`evidence`.
        num_samples: S, the number of draws of the guide for each row.

    Raises:
        ValueError: as for :func:`evidence`, and for latents that are discrete, or summed out by the
            model.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> x = torch.randn(50, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> fisher_divergence(ppca, Exact(ppca), x).scaled.max() < 1e-6
    tensor(True)
    """
    check_counts(2, num_samples=num_samples)
    check_shared(plate, seed, arguments, chunk)
    check_executor(executor)
    unit, batches = rows_of(model, guide, data, batch_size, arguments, plate)
    of, joined = fisher_pass(num_samples, chunk)

    def of_batch(batch: Batch) -> _Part:
        return of(RowDraws(model, guide, batch, unit, seed))

    with evaluating(model, guide, seed=seed), constant(model, guide):
        return by_batch(batches, of_batch, joined, "fisher_divergence", progress, executor)


def fisher_pass(num_samples: int, chunk: int | None) -> "Pass[RowDraws, _Part, FisherDivergence]":
    """The report, as a pass."""

    def joined(parts: list[_Part], _: bool) -> FisherDivergence:
        first, columns = parts[0], columns_of(part.columns for part in parts)
        parts.clear()
        divergence, error, scaled, scaled_error = columns_joined(columns)
        return FisherDivergence(
            first.dims, divergence, error, scaled, scaled_error, num_samples, first.per
        )

    return Pass(lambda draws: _of(draws, num_samples, chunk), joined)


def fisher_where_known(
    num_samples: int,
) -> "Pass[RowDraws, _Part | None, FisherDivergence | None]":
    """The same, None where latents or densities have no gradients."""
    of, joined = fisher_pass(num_samples, None)

    def of_known(draws: RowDraws) -> _Part | None:
        try:
            return of(draws)
        except (NotContinuousError, NotImplementedError):
            return None

    def joined_known(parts: list[_Part | None], is_whole: bool) -> FisherDivergence | None:
        known = [part for part in parts if part is not None]
        return joined(known, is_whole) if len(known) == len(parts) else None

    return Pass(of_known, joined_known)


class _Part(NamedTuple):
    """Some rows of the fields of :class:`FisherDivergence`."""

    dims: tuple[str, ...]
    columns: tuple[Tensor, ...]
    per: Per


def _of(draws: RowDraws, num_samples: int, chunk: int | None) -> _Part:
    coordinates = Coordinates(draws, chunk, _WHY)
    parts = list(draws.ranges(num_samples, chunk))
    squares, values = [], []
    for u in (coordinates.draw(part, Use.FISHER) for part in parts):
        squares.append(_difference(coordinates, u).double().square().cpu())
        values.append(u.double().cpu())
    square, u = torch.cat(squares), torch.cat(values)
    variance = u.var(0)
    mean, error = square.mean(0), square.std(0) / num_samples**0.5
    scaled_error = _product_error(square, u, mean, variance)
    columns = mean, error, mean * variance, scaled_error
    return _Part(coordinates.labels, columns, draws.unit.per)


def _difference(coordinates: Coordinates, u: Tensor) -> Tensor:
    """The gradient of log p - log q at points, (S, B, K)."""
    with torch.enable_grad(), pyro.validation_enabled(False):
        u = u.detach().requires_grad_(True)
        found = coordinates.densities(u)
        (gradient,) = torch.autograd.grad((found.log_joint - found.log_q).sum(), u)
    return gradient


def _product_error(square: Tensor, u: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The standard error of mean times variance, by the delta method."""
    influence = square * variance + mean * (u - u.mean(0)).square()
    return influence.std(0) / len(u) ** 0.5
