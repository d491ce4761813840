"""Stochastic optimisation that finds and lowers its learning rate, and stops by itself."""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._fitting.budget import Budget, OutOfTime
from pyproelbo._fitting.history import Recorder, values_of
from pyproelbo._fitting.problem import Problem, Values
from pyproelbo._messages.arguments import check_counts, check_positive

RATES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
_KEPT = (4, 3, 1)  # of the rates, after each round


class Diverged(Exception):
    """No learning rate keeps the objective finite; with an error's message, or ""."""


class Point(NamedTuple):
    """Parameters, and the objective there."""

    vector: Tensor
    values: Values


class _Trial(NamedTuple):
    """A rate that is tried, and what it has reached."""

    lr: float
    vector: Tensor
    optimiser: torch.optim.Optimizer


@dataclass(frozen=True)
class Stochastic:
    r"""Adam with a learning rate that is found, then lowered until nothing more is gained.

    Of the rates 1, 0.3, 0.1, ..., 0.0003 the best four continue after ``trial_steps`` steps, the
    best three of these after twice as many more, and the best of these after four times as many
    more is kept, with its parameters (successive halving, Jamieson & Talwalkar 2016): the rate that
    is fastest at first often ends at a poor optimum. At a constant rate iterates settle around an
    optimum, at a distance that depends on the rate; their mean is closer (Dhaka et al. 2020,
    "Robust, accurate stochastic optimization for variational inference"). The mean of the second
    half of the iterates is therefore evaluated after ``least_steps``, twice, four times as many,
    ...; when doubling the time has gained less than the tolerance, the next rate is a quarter of
    this one (Welandawe et al. 2022, "Robust, automated, and accurate black-box variational
    inference"). When a lower rate has also gained less than the tolerance, the fit has converged.
    Means are compared at the same draws and data. A plateau on which steps gain nothing for long,
    as before a mixture's components separate, cannot be distinguished from an optimum in this way:
    :class:`FixedDraws` detects it by the curvature.

    Attributes:
        lr: the first learning rate; None to find it.
        trial_steps: steps at each rate, before four are kept.
        least_steps: steps before a rate is first evaluated.
        max_rates: the largest number of rates.
    """

    lr: float | None = None
    trial_steps: int = 100
    least_steps: int = 200
    max_rates: int = 8

    def __post_init__(self) -> None:
        if self.lr is not None:
            check_positive(lr=self.lr)
        check_counts(
            trial_steps=self.trial_steps, least_steps=self.least_steps, max_rates=self.max_rates
        )

    def fit(self, problem: Problem, tolerance: float, budget: Budget, recorder: Recorder) -> None:
        """Leave the parameters where the objective is largest.

        Raises:
            OutOfTime: with the best parameters found; KeyboardInterrupt likewise.
            Diverged: where no rate keeps the objective finite.
        """
        search = _Search(problem, tolerance, budget, recorder)
        at_rest: Point | None = None
        try:
            lr = self._found(search) if self.lr is None else self.lr
            for _ in range(self.max_rates):
                now = search.until_rest(lr, self.least_steps)
                if now is not None:
                    if at_rest is not None and search.is_gain_small(now, at_rest):
                        return
                    at_rest = now
                lr /= 4
        finally:
            search.end()
        raise Diverged(search.said) if at_rest is None else OutOfTime

    def _found(self, search: "_Search") -> float:
        """The rate that remains; training continues from its parameters."""
        problem, steps = search.problem, self.trial_steps
        trials = [_Trial(lr, search.best.vector, search.optimiser(lr)) for lr in RATES]
        for kept in _KEPT:
            objective, found = problem.objective.state_dict(), list[tuple[float, _Trial]]()
            for trial in trials:
                problem.parameters.put(trial.vector)
                problem.objective.load_state_dict(objective)
                point = search.run(trial.lr, steps, trial.optimiser)
                if point is not None:
                    value = point.values.objective.mean().item()
                    found.append((value, trial._replace(vector=problem.parameters.get())))
            if not found:
                raise Diverged(search.said)
            found.sort(key=lambda of: of[0], reverse=True)
            trials = [trial for _, trial in found[:kept]]
            steps *= 2
        trial = trials[0]
        problem.parameters.put(trial.vector)
        return trial.lr


class _Search:
    """Continues from the best parameters so far, which it keeps."""

    def __init__(
        self, problem: Problem, tolerance: float, budget: Budget, recorder: Recorder
    ) -> None:
        self.problem, self._tolerance = problem, tolerance
        self._budget, self._recorder = budget, recorder
        self.best = Point(problem.parameters.get(), problem.evaluated())
        self.said = ""  # by an error, about invalid parameters
        ends = [schedule.settled() for schedule in problem.objective.schedules.values()]
        self._settles = max((end for end in ends if end is not None), default=0)

    def until_rest(self, lr: float, least_steps: int) -> Point | None:
        """Train at one rate until twice the time gains little: its best point; None if it fails.

        The time between evaluations doubles, and each is at the mean of the iterates since the last
        one.
        """
        optimiser = self.optimiser(lr)
        before: Point | None = None
        best: Point | None = None
        steps = least_steps
        while True:
            now = self.run(lr, steps, optimiser)
            if now is None or self._has_fallen(now):
                self.problem.parameters.put(self.best.vector)
                return None
            best = now if best is None or self._is_better(now, best) else best
            is_settled = self.problem.objective.step >= self._settles
            if before is not None and is_settled:
                if self.is_gain_small(now, before):
                    self.problem.parameters.put(best.vector)
                    return best
                steps *= 2
            before = now

    def run(
        self, lr: float, steps: int, optimiser: torch.optim.Optimizer | None = None
    ) -> Point | None:
        """Some steps: the mean of the later iterates, or the last; None if not finite."""
        problem = self.problem
        optimiser = self.optimiser(lr) if optimiser is None else optimiser
        total, num = torch.zeros_like(self.best.vector), 0
        for step in range(steps):
            optimiser.zero_grad(set_to_none=True)
            loss = self._step()
            if loss is None:
                return None
            optimiser.step()
            self._recorder.add(partial(self._metrics, -loss, lr))
            self._budget.show()
            if step >= steps // 4:
                total += problem.parameters.get()
                num += 1
        last = self._here()
        with problem.parameters.held():
            problem.parameters.put(total / num)
            mean = self._here()
        found = [point for point in (mean, last) if point.values.is_finite]
        if not found:
            return None
        point = max(found, key=lambda p: p.values.objective.mean().item())
        self._budget.say(point.values.elbo.mean().item())
        if self._is_better(point, self.best):
            self.best = point
        return point

    def _step(self) -> float | None:
        """The loss, with its gradients; None where it is not finite or a parameter is invalid."""
        loss, is_over, said = self.problem.step(self._budget.is_over)
        self.said = said or self.said
        if is_over:
            raise OutOfTime
        return loss if math.isfinite(loss) else None

    def end(self) -> None:
        """Leave the best parameters: of those evaluated, and the last ones.

        With several processes, the others may not be there for a last joint evaluation.
        """
        for value in self.problem.parameters.tensors:
            value.grad = None
        if self.problem.processes.num > 1:
            self.problem.parameters.put(self.best.vector)
            return
        here = self._here()
        if not here.values.is_finite or not self._is_better(here, self.best):
            self.problem.parameters.put(self.best.vector)

    def is_gain_small(self, now: Point, before: Point) -> bool:
        """Whether one point is hardly better than another."""
        gain, error = now.values.gain(before.values)
        return gain + error < self._tolerance

    def _is_better(self, one: Point, other: Point) -> bool:
        if not other.values.is_finite or self.problem.objective.step < self._settles:
            return True
        return one.values.gain(other.values)[0] > 0

    def _metrics(self, objective: float, lr: float) -> dict[str, Tensor | float]:
        terms = self.problem.objective.last_terms
        assert terms is not None
        return {**values_of(terms, objective, self.problem.per), "lr": lr}

    def _has_fallen(self, now: Point) -> bool:
        """Whether a point is far below the best, as after a jump."""
        gain, error = now.values.gain(self.best.values)
        spread = self.best.values.objective.std().item()
        return gain < -max(10 * self._tolerance, 5 * error, spread)

    def _here(self) -> Point:
        values = self.problem.evaluated()
        self.said = values.said or self.said
        return Point(self.problem.parameters.get(), values)

    def optimiser(self, lr: float) -> torch.optim.Optimizer:
        """A new Adam with this rate."""
        return torch.optim.Adam(self.problem.parameters.tensors, lr=lr)
