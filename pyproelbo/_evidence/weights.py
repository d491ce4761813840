"""From log-weights to log p(x), and how well it is known."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyproelbo._results.result import Result
from pyproelbo._results.tables import Table, row

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, eq=False, repr=False)
class Evidence(Result):
    r"""log p(x_n) of each datum, estimated by log (1/S) sum_s w_ns.

    By importance weighting, w_ns = p(x_n, z_s) / q(z_s | x_n); by annealing, as
    :class:`~pyproelbo.Annealed` says. Without the logarithm the estimate has no bias; with it, it
    lies below log p(x_n) on average, and the more samples, the nearer (Burda, Grosse &
    Salakhutdinov 2016).

    Attributes:
        log_evidence: in nats, (N,).
        elbo: the mean of log p(x_n, z) - log q(z | x_n) over the draws z of q, in nats, (N,);
            where the draws start from the prior, that is q.
        stderr: of log_evidence, by the spread of the weights, (N,); it misses what no sample
            has found, so that it means little where the effective sample size is small. NaN of a
            single sample.
        elbo_stderr: of elbo, (N,); NaN of a single sample.
        effective_sample_size: (sum of the weights)^2 / sum of their squares, (N,): from 1 to S.
        num_samples: S.
        upper_bound: of simulated data, what lies above log p(x_n) on average, in nats, (N,); None
            where the latents behind the data are not known.
        upper_stderr: of upper_bound, (N,), by the spread of the S chains. They have a start in
            common, so that of a mean over data the spread from datum to datum says more.
        acceptance: the mean probability with which a move was accepted, (N,); None where there
            are no moves.
    """

    log_evidence: Tensor
    elbo: Tensor
    stderr: Tensor
    elbo_stderr: Tensor
    effective_sample_size: Tensor
    num_samples: int
    upper_bound: Tensor | None = None
    upper_stderr: Tensor | None = None
    acceptance: Tensor | None = None

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dim "datum"; what is None is left out."""
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
        }
        values = {
            name: ("datum", value.numpy(), {"units": unit})
            for name, (value, unit) in columns.items()
            if value is not None
        }
        return xarray.Dataset(values, attrs={"num_samples": self.num_samples})

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
        if self.upper_bound is not None:
            apart = (self.upper_bound - self.log_evidence).mean()
            rows.insert(
                1, row("upper bound", self.upper_bound.mean(), None, f"({apart:.4f} above)")
            )
        if self.acceptance is not None:
            least = _least(self.acceptance, 2)
            rows.append(row("accepted moves", self.acceptance.median(), None, least, decimals=2))
        samples = f"samples: {self.num_samples:,}"
        return Table(f"Evidence, nats per datum ({num:,} data, {samples})", rows)


def _least(values: Tensor, decimals: int) -> str:
    return f"(median; least {values.min():.{decimals}f})"


class Weights(NamedTuple):
    """The weights of S samples for each of B data, (S, B) each.

    Attributes:
        log_weight: log w, of which exp has p(x) as its mean.
        log_ratio: log p(x, z) - log q(z | x) at the draw that the sample started from.
        acceptance: with which probability its moves were accepted; None where there are none.
    """

    log_weight: Tensor
    log_ratio: Tensor
    acceptance: Tensor | None = None


def summary(chunks: Iterable[Weights]) -> Evidence:
    """That of a batch, from its samples in parts."""
    parts, accepted, S = [], [], 0
    shift: Tensor | None = None
    for log_weight, log_ratio, acceptance in chunks:
        w, r = log_weight.double(), log_ratio.double()
        if is_validation_enabled() and w.isnan().any():
            raise ValueError("a weight is NaN: look for NaN in the data, model or guide")
        shift = r.mean(0) if shift is None else shift
        r, S = r - shift, S + len(r)
        parts.append((w.logsumexp(0), (2 * w).logsumexp(0), r.sum(0), r.square().sum(0)))
        accepted += [] if acceptance is None else [acceptance]
    assert shift is not None
    sums, squares, totals, spreads = (torch.stack(column) for column in zip(*parts, strict=True))
    log_sum, mean = sums.logsumexp(0), totals.sum(0) / S
    ess = (2 * log_sum - squares.logsumexp(0)).exp()
    variance = (spreads.sum(0) / S - mean.square()).clamp(min=0)
    return Evidence(
        log_sum - math.log(S),
        shift + mean,
        (1 / ess - 1 / S).clamp(min=0).sqrt() if S > 1 else torch.full_like(mean, math.nan),
        (variance / (S - 1)).sqrt() if S > 1 else torch.full_like(mean, math.nan),
        ess,
        S,
        acceptance=torch.cat(accepted).mean(0) if accepted else None,
    )


def joined(parts: Sequence[Evidence]) -> Evidence:
    """That of all data, on the CPU, from those of their batches."""

    def column(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values).cpu()

    names = [field.name for field in fields(Evidence) if field.name != "num_samples"]
    return replace(parts[0], **{name: column(name) for name in names})
