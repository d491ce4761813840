"""One bound in every form: its parts, and its distance from log p(x)."""

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, NamedTuple, Self

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyproelbo._distributions.sobol import Kind, Points, enough, points_of
from pyproelbo._evidence.importance import Evidence, of_weights
from pyproelbo._evidence.psis import Psis
from pyproelbo._evidence.weights import LEAST_ESS, improper_note
from pyproelbo._messages.arguments import check_counts, check_executor, check_shared
from pyproelbo._results.numbers import share, with_error
from pyproelbo._results.per import Per, nats, num_rows
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Number, Row, Table
from pyproelbo._rows.batches import Arguments, Batch, ReportData, parted
from pyproelbo._rows.draws import RowDraws, RowTerms
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.passes import Pass, by_batch
from pyproelbo._rows.report_data import check_in_order, rows_of
from pyproelbo._rows.runs import Use
from pyproelbo._terms.log_weights import log_mean_exp
from pyproelbo._terms.traces import Program


class Estimate(NamedTuple):
    """A mean over the rows, and its Monte Carlo standard error, in nats."""

    value: float
    stderr: float

    def __str__(self) -> str:
        return with_error(self.value, self.stderr)


@dataclass(frozen=True, eq=False, repr=False)
class Decompositions(Result):
    r"""The ELBO of a data set in every form in which it is derived, in nats.

    Per datum, as means over N; where a latent is global, for all data together.

    With draws z from q(z | x), their weights w = p(x, z) / q(z | x), with E_q[w] = p(x), and the
    ratio r = p(z | x) / q(z | x) = w / p(x):

    - ``importance_bound - jensen_gap``: Jensen's inequality, log E_q[w] >= E_q[log w];
    - ``energy + entropy``: E_q[log p(x, z)] + H[q];
    - ``reconstruction + factor - kl``: E_q[log p(x | z)] - KL(q(z | x) || p(z)), and the
      log-factors of the model, if any;
    - ``log_evidence - posterior_kl``: log p(x) - KL(q(z | x) || p(z | x));
    - ``log_evidence - slack``: Bayes' rule with ln r <= r - 1, whose slack is E_q[r - 1 - ln r]. As
      r - 1 - ln r is never negative, this form is a bound for any draws.

    The first, the second and the fourth equal ``elbo`` up to rounding. The third does so in
    expectation, and exactly where no KL has a closed form. The fifth does so in expectation where q
    covers the whole posterior, E_q[r] = 1: its excess over the ELBO is what the draws miss of that.

    Attributes:
        elbo: E_q[log w].
        log_evidence: log p(x).
        importance_bound: the log of the mean weight of S draws, at most log p(x) in expectation
            (Burda, Grosse & Salakhutdinov 2016).
        jensen_gap: ``importance_bound - elbo``, never negative.
        half_variance: Var_q[log w] / 2: the whole gap log p(x) - ELBO where log w is normal,
            and to second order where it is small.
        energy: E_q[log p(x, z)], with the model's log-factors: *minus* the mean energy in the sign
            convention of physics.
        entropy: H[q] = -E_q[log q(z | x)].
        reconstruction: E_q[log p(x | z)].
        factor: the mean of the model's log-factors, 0 if it has none.
        kl: KL(q(z | x) || p(z)), in closed form where there is one.
        posterior_kl: KL(q(z | x) || p(z | x)) = E_q[-ln r].
        slack: E_q[r - 1 - ln r], never negative.
        num_data: N.
        num_samples: S, the number of draws for each datum.
        per: the unit that the numbers refer to: "datum"; or "data set", where a latent is global:
            they are then for all data together, and N is 1.
        uncertain: the share of the rows for which a few draws have most of the weight: log p(x) is
            then probably larger; 0 where it was given exactly.
        is_up_to_a_constant: whether a prior is improper: all but the gaps is then known up to a
            constant only.
    """

    _options = ("num_samples", "per", "is_up_to_a_constant")

    elbo: Estimate
    log_evidence: Estimate
    importance_bound: Estimate
    jensen_gap: Estimate
    half_variance: Estimate
    energy: Estimate
    entropy: Estimate
    reconstruction: Estimate
    factor: Estimate
    kl: Estimate
    posterior_kl: Estimate
    slack: Estimate
    num_data: int
    num_samples: int
    per: Per = "datum"
    uncertain: float = 0.0
    is_up_to_a_constant: bool = False

    @classmethod
    def _merged(cls, parts: Sequence[Any]) -> Self:
        shares = [part.num_data / sum(each.num_data for each in parts) for part in parts]

        def mean(name: str) -> Estimate:
            of = [(share, getattr(part, name)) for share, part in zip(shares, parts, strict=True)]
            value = sum(share * each.value for share, each in of)
            return Estimate(value, math.hypot(*(share * each.stderr for share, each in of)))

        return replace(
            parts[0],
            **{name: mean(name) for name in _NAMES},
            num_data=sum(part.num_data for part in parts),
            uncertain=sum(
                share * part.uncertain for share, part in zip(shares, parts, strict=True)
            ),
        )

    @property
    def notes(self) -> list[str]:
        """Remarks on how reliable the numbers are, in sentences; empty where nothing stands out."""
        notes = improper_note(self.is_up_to_a_constant)
        if self.uncertain > 0:
            of = "" if self.per == "data set" else f" for {share(self.uncertain)} of the data"
            notes.insert(
                0,
                f"log p(x) is uncertain{of}: a few draws have most of the weight, so that it and "
                "the KL to the posterior are probably larger.",
            )
        return notes

    @property
    def forms(self) -> dict[str, float]:
        """The ELBO in each form."""
        return {
            label: sum(sign * getattr(self, name).value for sign, name in form)
            for label, form in _forms(self).items()
        }

    def to_xarray(self) -> Any:
        """An ``xarray.Dataset``: each estimate by its name, its error as ``<name>_stderr``."""
        import xarray

        values: dict[str, Any] = {}
        for name in _NAMES:
            value, error = getattr(self, name)
            values[name] = ((), value, {"units": nats(self.per)})
            values[f"{name}_stderr"] = ((), error, {"units": nats(self.per)})
        attributes: dict[str, Any] = {"num_data": self.num_data, "num_samples": self.num_samples}
        attributes |= {"per": self.per, "uncertain": self.uncertain}
        attributes["is_up_to_a_constant"] = int(self.is_up_to_a_constant)
        return xarray.Dataset(values, attrs=attributes)

    def _table(self) -> Table:
        num, draws = num_rows(self.per, self.num_data), f"{self.num_samples:,}"
        rows = []
        width = max(len(form) for form in _forms(self).values())
        for (label, elbo), form in zip(self.forms.items(), _forms(self).values(), strict=True):
            parts = [Number(*getattr(self, name)) for _, name in form]
            parts += [None] * (width - len(parts))
            rows.append(Row(label, (*parts, Number(elbo))))
        rows += [
            Row("E[log w]", (*[None] * width, Number(*self.elbo))),
            Row("half the variance of log w", (Number(*self.half_variance), *[None] * width)),
        ]
        return Table(f"The ELBO in every form, {nats(self.per)} ({num}, draws: {draws})", rows)


_FORMS = {
    "log mean w - Jensen gap": ((1, "importance_bound"), (-1, "jensen_gap")),
    "energy + entropy": ((1, "energy"), (1, "entropy")),
    "reconstruction - KL to the prior": ((1, "reconstruction"), (-1, "kl")),
    "log p(x) - KL to the posterior": ((1, "log_evidence"), (-1, "posterior_kl")),
    "log p(x) - slack of ln r <= r - 1": ((1, "log_evidence"), (-1, "slack")),
}
_OF_FACTORS = "reconstruction + factor - KL to the prior"


def _forms(result: Decompositions) -> dict[str, tuple[tuple[int, str], ...]]:
    """The signs and the names of the parts of each form, by its label."""
    if result.factor.value == 0 == result.factor.stderr:
        return _FORMS
    forms = {}
    for label, form in _FORMS.items():
        if form == _FORMS["reconstruction - KL to the prior"]:
            label, form = _OF_FACTORS, ((1, "reconstruction"), (1, "factor"), (-1, "kl"))
        forms[label] = form
    return forms


_NAMES = [field.name for field in fields(Decompositions) if field.type is Estimate]


def decompositions(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    num_samples: int | None = None,
    draws: Kind = "independent",
    evidence: Evidence | Psis | Tensor | None = None,
    plate: str | None = None,
    batch_size: int = 256,
    chunk: int | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool = True,
) -> Decompositions:
    """The ELBO of a data set in every form, side by side (see :class:`Decompositions`).

    Args:
        model, guide, data, arguments, plate, batch_size, chunk, seed, executor, progress:
            as in :func:`evidence`.
        num_samples: S, the number of draws of the guide for each datum; by default 100, or 128
            Sobol draws.
        draws: "independent", or "sobol" for scrambled Sobol points, whose S is 8 times a power of
            two (see :class:`~pyproelbo.Sobol`).
        evidence: log p(x) of the data in this order, as returned by :func:`evidence` or
            :func:`psis` from draws of another seed, or where it is known exactly (N,). By default
            it is estimated from 1,000 other draws for each datum, or from S if more: a lower bound,
            which makes ``posterior_kl`` one too.

    Raises:
        ValueError: as for :func:`evidence`, for fewer than two samples, and for an evidence of
            other data.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Diagonal
    >>> x = torch.randn(200, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> result = decompositions(ppca, Diagonal.optimum(ppca), x, evidence=ppca.log_evidence(x))
    >>> 0 <= result.slack.value and 0 <= result.jensen_gap.value
    True
    """
    num = enough(draws, 100) if num_samples is None else num_samples
    check_counts(2, num_samples=num)
    check_shared(plate, seed, arguments, chunk)
    check_executor(executor)
    points = points_of(draws, num)
    given = None if evidence is None else KnownEvidence.of(evidence)
    if given is not None:
        check_in_order(data)
        given = given._replace(start=parted(data)[1])
    unit, batches = rows_of(model, guide, data, batch_size, arguments, plate)
    of, forms = decompositions_pass(num, chunk, given)

    def of_batch(batch: Batch) -> _Part:
        return of(RowDraws(model, guide, batch, unit, seed, points))

    with evaluating(model, guide, seed=seed):
        return by_batch(batches, of_batch, forms, "decompositions", progress, executor, _with_next)


def _with_next(parts: "list[_Part]", part: "_Part") -> "list[_Part]":
    return [parts[0] + part] if parts else [part]


def decompositions_pass(
    num_samples: int, chunk: int | None, given: "KnownEvidence | None" = None
) -> Pass[RowDraws, "_Part", Decompositions]:
    """The report, as a pass.

    Args:
        given: log p(x) of all data; None to estimate it.
    """

    def of(draws: RowDraws) -> _Part:
        if given is None:
            least = 1000 if draws.points is None else 1024
            known = KnownEvidence.of(of_weights(draws, max(least, num_samples), chunk))
        else:
            known = given.of_rows(draws.rows)
        drawn = draws.chunks(num_samples, chunk, Use.FORMS, "auto")
        terms = RowTerms(*(torch.cat(part).double() for part in zip(*drawn, strict=True)))
        series = _series(terms, known.log_evidence.to(terms.log_q), draws.points)
        found = {name: (value, _variance(x, draws.points)) for name, (value, x) in series.items()}
        return _Part.of(known, found, draws)

    def forms(parts: list[_Part], is_whole: bool) -> Decompositions:
        part = reduce(_Part.__add__, parts)
        if given is not None:
            given.first(part.num, is_whole)
        return Decompositions(
            **part.estimates,
            num_data=part.num,
            num_samples=num_samples,
            per=part.per,
            uncertain=part.num_uncertain / part.num,
            is_up_to_a_constant=part.is_improper,
        )

    return Pass(of, forms)


class KnownEvidence(NamedTuple):
    """log p(x) of some data, found before, on the CPU.

    Attributes:
        log_evidence: (N,), float64.
        stderr: its standard error, (N,); 0 where it is exact.
        effective_sample_size: of the weights behind it, (N,); None where nothing is known about
            them.
        is_uncertain: whether a few draws have most of the weight, (N,).
        start: the index of the first of them in the whole data.
    """

    log_evidence: Tensor
    stderr: Tensor
    effective_sample_size: Tensor | None
    is_uncertain: Tensor
    start: int = 0

    @classmethod
    def of(cls, evidence: Evidence | Psis | Tensor) -> "KnownEvidence":
        """The evidence in a result, or in a tensor of exact values.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(evidence, Tensor):
            value = evidence.detach().cpu().double()
            value = value.reshape(1) if value.dim() == 0 else value
            exact = torch.zeros_like(value, dtype=torch.bool)
            return cls(value, torch.zeros_like(value), None, exact)
        if not isinstance(evidence, Evidence | Psis):
            raise ValueError(
                "evidence should be a result of pe.evidence or pe.psis, or a tensor of log p(x), "
                f"(N,), got {evidence!r}"
            )
        ess = evidence.effective_sample_size
        uncertain = evidence.is_uncertain if isinstance(evidence, Evidence) else ess < LEAST_ESS
        ess = ess if isinstance(evidence, Evidence) else None  # of smoothed weights
        return cls(evidence.log_evidence.double(), evidence.stderr.double(), ess, uncertain)

    def of_rows(self, rows: slice) -> "KnownEvidence":
        """The evidence of some rows.

        Raises:
            ValueError: where there are fewer.
        """
        own = slice(rows.start - self.start, rows.stop - self.start)
        return self.first(own.stop, is_whole=False)._rows(own)

    def first(self, num: int, is_whole: bool) -> "KnownEvidence":
        """The evidence of the first data.

        Raises:
            ValueError: where there are fewer, and, if these are all, where there are more.
        """
        size = len(self.log_evidence) if self.log_evidence.dim() == 1 else None
        if size is None or size < num or (is_whole and size > num):
            raise ValueError(
                f"evidence should be of the same data, (N,), got shape "
                f"{tuple(self.log_evidence.shape)} for {'' if is_whole else 'at least '}{num} data"
            )
        return self._rows(slice(num))

    def _rows(self, rows: slice) -> "KnownEvidence":
        log_evidence, stderr, ess, uncertain, _ = self
        ess = None if ess is None else ess[rows]
        return KnownEvidence(log_evidence[rows], stderr[rows], ess, uncertain[rows])


class _Part(NamedTuple):
    """What is kept from some data: no more from many than from few.

    Attributes:
        num, num_uncertain: the number of data, and of those whose log p(x) is uncertain.
        sums: over these of each estimate, of its variance, and of where it is not finite: (3, E),
            on the CPU.
    """

    num: int
    num_uncertain: int
    sums: Tensor
    per: Per
    is_improper: bool

    @classmethod
    def of(
        cls, known: KnownEvidence, found: dict[str, tuple[Tensor, Tensor]], draws: RowDraws
    ) -> "_Part":
        """That of a batch, from its log p(x), and each estimate with its variance, (B,) both."""
        errors = known.stderr.square().sum()
        sums = []
        for name in _NAMES:
            value, variance = (x.sum().cpu() for x in found[name])
            if name in ("log_evidence", "posterior_kl"):
                variance = variance + errors
            sums.append(
                torch.stack([value, variance, (~found[name][0].isfinite()).sum().to(value)])
            )
        uncertain = int(known.is_uncertain.sum())
        of = draws.unit.per, draws.is_improper
        return cls(len(known.log_evidence), uncertain, torch.stack(sums, 1), *of)

    def __add__(self, other: "_Part") -> "_Part":  # type: ignore[override]
        """What is kept from the data of both."""
        nums = self.num + other.num, self.num_uncertain + other.num_uncertain
        return _Part(*nums, self.sums + other.sums, self.per, self.is_improper)

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Means over the data."""
        value, variance, unknown = self.sums
        if is_validation_enabled() and unknown.any():
            first = int(unknown.nonzero()[0, 0])
            raise ValueError(
                f"{_NAMES[first]} is NaN or infinite for {int(unknown[first])} data: look for NaN "
                "in the data, model or guide"
            )
        values, errors = (value / self.num).tolist(), (variance.sqrt() / self.num).tolist()
        return dict(zip(_NAMES, map(Estimate, values, errors), strict=True))


def _series(
    terms: RowTerms, log_evidence: Tensor, points: Points | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The value (B,) of each estimate, and each draw's part in it (S, B), up to a constant."""
    w = terms.log_weight
    bound = log_mean_exp(w)
    share = (w - bound).exp()
    log_r = w - log_evidence
    square = (w - w.mean(0)).square()
    linear = {
        "elbo": w,
        "log_evidence": log_evidence.expand_as(w),
        "energy": terms.log_joint,
        "entropy": -terms.log_q,
        "reconstruction": terms.log_likelihood,
        "factor": terms.log_factor,
        "kl": terms.kl.expand_as(w),
        "posterior_kl": -log_r,
        "slack": log_r.exp() - 1 - log_r,
    }
    return {name: (value.mean(0), value) for name, value in linear.items()} | {
        "importance_bound": (bound, share),
        "jensen_gap": (bound - w.mean(0), share - w),
        "half_variance": ((square.mean(0) + _variance(w, points)) / 2, square / 2),
    }


def _variance(series: Tensor, points: Points | None) -> Tensor:
    """The variance of a mean over draws, (B,): independent ones, or by Sobol replicates."""
    if points is not None:
        series = series.unflatten(0, (-1, points.num)).mean(1)
    return (series - series[:1]).var(0) / len(series)  # 0, and no rounding, where all are equal
