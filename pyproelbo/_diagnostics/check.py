"""One question about a fit: is the posterior good, and if not, what is wrong?"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from pyproelbo._evidence.by_level import (
    NESTED,
    Integrated,
    level_draws,
    over_globals,
    over_locals,
)
from pyproelbo._evidence.decompositions import Decompositions, decompositions_pass
from pyproelbo._evidence.fisher import FisherDivergence, fisher_where_known
from pyproelbo._evidence.linear_response import LinearResponse, check_response
from pyproelbo._evidence.moments import (
    Moments,
    MomentsPart,
    global_moments,
    local_moments,
    moments_pass,
)
from pyproelbo._evidence.pareto import LEAST, usable
from pyproelbo._evidence.psis import Psis, PsisPart, global_psis, local_psis, psis_pass
from pyproelbo._evidence.weights import LEAST_ESS
from pyproelbo._messages.arguments import check_counts, check_executor, check_shared
from pyproelbo._results.numbers import with_error
from pyproelbo._results.per import Per
from pyproelbo._results.result import Result, Section
from pyproelbo._results.tables import Row, Table
from pyproelbo._rows.batches import Arguments, Batch, ReportData, Shard
from pyproelbo._rows.dependencies import ignores_data
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.evaluating import constant, evaluating
from pyproelbo._rows.levels import LevelWeights, NoLevelsError
from pyproelbo._rows.passes import by_batch, by_part, together
from pyproelbo._rows.report_data import batches_of, rows_of
from pyproelbo._surgery.result import COLLAPSED, Surgery
from pyproelbo._surgery.surgery import surgery
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray

Verdict = Literal["fine", "doubtful", "bad"]
_WORST_FIRST: tuple[Verdict, ...] = ("bad", "doubtful", "fine")

SHARES = (0.01, 0.1)  # of the data, that may have a large k-hat: beyond, doubtful and bad
GAPS = (0.5, 3.0)  # nats per datum below log p(x): beyond, doubtful and bad
OFF = (0.1, 0.5)  # of the data, whose means or sds may be off: beyond, doubtful and bad
SHIFTS = (0.15, 0.3)  # sds of the posterior that a mean may be off: beyond, doubtful and bad
RATIOS = (1.15, 1.3)  # factors that an sd may be off: beyond, doubtful and bad
FISHER = 0.48  # for an sd 1.3 times too large, (1.3^2 - 1)^2: of a datum, doubtful
_GRADIENTS = 200  # draws for the Fisher divergence


class Finding(NamedTuple):
    """The result of one diagnostic, in a sentence."""

    verdict: Verdict
    text: str


@dataclass(frozen=True, eq=False, repr=False)
class Check(Result):
    """Whether a fit can be trusted, and why.

    Attributes:
        decompositions: the ELBO in every form, and how far it is from log p(x).
        psis: Pareto k-hat of each datum, or of the data set.
        moments: the errors of q's means and sds, by its weighted draws.
        surgery: the parts of the KL; None where there is no aggregate posterior.
        skipped: why ``surgery`` is None.
        is_amortised: whether the guide computes its posterior from the data that it is called with;
            otherwise its posterior belongs to the data that it was fitted to.
        fisher: the Fisher divergence of q, by gradients; None where a latent has no gradients.
        response: the linear response that was given; None where there was none.
        levels: for a program with global and local latents, Pareto k-hat and moments by level,
            "global" and "local"; empty for others.
    """

    decompositions: Decompositions
    psis: Psis
    moments: Moments
    surgery: Surgery | None
    skipped: str = ""
    is_amortised: bool = True
    levels: Mapping[str, tuple[Psis, Moments]] = field(default_factory=dict)
    fisher: FisherDivergence | None = None
    response: LinearResponse | None = None

    @property
    def per(self) -> Per:
        """The meaning of a row: a "datum"; or the "data set", where a latent is global."""
        return self.psis.per

    @property
    def findings(self) -> list[Finding]:
        """The result of each diagnostic."""
        return list(_findings(self))

    @property
    def notes(self) -> list[str]:
        """The texts of the findings."""
        return [finding.text for finding in self.findings]

    @property
    def verdict(self) -> Verdict:
        """The worst of the findings."""
        found = {finding.verdict for finding in self.findings}
        return next(verdict for verdict in _WORST_FIRST if verdict in found)

    def as_json(self) -> dict[str, object]:
        """The verdict and the numbers behind it."""
        parts = self.decompositions
        return {
            "verdict": self.verdict,
            "findings": [finding._asdict() for finding in self.findings],
            "elbo": parts.elbo.value,
            "log_evidence": parts.log_evidence.value,
            "posterior_kl": parts.posterior_kl.value,
            "per": self.per,
            "khat": self.psis.khat.tolist(),
            "joint_khat": self.psis.joint_khat,
            "khat_by_level": {level: part.khat.tolist() for level, (part, _) in self._levels},
        }

    def to_xarray(self) -> "xarray.DataTree":
        """An ``xarray.DataTree``: the verdict and its findings, and each part's own dataset.

        The groups are "decompositions", "psis", "moments", and, where they are known, "fisher",
        "linear_response" and "surgery"; where there are levels "psis_global" and so on.
        ``findings`` and the ``verdicts`` on them have the dim "finding"; the verdict on all is an
        attribute.
        """
        import xarray

        findings = {
            "findings": ("finding", self.notes),
            "verdicts": ("finding", [finding.verdict for finding in self.findings]),
        }
        attributes: dict[str, object] = {"verdict": self.verdict, "skipped": self.skipped}
        attributes |= {"per": self.per, "is_amortised": int(self.is_amortised)}
        groups = {"/": xarray.Dataset(findings, attrs=attributes)}
        groups |= {name: part.to_xarray() for name, part in self._parts.items()}
        return xarray.DataTree.from_dict(groups)

    @property
    def _levels(self) -> list[tuple[str, tuple[Psis, Moments]]]:
        return list(self.levels.items())

    @property
    def _parts(self) -> dict[str, Result]:
        parts = {
            "decompositions": self.decompositions,
            "psis": self.psis,
            **({} if self.levels else {"moments": self.moments}),
            **{f"psis_{level}": part for level, (part, _) in self._levels},
            **{f"moments_{level}": part for level, (_, part) in self._levels},
            "fisher": self.fisher,
            "linear_response": self.response,
            "surgery": self.surgery,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _table(self) -> Table:
        rows = [Row(finding.verdict, (), finding.text) for finding in self.findings]
        return Table(f"Verdict: {self.verdict}", rows)

    def _sections(self) -> list[Section]:
        """The sections of the parts, then the findings with the verdict on each."""
        parts = [section for part in self._parts.values() for section in part._sections()]
        return [*parts, Section(self._table())]


def _findings(check: Check) -> Iterator[Finding]:
    """In the order of their weight: the tails of the weights, means and sds, the gap, the rest."""
    judged = dict(check.levels) or {"": (check.psis, check.moments)}
    for tails, off in judged.values():
        yield from _of_tails(tails, check.is_amortised)
        yield from _of_moments(off)
    if check.fisher is not None:
        yield _of_gradients(check.fisher)
    if check.response is not None:
        yield _of_response(check.response)
    if check.skipped == _INTERRUPTED:
        yield Finding("doubtful", "The check was interrupted: the rest may be worse.")
    yield from _of_gap(check)
    tails, _ = judged.get("global", (check.psis, check.moments))
    ess = float(tails.effective_sample_size.median())
    if ess < LEAST_ESS:
        median = " (median)" * (check.per == "datum")
        yield Finding(
            "doubtful",
            f"log p(x) is itself uncertain, and probably larger: the effective sample size is "
            f"{ess:.0f} of {tails.num_samples:,}{median}.",
        )
    if check.surgery is not None:
        collapsed = check.surgery.average_kl < COLLAPSED
        for note in check.surgery.notes:
            yield Finding("doubtful" if collapsed else "fine", note)


def _of_tails(psis: Psis, is_amortised: bool) -> Iterator[Finding]:
    """Whether importance weights can be used, not whether q is good."""
    missed = "Train the guide longer, or take a richer family."
    if psis.per == "data set":
        of = "of the global latents " * (psis.level == "global")
        level = f"Pareto k-hat {of}is {float(psis.khat):.2f}"
        if psis.is_usable.all():
            alike = ", and the weights hardly differ" * (float(psis.khat) >= psis.threshold)
            yield Finding("fine", f"{level}{alike}: importance weights of q can be used.")
        else:
            yield Finding(
                "bad",
                f"{level}, above {psis.threshold:.2f}: q misses important parts of the posterior. "
                + missed,
            )
        return
    bad = float((~psis.is_usable).double().mean())
    given = " given the global latents" * bool(psis.num_globals)
    level = f"Pareto k-hat{given} is above {psis.threshold:.2f} for {bad:.1%} of the data"
    few, some = SHARES
    if bad <= few:
        yield Finding("fine", f"{level}: importance weights of q can be used.")
    elif bad <= some:
        yield Finding("doubtful", f"{level}: do not trust q for those.")
    else:
        yield Finding(
            "bad",
            f"{level}: q misses important parts of their posterior. "
            + (
                missed
                if is_amortised or psis.num_globals
                else "It is not computed from the data, but belongs to the data that the guide "
                "was fitted to, in their order: if these are others, fit it to them; else train "
                "it longer, or take a richer family."
            ),
        )


def _of_moments(moments: Moments) -> Iterator[Finding]:
    """Whether q's means and sds are those of the weighted draws, where weights can be used."""
    use = usable(moments.khat, moments.effective_sample_size, moments.num_samples)
    if not use.any():
        return
    shift, ratio = moments.mean_shift[use].abs(), moments.sd_ratio[use]
    factor = torch.maximum(ratio, 1 / ratio)
    if moments.per == "data set":
        s, r = (int(x[0].argmax()) for x in (shift, factor))
        mean_off = with_error(
            float(moments.mean_shift[0, s]), float(moments.mean_shift_stderr[0, s])
        )
        times = with_error(float(ratio[0, r]), float(moments.sd_ratio_stderr[0, r]))
        text = (
            f"By the weighted draws q's mean of {moments.dims[s]} is off by {mean_off} sds, and "
            f"its sd of {moments.dims[r]} is {times} times that of the posterior: the worst of "
            f"{len(moments.dims):,}"
        )
        worst = float(shift.max()), float(factor.max())
        level = sum(
            worst[0] > shift_limit or worst[1] > ratio_limit
            for shift_limit, ratio_limit in zip(SHIFTS, RATIOS, strict=True)
        )
        verdict = _WORST_FIRST[2 - level]
        cure = ". pe.from_svi(..., corrected=True) has those draws."
        if not moments.can_be_corrected.all():
            cure = (
                ", or worse: q is so narrow that its draws do not reach the posterior. "
                "Train the guide longer, or take a richer family."
            )
        cure = "." if verdict == "fine" else cure
        yield Finding(verdict, text + cure)
        return
    given = " given the global latents" * bool(moments.num_globals)
    off = float(((shift > SHIFTS[1]) | (factor > RATIOS[1])).any(1).double().mean())
    text = (
        f"By the weighted draws q's mean is off by more than {SHIFTS[1]} sds, or its sd by more "
        f"than {RATIOS[1] - 1:.0%},{given} for {off:.1%} of the data"
    )
    few, some = OFF
    yield Finding("fine" if off <= few else "doubtful" if off <= some else "bad", f"{text}.")


def _of_gradients(fisher: FisherDivergence) -> Finding:
    """Whether log q and log p have the same gradients at q's draws; needs no weights."""
    surely = fisher.scaled - 2 * fisher.scaled_stderr
    if fisher.per == "data set":
        k = int(surely[0].argmax())
        value = with_error(float(fisher.scaled[0, k]), float(fisher.scaled_stderr[0, k]))
        return Finding(
            "fine",  # not a criterion: means and sds are judged by the moments
            f"The gradients of log q and log p(x, z) differ most in {fisher.dims[k]}: Fisher "
            f"divergence times q's variance {value} (0 at the posterior, {FISHER} of an sd 30% too "
            "large).",
        )
    off = float((surely > FISHER).any(1).double().mean())
    return Finding(
        "fine" if off <= OFF[0] else "doubtful",
        f"The Fisher divergence times q's variance is above {FISHER}, as for an sd 30% too large, "
        f"for {off:.1%} of the data.",
    )


def _of_response(response: LinearResponse) -> Finding:
    """Whether q's sds agree with linear response, which needs no weights."""
    ratio, error = response.q_sd / response.sd, response.sd_stderr / response.sd
    off = ratio.log().abs() - 2 * error
    k = int(off.argmax())
    value = f"{ratio[k]:.2f} ± {ratio[k] * error[k]:.2f}"
    return Finding(
        "fine" if float(off[k].exp()) < RATIOS[1] else "doubtful",
        f"By linear response q's sd of {response.names[k]} is {value} times that of the posterior: "
        f"the worst of {len(response.names):,}.",
    )


def _of_gap(check: Check) -> Iterator[Finding]:
    gap = check.decompositions.posterior_kl.value
    if check.per == "data set":
        yield Finding(
            "fine",  # a number of all latents together, which k-hat and the moments judge
            f"The ELBO is {gap:.2f} nats below log p(x), for all data together: pe.inference_gap "
            "shows whether the family or the training is to blame.",
        )
        return
    missing = f"The ELBO is {gap:.2f} nats per datum below log p(x)"
    small, large = GAPS
    if gap < small:
        yield Finding("fine", f"{missing}.")
    else:
        verdict: Verdict = "doubtful" if gap < large else "bad"
        yield Finding(
            verdict,
            f"{missing}: pe.inference_gap shows whether the family or the encoder is to blame.",
        )


def check(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    num_samples: int = 1000,
    linear_response: LinearResponse | None = None,
    plate: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool = True,
) -> Check:
    """Run the diagnostics that take seconds, and give a verdict: fine, doubtful or bad.

    The verdict is the worst of the findings. Where a latent is global, all data form one row:

    - Pareto k-hat above its threshold is bad, unless the weights hardly differ (``is_usable`` of
      :class:`Psis`);
    - the worst of q's means and sds, by its weighted draws, decides: a mean off by less than 0.15
      standard deviations of the posterior, and an sd by less than a factor of 1.15, are fine; a
      mean off by more than 0.3, or an sd by more than a factor of 1.3, is bad; between them,
      doubtful.

    The Fisher divergence (:func:`fisher_divergence`) is reported with them.

    For a program that also has local latents, k-hat and moments are judged by level: for the
    global latents, and for those of each datum given them. Where a row is a datum:

    - k-hat above its threshold for at most 1% of the data is fine, for at most 10% doubtful, for
      more bad;
    - a mean off by more than 0.3 sds, or an sd by a factor of 1.3, for at most 10% of the data is
      fine, for at most 50% doubtful, for more bad;
    - a Fisher divergence above 0.48 for at most 10% of the data is fine, for more doubtful;
    - an ELBO less than 0.5 nats per datum below log p(x) is fine, less than 3 doubtful, more bad;
    - an average KL below 0.1 nats per datum is a collapse: doubtful.

    An effective sample size below 50, for the median datum, makes log p(x) doubtful.

    The threshold of k-hat, min(1 - 1 / log10 S, 0.7), is from Vehtari, Simpson, Gelman, Yao &
    Gabry (2024), "Pareto smoothed importance sampling". The thresholds for a data set are
    calibrated on fits to 29 known posteriors (``tests/benchmarks/posteriordb.py`` has the table:
    how often a fit called fine is wrong, and a wrong one is not called fine). All other numbers are
    our rules of thumb: where an application has better ones, judge by the values in the
    :class:`Check`. No verdict accounts for what no draw of q has found, such as a mode of the
    posterior that q misses.

    Args:
        model, guide, data, arguments, plate, batch_size, seed, executor, progress: as in
            :func:`evidence`.
            Give data that the fit has not seen, some hundreds or thousands.
        num_samples: draws for each datum.
        linear_response: the result of :func:`linear_response` for the same fit: an sd of q that
            differs from the response's sd by a factor of 1.3 is doubtful, even where weights cannot
            be used.

    Raises:
        ValueError: as for :func:`psis`.

    >>> import torch
    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> x = torch.randn(50, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> check(ppca, Exact(ppca), x, num_samples=100).findings[0].verdict
    'fine'
    """
    check_counts(LEAST, num_samples=num_samples)
    check_shared(plate, seed, arguments, None)
    check_executor(executor)
    check_response(linear_response)
    if isinstance(data, Shard):
        raise ValueError(
            "data should be all data, not a Shard: a check has a surgery, which is of all data; "
            "merge the reports that it is made of"
        )
    unit, batches = rows_of(model, guide, data, batch_size, arguments, plate)
    reports = together(
        [
            decompositions_pass(num_samples, None),
            psis_pass(num_samples, None),
            moments_pass(num_samples, None),
            fisher_where_known(_GRADIENTS),
        ]
    )

    def joined(parts: list[Any], is_whole: bool) -> Check:
        forms, tails, off, fisher = reports.joined(parts, is_whole)
        found = Check(forms, tails, off, None, fisher=fisher, response=linear_response)
        return found if is_whole else _interrupted(found)

    def by_row(_: Check | None) -> Check:
        def of(batch: Batch) -> list[Any]:
            return reports.of(RowDraws(model, guide, batch, unit, seed))

        return by_batch(batches, of, joined, "check", progress, executor)

    def amortised(found: Check | None) -> Check:
        assert found is not None
        first = next(iter(batches_of(model, guide, data, batch_size, arguments)))
        return replace(found, is_amortised=not ignores_data(guide, first.args, first.kwargs))

    def beside(found: Check | None) -> Check:
        assert found is not None
        if found.skipped:
            return found
        options: dict[str, Any] = {"arguments": arguments, "plate": plate, "seed": seed}
        try:
            if unit.per == "data set":
                levels = _by_level(model, guide, data, num_samples, progress, **options)
                return replace(found, levels=levels, skipped=_NO_AGGREGATE)
            options |= {"batch_size": batch_size, "executor": executor, "progress": progress}
            return replace(found, surgery=surgery(model, guide, data, **options))
        except ValueError as error:
            return replace(found, skipped=str(error))

    with (
        evaluating(model, guide, seed=seed),
        constant(model, guide),
    ):  # one report, which repeats no note
        return by_part(
            [by_row, amortised, beside],
            lambda found, part: part(found),
            lambda found, is_whole: found if is_whole else _interrupted(found),
            "check",
            lambda _: "parts, without surgery and what is by level",
        )


def _interrupted(check: Check) -> Check:
    return replace(check, skipped=check.skipped or _INTERRUPTED)


_INTERRUPTED = "the check was interrupted before"
_NO_AGGREGATE = (
    "all data share one posterior, and there is no aggregate of posteriors: pe.inference_gap "
    "finds the cause of an error, pe.from_svi has its draws"
)


def _by_level(
    model: Program,
    guide: Program,
    data: ReportData,
    num_samples: int,
    progress: bool,
    arguments: Arguments | None,
    plate: str | None,
    seed: int,
) -> dict[str, tuple[Psis, Moments]]:
    """Pareto k-hat and moments by level, where there are both global and local latents."""

    def of_globals(draws: Integrated) -> tuple[Psis, Moments]:
        return global_psis(draws, levels.is_improper), global_moments(draws)

    def of_locals(weights: LevelWeights) -> tuple[PsisPart, MomentsPart]:
        return PsisPart.of_locals(weights), MomentsPart.of_locals(weights)

    def joined(parts: list[tuple[PsisPart, MomentsPart]]) -> tuple[Psis, Moments]:
        tails, off = zip(*parts, strict=True)
        return local_psis(list(tails)), local_moments(list(off))

    counts, named = (num_samples, NESTED), ("levels", progress, True)
    try:
        with level_draws(model, guide, data, arguments, plate, seed) as levels:
            return {
                "global": over_globals(levels, *counts, None, of_globals, *named),
                "local": over_locals(levels, *counts, of_locals, joined, *named),
            }
    except NoLevelsError:
        return {}
