"""From log-weights to log p(x), and its accuracy."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyproelbo._evidence.pareto import GOOD, LEAST, bands, tail_khat, tail_size, threshold_of
from pyproelbo._results.merging import rows_merged
from pyproelbo._results.numbers import share
from pyproelbo._results.per import Per, dim, nats, num_rows
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Row, Table, row
from pyproelbo._rows.shelf import columns_joined

if TYPE_CHECKING:
    import xarray

LEAST_ESS = 50.0  # below, log p(x) is uncertain
_KEPT = 4  # tails, whose largest weights are sought


@dataclass(frozen=True, eq=False, repr=False)
class Evidence(Result):
    r"""log p(x_n) of each datum, estimated by log (1/S) sum_s w_ns.

    By importance weighting, w_ns = p(x_n, z_s) / q(z_s | x_n); by annealing, as in
    :class:`~pyproelbo.Annealed`. Without the logarithm the estimate is unbiased; with it, it lies
    below log p(x_n) on average, and closer with more samples (Burda, Grosse & Salakhutdinov 2016).

    Attributes:
        log_evidence: in nats, (N,).
        elbo: the mean of log p(x_n, z) - log q(z | x_n) over the draws z of q, in nats, (N,);
            where the draws start from the prior, the prior is q.
        stderr: the standard error of log_evidence, by the spread of the weights, (N,); it misses
            what no sample has found, and means little where the effective sample size is small. NaN
            for a single sample.
        elbo_stderr: of elbo, (N,); NaN for a single sample.
        effective_sample_size: (sum of the weights)^2 / sum of their squares, (N,): from 1 to S.
        num_samples: S.
        upper_bound: for simulated data, an estimate that lies above log p(x_n) on average, in nats,
            (N,); None where the latents behind the data are not known.
        upper_stderr: of upper_bound, (N,), by the spread of the S chains. As these share a start,
            the spread from datum to datum is a better guide to the error of a mean over data.
        acceptance: the mean probability with which a move was accepted, (N,); None where there
            are no moves.
        largest_weight: the share of the largest weight in their sum, (N,).
        khat: Pareto k-hat of the weights, (N,): above 0.5 they have no variance, and ``stderr`` is
            too small (see :class:`~pyproelbo.Psis`). None for fewer than 25 samples.
        per: the meaning of a row: a "datum"; or the "data set", where a latent is global, and N is
            1.
        is_up_to_a_constant: whether a prior is improper: log p(x) and the ELBO are then known up to
            a constant only.
        replicates: R, of Sobol points (see :class:`~pyproelbo.Sobol`), whose means' spread gives
            ``stderr`` and ``elbo_stderr``; None where draws are independent. The bias of
            log_evidence, about -``stderr``^2 / 2, falls with the error. Each draw is still one from
            q: ``effective_sample_size``, ``largest_weight`` and ``khat`` show how well q covers p(z
            | x), not how accurately log p(x) is known.
    """

    _options = ("num_samples", "per", "is_up_to_a_constant", "replicates")

    log_evidence: Tensor
    elbo: Tensor
    stderr: Tensor
    elbo_stderr: Tensor
    effective_sample_size: Tensor
    num_samples: int
    upper_bound: Tensor | None = None
    upper_stderr: Tensor | None = None
    acceptance: Tensor | None = None
    largest_weight: Tensor | None = None
    khat: Tensor | None = None
    per: Per = "datum"
    is_up_to_a_constant: bool = False
    replicates: int | None = None

    @classmethod
    def _merged(cls, parts: Sequence[Any]) -> Self:
        return rows_merged(parts)

    @property
    def is_uncertain(self) -> Tensor:
        """Where a few draws have most of the weight, (N,).

        The effective sample size is below 50 there (or half of the samples, where these are fewer
        than 100), or one of them has more than half of the weight: log p(x) is probably larger, and
        its error means little.
        """
        few = self.effective_sample_size < min(LEAST_ESS, self.num_samples / 2)
        if self.largest_weight is not None and self.num_samples > 2:
            few = few | (self.largest_weight > 0.5)
        return few

    @property
    def notes(self) -> list[str]:
        """Remarks on how reliable the numbers are, in sentences; empty where nothing stands out."""
        return [
            *uncertain_note(self.per, self.is_uncertain, self.effective_sample_size),
            *([] if self.khat is None else heavy_note(self.per, self.khat)),
            *improper_note(self.is_up_to_a_constant),
        ]

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dim "datum" or "data_set", without empty fields."""
        import xarray

        columns = {
            "log_evidence": (self.log_evidence, "nats"),
            "log_evidence_stderr": (self.stderr, "nats"),
            "elbo": (self.elbo, "nats"),
            "elbo_stderr": (self.elbo_stderr, "nats"),
            "effective_sample_size": (self.effective_sample_size, "draws"),
            "upper_bound": (self.upper_bound, "nats"),
            "upper_bound_stderr": (self.upper_stderr, "nats"),
            "acceptance": (self.acceptance, "1"),
            "largest_weight": (self.largest_weight, "1"),
            "khat": (self.khat, "1"),
        }
        values = {
            name: (dim(self.per), value.numpy(), {"units": unit})
            for name, (value, unit) in columns.items()
            if value is not None
        }
        attributes: dict[str, int | str] = {"num_samples": self.num_samples, "per": self.per}
        if self.replicates is not None:
            attributes["replicates"] = self.replicates
        attributes["is_up_to_a_constant"] = int(self.is_up_to_a_constant)
        return xarray.Dataset(values, attrs=attributes)

    def _table(self) -> Table:
        num, ess = len(self.log_evidence), self.effective_sample_size
        error, elbo_error = (
            float(e.square().sum().sqrt()) / num for e in (self.stderr, self.elbo_stderr)
        )
        rows = [
            row("log p(x)", self.log_evidence.mean(), error),
            row("ELBO", self.elbo.mean(), elbo_error),
            row("gap", (self.log_evidence - self.elbo).mean()),
            row("effective sample size", ess.median(), None, _least(ess, 1), decimals=1),
        ]
        if self.khat is not None:
            rows.append(khat_row(self.khat, self.per, self.num_samples))
        if self.upper_bound is not None:
            apart = (self.upper_bound - self.log_evidence).mean()
            rows.insert(
                1, row("upper bound", self.upper_bound.mean(), None, f"({apart:.4f} above)")
            )
        if self.acceptance is not None:
            least = _least(self.acceptance, 2)
            rows.append(row("accepted moves", self.acceptance.median(), None, least, decimals=2))
        samples = f"samples: {self.num_samples:,}"
        if self.replicates is not None:
            samples += f" in {self.replicates} replicates"
        return Table(f"Evidence, {nats(self.per)} ({num_rows(self.per, num)}, {samples})", rows)


def uncertain_note(per: Per, uncertain: Tensor, ess: Tensor) -> list[str]:
    """The note that log p(x) is uncertain, where it is so for any row."""
    if not uncertain.any():
        return []
    where = "" if per == "data set" else f" for {int(uncertain.sum()):,} of {len(ess):,} data"
    return [
        f"log p(x) is uncertain{where}: a few draws have most of the weight (effective sample "
        f"size: {ess[uncertain].min():.1f} at least). It is probably larger, and its error is too "
        "small. Take proposal='prior' or 'mixture', more samples, or method='annealed'."
    ]


def heavy_note(per: Per, khat: Tensor) -> list[str]:
    """The note that weights have no finite variance, where it is so for any row."""
    heavy = khat >= GOOD
    if not heavy.any():
        return []
    where = f"For {share(float(heavy.double().mean()))} of the data k-hat is"
    return [
        f"{'k-hat is' if per == 'data set' else where} above {GOOD}: the weights have no variance "
        "there, so that standard errors of log p(x) are too small."
    ]


def khat_row(khat: Tensor, per: Per, num_samples: int) -> Row:
    """Pareto k-hat, as a line of a table: the median's, and the largest of several."""
    k = float(khat.median())
    remark = f"(median; largest {khat.max():.2f})"
    if per == "data set":
        end = threshold_of(num_samples)
        (remark,) = (name for name, mask in bands(khat, end).items() if mask.all())
        ends = {"good": min(GOOD, end), "usable": end}
        remark = f"({remark}, below {ends[remark]:.2g})" if remark in ends else f"({remark})"
    return row("Pareto k-hat", k, None, remark, decimals=2)


def improper_note(is_improper: bool) -> list[str]:
    """The note that log p(x) is known only up to a constant, where it is so."""
    if not is_improper:
        return []
    return ["A prior is improper: log p(x) and the ELBO are up to a constant, their gap is not."]


def _least(values: Tensor, decimals: int) -> str:
    return f"(median; least {values.min():.{decimals}f})" if len(values) > 1 else ""


class Weights(NamedTuple):
    """The weights of S samples for each of B data, (S, B) each.

    Attributes:
        log_weight: log w, where w has the mean p(x).
        log_ratio: log p(x, z) - log q(z | x) at the draw that the sample started from.
        acceptance: the probability with which its moves were accepted; None where there are none.
    """

    log_weight: Tensor
    log_ratio: Tensor
    acceptance: Tensor | None = None


def summary(chunks: Iterable[Weights], num_samples: int, replicates: int | None = None) -> Evidence:
    """The evidence of a batch, from its samples in parts.

    Args:
        replicates: the number of replicates of the samples, one after another; None for independent
            samples.
    """
    parts, counts, accepted, tail, S = [], [], [], [], 0
    shift: Tensor | None = None
    if replicates is not None:
        chunks = _within(chunks, num_samples // replicates)
    for log_weight, log_ratio, acceptance in chunks:
        w, r = log_weight.double(), log_ratio.double()
        if is_validation_enabled() and w.isnan().any():
            raise ValueError("a weight is NaN: look for NaN in the data, model or guide")
        shift = r.mean(0) if shift is None else shift
        r, S = r - shift, S + len(r)
        tail.append(w)
        if sum(map(len, tail)) > _KEPT * tail_size(num_samples):
            tail = [_largest(tail, num_samples)]
        parts.append((w.logsumexp(0), (2 * w).logsumexp(0), r.sum(0), r.square().sum(0)))
        counts.append(len(r))
        accepted += [] if acceptance is None else [acceptance]
    assert shift is not None and num_samples == S
    largest = _largest(tail, num_samples)
    sums, squares, totals, spreads = (torch.stack(column) for column in zip(*parts, strict=True))
    log_sum, mean = sums.logsumexp(0), totals.sum(0) / S
    ess = (2 * log_sum - squares.logsumexp(0)).exp()
    if replicates is not None:
        stderr, elbo_stderr = _of_replicates((sums - log_sum).exp(), totals, counts, replicates)
    elif S > 1:
        variance = (spreads.sum(0) / S - mean.square()).clamp(min=0)
        stderr = (1 / ess - 1 / S).clamp(min=0).sqrt()
        elbo_stderr = (variance / (S - 1)).sqrt()
    else:
        stderr = elbo_stderr = torch.full_like(mean, math.nan)
    return Evidence(
        log_sum - math.log(S),
        shift + mean,
        stderr,
        elbo_stderr,
        ess,
        S,
        acceptance=torch.cat(accepted).mean(0) if accepted else None,
        largest_weight=(largest[0] - log_sum).exp(),
        khat=tail_khat(largest).to(mean.device) if S >= LEAST else None,
        replicates=replicates,
    )


def _within(chunks: Iterable[Weights], num: int) -> Iterator[Weights]:
    """The same samples in parts, none with samples of two replicates of ``num``."""
    start = 0
    for log_weight, log_ratio, acceptance in chunks:
        assert acceptance is None
        first = min(num - start % num, len(log_weight))
        sizes = [first, *[num] * ((len(log_weight) - first) // num)]
        sizes += [] if sum(sizes) == len(log_weight) else [len(log_weight) - sum(sizes)]
        start += len(log_weight)
        for w, r in zip(log_weight.split(sizes), log_ratio.split(sizes), strict=True):
            yield Weights(w, r)


def _of_replicates(
    shares: Tensor, totals: Tensor, counts: Sequence[int], replicates: int
) -> tuple[Tensor, Tensor]:
    """The errors of log p(x) and of the ELBO, (B,), by the spread of replicates' means.

    Args:
        shares: the share of each part of the samples in the sum of the weights, (P, B).
        totals: the sums of log-ratios in each part, (P, B).
        counts: the number of samples in each part.
    """
    num = sum(counts) // replicates
    of = (torch.tensor(counts).cumsum(0) - 1) // num
    zero = torch.zeros_like(totals[:replicates])

    def error(parts: Tensor) -> Tensor:
        return zero.index_add(0, of.to(parts.device), parts).std(0) / replicates**0.5

    return error(replicates * shares), error(totals / num)


def _largest(parts: Sequence[Tensor], num_samples: int) -> Tensor:
    """The weights that determine k-hat of all samples, (K, B), the largest first."""
    log_weight = torch.cat([*parts])
    return log_weight.topk(min(tail_size(num_samples) + 1, len(log_weight)), 0).values


def joined(parts: list[Evidence]) -> Evidence:
    """The evidence of all data, on the CPU, from that of their batches; empties ``parts``."""
    first = parts[0]
    names = [f.name for f in fields(Evidence) if isinstance(getattr(first, f.name), Tensor)]
    columns = [[getattr(part, name) for part in parts] for name in names]
    parts.clear()
    whole = (value.cpu() for value in columns_joined(columns))
    return replace(first, **dict(zip(names, whole, strict=True)))
