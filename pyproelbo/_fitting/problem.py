"""What is fitted: an objective of a model and a guide, on data."""

import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyproelbo._backend import rng
from pyproelbo._fitting.parameters import Parameters, parameters_of
from pyproelbo._fitting.processes import Processes
from pyproelbo._rows.batches import Arguments, Batch, Batches, ReportData, device_of
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.report_data import Per, batches_of, check_scaled, have_rows
from pyproelbo._rows.runs import Runs
from pyproelbo._rows.several import obstacle
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import Program, Traces, run
from pyproelbo.elbo import NonFiniteWarning, TermsELBO

_EVALUATIONS = 32  # runs, on as many batches, by which parameters are compared
_DRAWS, _ELEMENTS = 64, 2**14  # draws in one of them, and numbers of a site, at most
# for parameters that no distribution accepts
_INVALID = (ValueError, torch.linalg.LinAlgError)  # pyright: ignore[reportPrivateImportUsage]
_ROWS = 1024  # of a batch of held-out data, at most


@dataclass
class Problem:
    """An objective of programs on data.

    Attributes:
        per: the unit that nats refer to.
        parameters: what is optimised.
        batches: the batches of training, pass after pass.
        is_whole: whether each batch holds all data.
        known: some of them, on which the result is evaluated.
        compared: the batches on which parameters are compared, at the same draws each time:
            likewise, or held-out data.
        at_once: how many draws for each, in one run.
        first: a run.
        processes: those that fit together.
    """

    model: Program
    guide: Program
    objective: TermsELBO
    per: Per
    parameters: Parameters
    batches: Iterator[Batch]
    is_whole: bool
    known: list[Batch]
    compared: list[Batch]
    at_once: int
    first: Traces
    processes: Processes
    seed: int

    @property
    def is_held_out(self) -> bool:
        """Whether parameters are compared on data that no step uses."""
        return self.compared is not self.known

    @property
    def num_rows(self) -> int:
        """The number of data that a step uses, if nats are per datum."""
        return self.known[0].size if self.per == "datum" else 1

    def step(self, is_over: bool) -> "Step":
        """The loss of the next batch and the parameters' gradients: means over the processes.

        Args:
            is_over: whether this process has no time left.
        """
        batch, loss, said = next(self.batches), math.nan, ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NonFiniteWarning)
                loss = self.objective.loss_and_grads(
                    self.model, self.guide, *batch.args, **batch.kwargs
                )
        except _INVALID as error:
            said = _first_line(error)
        if self.processes.num > 1:
            found = self.parameters.gradients()
            mean = self.processes.mean(torch.cat([found, found.new_tensor([loss, is_over])]))
            loss, over = mean[-2:].tolist()
            self.parameters.put_gradients(mean[:-2])
            is_over = over > 0
        return Step(loss, is_over, said)

    def evaluated(self, batches: list[Batch] | None = None) -> "Values":
        """The objective at fixed batches and draws, for the current parameters.

        It is NaN where they are invalid. The runs are divided among the processes.

        Args:
            batches: the batches, at draws that have chosen nothing; by default ``compared``, at the
                draws by which parameters are compared.
        """
        fresh = batches is not None
        batches = self.compared if batches is None else batches
        every, rank = self.processes.num, self.processes.rank
        runs = [rank + every * i for i in range(-(-_EVALUATIONS // every))]
        found, said = [], ""
        with evaluating(self.model, self.guide), pyro.validation_enabled(False):
            try:
                for r in runs:
                    rng.begin(1000 * (2 * self.seed + fresh) + r)
                    found.append(self._values(batches[r % len(batches)]))
            except _INVALID as error:
                said = _first_line(error)
        like = self.parameters.tensors[0]
        values = torch.stack(found, 1) if not said else like.new_full((2, len(runs)), torch.nan)
        objective, elbo = self.processes.joined(values.detach()).double().cpu()
        return Values(objective, elbo, said)

    def _values(self, batch: Batch) -> Tensor:
        """The objective and the ELBO of a run, (2,)."""
        terms = self._terms(batch)
        num = terms.num_data if self.per == "datum" else 1
        return torch.stack([self.objective.objective(terms) / num, terms.elbo / num])

    def _terms(self, batch: Batch) -> Terms:
        """With as many draws at once as are cheap, where the objective is a mean over them."""
        if self.at_once == 1:
            return self.objective.terms(self.model, self.guide, *batch.args, **batch.kwargs)
        runs = Runs(self.model, self.guide, batch, self.seed)
        return self.objective._terms_of(runs.run(self.at_once))


def _at_once(
    objective: TermsELBO, model: Program, guide: Program, batch: Batch, first: Traces
) -> int:
    """The number of draws at which one run evaluates the objective."""
    num = min(_DRAWS, _ELEMENTS // max(site["log_prob"].numel() for site in first.sites))
    if num < 2 or not objective.additive or "sequential" in first.enumerated:
        return 1
    with evaluating(model, guide):
        return num if obstacle(model, guide, batch.args, batch.kwargs, first) is None else 1


class Step(NamedTuple):
    """A loss, in nats; whether time is over; and an error's message on the parameters, or ""."""

    loss: float
    is_over: bool
    said: str


@dataclass(frozen=True)
class Values:
    """An objective and the ELBO at fixed draws, (R,) each, in nats; an error's message, or ""."""

    objective: Tensor
    elbo: Tensor
    said: str = ""

    @property
    def is_finite(self) -> bool:
        """Whether all are."""
        return bool(self.objective.isfinite().all())

    def gain(self, other: "Values") -> tuple[float, float]:
        """How much larger this objective is than another's, with its standard error."""
        d = self.objective - other.objective
        return d.mean().item(), d.std().item() / len(d) ** 0.5


def problem_of(
    model: Program,
    guide: Program,
    data: ReportData,
    objective: TermsELBO,
    arguments: Arguments | None,
    batch_size: int | None,
    held_out: ReportData,
    processes: Processes,
    seed: int,
) -> Problem:
    """The problem; the programs are run once, to make what they make in their first run.

    The parameters are those of the first process.

    Raises:
        ValueError: for programs without parameters, for minibatches of a program with global
            latents whose plate does not give the number of all data, and of local latents of an
            AutoGuide; for held-out data of a program with global latents.
    """
    if batch_size is None or data is None:
        batches = batches_of(model, guide, data, sys.maxsize, arguments)
    else:
        batches = Batches(data, batch_size, device_of(guide, model), arguments)
    first = next(iter(batches))
    with rng.put_aside(seed), torch.no_grad(), poutine.trace(param_only=True) as params:
        traces = run(model, guide, first.args, first.kwargs)[0]
        # an objective's trial of programs that it has not seen uses random numbers
        objective.terms(model, guide, *first.args, **first.kwargs)
    sites = Sites.of(traces)
    parameters = parameters_of(params.trace, model, guide)
    per: Per = "datum" if have_rows(sites, first.size) else "data set"
    parameters.put(processes.first(parameters.get()))
    known = list(islice(batches.shuffled(seed + 1), _EVALUATIONS))
    is_whole = batches.is_one
    if not is_whole:
        _check_auto(guide, sites)
        if per == "data set":
            check_scaled(sites)
    known = known[:1] if is_whole else known
    compared = known
    if held_out is not None:
        _check_amortised(guide, per)
        compared = list(islice(_even(held_out, batches), _EVALUATIONS))
    at_once = _at_once(objective, model, guide, max(known[0], compared[0], key=_size), traces)
    return Problem(
        model,
        guide,
        objective,
        per,
        parameters,
        batches.shuffled(seed, processes.rank, processes.num),
        is_whole,
        known,
        compared,
        at_once,
        traces,
        processes,
        seed,
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _size(batch: Batch) -> int:
    return batch.size


def _even(held_out: ReportData, trained: Batches) -> Batches:
    """Held-out data in batches of nearly equal size."""
    whole = Batches(held_out, sys.maxsize, trained.device, trained.arguments)
    if not whole.is_one:
        return whole
    num = next(iter(whole)).size
    size = -(-num // -(-num // _ROWS))
    return Batches(held_out, size, trained.device, trained.arguments)


def _check_amortised(guide: Program, per: Per) -> None:
    """Raise a ValueError where a fit to some data gives no posterior for others."""
    if per == "data set" or isinstance(poutine.unwrap(guide), AutoGuide):
        raise ValueError(
            "held_out is for guides that are called with data, and have a posterior for each: here "
            + (
                "a latent is global, with one posterior given the training data. Use pe.loo for "
                "the prediction of other data, or leave held_out out"
                if per == "data set"
                else "an AutoGuide has parameters for each of the training data. Leave held_out "
                "out, or write an amortised guide"
            )
        )


def _check_auto(guide: Program, sites: Sites) -> None:
    """Raise a ValueError for an AutoGuide with parameters for each row of a minibatch."""
    auto = poutine.unwrap(guide)
    if not isinstance(auto, AutoGuide) or auto.create_plates is not None:
        return
    of_data = [{plate.name for plate in site["plates"]} for site in sites.data.values()]
    rows = set.union(*of_data) if of_data else set[str]()
    for name, site in sites.latents.items():
        if rows & {plate.name for plate in site["plates"]}:
            raise ValueError(
                f"the AutoGuide has parameters of latent {name!r} for each row of its plate, which "
                "different rows of different minibatches would share: fit without batch_size, "
                "give the AutoGuide create_plates, or write an amortised guide"
            )
