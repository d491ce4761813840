"""For each datum the cheapest posterior that passes the checks of its importance weights."""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from pyproelbo._evidence.annealed import Annealed
from pyproelbo._evidence.by_level import NESTED
from pyproelbo._evidence.modes import STARTS
from pyproelbo._evidence.moments import NARROW
from pyproelbo._evidence.pareto import LEAST
from pyproelbo._evidence.repair_jobs import Jobs, Part, data_until
from pyproelbo._evidence.repair_levels import GLOBAL, STEPS, LevelLadder, LevelState
from pyproelbo._evidence.repair_levels import WAYS as BY_LEVEL
from pyproelbo._evidence.repair_result import FAILED, ORDER, Repair
from pyproelbo._evidence.repair_settings import Settings
from pyproelbo._evidence.repair_steps import WAYS
from pyproelbo._messages.arguments import check_counts, check_executor, check_positive, check_shared
from pyproelbo._results.origin import Origin
from pyproelbo._results.per import Per
from pyproelbo._rows.batches import Arguments, Batch, ReportData
from pyproelbo._rows.evaluating import constant, evaluating
from pyproelbo._rows.origins import of_rows, origin_here
from pyproelbo._rows.passes import bar, by_batch, by_part
from pyproelbo._rows.report_data import Unit, rows_of
from pyproelbo._rows.values import latent_names
from pyproelbo._rows.whole_reports import whole_reports
from pyproelbo._terms.traces import Program

LEVELS = ("joint", "both")


def repair(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    num_samples: int = 1000,
    methods: Sequence[str] | None = None,
    max_time: float | None = None,
    steps: int = 500,
    lr: float | None = None,
    num_particles: int = 10,
    annealed: Annealed | None = None,
    level: Literal["joint", "both"] | None = None,
    num_nested: int = NESTED,
    plate: str | None = None,
    batch_size: int = 256,
    chunk: int | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool = True,
) -> Repair:
    """Draws from each datum's posterior, by the cheapest method that passes (see :class:`Repair`).

    The guide's own draws are weighted for all data first. Each further method is then tried only
    with the data that have not passed; those that lack a mode and nothing else wait for "modes".
    Where all data are one row, "family" fits the guide's own parameters, and restores them. Model
    and guide are unchanged.

    **By level.** Where a program has global latents w, and latents z_n of single data, all of them
    form one row by default: one Gaussian and annealed chains for all latents, whose weights
    degenerate as N grows. With ``level="both"`` each level is repaired separately. The draws still
    come from the joint posterior: each of S draws of w has 20 draws of every z_n, of which one is
    chosen by its weight p(x_n, z | w) / q(z | x_n, w), and w, with its z, has the weight p(w) /
    q(w) prod_n p^(x_n | w), where p^ is the mean of those 20 (Andrieu & Roberts 2009, "The
    pseudo-marginal approach"). Hence

    - draws of z_n pass if, given w, they meet the criteria for a row at nine of ten of 20 draws of
      w, with S draws of z_n each. ``khat_before`` is the k-hat of ``psis(level="local")``;
    - otherwise q(z_n | w) is replaced by a fitted Gaussian whose mean is linear in w: one fit for
      all w, where a fit for each draw of w would take S times as long;
    - draws of w pass if their weights do, with the latents of the data integrated out, and all z_n
      pass: what is missed of p(x_n | w) is missed in the weight of w. Otherwise a Gaussian of all
      latents is fitted in which z_n and z_m are independent given w, and w is drawn from it; z_n as
      well where the guide's draws do not pass at these w, or where theirs, added up over all data,
      leave the weights of w too noisy.

    ``Repair.of_globals`` has the results for w. Where w has failed, the draws of no datum come from
    its posterior. By level there is no search for modes, and there are no annealed chains, no fits
    of the guide's own family, and no discrete latents: take ``level="joint"`` for these, or fit the
    guide by :func:`fit`. All data are run at once, and S draws of all of their latents are held.

    Nothing finished is lost: Ctrl-C returns it, with an :class:`~pyproelbo.UnfinishedWarning`; an
    error has it as its attribute ``repair``.

    Args:
        model, guide, data, arguments, plate, batch_size, chunk, seed, executor, progress: as in
            :func:`evidence`. ``batch_size`` changes nothing if the programs can run on some of the
            data; if not, as for AutoGuides with parameters for each datum, data that have not
            passed are repaired together with the others of their batch.
        num_samples: S, the number of draws for each row and each method.
        methods: the methods after the guide, in their order: some of "family", "correlated",
            "modes", "annealed" and "mixture". By default the first four, and "mixture" where a
            latent is discrete. One that does not apply to these programs is left out, and the notes
            give the reason. By level there is only "correlated".
        max_time: seconds after which no further batch is repaired; the rest remains as it is by
            then (``is_finished``). The guide's draws are weighted for all data in any case. By
            default there is no limit.
        steps, lr, num_particles: of Adam for "family", as in :func:`inference_gap`; "correlated",
            and each Gaussian of "modes", take as many steps and particles.
        annealed: the settings of annealing; by default with 50 temperatures.
        level: "both" for each level separately, "joint" for all latents of all data together; by
            default each datum separately, or all together where a latent is global.
        num_nested: by level, the number of draws of z_n for each draw of w, and of draws of w at
            which z_n is judged.

    Raises:
        ValueError: as for :func:`evidence`; for fewer than 25 samples, for a ``max_time`` that is
            not positive, for unknown ``methods``, and for a guide that draws nothing. By level, for
            programs without global or without local latents, and for discrete latents.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Diagonal
    >>> x = torch.randn(20, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> repaired = repair(ppca, Diagonal(2, 5), x)
    >>> repaired.passes.all(), repaired.draws["z"].shape
    (tensor(True), torch.Size([1000, 20, 2]))

    By level, where the guide is off for one of the data:

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    >>> def guide(x):
    ...     mean = pyro.sample("mean", dist.Normal(x.sum() / 5.25, 0.49))
    ...     with pyro.plate("data", len(x)):
    ...         off = torch.tensor([2.0, 0.0, 0.0, 0.0])
    ...         pyro.sample("z", dist.Normal((mean + 4 * x) / 5 + off, 0.45))
    >>> repaired = repair(model, guide, torch.randn(4), level="both")
    >>> repaired.method.tolist(), repaired.of_globals.method.tolist()
    (['correlated', 'guide', 'guide', 'guide'], ['guide'])
    """
    check_counts(LEAST, num_samples=num_samples)
    check_counts(steps=steps, num_particles=num_particles)
    check_positive(lr=0.1 if lr is None else lr, max_time=1 if max_time is None else max_time)
    check_shared(plate, seed, arguments, chunk)
    check_executor(executor, "local" if level == "both" else None)
    check_counts(num_nested=num_nested)
    if level is not None and level not in LEVELS:
        raise ValueError(f"level should be one of {list(LEVELS)}, or None, got {level!r}")
    _check_methods(methods, BY_LEVEL if level == "both" else tuple(WAYS))
    if annealed is not None and not isinstance(annealed, Annealed):
        raise ValueError(f"annealed should be pe.Annealed(...), got {annealed!r}")
    how = Annealed(num_temperatures=50) if annealed is None else annealed
    counts = num_samples, steps, num_particles, lr, how, chunk, seed
    if level == "both":
        (whole,) = rows_of(model, guide, data, sys.maxsize, arguments, is_joint=True).batches
        settings = Settings(model, guide, Unit("data set"), *counts)
        ways = BY_LEVEL if methods is None else methods
        with evaluating(model, guide, seed=seed), constant(model, guide):
            ladder = LevelLadder(settings, whole, plate, num_nested, ways, max_time, NARROW)
            return by_part(
                bar(iter(ladder), "repair", progress),
                ladder.after,
                lambda state, _: _of_levels(state, ladder, num_samples),
                "repair",
                lambda step: f"{STEPS.index(step) + 1} of {len(STEPS)} steps",
            )
    unit, batches = rows_of(model, guide, data, batch_size, arguments, plate, level == "joint")
    settings = Settings(model, guide, unit, *counts)
    with evaluating(model, guide, seed=seed), constant(model, guide):
        if executor is not None:
            of = _OfBatch(settings, methods, None if max_time is None else time.time() + max_time)
            return by_batch(
                batches, of, lambda of, _: Repair._merged(of), "repair", progress, executor
            )
        jobs = Jobs(settings, batches, methods, max_time, NARROW)
        return _repaired(jobs, progress, origin_here())


def _repaired(jobs: Jobs, progress: bool, origin: Origin | None) -> Repair:
    """The repair of all rows, method by method."""

    def of_next(parts: list[Part] | None, job: Any) -> list[Part]:
        return [*(parts or []), *job.run()]

    def result(parts: list[Part], _: bool) -> Repair:
        found = _result(parts, jobs, jobs.to.num_samples, jobs.to.unit.per)
        return of_rows(found, origin, jobs.start, jobs.start + len(found.khat_after))

    return by_part(bar(iter(jobs), "repair", progress), of_next, result, "repair", data_until)


class _OfBatch(NamedTuple):
    """The repair of a batch, by a worker.

    Attributes:
        until: when no further method is started, in seconds since the epoch; None for never.
    """

    settings: Settings
    methods: Sequence[str] | None
    until: float | None

    def __call__(self, batch: Batch) -> Repair:
        left = None if self.until is None else self.until - time.time()
        jobs = Jobs(self.settings, [batch], self.methods, left, NARROW)
        with whole_reports():
            return _repaired(jobs, progress=False, origin=None)  # the whole knows its rows


def _check_methods(methods: Sequence[str] | None, ways: Sequence[str]) -> None:
    names = () if methods is None else methods
    is_list = isinstance(names, list | tuple)
    if not is_list or any(not isinstance(n, str) or n not in ways for n in names):
        where = "" if len(ways) > 1 else " where level='both'"
        raise ValueError(
            f"methods should be some of {list(ways)}, in a list{where}, got {methods!r}"
        )


def _result(parts: list[Part], jobs: Jobs, num_samples: int, per: Per) -> Repair:
    """Each row from the last part that contains it."""
    first = [part for part in parts if part.name == "guide"]
    draws = {n: torch.cat([part.draws[n] for part in first], 1) for n in first[0].draws}
    khat, ess = (torch.cat([getattr(p, n) for p in first]) for n in ("khat", "ess"))
    passes = torch.cat([part.passes for part in first])
    names = np.full(len(khat), "guide", dtype=f"<U{max(map(len, ORDER))}")
    before = khat.clone()
    for part in parts:
        if part.name != "guide":
            for name, values in part.draws.items():
                draws[name][:, part.rows] = values
            khat[part.rows], ess[part.rows], passes[part.rows] = part.khat, part.ess, part.passes
            names[part.rows.numpy()] = part.name
    names[~passes.numpy()] = FAILED
    num = len(khat)
    seen, cost = jobs.sees_modes(num), jobs.cost(num)
    is_finished = passes | jobs.is_exhausted(num)
    drawn, draws = draws, {name: draws[name] for name in jobs.sites}
    if per == "data set":
        draws = {name: value[:, 0] for name, value in draws.items()}
    return Repair(
        draws,
        names,
        before,
        khat,
        ess,
        cost,
        dict(jobs.seconds),
        is_finished,
        seen,
        num_samples,
        per,
        STARTS if jobs.is_searched else 0,
        dict(jobs.left_out),
        drawn,
        jobs.plate,
    )


def _of_levels(state: LevelState, ladder: LevelLadder, num_samples: int) -> Repair:
    """The data given the global latents, together with the latter."""
    levels, num = ladder.levels, len(state.before.khat)
    global_names, local_names = levels.names
    latents = latent_names(levels.first)
    passes, verdict = state.locals_.passes, state.locals_
    names = np.where(state.proposal.of_locals.numpy(), "correlated", "guide")
    of_w = "correlated" if state.proposal.of_globals else "guide"
    seconds = {n: s for n, s in ladder.seconds.items() if not n.endswith(GLOBAL)}
    globals_ = {n: value[:, 0] for n, value in state.draws.items() if n in latents}
    is_local = {n: levels.is_local(levels.first.model_sites[n]) for n in latents}
    finished = torch.full((num,), state.is_finished, device="cpu")
    of_globals = Repair(
        {n: value for n, value in globals_.items() if not is_local[n]},
        np.array([of_w if state.globals_pass else FAILED]),
        state.globals_before.khat,
        state.globals_.khat,
        state.globals_.effective_sample_size,
        torch.tensor([sum(ladder.seconds.values()) - sum(seconds.values())], device="cpu"),
        {n.removesuffix(GLOBAL): s for n, s in ladder.seconds.items() if n.endswith(GLOBAL)},
        finished[:1],
        state.known.sees_half,
        num_samples,
        "data set",
    )
    draws = {n: state.draws[n] if is_local[n] else globals_[n] for n in latents}
    return Repair(
        draws,
        np.where(passes.numpy(), names, FAILED),
        state.before.khat,
        verdict.khat,
        state.effective_sample_size,
        torch.full((num,), sum(seconds.values()) / num, dtype=torch.float64, device="cpu"),
        seconds,
        finished,
        verdict.sees_half,
        num_samples,
        "datum",
        0,
        ladder.left_out,
        {n: state.draws[n] for n in (*global_names, *local_names)},
        levels.plate.name,
        of_globals,
    )
