"""One question about a fit: is the posterior good, and if not, what is wrong?"""

from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from pyproelbo._diagnostics.check_result import NO_SURGERY, Check
from pyproelbo._diagnostics.findings import INTERRUPTED
from pyproelbo._evidence.by_level import (
    NESTED,
    Integrated,
    level_draws,
    over_globals,
    over_locals,
)
from pyproelbo._evidence.decompositions import decompositions_pass
from pyproelbo._evidence.fisher import fisher_where_known
from pyproelbo._evidence.linear_response import LinearResponse, check_response
from pyproelbo._evidence.moments import (
    Moments,
    MomentsPart,
    global_moments,
    local_moments,
    moments_pass,
)
from pyproelbo._evidence.pareto import LEAST
from pyproelbo._evidence.psis import Psis, PsisPart, global_psis, local_psis, psis_pass
from pyproelbo._messages.arguments import check_counts, check_executor, check_shared
from pyproelbo._results.merging import stamped
from pyproelbo._rows.batches import Arguments, Batch, ReportData, Shard, parted
from pyproelbo._rows.dependencies import ignores_data
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.evaluating import constant, evaluating
from pyproelbo._rows.levels import LevelWeights, NoLevelsError
from pyproelbo._rows.passes import by_batch, by_part, together
from pyproelbo._rows.report_data import batches_of, rows_of
from pyproelbo._surgery.surgery import surgery
from pyproelbo._terms.traces import Program

_GRADIENTS = 200  # draws for the Fisher divergence


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
            Give data that the fit has not seen, some hundreds or thousands. The check of a
            :class:`Shard` has no surgery (:meth:`Check.with_surgery`).
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
        of_part, _ = parted(data)
        first = next(iter(batches_of(model, guide, of_part, batch_size, arguments)))
        is_amortised = not ignores_data(guide, first.args, first.kwargs)
        return stamped(replace(found, is_amortised=is_amortised), found.origin)

    def beside(found: Check | None) -> Check:
        assert found is not None
        if found.skipped:
            return found
        if isinstance(data, Shard):
            return stamped(replace(found, skipped=NO_SURGERY), found.origin)
        options: dict[str, Any] = {"arguments": arguments, "plate": plate, "seed": seed}
        try:
            if unit.per == "data set":
                levels = _by_level(model, guide, data, num_samples, progress, **options)
                return replace(found, levels=levels, skipped=_NO_AGGREGATE)
            options |= {"batch_size": batch_size, "executor": executor, "progress": progress}
            whole = replace(found, surgery=surgery(model, guide, data, **options))
        except ValueError as error:
            whole = replace(found, skipped=str(error))
        return stamped(whole, found.origin)

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
    return stamped(replace(check, skipped=check.skipped or INTERRUPTED), check.origin)


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
