"""One captured step: its graph, the conditions for its validity, and its replay."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Self

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyproelbo._backend import rng
from pyproelbo._backend.kept_samples import samples_forgotten
from pyproelbo._backend.of_graph import run_with
from pyproelbo._backend.opaque import kept_opaque
from pyproelbo._backend.pyro_private import handlers, parameters_in_store, show
from pyproelbo._backend.sites import Param, Site
from pyproelbo._backend.torch_private import with_hooks
from pyproelbo._backend.updates import Update
from pyproelbo._terms.nested import refilled, tensors_in
from pyproelbo.capture.calls import Call, Replay
from pyproelbo.capture.compared import check, nearness
from pyproelbo.capture.given import Given
from pyproelbo.capture.graph import Computed, capture, gradients
from pyproelbo.capture.hooks import refuse_hooks
from pyproelbo.capture.location import line_of_caller
from pyproelbo.capture.options import Capture, GraphFunction
from pyproelbo.capture.runners import Runners, Steps
from pyproelbo.capture.structure import PLAIN, CannotCapture
from pyproelbo.capture.surroundings import (
    refuse_kept_samples,
    without_autocast,
)
from pyproelbo.capture.updating import Updating, WithUpdate


class Captured:
    """The step of a call, for all calls of its structure.

    Making it advances neither random numbers nor buffers.

    Attributes:
        size: the number of operations.

    Raises:
        CannotCapture: where the graph would differ from the step.
    """

    def __init__(self, call: Call, options: Capture) -> None:
        objective, tensors = call.objective, call.tensors
        self._schedules, self._values = call.parts.schedules, call.parts.current_weights()
        self._weights = {name: call.like.new_tensor(value) for name, value in self._values.items()}
        self._num_checks, self._num_replays = options.check, 0
        self._numbers, self._num_others = call.numbers, 0

        def step(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            with call.parts.weighted_by(self._weights):
                return call.loss(tensors), list(tensors_in(call.records))

        before = Given([call.model, call.guide, objective])
        refuse_hooks(before.modules)
        with _undone(before.buffers()), _Seen() as seen, kept_opaque() as self._kept:
            try:
                with samples_forgotten():
                    numbers = [i for i, x in enumerate(call.numbers) if x is not None]
                    graph = capture(step, tensors, numbers, seen.lines)
                    refuse_kept_samples()
            finally:
                changed = before.others()
                for attribute in changed:
                    attribute.restore()
        for attribute in changed:
            was = attribute.value
            is_number = isinstance(was, (*PLAIN, nn.Module))
            if is_number or any(was is x for x in graph.inputs):
                raise CannotCapture(f"{attribute} changes within the step: make it a buffer")
        self._roots = [call.model, call.guide, objective, *seen.modules]
        self._own = changed  # what each step makes anew
        self.given = Given(self._roots, graph.inputs, but_for=changed)
        refuse_hooks(self.given.modules)
        for x in graph.inputs:
            if not x.is_leaf:
                raise CannotCapture(
                    f"it reads {self.given.name_of(x)}, which needs a gradient and was computed "
                    "outside it: pass it as an argument"
                )
        self._records = call.records
        self._inputs, self._leaves = graph.inputs, graph.leaves
        owned = {id(p) for module in self.given.modules for p in module.parameters(recurse=False)}
        self._parameters = [(n, x, id(x) in owned) for n, x in seen.parameters.items()]
        self._shown = {name: leaf for name, leaf, _ in self._parameters}
        self._leaves_in(tensors)
        self._near, self.size = nearness(graph), len(graph.module.graph.nodes)
        self._updating: Updating | None = None
        self._unfit: Update | None = None  # the last one with which no graph ends
        steps = Steps(self._made, self._checked, self._undone)
        self._runners = Runners(graph.module, tensors, graph.inputs, self._kept, options, steps)

    def holds(self) -> bool:
        """Whether modules and parameters are the captured ones."""
        if self._schedules.keys() != self._values.keys():
            return False
        known = parameters_in_store()
        for name, leaf, is_owned in self._parameters:
            now = known.get(name)
            if now is leaf:
                continue
            needs_store = bool(handlers()) and not pyro.settings.get("module_local_params")
            if now is not None or not is_owned or needs_store:
                return False
        return self.given.are_same()

    def given_now(self) -> Given:
        """What the same programs hold now."""
        return Given(self._roots, but_for=self._own)

    def replay(self, call: Call) -> Replay:
        """Make the step.

        Raises:
            CannotCapture: if an eager step at the same random numbers has other results.
        """
        tensors = call.tensors
        leaves = self._leaves_in(tensors)
        # the first one follows its own capture, and would see no change
        is_checked = 0 < self._num_replays <= self._num_checks
        if call.numbers:
            is_other = call.numbers != self._numbers and self._num_others < max(1, self._num_checks)
            is_checked = is_checked or is_other or self._num_replays == 0
            self._num_others += is_other
        for name, value in call.parts.current_weights().items():
            if value != self._values[name]:
                self._weights[name].fill_(value)
                self._values[name] = value
        runs = self._runners.of(self._updating_for(call.update, tensors), tensors)
        if is_checked:
            expected = self._eager(call, tensors)
            check(self._tried(runs.function, tensors)[0], expected, self._near)
        step = runs.step(tensors)
        if len(handlers()) > step.has_updated:  # else SVI's own alone, which updates what it sees
            show(self._shown)
        self._num_replays += 1
        records = step.records  # without the gradients, which are freed with .grad
        call.parts.records.later(lambda: refilled(self._records, iter(records)))
        return Replay(step.loss, leaves, step.gradients, self._shown, step.has_updated)

    def _updating_for(self, update: Update | None, tensors: list[Tensor]) -> Updating | None:
        """The update with which the graph ends; None where it is left to the optimiser."""
        if update is None:
            return None
        if self._updating is None and update is not self._unfit:
            self._unfit = update  # unless it fits
            if self._runners.may_update(len(self._leaves)):
                self._updating = Updating.of(update, self._leaves, tensors, self._inputs)
        updating = self._updating
        return updating if updating is not None and updating.takes(update, tensors) else None

    def _made(self, run: GraphFunction, tensors: list[Tensor]) -> Computed:
        with torch.no_grad(), without_autocast(), run_with(self._kept) if self._kept else _NOTHING:
            loss, *rest = run(*tensors, *self._inputs)
        num, has_updated = len(self._leaves), isinstance(run, WithUpdate)
        return Computed(loss, rest[:num], rest[num:], has_updated)

    def _tried(self, run: GraphFunction, tensors: list[Tensor]) -> tuple[Computed, list[Tensor]]:
        """The step, and what it has made of the parameters that it updates; undone."""
        changed = run.updating.changed if isinstance(run, WithUpdate) else []
        with self._undone(changed):
            return self._made(run, tensors), [x.detach().clone() for x in changed]

    def _checked(self, run: GraphFunction, tensors: list[Tensor]) -> float | None:
        """Compare a compiled step with the graph's; the seconds of an update that it makes.

        None where a loss that is not finite leaves the update out.
        """
        expected, _ = self._tried(self._runners.function, tensors)
        step, updated = self._tried(run, tensors)
        check(step, expected, self._near)
        if not isinstance(run, WithUpdate):
            return 0.0
        return run.updating.check(updated, step.gradients) if step.loss.isfinite() else None

    def _eager(self, call: Call, tensors: list[Tensor]) -> Computed:
        """The step by the program itself, undone."""
        copies = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
        numbers = call.numbers or (None,) * len(copies)
        filled = [x if n is None else n for x, n in zip(copies, numbers, strict=True)]
        with _undone(self.given.buffers()), torch.enable_grad():
            loss = call.loss(filled)
            keep = self.given.has_graphs()  # compiled loops are back-propagated only once
            return Computed(loss.detach(), gradients(loss, self._leaves_in(copies), keep), [])

    def _leaves_in(self, tensors: list[Tensor]) -> list[Tensor]:
        leaves = [tensors[leaf] if isinstance(leaf, int) else leaf for leaf in self._leaves]
        for x in with_hooks(leaves):
            raise CannotCapture(f"{self.given.name_of(x)} has a hook, as of register_hook")
        return leaves

    def _undone(self, changed: Sequence[Tensor] = ()) -> AbstractContextManager[None]:
        return _undone([*self.given.buffers(), *changed])


_NOTHING = nullcontext()


class _Seen(Messenger):
    """The parameters and modules that a program has used, and the lines of its sample sites."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, Tensor] = {}
        self.modules: list[nn.Module] = []
        self.lines: dict[str, str] = {}  # of sample sites

    def __enter__(self) -> Self:
        self._hook = register_module_forward_pre_hook(lambda m, _: self.modules.append(m))
        return super().__enter__()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hook.remove()
        super().__exit__(exc_type, exc_value, traceback)

    def _pyro_sample(self, msg: Site) -> None:
        self.lines[msg["name"]] = line_of_caller() or self.lines.get(msg["name"], "")

    def _pyro_post_param(self, msg: Param) -> None:
        value = msg["value"]  # of a module alone if parameters are local to modules
        self.parameters[msg["name"]] = getattr(value, "unconstrained", lambda: value)()


@contextmanager
def _undone(buffers: list[Tensor]) -> Iterator[None]:
    """Restore random numbers and buffers afterwards."""
    torch.clear_autocast_cache()  # of parameters, which a graph casts by itself
    copies = [x.clone() for x in buffers]
    try:
        with rng.put_aside():
            yield
    finally:
        torch.clear_autocast_cache()
        with torch.no_grad():
            for x, copy in zip(buffers, copies, strict=True):
                x.copy_(copy)
