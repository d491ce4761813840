"""The choice of the method for a problem."""

from dataclasses import dataclass

from pyproelbo._fitting.budget import Budget
from pyproelbo._fitting.fixed_draws import FixedDraws, TooManyDraws, unsuited
from pyproelbo._fitting.history import Recorder
from pyproelbo._fitting.problem import Problem
from pyproelbo._fitting.stochastic import Stochastic

FEW = 10_000  # parameters


@dataclass(frozen=True)
class Automatic:
    """Fixed draws where possible and with few parameters; otherwise, or then, stochastic steps."""

    def fit(self, problem: Problem, tolerance: float, budget: Budget, recorder: Recorder) -> None:
        """Leave the parameters where the objective is largest; raises what the methods raise."""
        if problem.parameters.size <= FEW and not unsuited(problem):
            try:
                return FixedDraws().fit(problem, tolerance, budget, recorder)
            except TooManyDraws:
                pass  # continue from there
        return Stochastic().fit(problem, tolerance, budget, recorder)
