"""The errors of q's means and standard deviations, by its own weighted draws."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from pyproelbo._evidence.by_level import (
    NESTED,
    Integrated,
    check_level,
    level_draws,
    over_globals,
    over_locals,
)
from pyproelbo._evidence.pareto import LEAST, pareto_smooth, usable
from pyproelbo._messages.arguments import check_counts, check_executor, check_shared
from pyproelbo._results.merging import rows_merged
from pyproelbo._results.per import Per, dim, num_rows
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Number, Row, Table
from pyproelbo._rows.batches import Arguments, Batch, ReportData
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.levels import Level, LevelWeights
from pyproelbo._rows.passes import Pass, by_batch
from pyproelbo._rows.report_data import rows_of
from pyproelbo._rows.runs import Use
from pyproelbo._rows.shelf import columns_joined, columns_of
from pyproelbo._rows.values import latent_values
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray

NARROW = 1.3  # the factor by which weighted draws may be wider than q
_SHOWN = 20  # lines of a table
_COLUMNS = (
    "q_mean",
    "q_sd",
    "mean",
    "sd",
    "mean_shift",
    "mean_shift_stderr",
    "sd_ratio",
    "sd_ratio_stderr",
    "khat",
    "effective_sample_size",
)


@dataclass(frozen=True, eq=False, repr=False)
class Moments(Result):
    r"""Means and standard deviations of q, and of the posterior by weighted draws of q.

    With draws z_s of q and their smoothed weights w_s, which sum to 1 (:class:`Psis`), the
    posterior's mean is sum_s w_s z_s, and q's is the mean of the same draws. The error of their
    difference follows from its weights w_s - 1/S. Where k-hat is large the difference means little,
    and q may be off by more.

    Attributes:
        dims: the labels of the K dimensions, such as "z[0]".
        q_mean: the mean of q, (N, K); ``q_sd`` likewise.
        mean: the mean of the posterior, (N, K); ``sd`` likewise.
        mean_shift: (q_mean - mean) / sd, the error of q's mean in standard deviations of the
            posterior, (N, K); ``mean_shift_stderr`` is its standard error.
        sd_ratio: q_sd / sd, (N, K): below 1 where q is too narrow; ``sd_ratio_stderr`` likewise.
        khat: Pareto k-hat of the weights, (N,).
        effective_sample_size: of the smoothed weights, (N,).
        num_samples: S.
        per: the meaning of a row: a "datum"; or the "data set", where a latent is global, and N is
            1.
        level: the latents concerned: "joint" for all; "local" for those of each datum; "global" for
            those that all data share, with the local ones integrated out.
        num_globals: the number of draws of global latents over which the numbers are means, if they
            are for a datum given these; 0 otherwise.
    """

    _options = ("dims", "num_samples", "per", "level", "num_globals")

    dims: tuple[str, ...]
    q_mean: Tensor
    q_sd: Tensor
    mean: Tensor
    sd: Tensor
    mean_shift: Tensor
    mean_shift_stderr: Tensor
    sd_ratio: Tensor
    sd_ratio_stderr: Tensor
    khat: Tensor
    effective_sample_size: Tensor
    num_samples: int
    per: Per = "datum"
    level: Level = "local"
    num_globals: int = 0

    @classmethod
    def _merged(cls, parts: Sequence[Any]) -> Self:
        return rows_merged(parts)

    @property
    def can_be_corrected(self) -> Tensor:
        """Whether the weighted draws can stand for the posterior, (N,).

        They can be used (``is_usable`` of :class:`Psis`), and q is not so narrow, with an sd below
        1 / 1.3 of the weighted draws' sd, that its draws do not reach the posterior. Both criteria
        come from a comparison with 29 known posteriors (``tests/benchmarks/posteriordb.py``): where
        q is far too narrow, k-hat of a thousand draws can nevertheless be small.
        """
        reached = (self.sd_ratio > 1 / NARROW).all(1)
        return usable(self.khat, self.effective_sample_size, self.num_samples) & reached

    @property
    def notes(self) -> list[str]:
        """Remarks on how reliable the numbers are, in sentences; empty where nothing stands out."""
        bad = float((~self.can_be_corrected).double().mean())
        if bad == 0:
            return []
        of = "" if self.per == "data set" else f" for {bad:.1%} of the data"
        return [
            f"q may be off by more than its own draws can show{of}: k-hat is large, or q is so "
            "narrow that they do not reach the posterior."
        ]

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dims "datum" or "data_set", and "latent_dim"."""
        import xarray

        units = {"mean_shift": "standard deviations", "sd_ratio": "1"}
        values: dict[str, Any] = {
            name: ((dim(self.per), "latent_dim"), getattr(self, name).numpy(), unit)
            for name, unit in {
                **{name: {"units": "as the latent"} for name in ("q_mean", "q_sd", "mean", "sd")},
                **{f"{n}{end}": {"units": u} for n, u in units.items() for end in ("", "_stderr")},
            }.items()
        }
        values["khat"] = (dim(self.per), self.khat.numpy(), {"units": "1"})
        ess = self.effective_sample_size.numpy()
        values["effective_sample_size"] = (dim(self.per), ess, {"units": "draws"})
        attributes = {"num_samples": self.num_samples, "per": self.per, "level": self.level}
        attributes["num_globals"] = self.num_globals
        return xarray.Dataset(values, {"latent_dim": list(self.dims)}, attributes)

    def _table(self) -> Table:
        off = self.mean_shift.abs().amax(0) + self.sd_ratio.log().abs().nan_to_num().amax(0)
        order = off.argsort(descending=True, stable=True)[:_SHOWN].sort().values.tolist()
        rows = [Row(self.dims[k], self._cells(k)) for k in order]
        left = len(self.dims) - len(order)
        if left:
            rows.append(Row(f"and {left:,} that are less off", ()))
        heads = ("latent", "q's mean", "mean", "off by, in sds", "q's sd / sd")
        if self.per == "datum":
            heads = ("latent", "mean |shift|, in sds", "largest", "median q's sd / sd")
        of = num_rows(self.per, len(self.khat))
        of += f" given {self.num_globals} draws of the global latents" * bool(self.num_globals)
        title = f"Means and sds of q by weighted draws ({of}, draws: {self.num_samples:,})"
        return Table(title, rows, heads)

    def _cells(self, k: int) -> tuple[Number, ...]:
        if self.per == "datum":
            shift, ratio = self.mean_shift[:, k].abs(), self.sd_ratio[:, k]
            values = shift.mean(), shift.amax(), ratio.median()
            return tuple(Number(float(value), None, 2) for value in values)
        return (
            Number(float(self.q_mean[0, k])),
            Number(float(self.mean[0, k])),
            Number(float(self.mean_shift[0, k]), float(self.mean_shift_stderr[0, k])),
            Number(float(self.sd_ratio[0, k]), float(self.sd_ratio_stderr[0, k])),
        )


def moments(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    num_samples: int = 1000,
    level: Level | None = None,
    num_nested: int = NESTED,
    plate: str | None = None,
    batch_size: int = 256,
    chunk: int | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool = True,
) -> Moments:
    """The errors of q's means and sds, by its weighted draws (see :class:`Moments`).

    Args:
        model, guide, data, arguments, plate, batch_size, chunk, seed, executor, progress:
            as in :func:`evidence`.
        num_samples: S, the number of draws of the guide for each row. They are made twice: for
            their weights, and then for their values.
        level, num_nested: as in :func:`evidence`: "global" for the latents that all data share, by
            weights in which the others are integrated out; "local" for those of each datum given
            them, as means over ``num_nested`` draws of the global ones.

    Raises:
        ValueError: as for :func:`evidence`, and for fewer than 25 samples.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> x = torch.randn(50, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> moments(ppca, Exact(ppca), x, num_samples=100).mean_shift.abs().max() < 1e-4
    tensor(True)
    """
    check_counts(LEAST, num_samples=num_samples)
    check_shared(plate, seed, arguments, chunk)
    check_executor(executor, level)
    check_level(level, num_nested)
    if level in ("global", "local"):
        counts, named = (num_samples, num_nested), ("moments", progress, True)
        with level_draws(model, guide, data, arguments, plate, seed) as levels:
            if level == "local":
                return over_locals(levels, *counts, MomentsPart.of_locals, local_moments, *named)
            return over_globals(levels, *counts, chunk, global_moments, *named)
    unit, batches = rows_of(model, guide, data, batch_size, arguments, plate, level is not None)

    of, joined = moments_pass(num_samples, chunk)

    def of_batch(batch: Batch) -> MomentsPart:
        return of(RowDraws(model, guide, batch, unit, seed))

    with evaluating(model, guide, seed=seed):
        return by_batch(batches, of_batch, joined, "moments", progress, executor)


def moments_pass(num_samples: int, chunk: int | None) -> "Pass[RowDraws, MomentsPart, Moments]":
    """The report, as a pass."""

    def joined(parts: list[MomentsPart], _: bool) -> Moments:
        first = parts[0]
        columns = columns_of(part.columns for part in parts)
        parts.clear()
        whole = tuple(columns_joined(columns))
        kind = "joint" if first.per == "data set" else "local"
        return _moments(first._replace(columns=whole), first.per, kind)

    return Pass(lambda draws: _part(draws, num_samples, chunk), joined)


class MomentsPart(NamedTuple):
    """Some rows of the fields of :class:`Moments`, from "q_mean" to the end."""

    dims: tuple[str, ...]
    columns: tuple[Tensor, ...]
    num_samples: int
    per: Per = "datum"

    @classmethod
    def of_locals(cls, weights: LevelWeights) -> "MomentsPart":
        """The moments of each datum's latents given one draw of the global ones."""
        assert weights.values is not None
        return _weighed(weights.of_locals[0], weights.values[0], weights.names)


def _moments(part: MomentsPart, per: Per, level: Level, num_globals: int = 0) -> Moments:
    columns = dict(zip(_COLUMNS, part.columns, strict=True))
    options = {"per": per, "level": level, "num_globals": num_globals}
    numbers = {"num_samples": part.num_samples, **columns}
    return Moments(dims=part.dims, **numbers, **options)  # type: ignore


def _part(draws: RowDraws, num_samples: int, chunk: int | None) -> MomentsPart:
    """The part of a batch: first its weights, then sums of the weighted draws."""
    smoothed, khat = pareto_smooth(draws.log_weights(num_samples, chunk))
    weights = torch.from_numpy(np.exp(smoothed))
    names: tuple[str, ...] = ()
    sums: Sums | None = None
    for numbers in draws.ranges(num_samples, chunk):
        start = numbers.start
        for traces in draws.traces(numbers, Use.WEIGHTS):
            names, z = latent_values(traces, draws.plate)
            sums = Sums(z[0]) if sums is None else sums
            sums.add(z, weights[start : start + len(z)], num_samples)
            start += len(z)
    assert sums is not None
    columns = (*sums.moments(num_samples), *_of_weights(weights, khat))
    return MomentsPart(names, columns, num_samples, draws.unit.per)


def global_moments(draws: Integrated) -> Moments:
    """The moments of global latents, by weights in which the local ones are integrated out."""
    assert draws.values is not None
    return _moments(_weighed(draws.log_weight, draws.values, draws.names), "data set", "global")


def local_moments(parts: list[MomentsPart]) -> Moments:
    """The moments of each datum's latents: means over draws of the global ones."""
    columns = [torch.stack(column) for column in zip(*(p.columns for p in parts), strict=True)]
    means = [column.mean(0) for column in columns]
    for i, (name, column) in enumerate(zip(_COLUMNS, columns, strict=True)):
        if name.endswith("_stderr"):
            means[i] = column.square().sum(0).sqrt() / len(parts)
        elif name == "sd_ratio":
            means[i] = column.log().mean(0).exp()
    whole = MomentsPart(parts[0].dims, tuple(means), parts[0].num_samples)
    return _moments(whole, "datum", "local", len(parts))


def _weighed(log_w: Tensor, z: Tensor, names: tuple[str, ...]) -> MomentsPart:
    """The moments from draws (S, B, K) and their log-weights (S, B)."""
    smoothed, khat = pareto_smooth(log_w)
    sums, weights = Sums(z[0]), torch.from_numpy(np.exp(smoothed))
    sums.add(z, weights, len(z))
    return MomentsPart(names, (*sums.moments(len(z)), *_of_weights(weights, khat)), len(z))


def _of_weights(weights: Tensor, khat: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(khat), 1 / weights.square().sum(0)


class Sums:
    """Weighted sums of powers of draws (S, B, K) that arrive in parts.

    Args:
        about: what is subtracted from the draws, (B, K), to limit cancellation.
    """

    def __init__(self, about: Tensor) -> None:
        self._about = about
        self._plain = torch.zeros(2, *about.shape, dtype=torch.float64)  # of z and z^2
        self._weighted = torch.zeros_like(self._plain)
        # of (w - 1/S)^2 z^p, for p of 0, ..., 4
        self._squares = torch.zeros(5, *about.shape, dtype=torch.float64)

    def add(self, z: Tensor, weights: Tensor, num: int) -> None:
        """Add draws, with weights (s, B) that sum to 1 over all ``num`` draws."""
        z, w = z - self._about, weights.unsqueeze(-1)
        square = (w - 1 / num).square()
        for p in range(5):
            self._squares[p] += (square * z**p).sum(0)
        for p in range(2):
            self._plain[p] += (z ** (p + 1)).sum(0) / num
            self._weighted[p] += (w * z ** (p + 1)).sum(0)

    def moments(self, num: int) -> tuple[Tensor, ...]:
        """The fields of :class:`Moments`, from "q_mean" to "sd_ratio_stderr"."""
        q_mean, mean = self._plain[0], self._weighted[0]
        q_sd, sd = (
            (second - first.square()).clamp(min=0).sqrt()
            for first, second in (self._plain, self._weighted)
        )
        s0, s1, s2, s3, s4 = self._squares
        # of sum (w - 1/S) (z - m), and of sum (w - 1/S) ((z - m)^2 - v)
        of_mean = s2 - 2 * mean * s1 + mean**2 * s0
        m, v = mean, sd.square()
        central = s4 - 4 * m * s3 + 6 * m**2 * s2 - 4 * m**3 * s1 + m**4 * s0
        of_square = central - 2 * v * of_mean + v**2 * s0
        still = (sd == 0) & (q_sd == 0)  # as a discrete latent whose draws are all equal
        scale = torch.where(sd > 0, sd, 1.0)
        shift = torch.where(still, 0.0, (q_mean - mean) / scale)
        ratio = torch.where(still, 1.0, q_sd / scale)
        shift_error = of_mean.clamp(min=0).sqrt() / scale
        ratio_error = ratio * of_square.clamp(min=0).sqrt() / (2 * scale.square())
        means = (q_mean + self._about, q_sd, mean + self._about, sd)
        return (*means, shift, shift_error, ratio, ratio_error)
