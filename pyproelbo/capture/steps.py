"""The steps of an objective: which to capture, to replay, or to run eagerly."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING

import torch

from pyproelbo._messages.warn import warn
from pyproelbo.capture.calls import Call, Program, Replay
from pyproelbo.capture.given import Given
from pyproelbo.capture.options import Capture, CaptureWarning
from pyproelbo.capture.structure import CannotCapture, structure_of
from pyproelbo.capture.surroundings import surroundings

if TYPE_CHECKING:
    from pyproelbo.capture.captured import Captured

_PATIENCE = 3  # how many steps in a row may find an attribute of a module changed
_ANY_NUMBER = "any number"
_LARGE = 4000  # operations, whose capture takes a quarter of a second, and half as much to run


@dataclass
class _Structure:
    """Steps whose arguments differ only in the numbers in tensors."""

    programs: tuple[Program, Program]  # whose ids are no others' as long as these are held
    graphs: "list[Captured]" = field(default_factory=list)  # for different attributes of modules
    given: Given | None = None  # as it was when last no graph was right for it
    changes: int = 0
    is_eager: bool = False  # for good
    first: Hashable = None  # of those for all numbers, the structure with those first met


class CapturedSteps:
    """The graphs of an objective's steps.

    A structure runs eagerly when first met, and is captured when met again. A copy of this has no
    graphs.
    """

    def __init__(self, options: Capture) -> None:
        self.options = options
        self._structures: dict[Hashable, _Structure] = {}
        self._new_in_a_row = 0
        self._last: tuple[Hashable, _Structure | None] = None, None
        self._said: set[str] = set()
        self._not_for_all = ""  # numbers as tensors

    def __reduce__(self) -> tuple[type["CapturedSteps"], tuple[Capture]]:
        return CapturedSteps, (self.options,)

    def replay(self, call: Call) -> Replay | None:
        """Make the step by a graph; None where it must run eagerly."""
        try:
            around = _id(call.model), _id(call.guide), surroundings()
            exact = *around, structure_of(call.args), structure_of(call.kwargs)
            last, known = self._last
            if exact != last:  # which takes less than to look it up
                known = self._structures.get(exact)
            if known is None or not (known.graphs or known.is_eager):
                replay = self._for_all_numbers(call, around, exact)
                if replay is not None:
                    return replay
            structure = self._structure(known, exact, call)
            if structure is not None:
                self._last = exact, structure
        except CannotCapture as reason:
            return self._warn(reason)
        if structure is None or structure.is_eager:
            return None
        try:
            return self._replayed(structure, call)
        except CannotCapture as reason:
            structure.is_eager = True
            structure.graphs.clear()
            return self._warn(reason)

    def _for_all_numbers(self, call: Call, around: tuple, exact: Hashable) -> Replay | None:
        """Make the step by a graph whose inputs include the arguments' Python floats.

        None for the first numbers met, and where such a graph would be wrong: each number then has
        its own graph.
        """
        call = call.with_tensors()
        if not any(number is not None for number in call.numbers):
            return None
        key = *around, structure_of(call.args), structure_of(call.kwargs), _ANY_NUMBER
        structure = self._structures.get(key)
        if structure is None:
            self._structures[key] = _Structure((call.model, call.guide), first=exact)
        if structure is None or structure.is_eager or structure.first == exact:
            return None
        try:
            self._new_in_a_row = 0
            return self._replayed(structure, call)
        except CannotCapture as reason:
            structure.is_eager = True
            structure.graphs.clear()
            self._not_for_all = f" (they cannot be tensors by themselves: {reason})"
            return None

    def _replayed(self, structure: "_Structure", call: Call) -> Replay | None:
        captured = self._captured(structure, call)
        return None if captured is None else captured.replay(call)

    def _warn(self, reason: CannotCapture) -> None:
        if str(reason) not in self._said:
            self._said.add(str(reason))
            warn(f"steps run eagerly: {reason}", CaptureWarning)

    def _structure(self, known: _Structure | None, key: Hashable, call: Call) -> _Structure | None:
        """The structure, None if it is new."""
        if known is not None:
            self._new_in_a_row = 0
            return known
        if len(self._structures) >= 4 * self.options.max_graphs:
            for old in [k for k, known in self._structures.items() if not known.graphs][:1]:
                del self._structures[old]
        self._structures[key] = _Structure((call.model, call.guide))
        self._new_in_a_row += 1
        if self._new_in_a_row > 2 * self.options.max_graphs:
            raise CannotCapture(
                "every step has arguments of other shapes, or other numbers: pass numbers as "
                "tensors, pad sequences to few lengths, and give the same model and guide"
                + self._not_for_all
            )
        return None

    def _captured(self, structure: _Structure, call: Call) -> "Captured | None":
        """The graph that is valid for this step, perhaps a new one."""
        for captured in structure.graphs:
            if captured.holds():
                structure.changes = 0
                return captured
        if structure.graphs:
            last = structure.given
            changed = ["a parameter"] if last is None else last.changed()
            if changed:
                structure.changes += 1
                if structure.changes > _PATIENCE:
                    raise CannotCapture(f"{changed[0]} is another one at every step")
                structure.given = structure.graphs[0].given_now()
                return None
        if sum(len(known.graphs) for known in self._structures.values()) >= self.options.max_graphs:
            if not structure.graphs:
                raise CannotCapture(
                    f"there are {self.options.max_graphs} graphs for other arguments, and this is "
                    f"max_graphs{self._not_for_all}"
                )
            del structure.graphs[0]
        captured = _captured(call, self.options)
        structure.graphs.append(captured)
        structure.given, structure.changes = None, 0
        return captured if captured.size <= _LARGE else None  # the next step makes it run


def _id(program: Program) -> Hashable:
    """Equal for the same program, and for the same method of the same object."""
    is_method = isinstance(program, MethodType)
    return (id(program.__self__), program.__func__) if is_method else id(program)


def _captured(call: Call, options: Capture) -> "Captured":
    """The step in a graph.

    Raises:
        CannotCapture: where the graph would differ from the step, or torch lacks what makes one.
    """
    try:  # of torch's experimental parts, which change with its releases
        from pyproelbo.capture.captured import Captured
    except (ImportError, AttributeError) as error:
        raise CannotCapture(
            f"torch {torch.__version__} lacks what captures steps ({error}): take another release "
            "of torch, or compile=False to silence this"
        ) from error
    return Captured(call, options)
