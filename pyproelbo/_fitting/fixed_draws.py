"""Optimisation with fixed noise: of a smooth function, by its curvature."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from pyproelbo._distributions.sobol import Kind, Points, enough, points_of
from pyproelbo._evidence.curvature import (
    NotAtOptimumError,
    by_curvature,
    by_gradients,
    scales,
    solver,
)
from pyproelbo._evidence.fixed_draws import GROUPS, Draws, FixedObjective
from pyproelbo._fitting.budget import Budget
from pyproelbo._fitting.history import Recorder, values_of
from pyproelbo._fitting.problem import Problem
from pyproelbo._messages.arguments import check_counts
from pyproelbo._rows.runs import Runs, Use
from pyproelbo._terms.roles import is_drawn
from pyproelbo._terms.traces import Traces

_FAILURES = 2  # how often draws may be raised where the Hessian is of no use
_MOST = 2**23  # draws times the size of a site: beyond, one evaluation takes too long


class TooManyDraws(Exception):
    """More draws would be needed than can be made together."""


@dataclass(frozen=True)
class FixedDraws:
    r"""L-BFGS, then Newton's method in a trust region, at draws of the guide with fixed noise.

    The objective is then a smooth function without noise: neither a learning rate nor a number of
    steps is needed (Giordano, Ingram & Broderick 2024, "Black box variational inference with a
    deterministic objective"). Its maximum depends on the S draws. Estimated from the differences of
    the gradient between groups of draws, the objective there lies below the best by about

        1/2 tr((-H)^-1 C) / S,

    with H the Hessian there and C the covariance of one draw's gradient. S is raised until this is
    below the tolerance. Where the Hessian is not definite, as for a net with redundant parameters,
    half of the amount by which the objective is larger at its own draws than at others is used
    instead. The method is for all data at once, for draws that are reparameterised, or summed out
    in parallel (``config_enumerate``), and for objectives that are means over draws; for a guide
    with a joint draw of many latents S becomes large.

    Attributes:
        num_samples: S at first.
        draws: "independent"; or "sobol" for scrambled Sobol points, of which fewer suffice where
            latents are few; S is then 8 times a power of two (see :class:`~pyproelbo.Sobol`), and C
            / S is estimated from the differences of the gradient between replicates.
    """

    num_samples: int = 64
    draws: Kind = "independent"

    def __post_init__(self) -> None:
        check_counts(GROUPS, num_samples=self.num_samples)
        points_of(self.draws, self.num_samples)

    def fit(self, problem: Problem, tolerance: float, budget: Budget, recorder: Recorder) -> None:
        """Leave the parameters where the objective is largest.

        Raises:
            ValueError: for minibatches, for other objectives, for draws without gradients.
            TooManyDraws: where more would be needed, with the best found by fewer.
        """
        reason = unsuited(problem)
        if reason:
            raise ValueError(f"method=FixedDraws() does not apply here: {reason}")
        is_random = any(map(is_drawn, problem.first.guide_sites.values()))
        num, failed = self.num_samples if is_random else enough(self.draws, GROUPS), 0
        while True:
            points = points_of(self.draws, num)
            objective = _Watched(problem, num, points, budget, recorder)
            try:
                optimum = _optimum(objective, problem.seed, tolerance * problem.num_rows)
            finally:
                objective.end()
            lacks = optimum.lacks / problem.num_rows
            if not optimum.is_curved:  # as for a net with redundant parameters
                lacks, failed = _lacks_at_others(problem, optimum), failed + 1
            if lacks < tolerance:
                return
            more = int(num * min(8.0, max(2.0, 1.3 * lacks / tolerance)))
            num = enough(self.draws, more)
            if failed > _FAILURES or num * objective.largest > _MOST:
                raise TooManyDraws


class _Optimum(NamedTuple):
    """The maximum at S draws.

    Attributes:
        value: of the objective, in nats.
        lacks: how far the objective at other draws lies below the best there, on average.
        is_curved: whether the Hessian, from which that is known, is definite.
    """

    value: float
    lacks: float
    is_curved: bool


def _optimum(objective: "_Watched", seed: int, tolerance: float) -> _Optimum:
    """By gradients, and by curvature where these have not reached it."""
    eta = objective.start
    for search in (by_gradients, by_curvature):
        d = scales(objective, eta, seed)
        eta = search(objective, eta, np.sqrt(d))
        try:
            lacks, rise = _lacks(objective, eta, scales(objective, eta, seed))
        except NotAtOptimumError:
            continue
        if rise < tolerance / 10:
            return _Optimum(objective.value(eta)[0], lacks + rise, True)
    return _Optimum(objective.value(eta)[0], math.inf, False)


def _lacks(objective: FixedObjective, eta: np.ndarray, d: np.ndarray) -> tuple[float, float]:
    """How far below the best the objective is, as S is finite and eta not quite the maximum.

    Raises:
        NotAtOptimumError: where the Hessian is not definite.
    """
    num = len(objective.groups)
    gradients = np.stack([objective.value(eta, [group])[1] for group in objective.groups], 1)
    mean = gradients.mean(1, keepdims=True)
    solve = solver(objective, eta, d)
    off = gradients - mean
    rise = float((mean * solve(mean)).sum()) / 2
    return float((off * solve(off)).sum()) / (num * (num - 1)) / 2, rise


def _lacks_at_others(problem: Problem, optimum: _Optimum) -> float:
    """The same by other draws: at most half the excess of the objective at its own draws."""
    values = problem.evaluated().objective
    gap = optimum.value / problem.num_rows - values.mean().item()
    return (max(gap, 0.0) + 2 * values.std().item() / len(values) ** 0.5) / 2


def unsuited(problem: Problem) -> str:
    """The reason, in words, why an objective cannot be maximised at fixed draws; "" if it can."""
    objective, first = problem.objective, problem.first
    if not problem.is_whole:
        return "each step sees a minibatch, and there is no single function to maximise"
    if problem.processes.num > 1:
        return "several processes fit, each on its part of the data"
    if problem.is_held_out:
        return "held-out data stop the fit before the maximum"
    if not objective.additive:
        return f"{type(objective).__name__} is not a mean over draws"
    if any(schedule.settled() != 0 for schedule in objective.schedules.values()):
        return "a weight of the objective changes with the step"
    if "sequential" in first.enumerated:
        return "the guide enumerates a latent one value at a time"
    for name, site in first.guide_sites.items():
        if is_drawn(site) and not site["fn"].has_rsample:
            return f"the draws of latent {name!r} have no gradients, as for a discrete one"
    return ""


class _Watched(FixedObjective):
    """The objective of a problem; evaluations are recorded, and the best parameters are kept."""

    def __init__(
        self,
        problem: Problem,
        num: int,
        points: Points | None,
        budget: Budget,
        recorder: Recorder,
    ) -> None:
        runs = Runs(problem.model, problem.guide, problem.known[0], problem.seed, points)
        self._seen: list[tuple[int, dict[str, Tensor | float]]] = []
        self._problem, self._budget, self._recorder = problem, budget, recorder

        def traces(numbers: range) -> list[Traces]:
            return runs.traces(None, numbers, Use.FIXED)

        tensors = problem.parameters.tensors
        super().__init__(traces, runs.first, self._total, tensors, num, points=points)
        self._best = -np.inf, self.start

    def value(self, eta: np.ndarray, draws: Draws | None = None) -> tuple[float, np.ndarray]:
        """As of the base."""
        self._budget.check()
        self._seen.clear()
        value, gradient = super().value(eta, draws)
        if draws is None and np.isfinite(value):
            self._record()
            self._best = max(self._best, (value, eta.copy()), key=lambda pair: pair[0])
        return value, gradient

    def end(self) -> None:
        """Leave the best parameters."""
        self._put(self._best[1])

    def _total(self, traces: Traces) -> Tensor:
        terms = self._problem.objective._terms_of(traces)
        found = self._problem.objective.objective(terms)
        seen = values_of(terms, found.detach(), self._problem.per)
        self._seen.append((traces.num_particles, seen))
        return found * traces.num_particles

    def _record(self) -> None:
        total = sum(num for num, _ in self._seen)
        names = self._seen[0][1]
        mean = {n: sum(num * float(of[n]) for num, of in self._seen) / total for n in names}
        self._recorder.add(mean)
        self._budget.show()
        self._budget.say(mean["elbo"])
