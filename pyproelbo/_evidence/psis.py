"""The tails of importance weights: whether a posterior can be trusted, datum by datum."""

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from pyproelbo._evidence.by_level import (
    NESTED,
    Integrated,
    check_level,
    level_draws,
    mean_over,
    over_globals,
    over_locals,
)
from pyproelbo._evidence.pareto import (
    GOOD,
    LEAST,
    bands,
    pareto_smooth,
    smoothed_rows,
    threshold_of,
    usable,
)
from pyproelbo._evidence.weights import heavy_note, improper_note, khat_row
from pyproelbo._messages.arguments import check_counts, check_executor, check_shared
from pyproelbo._results.merging import rows_merged
from pyproelbo._results.numbers import share
from pyproelbo._results.per import Per, dim
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Table, row
from pyproelbo._rows.batches import Arguments, Batch, ReportData
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.levels import Level, LevelWeights
from pyproelbo._rows.passes import Pass, by_batch
from pyproelbo._rows.report_data import rows_of
from pyproelbo._rows.shelf import columns_joined, columns_of
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, eq=False, repr=False)
class Psis(Result):
    r"""Pareto k-hat of the importance weights p(x_n, z) / q(z | x_n) of each datum.

    Yao, Vehtari, Simpson & Gelman (2018), "Yes, but did it work?": k-hat is an estimate of the
    least k for which the 1 / k-th moment of the weights is finite. Below 0.5 the weights have a
    finite variance; below ``threshold``, 0.7 or a little less, weighted estimates can still be
    trusted; above, the draws of q miss important parts of p(z | x_n). k-hat thus shows whether the
    weights can be used, not whether q is good: a q that is 5 times too wide has k-hat below 0. The
    weighted draws show how far q is off (:func:`~pyproelbo.moments`).

    Attributes:
        khat: k-hat of each datum, (N,).
        joint_khat: k-hat of the weights of all data together, prod_n w_n. It can be bad where every
            datum is good: for no amortised guide of many data is it small.
        effective_sample_size: of each datum's smoothed weights, (N,): from 1 to S.
        log_evidence: log p(x_n) by the smoothed weights' mean, in nats, (N,); ``stderr`` is its
            standard error.
        num_samples: S.
        per: the meaning of a row: a "datum"; or the "data set", where a latent is global, and N is
            1.
        is_up_to_a_constant: whether a prior is improper: log p(x) is then known up to a constant
            only; k-hat does not depend on it.
        level: the latents that the weights belong to: "joint" for all; "local" for those of each
            datum; "global" for those that all data share, with the local ones integrated out.
        num_globals: the number of draws of global latents over which the numbers are means, if the
            weights are for a datum given these; 0 otherwise.
        joint_log_weights: the sums of the log-weights of all data for each draw, (S,), of which
            ``joint_khat`` is; None where they are unknown.
    """

    _options = ("num_samples", "per", "level", "is_up_to_a_constant", "num_globals")

    khat: Tensor
    joint_khat: float
    effective_sample_size: Tensor
    log_evidence: Tensor
    num_samples: int
    per: Per = "datum"
    is_up_to_a_constant: bool = False
    level: Level = "local"
    num_globals: int = 0
    joint_log_weights: Tensor | None = None

    @classmethod
    def _merged(cls, parts: Sequence[Any]) -> Self:
        joint = sum(np.asarray(part.joint_log_weights) for part in parts)
        return replace(
            rows_merged(parts),
            joint_khat=float(pareto_smooth(joint)[1]),
            joint_log_weights=torch.from_numpy(joint),
        )

    @property
    def notes(self) -> list[str]:
        """Remarks on how reliable the numbers are, in sentences; empty where nothing stands out."""
        heavy = heavy_note(self.per, self.khat)
        return [*heavy, *improper_note(self.is_up_to_a_constant)]

    @property
    def stderr(self) -> Tensor:
        """The standard error of log_evidence, by the spread of the smoothed weights, (N,)."""
        return (1 / self.effective_sample_size - 1 / self.num_samples).clamp(min=0).sqrt()

    @property
    def is_usable(self) -> Tensor:
        """Whether the weights can be used, (N,).

        Their k-hat is below the threshold, or they hardly differ: where the effective sample size
        is above 80% of S, the tail of their differences, however heavy, has no influence.
        """
        return usable(self.khat, self.effective_sample_size, self.num_samples)

    @property
    def threshold(self) -> float:
        """The largest usable k-hat for S draws: min(1 - 1 / log10 S, 0.7) (Vehtari et al. 2024)."""
        return threshold_of(self.num_samples)

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dim "datum" or "data_set"."""
        import xarray

        columns = {
            "khat": (self.khat, "1"),
            "effective_sample_size": (self.effective_sample_size, "draws"),
            "log_evidence": (self.log_evidence, "nats"),
            "log_evidence_stderr": (self.stderr, "nats"),
        }
        values: dict[str, Any] = {
            name: (dim(self.per), value.numpy(), {"units": unit})
            for name, (value, unit) in columns.items()
        }
        values["joint_khat"] = ((), self.joint_khat, {"units": "1"})
        attributes = {
            "num_samples": self.num_samples,
            "threshold": self.threshold,
            "per": self.per,
            "is_up_to_a_constant": int(self.is_up_to_a_constant),
            "level": self.level,
            "num_globals": self.num_globals,
        }
        return xarray.Dataset(values, attrs=attributes)

    def _table(self) -> Table:
        k, ess = self.khat, self.effective_sample_size
        if self.per == "data set":
            rows = [
                khat_row(k, self.per, self.num_samples),
                row("effective sample size", ess[0], decimals=1),
                row("log p(x), nats", self.log_evidence[0], float(self.stderr[0])),
            ]
            title = "Importance weights of all data together"
            if self.level == "global":
                title = "Importance weights of the global latents"
            return Table(f"{title}, draws: {self.num_samples:,}", rows)
        ends = {"good": min(GOOD, self.threshold), "usable": self.threshold}
        labels = {name: f"{name}, below {end:.2g}" for name, end in ends.items()}
        rows = [
            row(
                labels.get(name, name),
                int(mask.sum()),
                None,
                f"({share(float(mask.double().mean()))} of the data)",
            )
            for name, mask in bands(k, self.threshold).items()
        ]
        if (alike := ~(k < self.threshold) & self.is_usable).any():
            rows.append(row("  whose weights hardly differ", int(alike.sum())))
        rows += [
            row("median", k.median(), None, f"(largest {k.max():.2f})", decimals=2),
            *(
                [row("all data together", self.joint_khat, decimals=2)]
                if not math.isnan(self.joint_khat)
                else []
            ),
            row(
                "effective sample size",
                ess.median(),
                None,
                f"(median; least {ess.min():.1f})",
                decimals=1,
            ),
        ]
        given = f" given {self.num_globals} draws of the global latents" * bool(self.num_globals)
        return Table(f"Pareto k-hat of {len(k):,} data{given}, draws: {self.num_samples:,}", rows)


def global_psis(draws: Integrated, is_improper: bool) -> Psis:
    """The report on global latents."""
    return _of_parts([PsisPart.of(draws.log_weight.numpy())], "data set", "global", is_improper)


def _of_parts(parts: list["PsisPart"], per: Per, level: Level, is_improper: bool) -> Psis:
    joints, *columns = columns_of(parts)
    parts.clear()
    k, ess, log_p = map(torch.from_numpy, columns_joined(columns))
    joint = sum(joints, np.zeros(()))
    joint_khat = float(pareto_smooth(joint)[1])
    sums = torch.from_numpy(joint)
    return Psis(
        k, joint_khat, ess, log_p, len(joint), per, is_improper, level, joint_log_weights=sums
    )


def local_psis(parts: list["PsisPart"]) -> Psis:
    """The report on local latents: means over draws of the global ones."""
    k = mean_over([part.khat for part in parts])
    ess = mean_over([part.effective_sample_size for part in parts])
    log_p = mean_over([part.log_evidence for part in parts])
    return Psis(k, math.nan, ess, log_p, len(parts[0].joint), num_globals=len(parts))


def psis(
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
) -> Psis:
    """Pareto k-hat of the importance weights of each datum, or of the data set (see :class:`Psis`).

    Args:
        model, guide, data, arguments, plate, batch_size, chunk, seed, executor, progress:
            as in :func:`evidence`.
        num_samples: S, the number of draws of the guide for each row. The weights of a batch are
            held at once, as is their product over all data.
        level, num_nested: as in :func:`evidence`. For level "local", k-hat and the effective sample
            size are means over the draws of w, and the joint k-hat is unknown.

    Raises:
        ValueError: as for :func:`evidence`, and for fewer than 25 samples.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> ppca = PPCA.optimum(torch.randn(50, 5), num_latents=2)
    >>> result = psis(ppca, Exact(ppca), torch.randn(50, 5), num_samples=100)
    >>> result.khat.max(), result.joint_khat
    (tensor(0., dtype=torch.float64), 0.0)
    """
    check_counts(LEAST, num_samples=num_samples)
    check_shared(plate, seed, arguments, chunk)
    check_executor(executor, level)
    check_level(level, num_nested)
    if level in ("global", "local"):
        counts, named = (num_samples, num_nested), ("psis", progress)
        with level_draws(model, guide, data, arguments, plate, seed) as levels:
            if level == "local":
                return over_locals(levels, *counts, PsisPart.of_locals, local_psis, *named)
            of_globals = partial(global_psis, is_improper=levels.is_improper)
            return over_globals(levels, *counts, chunk, of_globals, *named)
    unit, batches = rows_of(model, guide, data, batch_size, arguments, plate, level is not None)
    of, joined = psis_pass(num_samples, chunk)

    def of_batch(batch: Batch) -> _Rows:
        return of(RowDraws(model, guide, batch, unit, seed))

    with evaluating(model, guide, seed=seed):
        return by_batch(batches, of_batch, joined, "psis", progress, executor, _with_next)


def psis_pass(num_samples: int, chunk: int | None) -> Pass[RowDraws, "_Rows", Psis]:
    """The report, as a pass."""

    def of(draws: RowDraws) -> _Rows:
        weights = draws.log_weights(num_samples, chunk).cpu().numpy()
        return _Rows(PsisPart.of(weights), draws.unit.per, draws.is_improper)

    def joined(parts: list[_Rows], _: bool) -> Psis:
        first, weights = parts[0], [part.weights for part in parts]
        parts.clear()
        level = "joint" if first.per == "data set" else "local"
        return _of_parts(weights, first.per, level, first.is_improper)

    return Pass(of, joined)


class PsisPart(NamedTuple):
    """What is kept from the log-weights of S draws for each of B data."""

    joint: np.ndarray  # (S,), their sums over the data; 0 where another part has them
    khat: np.ndarray  # (B,)
    effective_sample_size: np.ndarray  # (B,)
    log_evidence: np.ndarray  # (B,)

    @classmethod
    def of_locals(cls, weights: LevelWeights) -> "PsisPart":
        """The part for each datum's latents given one draw of the global ones."""
        return cls.of(weights.of_locals[0].numpy())

    @classmethod
    def of(cls, w: np.ndarray) -> "PsisPart":
        """The part from log-weights (S, B)."""
        _, k, log_sum, ess = smoothed_rows(w)
        return cls(w.sum(1), k, ess, log_sum - math.log(len(w)))


class _Rows(NamedTuple):
    """What is kept from a batch."""

    weights: PsisPart
    per: Per
    is_improper: bool


def _with_next(parts: list[_Rows], part: _Rows) -> list[_Rows]:
    """The parts and one more, which alone holds the sums over all data."""
    if not parts:
        return [part]
    *before, last = parts
    joint = last.weights.joint + part.weights.joint
    last, part = (
        rows._replace(weights=rows.weights._replace(joint=sums))
        for rows, sums in ((last, np.zeros(())), (part, joint))
    )
    return [*before, last, part]
