"""The gap between ELBO and evidence: for want of a better family, or of a better encoder."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from pyproelbo._evidence.best_posterior import fit_posteriors
from pyproelbo._evidence.decompositions import KnownEvidence
from pyproelbo._evidence.importance import Evidence, evidence_of, joined
from pyproelbo._evidence.psis import Psis
from pyproelbo._evidence.trained_guide import parameters_of, trained
from pyproelbo._evidence.weights import improper_note
from pyproelbo._messages.arguments import check_counts, check_executor, check_positive, check_shared
from pyproelbo._results.merging import rows_merged
from pyproelbo._results.numbers import share
from pyproelbo._results.per import Per, dim, nats, num_rows
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Table, row
from pyproelbo._rows.batches import Arguments, Batch, ReportData
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.passes import by_batch
from pyproelbo._rows.report_data import check_in_order, rows_of
from pyproelbo._rows.runs import Use
from pyproelbo._rows.shelf import columns_of
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, eq=False, repr=False)
class InferenceGap(Result):
    r"""log p(x) - ELBO of each datum, in two parts, in nats.

    Cremer, Li & Duvenaud (2018), "Inference suboptimality in variational autoencoders". With q* the
    best member of the guide's family for a single datum,

        log p(x) - L[q] = (log p(x) - L[q*]) + (L[q*] - L[q]):

    the approximation gap, which only a richer family closes, and the amortisation gap, which more
    capacity or training of the encoder closes. Where a latent is global, all data are one row, to
    which the guide itself is fitted: its amortisation gap is 0 by definition, and the second part
    is the optimisation gap, which more training closes.

    Attributes:
        log_evidence: log p(x), (N,).
        best_elbo: L[q*], (N,). As q* is found by gradients, this may be too small.
        elbo: L[q], of the guide itself, (N,).
        stderr: of the three by name, (N,) each: Monte Carlo errors at these q.
        effective_sample_size: of the importance weights behind log p(x), (N,); None where it
            was given.
        per: the meaning of a row: a "datum"; or the "data set", where a latent is global, and N is
            1.
        is_uncertain: where a few draws have most of the weight behind log p(x), which is then
            probably larger, (N,); None where it was given exactly.
        is_up_to_a_constant: whether a prior is improper: all but the gaps is then known up to a
            constant only.
    """

    _options = ("per", "is_up_to_a_constant")

    log_evidence: Tensor
    best_elbo: Tensor
    elbo: Tensor
    stderr: dict[str, Tensor]
    effective_sample_size: Tensor | None = None
    per: Per = "datum"
    is_uncertain: Tensor | None = None
    is_up_to_a_constant: bool = False

    @classmethod
    def _merged(cls, parts: Sequence[Any]) -> Self:
        return rows_merged(parts)

    @property
    def notes(self) -> list[str]:
        """Remarks on how reliable the numbers are, in sentences; empty where nothing stands out."""
        notes = improper_note(self.is_up_to_a_constant)
        if self.is_uncertain is not None and self.is_uncertain.any():
            share_of = share(float(self.is_uncertain.double().mean()))
            of = "" if self.per == "data set" else f" for {share_of} of the data"
            notes.insert(
                0,
                f"log p(x) is uncertain{of}: a few draws have most of the weight, so that it and "
                "the approximation gap are probably larger.",
            )
        return notes

    @property
    def total(self) -> Tensor:
        """log p(x) - L[q], KL(q(z | x) || p(z | x)): (N,)."""
        return self.log_evidence - self.elbo

    @property
    def approximation(self) -> Tensor:
        """log p(x) - L[q*]: (N,)."""
        return self.log_evidence - self.best_elbo

    @property
    def amortisation(self) -> Tensor:
        """L[q*] - L[q] for a datum; 0 for a guide that was fitted to the one data set: (N,)."""
        gap = self.best_elbo - self.elbo
        return gap if self.per == "datum" else torch.zeros_like(gap)

    @property
    def optimisation(self) -> Tensor:
        """L[q*] - L[q] for a guide that was fitted to the one data set; 0 for a datum: (N,)."""
        return self.best_elbo - self.elbo - self.amortisation

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dim "datum" or "data_set"."""
        import xarray

        names = ("log_evidence", "best_elbo", "elbo", *_GAPS)
        units, rows = {"units": "nats"}, dim(self.per)
        values = {name: (rows, getattr(self, name).numpy(), units) for name in names}
        errors = {f"{n}_stderr": (rows, e.numpy(), units) for n, e in self.stderr.items()}
        if self.effective_sample_size is not None:
            ess = self.effective_sample_size.numpy()
            values["effective_sample_size"] = (rows, ess, {"units": "draws"})
        attributes = {"per": self.per, "is_up_to_a_constant": int(self.is_up_to_a_constant)}
        return xarray.Dataset(values | errors, attrs=attributes)

    def error(self, name: str) -> float:
        """The Monte Carlo standard error of the mean over the data of one of the above."""
        squares = [self.stderr[n].square().sum() for n in _ERRORS.get(name, (name,))]
        return float(torch.stack(squares).sum().sqrt()) / len(self.elbo)

    def _table(self) -> Table:
        second, remark = "amortisation", ""
        if self.per == "data set":
            second = "optimisation"
            remark = "(amortisation gap: 0 by definition, for the guide is fitted to these data)"
        lines = (
            ("log p(x)", "log_evidence", ""),
            ("  approximation gap", "approximation", ""),
            ("ELBO of the best q", "best_elbo", ""),
            (f"  {second} gap", second, remark),
            ("ELBO", "elbo", ""),
        )
        rows = [
            row(label, getattr(self, n).mean(), self.error(n), said) for label, n, said in lines
        ]
        of = num_rows(self.per, len(self.elbo))
        return Table(f"Inference gap, {nats(self.per)} ({of})", rows)


_GAPS = ("total", "approximation", "amortisation", "optimisation")
_ERRORS = {
    "total": ("log_evidence", "elbo"),
    "approximation": ("log_evidence", "best_elbo"),
    "amortisation": ("best_elbo", "elbo"),
    "optimisation": ("best_elbo", "elbo"),
}


def inference_gap(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    evidence: Evidence | Psis | Tensor | None = None,
    steps: int = 500,
    lr: float | None = None,
    num_particles: int = 10,
    num_samples: int = 1000,
    plate: str | None = None,
    batch_size: int = 256,
    chunk: int | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool = True,
) -> InferenceGap:
    """The gap between ELBO and evidence, and its two parts (see :class:`InferenceGap`).

    For every datum the parameters of q are fitted separately, starting from the guide's; the model
    is unchanged. Where all data are one row, the guide's own parameters are fitted, then restored.
    The ELBO of both is estimated from the same number of draws, and log p(x), unless given, by
    importance weighting with the fitted q.

    Args:
        model, guide, data, arguments, plate, batch_size, chunk, seed, executor, progress:
            as in :func:`evidence`. Draws of the guide must be reparameterised; where a row is a
            datum, its latents must be independent given the data.
        evidence: log p(x), as returned by :func:`evidence`, or, where known exactly, a tensor (N,).
        steps: of Adam for each batch.
        lr: its initial learning rate, which falls to 0. By default 0.1 for the unconstrained
            parameters of a datum's q (for a Normal, its mean and the logarithm of its scale), 0.01
            for the guide's own.
        num_particles: draws in each step.
        num_samples: draws for each datum and estimate.

    Raises:
        ValueError: as for :func:`evidence`; for a guide that draws one latent given another, for
            latents without reparameterised draws, for an evidence of other data.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Diagonal
    >>> x = torch.randn(20, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> result = inference_gap(ppca, Diagonal(2, 5), x, evidence=ppca.log_evidence(x))
    >>> result.approximation.mean().abs() < 0.01 < result.amortisation.mean()
    tensor(True)
    """
    check_counts(steps=steps, num_particles=num_particles, num_samples=num_samples)
    check_positive(lr=0.1 if lr is None else lr)
    check_shared(plate, seed, arguments, chunk)
    check_executor(executor)
    if evidence is not None:
        KnownEvidence.of(evidence)  # before anything is computed
        check_in_order(data)
    unit, batches = rows_of(model, guide, data, batch_size, arguments, plate)

    def of(batch: Batch) -> tuple[Evidence, Evidence]:
        """The evidence by the guide, and by the best member of its family."""

        def of_draws(q: Program, use: Use) -> Evidence:
            found = RowDraws(model, q, batch, unit, seed)
            return evidence_of(found, num_samples, chunk, use)

        own, options = of_draws(guide, Use.WEIGHTS), (steps, num_particles)
        parameters = [] if unit.per == "datum" else parameters_of(guide, model, batch)
        if not parameters:
            fit = (*options, 0.1 if lr is None else lr, seed)
            fitted = fit_posteriors(model, guide, batch, unit, *fit)
            return own, of_draws(fitted(guide), Use.BEST)
        fit = (*options, 0.01 if lr is None else lr, seed)
        with trained(model, guide, batch, unit, parameters, *fit):
            return own, of_draws(guide, Use.BEST)

    def gap(parts: list[tuple[Evidence, Evidence]], is_whole: bool) -> InferenceGap:
        columns = columns_of(parts)
        parts.clear()
        own, best = (joined(columns.pop(0)) for _ in range(2))
        known = KnownEvidence.of(best if evidence is None else evidence)
        return _gap(own, best, known.first(len(own.elbo), is_whole))

    with evaluating(model, guide, seed=seed):
        return by_batch(batches, of, gap, "inference_gap", progress, executor)


def _gap(own: Evidence, best: Evidence, known: KnownEvidence) -> InferenceGap:
    log_evidence, error, ess, uncertain, _ = known
    stderr = {"log_evidence": error, "best_elbo": best.elbo_stderr, "elbo": own.elbo_stderr}
    return InferenceGap(
        log_evidence,
        best.elbo,
        own.elbo,
        stderr,
        ess,
        own.per,
        uncertain,
        own.is_up_to_a_constant,
    )
