"""The tails of importance weights: how far a posterior can be trusted, datum by datum."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyproelbo._evidence.by_level import check_level, global_weights, local_weights, mean_over
from pyproelbo._evidence.weights import improper_note
from pyproelbo._messages.arguments import check_counts, check_shared
from pyproelbo._results.numbers import share
from pyproelbo._results.per import Per, dim
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Table, row
from pyproelbo._rows.batches import Arguments, Batch, ReportData
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.levels import Level, LevelDraws
from pyproelbo._rows.passes import by_batch
from pyproelbo._rows.report_data import rows_of
from pyproelbo._rows.runs import Use
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray

ALIKE = 0.8  # of the draws, that count where weights hardly differ
GOOD, USABLE = 0.5, 0.7  # Vehtari et al. (2024), section 3.2.4
_CONSTANT = 1e-3  # nats: log-weights that spread less are all the same, but for rounding


def pareto_smooth(log_weights: ArrayLike | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed importance weights, and the shape k of the tail that was fitted.

    Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto smoothed importance sampling". ArviZ does
    it, whose versions differ in the sign of what they take.

    Args:
        log_weights: log p(x, z) - log q(z) at S draws, up to a constant: (S, ...).

    Returns:
        The logarithms of the smoothed weights, which sum to 1 over the draws, (S, ...); and k,
        (...): 0 where the largest weights are all the same, as for a discrete latent, and there
        is no tail; infinite where the largest are less than five, above many of one size, and
        none can be fitted. Where all weights are 0, NaN, and k is infinite.

    Raises:
        ValueError: for fewer than 25 draws, of which no tail can be fitted, and for NaN or +inf.

    >>> log_weights = np.random.default_rng(0).exponential(size=(4000, 2)) * [0.2, 0.9]
    >>> pareto_smooth(log_weights)[1] < 0.5
    array([ True, False])
    """
    if isinstance(log_weights, Tensor):
        log_weights = log_weights.detach().cpu()
    w = np.moveaxis(np.asarray(log_weights, float), 0, -1)
    if w.ndim == 0 or w.shape[-1] < 25:
        raise ValueError(
            f"log_weights should have at least 25 draws, (S, ...), got {np.shape(log_weights)}"
        )
    if np.isnan(w).any() or (w == np.inf).any():
        raise ValueError("log_weights should not be NaN or +inf: look for NaN in data and programs")
    none = (w == -np.inf).all(-1)
    w = np.where(none[..., None], 0.0, w)
    w = w - w.max(-1, keepdims=True)
    S = w.shape[-1]
    below = S - 1 - math.ceil(min(S / 5, 3 * S**0.5))  # the tail's draws are those above
    constant = np.partition(w, below, -1)[..., below] > -_CONSTANT
    smoothed, k = _psislw(np.where(constant[..., None], _varied(w.shape), w))
    smoothed = np.where(constant[..., None], w, smoothed)
    smoothed = smoothed - np.logaddexp.reduce(smoothed, -1, keepdims=True)
    smoothed = np.where(none[..., None], np.nan, smoothed)
    return np.moveaxis(smoothed, -1, 0), np.select([none, constant], [np.inf, 0.0], k)


def _psislw(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By ArviZ, of draws in the last dim."""
    try:
        from arviz_stats.base import array_stats  # type: ignore[import-not-found]
    except ImportError:  # ArviZ before 1.0
        from arviz import psislw

        return psislw(log_weights)  # type: ignore[return-value]
    return array_stats.psislw(-log_weights)


def _varied(shape: tuple[int, ...]) -> np.ndarray:
    """In place of weights that have no tail to be fitted."""
    return np.broadcast_to(-np.linspace(0.0, 1.0, shape[-1]), shape)


@dataclass(frozen=True, eq=False, repr=False)
class Psis(Result):
    r"""Pareto k-hat of the importance weights p(x_n, z) / q(z | x_n) of each datum.

    Yao, Vehtari, Simpson & Gelman (2018), "Yes, but did it work?": k-hat is an estimate of the
    least k for which the 1 / k-th moment of the weights is finite. Below 0.5 they have a variance;
    below 0.7 estimates that are weighted by them can still be trusted; above, the draws of q miss
    what matters of p(z | x_n). So k-hat tells if the weights can be used, and not if q is good: a q
    that is 5 times too wide has k-hat below 0. How far it is off the weighted draws tell
    (:func:`~pyproelbo.moments`).

    Attributes:
        khat: k-hat of each datum, (N,).
        joint_khat: of the weights of all data together, prod_n w_n. It can be bad where every
            datum is good: no amortised guide of many data has it small.
        effective_sample_size: of each datum's smoothed weights, (N,): from 1 to S.
        log_evidence: log p(x_n) by the smoothed weights' mean, in nats, (N,); ``stderr`` is its
            standard error.
        num_samples: S.
        per: what a row is: a "datum"; or the "data set", where a latent is global, and N is 1.
        is_up_to_a_constant: whether a prior is improper, so that log p(x) is known but for a
            constant; k-hat does not depend on that.
        level: of which latents the weights are: "joint" of all; "local" of those of each datum;
            "global" of those that all data share, with the local ones integrated out.
        num_globals: how many draws of global latents the numbers are means over, where the weights
            are those of a datum given them; 0 where there are none.
    """

    khat: Tensor
    joint_khat: float
    effective_sample_size: Tensor
    log_evidence: Tensor
    num_samples: int
    per: Per = "datum"
    is_up_to_a_constant: bool = False
    level: Level = "local"
    num_globals: int = 0

    @property
    def notes(self) -> list[str]:
        """What the numbers are worth, in sentences; none where nothing stands out."""
        heavy = self.khat >= GOOD
        notes = improper_note(self.is_up_to_a_constant)
        if heavy.any():
            where = (
                "k-hat is"
                if self.per == "data set"
                else (f"For {share(float(heavy.double().mean()))} of the data k-hat is")
            )
            notes.insert(
                0,
                f"{where} above {GOOD}: the weights have no variance there, so that standard "
                "errors of log p(x) are too small.",
            )
        return notes

    @property
    def stderr(self) -> Tensor:
        """Of log_evidence, by the spread of the smoothed weights, (N,)."""
        return (1 / self.effective_sample_size - 1 / self.num_samples).clamp(min=0).sqrt()

    @property
    def is_usable(self) -> Tensor:
        """Whether the weights can be used, (N,).

        Their k-hat is below the threshold, or they hardly differ: where the effective sample size
        is above 80% of S, the tail of what they differ by, however heavy, is of no weight.
        """
        return usable(self.khat, self.effective_sample_size, self.num_samples)

    @property
    def threshold(self) -> float:
        """Above it, S draws are too few: min(1 - 1 / log10 S, 0.7) (Vehtari et al. 2024)."""
        return self.threshold_of(self.num_samples)

    @staticmethod
    def threshold_of(num_samples: int) -> float:
        """That of so many draws."""
        return min(1 - 1 / math.log10(num_samples), USABLE)

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
                row("Pareto k-hat", k[0], None, f"({_level(float(k[0]))})", decimals=2),
                row("effective sample size", ess[0], decimals=1),
                row("log p(x), nats", self.log_evidence[0], float(self.stderr[0])),
            ]
            title = "Importance weights of all data together"
            if self.level == "global":
                title = "Importance weights of the global latents"
            return Table(f"{title}, draws: {self.num_samples:,}", rows)
        masks = {
            "good, below 0.5": k < GOOD,
            "usable, below 0.7": (k >= GOOD) & (k < USABLE),
            "bad": ~(k < USABLE),
        }
        rows = [
            row(label, int(mask.sum()), None, f"({share(float(mask.double().mean()))} of the data)")
            for label, mask in masks.items()
        ]
        if (alike := ~(k < USABLE) & self.is_usable).any():
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


def _of_parts(parts: list["_Part"], per: Per, level: Level, is_improper: bool) -> Psis:
    joints, *columns = zip(*parts, strict=True)
    k, ess, log_p = (torch.as_tensor(np.concatenate(column)) for column in columns)
    joint = np.sum(joints, 0)
    joint_khat = float(pareto_smooth(joint)[1])
    return Psis(k, joint_khat, ess, log_p, len(joint), per, is_improper, level)


def _local(parts: list["_Part"], num_samples: int) -> Psis:
    """The means over draws of the global latents."""
    k = mean_over([part.khat for part in parts])
    ess = mean_over([part.effective_sample_size for part in parts])
    log_p = mean_over([part.log_evidence for part in parts])
    return Psis(k, math.nan, ess, log_p, num_samples, num_globals=len(parts))


def usable(khat: Tensor, effective_sample_size: Tensor, num_samples: int) -> Tensor:
    """Whether weights can be used, by :attr:`Psis.is_usable`."""
    alike = effective_sample_size > ALIKE * num_samples
    return (khat < Psis.threshold_of(num_samples)) | alike


def _level(khat: float) -> str:
    """What a k-hat says of the weights."""
    return "good, below 0.5" if khat < GOOD else "usable, below 0.7" if khat < USABLE else "bad"


def psis(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    num_samples: int = 1000,
    level: Level | None = None,
    num_nested: int = 20,
    plate: str | None = None,
    batch_size: int = 256,
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Psis:
    """Pareto k-hat of the importance weights of each datum, or of the data set (see :class:`Psis`).

    Args:
        model, guide, data, arguments, plate, batch_size, chunk, seed, progress: as
            :func:`evidence`.
        num_samples: S, draws of the guide for each row. The weights of a batch are held at
            once, and the product of those of all data.
        level, num_nested: as :func:`evidence`. By level "local" k-hat and the effective sample size
            are means over the draws of w, and the joint k-hat is not known.

    Raises:
        ValueError: as :func:`evidence`, and for fewer than 25 samples.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> ppca = PPCA.optimum(torch.randn(50, 5), num_latents=2)
    >>> result = psis(ppca, Exact(ppca), torch.randn(50, 5), num_samples=100)
    >>> result.khat.max(), result.joint_khat
    (tensor(0., dtype=torch.float64), 0.0)
    """
    check_counts(25, num_samples=num_samples)
    check_shared(plate, seed, arguments, chunk)
    check_level(level, num_nested)
    is_joint = level is not None
    unit, batches = rows_of(model, guide, data, batch_size, arguments, plate, is_joint)
    if level in ("global", "local"):
        (whole,) = batches
        with evaluating(model, guide, seed=seed):
            draws = LevelDraws(model, guide, whole, plate, seed)
            if level == "global":
                w = global_weights(draws, num_samples, num_nested, chunk, progress)
                return _of_parts([_Part.of(w.numpy())], "data set", "global", draws.is_improper)
            parts = local_weights(draws, num_samples, num_nested, progress)
            return _local([_Part.of(w.numpy()) for w in parts], num_samples)
    improper = False

    def of(batch: Batch) -> _Part:
        nonlocal improper
        draws = RowDraws(model, guide, batch, unit, seed)
        improper = draws.is_improper
        weights = (part.log_weight for part in draws.chunks(num_samples, chunk, Use.WEIGHTS))
        return _Part.of(torch.cat(list(weights)).double().cpu().numpy())

    def joined(parts: list[_Part], _: bool) -> Psis:
        return _of_parts(parts, unit.per, "joint" if unit.per == "data set" else "local", improper)

    with evaluating(model, guide, seed=seed):
        return by_batch(batches, of, joined, "psis", progress)


class _Part(NamedTuple):
    """What is kept of the log-weights of S draws for each of B data."""

    joint: np.ndarray  # (S,), their sums over the data
    khat: np.ndarray  # (B,)
    effective_sample_size: np.ndarray  # (B,)
    log_evidence: np.ndarray  # (B,)

    @classmethod
    def of(cls, w: np.ndarray) -> "_Part":
        """That of log-weights (S, B)."""
        smoothed, k = pareto_smooth(w)
        # only the tail is smoothed, at most a fifth: the difference at another weight is the
        # logarithm of what the smoothed weights have been divided by
        at = w.argsort(0)[None, 3 * len(w) // 4]
        before, after = (np.take_along_axis(x, at, 0)[0] for x in (w, smoothed))
        with np.errstate(invalid="ignore"):
            sums = np.where(np.isfinite(before), before - after, np.logaddexp.reduce(w, 0))
        return cls(w.sum(1), k, 1 / np.exp(2 * smoothed).sum(0), sums - math.log(len(w)))
