"""log p(x), by importance weighting with the guide as proposal, or by another method."""

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from pyproelbo._distributions.sobol import Kind, enough, points_of
from pyproelbo._evidence.annealed import Annealed
from pyproelbo._evidence.by_level import (
    NESTED,
    check_level,
    level_draws,
    local_evidence,
    over_globals,
    over_locals,
)
from pyproelbo._evidence.proposals import (
    Proposal,
    check_proposal,
    mixture_evidence,
    prior_draws,
)
from pyproelbo._evidence.weights import Evidence as Evidence
from pyproelbo._evidence.weights import Weights, summary
from pyproelbo._evidence.weights import joined as joined
from pyproelbo._messages.arguments import check_counts, check_executor, check_shared
from pyproelbo._rows.batches import Arguments, Batch, ReportData, Shard
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.evaluating import constant, evaluating
from pyproelbo._rows.levels import Level, LevelDraws
from pyproelbo._rows.passes import by_batch
from pyproelbo._rows.report_data import check_in_order, rows_of
from pyproelbo._rows.runs import Use
from pyproelbo._terms.traces import Program


class Method(Protocol):
    """A method to estimate log p(x).

    Attributes:
        num_samples: the default, for each datum.
    """

    num_samples: ClassVar[int]

    def proposal(self, model: Program, guide: Program) -> Program:
        """The program that the draws start from."""
        ...

    def estimate(
        self,
        draws: RowDraws,
        num_samples: int,
        chunk: int | None,
        latents: Mapping[str, Tensor] | None,
        progress: bool,
    ) -> Evidence:
        """log p(x) of a batch."""
        ...


@dataclass(frozen=True)
class Importance:
    """w = p(x, z) / q(z | x) for draws z of the guide."""

    num_samples: ClassVar[int] = 1000

    def proposal(self, model: Program, guide: Program) -> Program:
        return guide

    def estimate(
        self,
        draws: RowDraws,
        num_samples: int,
        chunk: int | None,
        latents: Mapping[str, Tensor] | None,
        progress: bool,
    ) -> Evidence:
        if latents is not None:
            raise ValueError(
                "latents give an upper bound by annealing: take method='annealed', or "
                "Annealed(num_temperatures=1) for the bound by importance weighting"
            )
        return evidence_of(draws, num_samples, chunk)


METHODS: Mapping[str, Method] = {"importance": Importance(), "annealed": Annealed()}


def evidence(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    method: Literal["importance", "annealed"] | Method = "importance",
    num_samples: int | None = None,
    draws: Kind = "independent",
    proposal: Proposal = "guide",
    level: Level | None = None,
    num_nested: int = NESTED,
    latents: Mapping[str, Tensor] | None = None,
    plate: str | None = None,
    batch_size: int = 256,
    chunk: int | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool = True,
) -> Evidence:
    """log p(x_n) of each datum, or of the data set (see :class:`Evidence`).

    A program whose sites are all in a plate over the data has a posterior, and an evidence, for
    each datum. Where a latent is global, all data share one posterior: the whole data set is then
    one row, N is 1, and the result's ``per`` is "data set".

    Modules are evaluated in eval mode; their mode, Pyro's parameter store and torch's generators
    are restored. Nothing finished is lost: Ctrl-C returns it, with an
    :class:`~pyproelbo.UnfinishedWarning`; an error has it as its attribute ``evidence``.

    Args:
        model: a Pyro program; masks, inner plates and a subsampling scale of the plate over the
            data are handled correctly.
        guide: its guide, an AutoGuide or any other.
        data: a tensor (N, ...); or the arguments of model and guide, as a tuple or a mapping of
            keyword arguments, or both in a tuple; or a ``DataLoader`` of such batches. The first
            tensor determines the number of data; arguments with other rows, or none, are passed
            unchanged with every batch. None where the programs take no arguments. A
            :class:`~pyproelbo.Shard` is a part of the data, whose result can be merged.
        arguments: from a batch to the arguments of the programs, where the two differ.
        method: "importance" for weights p(x, z) / q(z | x) of draws of the guide; "annealed" for
            annealed importance sampling, or an :class:`~pyproelbo.Annealed` with its settings. It
            takes many gradients for each sample, and is for guides whose effective sample size is
            small.
        num_samples: S, the number of draws of the guide for each datum, or of chains that start
            from them. By default 1,000 draws, or 10 chains, or 1,024 Sobol draws.
        draws: for importance weighting with one proposal and all latents at once: "independent"; or
            "sobol" for scrambled Sobol points, in 8 replicates, whose spread gives the errors. With
            them, means of smooth functions of few latents have a much smaller error. S is 8 times a
            power of two. For other numbers of replicates: :class:`~pyproelbo.Sobol`.
        proposal: for importance weighting, the source of the draws: "guide"; "prior" for p(z); or
            "mixture" for half of each, with deterministic mixture weights p(x, z) / ((q(z | x) +
            p(z)) / 2), which stay bounded where q misses a part of the posterior.
        level: for a program with global latents w and local ones z_n, in the plate of the data:

            - "joint": log p(x), by weights of all latents at once, whose variance grows with N.
            - "global": log p(x), by weights of w, with each z_n integrated out by its own
              ``num_nested`` draws (see :func:`~pyproelbo._evidence.by_level.over_globals`), which
              remains usable for large N.
            - "local": log p(x_n | w) of each datum, the mean over ``num_nested`` draws of w from q.

            None means "joint" where a latent is global, and each datum by itself where none is. By
            level, all data must be given at once, and the method is importance weighting.
        num_nested: draws of the latents of the other level.
        latents: for data simulated from the model, the latents behind them, by site name, each for
            all data in the shape that the model draws (N, ...). By annealing they give the upper
            bound. A trace of the model has both::

                sites = poutine.trace(model).get_trace(num=100).nodes
                x, latents = sites["x"]["value"], {"z": sites["z"]["value"]}

        plate: the name of the plate over the data, where others have the size of a batch; all sites
            should then be in it.
        batch_size: the number of rows in one call of model and guide; a loader has its own.
        chunk: the number of draws made at once, as vectorised particles: memory grows with it. By
            default as many as make about 2,500 rows of a batch, or up to 20,000 where rows have few
            numbers. Two are tried first: if they differ from single draws, as for programs that
            count dims from the left, draws are made one by one, and a
            :class:`~pyproelbo.LoopedWarning` gives the reason.
        seed: of the draws. If all draws can be made by row (see :mod:`pyproelbo._rows.noise`), the
            result depends on it, but not on ``batch_size``, ``chunk``, the device or the state of
            random number generators.
        executor: computes the batches in its workers: a ``ProcessPoolExecutor``,
            ``dask.distributed.Client(...).get_executor()``, or any other
            ``concurrent.futures.Executor``. Programs and parameters are sent to each worker once,
            batches as they are needed; the result is that of one process where draws are made by
            row. What a worker that dies had not finished is computed again. The extra ``scale``
            has what sends programs that are defined within functions.
        progress: whether to show a progress bar, on a terminal.

    Raises:
        ValueError: for a latent or data outside the plate, for a latent that the guide does not
            draw, as in AutoDelta, or that only model or guide masks, for a guide that observes what
            the model draws, for enumeration, for densities scaled by anything other than the plate,
            and for data without rows. By annealing, also for latents that are discrete, and for
            guides without a density at a given z.

    >>> import torch
    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> x = torch.randn(200, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> result = evidence(ppca, Exact(ppca), x, num_samples=5)
    >>> torch.allclose(result.log_evidence, ppca.log_evidence(x).double(), rtol=1e-4)
    True
    """
    check_counts(num_samples=1 if num_samples is None else num_samples)
    check_shared(plate, seed, arguments, chunk)
    check_executor(executor, level)
    if isinstance(method, str) and method in METHODS:
        method = METHODS[method]
    if isinstance(method, str) or not hasattr(method, "estimate"):
        raise ValueError(
            f"method should be one of {sorted(METHODS)}, or Annealed(...), got {method!r}"
        )
    if latents is not None:
        check_in_order(data)
        if isinstance(data, Shard):
            raise ValueError("latents= are of all data: leave it out for a Shard of them")
    check_level(level, num_nested)
    check_proposal(proposal)
    if proposal != "guide" and (not isinstance(method, Importance) or level in ("global", "local")):
        raise ValueError(
            f"proposal={proposal!r} is for importance weighting of all latents at once: leave "
            "method= and level= out; annealing starts from the prior by Annealed(start='prior')"
        )
    num = enough(draws, method.num_samples) if num_samples is None else num_samples
    points = points_of(draws, num)
    if points is not None:
        plain = isinstance(method, Importance) and proposal != "mixture"
        if not plain or level in ("global", "local"):
            raise ValueError(
                f"draws={draws!r} is for importance weighting of all latents at once, with the "
                "guide or the prior as proposal: leave method= and level= out, or take "
                "draws='independent'"
            )
    start = method.proposal(model, guide)
    if level in ("global", "local"):
        if not isinstance(method, Importance):
            raise ValueError(f"level={level!r} is by importance weighting: leave method= out")
        with level_draws(model, guide, data, arguments, plate, seed) as levels:
            return _by_level(levels, level, num, num_nested, chunk, progress)
    unit, batches = rows_of(model, guide, data, batch_size, arguments, plate, level is not None)

    def of(batch: Batch) -> Evidence:
        if proposal == "prior":
            rows = prior_draws(model, batch, unit, seed, points)
        else:
            rows = RowDraws(model, start, batch, unit, seed, points)
        if proposal == "mixture":
            of_prior = prior_draws(model, batch, unit, seed)
            return _of(rows, mixture_evidence(rows, of_prior, num, chunk))
        return _of(rows, method.estimate(rows, num, chunk, latents, progress))

    with evaluating(model, guide, seed=seed), constant(model, guide):
        return by_batch(batches, of, lambda parts, _: joined(parts), "evidence", progress, executor)


def _by_level(
    draws: LevelDraws,
    level: Level,
    num_samples: int,
    num_nested: int,
    chunk: int | None,
    progress: bool,
) -> Evidence:
    counts, named = (num_samples, num_nested), ("evidence", progress)
    if level == "local":
        return over_locals(draws, *counts, lambda w: _plain(w.of_locals[0]), local_evidence, *named)
    found = over_globals(draws, *counts, chunk, lambda w: _plain(w.log_weight), *named)
    return replace(found, per="data set", is_up_to_a_constant=draws.is_improper)


def _plain(log_weight: Tensor) -> Evidence:
    """The evidence from all weights at once, (S, B)."""
    return summary([Weights(log_weight, log_weight)], len(log_weight))


def evidence_of(
    draws: RowDraws, num_samples: int, chunk: int | None, use: Use = Use.WEIGHTS
) -> Evidence:
    """The evidence of a batch by importance weighting."""
    parts = (part.log_weight for part in draws.chunks(num_samples, chunk, use))
    replicates = _replicates(draws, num_samples)
    return _of(draws, summary((Weights(w, w) for w in parts), num_samples, replicates))


def of_weights(draws: RowDraws, num_samples: int, chunk: int | None) -> Evidence:
    """The evidence of a batch by importance weighting, from stored weights; on the CPU."""
    w = draws.log_weights(num_samples, chunk)
    replicates = _replicates(draws, num_samples)
    return joined([_of(draws, summary([Weights(w, w)], num_samples, replicates))])


def _replicates(draws: RowDraws, num_samples: int) -> int | None:
    return None if draws.points is None else draws.points.replicates(num_samples)


def _of(draws: RowDraws, found: Evidence) -> Evidence:
    """Add what else is known about the rows."""
    return replace(found, per=draws.unit.per, is_up_to_a_constant=draws.is_improper)
