"""The steps of an objective: which to capture, which to replay, which to leave."""

import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from pyproelbo.capture.captured import Call, Captured, Replay
from pyproelbo.capture.options import Capture, CaptureWarning
from pyproelbo.capture.structure import Attributes, CannotCapture, structure_of, surroundings

_PATIENCE = 3  # how many steps in a row may find an attribute of a module changed


@dataclass
class _Structure:
    """Steps whose arguments differ in the numbers of tensors alone."""

    graphs: list[Captured] = field(default_factory=list)  # for different attributes of modules
    attributes: Attributes | None = None  # as they were when last no graph was right for them
    changes: int = 0
    is_eager: bool = False  # for good


class CapturedSteps:
    """The graphs of an objective's steps.

    A structure runs eagerly when it is first met, and is captured when it comes again. A copy of
    this has no graphs.
    """

    def __init__(self, options: Capture) -> None:
        self.options = options
        self._structures: dict[Hashable, _Structure] = {}
        self._new_in_a_row = 0
        self._said: set[str] = set()

    def __reduce__(self) -> Any:
        return CapturedSteps, (self.options,)

    def replay(self, call: Call) -> Replay | None:
        """Make the step by a graph; None where it has to run eagerly."""
        structure = None
        try:
            key = call.model, call.guide, structure_of(call.args), structure_of(call.kwargs)
            structure = self._structure((*key, surroundings()))
            if structure is None or structure.is_eager:
                return None
            captured = self._captured(structure, call)
            return None if captured is None else captured.replay(call)
        except CannotCapture as reason:
            if structure is not None:
                structure.is_eager = True
                structure.graphs.clear()
            if str(reason) not in self._said:
                self._said.add(str(reason))
                warnings.warn(f"steps run eagerly: {reason}", CaptureWarning, stacklevel=4)
            return None

    def _structure(self, key: Hashable) -> _Structure | None:
        """The structure, None if it is new."""
        if key in self._structures:
            self._new_in_a_row = 0
            return self._structures[key]
        if len(self._structures) >= 4 * self.options.max_graphs:
            for old in [k for k, known in self._structures.items() if not known.graphs][:1]:
                del self._structures[old]
        self._structures[key] = _Structure()
        self._new_in_a_row += 1
        if self._new_in_a_row > 2 * self.options.max_graphs:
            raise CannotCapture(
                "every step has arguments of other shapes, or other numbers: pass numbers as "
                "tensors, pad sequences to few lengths, and give the same model and guide"
            )
        return None

    def _captured(self, structure: _Structure, call: Call) -> Captured | None:
        """The graph that is right for this step, perhaps a new one."""
        for captured in structure.graphs:
            if captured.holds():
                structure.changes = 0
                return captured
        if structure.graphs:
            last = structure.attributes
            changed = ["a parameter"] if last is None else last.changed()
            if changed:
                structure.changes += 1
                if structure.changes > _PATIENCE:
                    raise CannotCapture(f"{changed[0]} is another one at every step")
                structure.attributes = Attributes(structure.graphs[0].attributes.modules)
                return None
        if sum(len(known.graphs) for known in self._structures.values()) >= self.options.max_graphs:
            if not structure.graphs:
                raise CannotCapture(
                    f"there are {self.options.max_graphs} graphs for other arguments, and this is "
                    "max_graphs"
                )
            del structure.graphs[0]
        captured = Captured(call, self.options)
        structure.graphs.append(captured)
        structure.attributes, structure.changes = None, 0
        return captured
