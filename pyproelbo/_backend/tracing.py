"""What captures are made by, which torch calls experimental: imported where one is made, only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves

VALIDATIONS = {f.__code__ for f in (Distribution.__init__, Distribution._validate_sample)}

untraced = proxy_tensor.disable_proxy_modes_tracing  # a context
has_proxy = proxy_tensor.has_proxy_slot
mode = proxy_tensor.get_proxy_mode
Tracer = proxy_tensor.PythonKeyTracer
Operation = OpOverload
assert_at_run: Operation = torch.ops.aten._assert_async.msg


def make_fx(function: Callable[..., object]) -> Callable[..., GraphModule]:
    """From the tensors that a function takes to the graph of what it computes of them.

    The nodes share one fake mode: to make one for each takes half of the time.
    """

    def graph(*tensors: Tensor) -> GraphModule:
        with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
            return proxy_tensor.make_fx(function)(*tensors)

    return graph


def tensors_in(values: object) -> list[Tensor]:
    """The tensors in the arguments or in the results of an operation."""
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def is_mutable(operation: Operation) -> bool:
    """Whether an operation writes into arguments."""
    return operation._schema.is_mutable


def written(operation: Operation, args: tuple, kwargs: dict[str, object]) -> list[object]:
    """The arguments that an operation writes into."""
    arguments = operation._schema.arguments
    given = {**dict(zip((x.name for x in arguments), args, strict=False)), **kwargs}
    names = (x.name for x in arguments if x.alias_info and x.alias_info.is_write)
    return [given[name] for name in names if name in given]


@contextmanager
def with_autograd() -> Iterator[None]:
    """With gradients, also inside of an operation of torch's dispatcher."""
    functionality = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(functionality, False), torch.enable_grad():
        yield
