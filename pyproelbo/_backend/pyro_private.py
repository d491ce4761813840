"""What Pyro does not promise: each name is here, and nowhere else."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import pyro
from pyro.distributions import MaskedDistribution
from pyro.infer import SVI
from pyro.nn import PyroModule
from pyro.nn import module as _module
from pyro.ops import packed
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _ENUM_ALLOCATOR, _PYRO_STACK, Message, effectful
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyproelbo._backend.sites import Site

SOFT = "_unquantize"  # where straight-through draws keep what they were before rounding
Packed = Tensor  # with the symbols of its dims, as Pyro packs them


if TYPE_CHECKING:  # Pyro's own, whose types say less than they take

    def scale_and_mask(
        tensor: Tensor | float, scale: float | Tensor = 1.0, mask: Tensor | bool | None = None
    ) -> Tensor:
        """Pyro's: a log-density times a scale, 0 where it is masked."""
        ...

    def site_is_factor(site: Site) -> bool:
        """Pyro's: whether a site is one of ``pyro.factor``."""
        ...

    def site_is_subsample(site: Site) -> bool:
        """Pyro's: whether a site draws the rows of a plate."""
        ...

    def check_site_shape(site: Site, max_plate_nesting: float) -> None:
        """Pyro's: whether the shape of a log-density is the shape of its plates."""
        ...
else:
    from pyro.distributions.util import scale_and_mask as scale_and_mask
    from pyro.poutine.util import site_is_factor as site_is_factor
    from pyro.poutine.util import site_is_subsample as site_is_subsample
    from pyro.util import check_site_shape as check_site_shape


def sites_of(trace: Trace) -> dict[str, Site]:
    """The nodes of a trace that are sample sites, and what else is in it, by name."""
    return trace.nodes  # type: ignore[return-value]


def handlers() -> list[Messenger]:
    """The effect handlers that this runs within."""
    return _PYRO_STACK


def show(parameters: Mapping[str, Tensor]) -> None:
    """Do what ``pyro.param`` does for SVI, which trains the leaves that it sees.

    Args:
        parameters: leaves by their names.
    """
    plain = [handler.trace for handler in _PYRO_STACK if type(handler) is TraceMessenger]
    are_plain = len(plain) == len(_PYRO_STACK)
    for name, leaf in parameters.items():
        leaf.unconstrained = weakref.ref(leaf)  # type: ignore[attr-defined]
        if not are_plain:
            _leaf(leaf, name=name)
            continue
        for trace in plain:  # what the line above comes to, in a fifth of the time
            site = {**_SHOWN, "name": name, "args": (leaf,), "value": leaf}
            if name in trace.nodes:
                trace.add_node(name, **site)
            else:
                trace.nodes[name] = site  # type: ignore[assignment]
                trace._pred[name], trace._succ[name] = set(), set()


_SHOWN = {
    "type": "param",
    "is_observed": False,
    "kwargs": {},
    "scale": 1.0,
    "mask": None,
    "cond_indep_stack": (),
    "done": True,
    "stop": False,
    "continuation": None,
    "infer": {},
}


@effectful(type="param")
def _leaf(leaf: Tensor) -> Tensor:
    return leaf


_SHOWN["fn"] = _leaf


def optimiser_of(frame: FrameType) -> object:
    """The optimiser of the step of Pyro's SVI that this frame is, which is called next; or None."""
    return frame.f_locals["self"].optim if frame.f_code is _STEP else None


_STEP = SVI.step.__code__


def are_parameters_local() -> bool:
    """The setting "module_local_params", in a fraction of the time that asking for it takes."""
    return _module._MODULE_LOCAL_PARAMS


def parameters_in_store() -> dict[str, Tensor]:
    """The unconstrained parameters of Pyro's store by their names, as they are there."""
    return pyro.get_param_store()._params


def rename(module: PyroModule, old: str, new: str) -> None:
    """Give a module of this name, and what is within it, names that begin with another."""
    for part in module.modules():
        if isinstance(part, PyroModule):
            part._pyro_name = new + part._pyro_name.removeprefix(old)


def name_of(module: PyroModule) -> str:
    """The name with which a module's parameters begin in Pyro's store."""
    return module._pyro_name


def replay(messenger: ReplayMessenger, msg: Message) -> None:
    """Let a sample statement have the value that it has in the trace of a messenger."""
    messenger._pyro_sample(msg)


def record(messenger: TraceMessenger, msg: Message) -> None:
    """Put a sample statement into the trace of a messenger."""
    messenger._pyro_post_sample(msg)


def mask_of(d: MaskedDistribution) -> Tensor | bool:
    """What a masked distribution is masked by."""
    return d._mask


def is_deterministic(site: Site) -> bool:
    """Whether a site is one of ``pyro.deterministic``, all of whose dims are its event's."""
    return bool(site["infer"].get("_deterministic"))


# Enumeration: marks that Pyro makes of sites, and symbols of the dims of packed tensors.


def is_enumerated(site: Site) -> bool:
    """Whether a site has its values one beside the other, or one after the other."""
    infer = site["infer"]
    return "_enumerate_dim" in infer or "_enum_total" in infer


@contextmanager
def dims_aside() -> Iterator[None]:
    """Programs within have all dims for their plates and what they enumerate."""
    before = [(allocator, dict(vars(allocator))) for allocator in (_DIM_ALLOCATOR, _ENUM_ALLOCATOR)]
    _DIM_ALLOCATOR._stack = []
    try:
        yield
    finally:
        for allocator, was in before:
            vars(allocator).clear()
            vars(allocator).update(was)


def symbol_of(site: Site) -> str | None:
    """That of the dim in which a site has all of its values; None where it has none."""
    return site["infer"].get("_enumerate_symbol")


def runs_of(site: Site) -> int:
    """How many values a site takes one after the other, each in a run of its own."""
    return site["infer"].get("_enum_total", 1)


def pack(value: Tensor, site: Site) -> Packed:
    """A tensor with the dims of a site's log-density, packed."""
    return packed.pack(value, site["infer"]["_dim_to_symbol"])  # pyright: ignore


def dims_of(value: Packed) -> str:
    """The symbols of a packed tensor's dims."""
    return value._pyro_dims  # type: ignore[attr-defined]


def with_dims(value: Tensor, dims: str) -> Packed:
    """A tensor with symbols for its dims."""
    value._pyro_dims = dims  # type: ignore[attr-defined]
    return value


def common_scale(scales: Iterable[float | Tensor]) -> float | Tensor:
    """The one scale of sites that are summed out together.

    Raises:
        ValueError: where they are scaled differently, or each element in its own way.
    """
    found = list(scales)
    if any(isinstance(scale, Tensor) and scale.dim() for scale in found):
        raise ValueError("sites that are summed out together should have one scale for all of them")
    if len({float(scale) for scale in found}) > 1:
        raise ValueError(
            "sites that are summed out together should share a common scale: put them, and what "
            "depends on them, into the same plates, and under the same poutine.scale"
        )
    return found[0]
