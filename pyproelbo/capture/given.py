"""What a graph takes as given: all that its programs read except numbers in tensors."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dis import get_instructions
from functools import partial
from operator import attrgetter, call, eq, is_
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.parameter import is_lazy

from pyproelbo._backend.torch_private import HELD, hooks_of, tensors_held
from pyproelbo._backend.unregistered import Unregistered
from pyproelbo.capture.structure import PLAIN

_INTERNAL = {*nn.Module().__dict__, *HELD} - {"training"}
_LIBRARIES = {*sys.stdlib_module_names, "torch", "pyro", "numpy", "scipy", "lightning"}
_CALLED = ("forward", "__call__", "objective", "log_prob", "rsample", "sample")  # by libraries
_NAMESPACES = (Namespace, SimpleNamespace)
_layout = attrgetter("shape", "dtype", "device", "requires_grad")
_MANY = 100  # entries, beyond which a list or a dict is data, and not looked into


class Attribute(NamedTuple):
    """A value that an object, a list, a class, a closure or a file holds by a name."""

    owner: str
    holder: Any  # a dict, a list, a class or the cell of a closure
    name: Any  # an index of a list, else a key or a name
    value: object
    is_there: bool = True

    @property
    def key(self) -> tuple:
        """What identifies it among all attributes: its holder, by id, and its name."""
        return id(self.holder), self.name

    @property
    def get(self) -> Callable[[Any], object]:
        """From the name to the holder's value for it, None where it has none."""
        holder = self.holder
        if isinstance(holder, CellType):
            return lambda _: holder.cell_contents
        if isinstance(holder, list):
            return lambda i: holder[i] if i < len(holder) else None
        return vars(holder).get if isinstance(holder, type) else holder.get

    def is_same(self) -> bool:
        """Whether it is the same object, whatever the numbers in it; for numbers, equal."""
        now = self.get(self.name)
        if now is self.value:
            return True
        return isinstance(now, PLAIN) and type(now) is type(self.value) and now == self.value

    def restore(self) -> None:
        """Give the holder its value back."""
        if isinstance(self.holder, CellType):
            self.holder.cell_contents = self.value
        elif isinstance(self.holder, type):
            setattr(self.holder, self.name, self.value)
        elif not self.is_there:
            self.holder.pop(self.name)
        elif not isinstance(self.holder, list) or self.name < len(self.holder):
            self.holder[self.name] = self.value

    def __str__(self) -> str:
        if isinstance(self.holder, list):
            return f"{self.owner}[{self.name}]"
        return f"{self.owner}.{self.name}" if self.owner else str(self.name)


class Given:
    """What programs hold now: layers, tensors, numbers, functions, and hooks of modules.

    For modules it includes everything; for other objects, closures and files, what the programs
    name. What libraries hold themselves is left out.

    Args:
        roots: the programs, and modules that they are known to use.
        tensors: others that they read.
        but_for: attributes to leave out.
    """

    def __init__(
        self,
        roots: Iterable[object],
        tensors: Iterable[Tensor] = (),
        but_for: Iterable[Attribute] = (),
    ) -> None:
        survey = _Survey(roots)
        self.modules = survey.modules
        skipped = {attribute.key for attribute in but_for}
        self._all = [x for key, x in survey.attributes.items() if key not in skipped]
        self._gets = [x.get for x in self._all]
        self._names = [x.name for x in self._all]
        self._values = [x.value for x in self._all]
        known = [x for x in (*self._values, *tensors) if isinstance(x, Tensor) and not is_lazy(x)]
        self._tensors = list({id(x): x for x in known}.values())
        self._strided = [x for x in self._tensors if x.layout == torch.strided]
        self._layouts = list(map(_layout, self._tensors))
        self._strides = list(map(Tensor.stride, self._strided))
        self._types = list(map(type, self.modules))
        hooks = [hooks for module in self.modules for hooks in hooks_of(module)]
        self._without_hooks = [x for x in hooks if not x]
        self._with_hooks = [x for x in hooks if x]
        self._hooks = list(map(tuple, self._with_hooks))
        left = {id(x.holder) for x in but_for}
        sized = [x for x in survey.sized if id(x) not in left]
        self._empty, self._sized = [x for x in sized if not x], [x for x in sized if x]
        self._sizes = list(map(len, self._sized))

    def are_same(self) -> bool:
        """Whether nothing has been replaced, whatever the numbers in tensors."""
        # lists of what is now would call the garbage collector, step by step
        now = map(call, self._gets, self._names)  # pyright: ignore
        return (
            not any(self._empty)
            and all(map(eq, map(len, self._sized), self._sizes))
            and (all(map(is_, now, self._values)) or not self.others())
            and all(map(eq, map(_layout, self._tensors), self._layouts))
            and all(map(eq, map(Tensor.stride, self._strided), self._strides))
            and all(map(is_, map(type, self.modules), self._types))
            and not any(self._without_hooks)
            and all(map(eq, map(tuple, self._with_hooks), self._hooks))
        )

    def changed(self) -> list[str]:
        """What has changed, in words."""
        words = list(map(str, self.others()))
        return words if words or self.are_same() else ["a layer, a parameter or a hook"]

    def others(self) -> list[Attribute]:
        """The attributes that have another value now."""
        return [attribute for attribute in self._all if not attribute.is_same()]

    def name_of(self, x: Tensor) -> str:
        """The name by which a tensor is held."""
        names = (str(attribute) for attribute in self._all if attribute.value is x)
        return next(names, f"a tensor of shape {tuple(x.shape)}")

    def has_graphs(self) -> bool:
        """Whether a tensor was computed from others outside the step."""
        return any(x.grad_fn is not None for x in self._tensors)

    def buffers(self) -> list[Tensor]:
        """The tensors of modules that no gradient changes, but the program may."""
        held = {id(d) for m in self.modules for d in (*tensors_held(m), vars(m))}
        return [
            x.value
            for x in self._all
            if id(x.holder) in held and isinstance(x.value, Tensor) and not x.value.requires_grad
        ]


class _Survey:
    """Searches programs until the names that they use lead to nothing new.

    Attributes:
        modules: in the order in which they are found.
        attributes: by holder and name.
        sized: lists and dicts that are held whole.
    """

    def __init__(self, roots: Iterable[object]) -> None:
        self.attributes: dict[tuple, Attribute] = {}
        self._found: dict[int, object] = {}
        self._names: set[str] = set(_CALLED)
        self._entries: dict[int, Sized] = {}
        self._labels: dict[int, str] = {}  # of lists and dicts
        for root in roots:
            self._find(root)
        size = -1
        while size != (size := len(self._found) + len(self._names)):
            for x in list(self._found.values()):
                self._look_into(x)

    @property
    def modules(self) -> list[nn.Module]:
        return [x for x in self._found.values() if isinstance(x, nn.Module)]

    @property
    def sized(self) -> list[Sized]:
        return list(self._entries.values())

    def _find(self, x: object) -> None:
        kinds = (nn.Module, Unregistered, Distribution, FunctionType, MethodType, partial)
        if isinstance(x, list | tuple | dict):
            if len(x) <= _MANY:
                self._found[id(x)] = x
        elif isinstance(x, property | staticmethod | classmethod):
            self._find(x.fget if isinstance(x, property) else x.__func__)
        elif isinstance(x, type | ModuleType):
            if not _is_library(x.__name__ if isinstance(x, ModuleType) else x.__module__):
                self._found[id(x)] = x
        elif isinstance(x, (*kinds, *_NAMESPACES)) or not (
            isinstance(x, Tensor) or not hasattr(x, "__dict__") or _is_library(type(x).__module__)
        ):
            self._found[id(x)] = x

    def _add(
        self, owner: str, holder: object, name: object, value: object, is_there: bool = True
    ) -> None:
        attribute = Attribute(owner, holder, name, value, is_there)
        if attribute.key not in self.attributes:
            self.attributes[attribute.key] = attribute
            self._labels.setdefault(id(value), str(attribute))
            self._find(value)

    def _look_into(self, x: object) -> None:
        if isinstance(x, nn.Module):
            self._look_into_module(x)
        elif isinstance(x, Unregistered):
            self._add(self._labels.get(id(x), ""), vars(x), "module", x.module)
        elif isinstance(x, FunctionType):
            self._look_into_function(x)
        elif isinstance(x, MethodType):
            self._find(x.__func__)
            self._find(x.__self__)
        elif isinstance(x, partial):
            for part in (x.func, x.args, x.keywords):
                self._find(part)
        elif isinstance(x, tuple):
            for part in x:
                self._find(part)
        elif isinstance(x, Distribution):
            for name, value in vars(x).items():
                if isinstance(value, Tensor | Distribution):
                    self._add(type(x).__name__, vars(x), name, value)
        elif isinstance(x, list | dict):
            label = self._labels.get(id(x), "")
            self._hold(label, x, enumerate(x) if isinstance(x, list) else x.items())
        else:
            if not isinstance(x, type | ModuleType):
                self._look_into_class(x)
            owner = x.__name__ if isinstance(x, type | ModuleType) else type(x).__name__
            holder = x if isinstance(x, type) else vars(x)
            for name, value in self._named(vars(x)):
                self._add(owner, holder, name, value)

    def _look_into_module(self, module: nn.Module) -> None:
        owner, own = type(module).__name__, module.__dict__
        for held in (own[kind] for kind in HELD if isinstance(own.get(kind), dict)):
            self._hold(owner, held, held.items())
        skipped = {*_INTERNAL, *getattr(module, "_changes_by_itself", ())}
        has_hooks = any(hooks_of(module))  # torch's own, which make its weights anew at each call
        for name, value in own.items():
            if has_hooks and isinstance(value, Tensor):
                continue
            is_always_seen = isinstance(value, (Tensor, nn.Module, Unregistered, *PLAIN))
            if name not in skipped and (is_always_seen or name in self._names):
                self._add(owner, own, name, value)
        if "forward" not in own:
            self._add(owner, own, "forward", None, is_there=False)
        self._look_into_class(module)

    def _look_into_class(self, x: object) -> None:
        for kind in type(x).__mro__:
            if _is_library(kind.__module__):
                continue
            self._find(kind)
            for name, _ in self._named(vars(kind)):
                if name not in vars(x):
                    self._add(type(x).__name__, vars(x), name, None, is_there=False)

    def _look_into_function(self, function: FunctionType) -> None:
        if _is_library(function.__globals__.get("__name__")):
            self._find(getattr(function, "__wrapped__", None))  # a library's decorator of one
            return
        codes = list(_codes(function.__code__))
        self._names.update(*(code.co_names for code in codes))
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            try:
                self._add("", cell, name, cell.cell_contents)
            except ValueError:  # not set yet
                continue
        for name in set().union(*map(_globals_in, codes)) & function.__globals__.keys():
            value = function.__globals__[name]
            if isinstance(value, ModuleType):
                self._find(value)
            else:
                self._add("", function.__globals__, name, value)
        for name, value in self._named(vars(function)):
            self._add(function.__name__, vars(function), name, value)
        for default in (function.__defaults__, function.__kwdefaults__):
            self._find(default)

    def _hold(self, owner: str, holder: Sized, items: Iterable[tuple[object, object]]) -> None:
        self._entries[id(holder)] = holder
        for name, value in items:
            self._add(owner, holder, name, value)

    def _named(self, held: Mapping[str, object]) -> Iterator[tuple[str, object]]:
        return ((name, held[name]) for name in list(held) if name in self._names)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of those within it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _globals_in(code: CodeType) -> set[str]:
    loads = (x for x in get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return {x.argval for x in loads}


def _is_library(module: str | None) -> bool:
    root, *rest = (module or "").split(".")
    if root == "pyproelbo":
        return not rest or rest[0] not in ("models", "guides")
    return root in _LIBRARIES
