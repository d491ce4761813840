"""From a program to a fitted guide, without a learning rate, a number of steps or a loop."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import nn

from pyproelbo._backend import rng
from pyproelbo._fitting.automatic import Automatic
from pyproelbo._fitting.budget import Budget, OutOfTime
from pyproelbo._fitting.fixed_draws import TooManyDraws
from pyproelbo._fitting.history import History, Logger, Recorder
from pyproelbo._fitting.problem import Problem, problem_of
from pyproelbo._fitting.processes import Alone, processes_of
from pyproelbo._fitting.stochastic import Diverged
from pyproelbo._messages import endings
from pyproelbo._messages.arguments import check_counts, check_positive, check_shared
from pyproelbo._messages.warn import warn
from pyproelbo._results.per import Per, nats
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Row, Table, row
from pyproelbo._rows.batches import Arguments, ReportData
from pyproelbo._rows.passes import UnfinishedWarning
from pyproelbo._terms.traces import Program
from pyproelbo.elbo import BetaELBO, TermsELBO

if TYPE_CHECKING:
    import xarray
    from lightning.fabric import Fabric

Reason = Literal["converged", "time", "diverged", "interrupted"]


class NotConvergedWarning(UserWarning):
    """A fit has stopped before it converged; the message gives the reason."""


class Method(Protocol):
    """How the objective is maximised."""

    def fit(self, problem: Problem, tolerance: float, budget: Budget, recorder: Recorder) -> None:
        """Leave the parameters where the objective is largest."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Fit(Result):
    r"""The result of a fit, and why it stopped; the programs hold the parameters.

    Attributes:
        reason: "converged"; "time" where the bound on time came first; "diverged" where the
            objective did not stay finite; "interrupted" by Ctrl-C.
        elbo: the true ELBO at the end, in nats, with its Monte Carlo error ``elbo_stderr``: from
            draws that no step has used, and after a fit by minibatches from some of the batches.
        held_out_elbo: the ELBO of the held-out data, likewise, with ``held_out_elbo_stderr``; None
            without such data. It is a little too high, since these data have chosen the parameters.
        objective: the objective that was maximised, likewise, with ``objective_stderr``.
        tolerance: the gain, in nats, below which the fit stops.
        history: the terms by step.
        method: the method of the fit.
        seconds: the duration.
        num_steps: the number of gradients.
        per: the unit that nats refer to: a "datum", or the "data set".
    """

    reason: Reason
    elbo: float
    elbo_stderr: float
    objective: float
    objective_stderr: float
    held_out_elbo: float | None
    held_out_elbo_stderr: float | None
    tolerance: float
    history: History
    method: Method
    seconds: float
    num_steps: int
    per: Per

    @property
    def is_converged(self) -> bool:
        """Whether the fit has stopped by itself."""
        return self.reason == "converged"

    @property
    def notes(self) -> list[str]:
        """Why the fit stopped, unless it stopped by itself."""
        return [] if self.is_converged else [f"Not converged: {_WHY[self.reason]}"]

    def to_xarray(self) -> "xarray.Dataset":
        """The history, with the result of the fit as attributes."""
        found = self.history.to_xarray()
        names = ("reason", "elbo", "elbo_stderr", "objective", "objective_stderr", "tolerance")
        names = (*names, "seconds", "num_steps", "held_out_elbo", "held_out_elbo_stderr")
        values = {name: getattr(self, name) for name in names}
        return found.assign_attrs({name: v for name, v in values.items() if v is not None})

    def _table(self) -> Table:
        rows = [row("ELBO", self.elbo, self.elbo_stderr)]
        if self.held_out_elbo is not None:
            rows.append(row("of held-out data", self.held_out_elbo, self.held_out_elbo_stderr))
        if not math.isclose(self.objective, self.elbo, rel_tol=1e-9):
            rows.append(row("objective", self.objective, self.objective_stderr))
        rows += [row("steps", self.num_steps), row("seconds", self.seconds, decimals=1)]
        rows.append(Row(f"ended: {self.reason}", ()))
        return Table(f"Fit, {nats(self.per)}", rows)


_WHY: dict[str, str] = {
    "time": "the time was over. Allow more by max_time=, or call fit again, which continues.",
    "diverged": "the objective did not stay finite at any learning rate. Look for a density that "
    "is infinite or NaN where the guide starts, and give the guide a smaller init_scale.",
    "interrupted": "it was interrupted. Call fit again to continue.",
}


def fit(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    objective: TermsELBO | None = None,
    arguments: Arguments | None = None,
    batch_size: int | None = None,
    held_out: ReportData | None = None,
    method: Method | None = None,
    tolerance: float = 0.02,
    max_time: float | None = 600.0,
    loggers: Iterable[Logger] = (),
    fabric: "Fabric | None" = None,
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    """Fit a guide, and the parameters of the model, to data (see :class:`Fit`).

    Args:
        model, guide, data, arguments, progress: as :func:`evidence`. A loader's batches are
            trained on as they come, and those of ``datasets.Files`` in a new order in each pass.
        objective: what is maximised; by default ``BetaELBO()``, the ELBO.
        batch_size: rows a step; None for all data at each step.
        held_out: data that no step uses, of the same kind; for amortised guides. Parameters are
            then compared by the objective on these data: the fit stops when it no longer grows, and
            leaves the parameters with the highest value, however much higher the objective on
            ``data`` could become. ``batch_size`` does not apply to them.
        method: :class:`~pyproelbo.FixedDraws` or :class:`~pyproelbo.Stochastic`, which describe
            their settings. By default the first where all data are used at once, draws have
            gradients or are summed out, and there are at most 10,000 parameters; otherwise the
            second. Where the first would need too many draws, the second continues from its
            parameters.
        tolerance: in nats per datum, or of the data set where a latent is global: a fit has
            converged when continuing has gained less.
        max_time: in seconds; None for no bound.
        loggers: they receive the terms of the steps: Lightning's ``CSVLogger``,
            ``TensorBoardLogger``, or another with ``log_metrics``.
        fabric: Lightning's Fabric, launched, for a fit by several processes or devices::

                fabric = lightning.Fabric(devices=4)
                fabric.launch()
                result = pe.fit(model, guide, data, batch_size=64, fabric=fabric)

            Programs that are modules are moved to its device. Each process takes steps on batches
            of its part of the rows, or on the batches of its loader, with its own draws, and
            gradients are means over the processes. All processes return the same result; the first
            shows the progress and writes to the loggers. All start with the parameters of the
            first.
        seed: for draws and minibatches. The state of random number generators is restored.

    Nothing found is lost: Ctrl-C, and the end of the time, leave the best parameters so far.

    Raises:
        ValueError: for programs without parameters, for minibatches of a program with global
            latents whose plate does not give the number of all data, and for held-out data for
            which the guide has no posterior.

    >>> import torch
    >>> from pyproelbo.guides.ppca import Diagonal
    >>> from pyproelbo.models.ppca import PPCA
    >>> result = fit(PPCA(1, 3), Diagonal(1, 3), torch.randn(50, 3), max_time=60)
    >>> result.reason
    'converged'
    """
    check_positive(tolerance=tolerance, max_time=1.0 if max_time is None else max_time)
    check_counts(batch_size=1 if batch_size is None else batch_size)
    check_shared(None, seed, arguments, None)
    processes = processes_of(fabric)
    if fabric is not None:
        for program in (model, guide):
            if isinstance(program, nn.Module):
                fabric.to_device(program)
    objective = BetaELBO() if objective is None else objective
    if not isinstance(objective, TermsELBO):
        raise ValueError(
            "objective should be a TermsELBO, such as BetaELBO(), got "
            f"{type(objective).__name__}: Pyro's Trace_ELBO is BetaELBO(kl='sampled')"
        )
    method = Automatic() if method is None else method
    problem = problem_of(
        model, guide, data, objective, arguments, batch_size, held_out, processes, seed
    )
    is_first = processes.rank == 0
    recorder = Recorder(problem.per, loggers if is_first else ())
    budget = Budget(max_time, progress and is_first)
    reason: Reason = "converged"
    said = ""
    try:
        with rng.put_aside(seed + 2**32 * processes.rank):
            method.fit(problem, tolerance, budget, recorder)
    except (OutOfTime, TooManyDraws):
        reason = "time"
    except Diverged as error:
        reason, said = "diverged", str(error)
    except KeyboardInterrupt:
        reason = "interrupted"
        problem.processes = Alone()  # the others may not reach what follows
        warn("interrupted: the parameters are the best so far", UnfinishedWarning)
    finally:
        budget.close()
    endings.note(reason)
    with rng.put_aside():
        values = problem.evaluated(problem.known)
        held = problem.evaluated(problem.compared).elbo if problem.is_held_out else None
    if reason in ("time", "diverged"):
        said = f" The last error was: {said}" if said else ""
        warn(f"not converged: {_WHY[reason]}{said}", NotConvergedWarning)
    error = len(values.elbo) ** 0.5
    return Fit(
        reason,
        values.elbo.mean().item(),
        values.elbo.std().item() / error,
        values.objective.mean().item(),
        values.objective.std().item() / error,
        None if held is None else held.mean().item(),
        None if held is None else held.std().item() / error,
        tolerance,
        recorder.history(),
        method,
        recorder.seconds,
        recorder.num_steps,
        problem.per,
    )
