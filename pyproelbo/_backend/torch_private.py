"""What torch does not promise, each with what becomes of the library without it."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import attrgetter
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl
from torch.nn.modules import module as _module
from torch.quasirandom import SobolEngine

from pyproelbo._backend.autograd import Context

T = TypeVar("T")


def default_device() -> torch.device:
    """That of ``torch.get_default_device``, in a fraction of the time where none has been set."""
    try:
        is_cpu = torch._C._len_torch_function_stack() == 0  # pyright: ignore
        is_cpu = is_cpu and getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None) is None
    except AttributeError:
        is_cpu = False
    return _CPU if is_cpu else torch.get_default_device()


_CPU = torch.device("cpu")


def gradient_of_gamma(concentration: Tensor, value: Tensor) -> Tensor:
    """``value``, a draw of Gamma(concentration, 1), with its gradient by the concentration.

    That of draws whose value of the distribution function stays as it is (implicit
    reparameterisation), which torch has for its own draws.
    """
    if not (concentration.requires_grad and torch.is_grad_enabled()):
        return value
    return _Gamma.apply(concentration, value)  # type: ignore[return-value]


class _Gamma(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, concentration: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(concentration, value)
        return value.clone()

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * _gamma_gradient(*ctx.saved_tensors), None


_gamma_gradient: Callable[[Tensor, Tensor], Tensor] = torch._standard_gamma_grad  # pyright: ignore


# Draws

SOBOL_BITS = SobolEngine.MAXBIT


@cache
def sobol_directions() -> np.ndarray:
    """The direction numbers of the Sobol sequence, of so many bits each: (bits, dims)."""
    return SobolEngine(SobolEngine.MAXDIM).sobolstate.numpy().T.astype(np.uint64)


# Distributions


def registered_kls() -> dict[tuple[type, type], Callable[..., Tensor]]:
    """The pairs of classes for which a KL is registered in closed form, with their functions."""
    return getattr(kl, "_KL_REGISTRY", {})


def is_validated(d: Distribution) -> bool:
    """Whether a distribution checks values."""
    return bool(getattr(d, "_validate_args", True))


def validate(d: Distribution, is_validated: bool) -> None:
    """Let a distribution check values, or not."""
    d._validate_args = is_validated


# Memory


def memory_of(x: Tensor) -> int:
    """What tells the memory in which a tensor lies from all other."""
    return x.untyped_storage()._cdata


def version_of(x: Tensor) -> int:
    """How many times a tensor has been written to."""
    return x._version


# Modules and hooks


HELD = ("_parameters", "_buffers", "_modules", "_pyro_params", "_pyro_samples")  # dicts of modules
HOOKS = {
    "forward_pre_hooks": "forward pre-hook",
    "forward_hooks": "forward hook",
    "backward_pre_hooks": "backward pre-hook",
    "backward_hooks": "backward hook",
}
GLOBAL_HOOKS = [(getattr(_module, f"_global_{kind}", {}), what) for kind, what in HOOKS.items()]


def tensors_held(module: nn.Module) -> list[Mapping[str, Tensor | None]]:
    """The dicts in which a module has its parameters and buffers."""
    return [module._parameters, module._buffers]


def hooks_of(module: nn.Module) -> list[dict[int, Callable[..., object]]]:
    """The hooks of each kind that a module's calls, and their backward passes, call."""
    return [getattr(module, f"_{kind}", {}) for kind in HOOKS]


def with_hooks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of the tensors that have a hook, as of ``register_hook``."""
    if not any(map(any, map(_hooks_of_tensor, tensors))):
        return []
    return [x for x in tensors if any(_hooks_of_tensor(x))]


_hooks_of_tensor = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")


# Autograd


def keeps_graph() -> bool:
    """Whether the backward pass at hand has retain_graph=True; where torch cannot tell, it may."""
    autograd = torch._C._autograd  # pyright: ignore
    return getattr(autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def scaled(gradients: Sequence[Tensor], scale: Tensor) -> Sequence[Tensor]:
    """Each tensor times a scalar, in one call where torch has it."""
    multiply: Callable[[Sequence[Tensor], Tensor], list[Tensor]] | None = getattr(
        torch, "_foreach_mul", None
    )
    return [x * scale for x in gradients] if multiply is None else multiply(gradients, scale)


def _plain_results(
    cls: type,
    func: Callable[..., T],
    types: object,
    args: tuple = (),
    kwargs: Mapping[str, object] | None = None,
) -> T:
    with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore
        return func(*args, **(kwargs or {}))


# of a subclass of Tensor whose operations give plain tensors: its __torch_function__
PLAIN_RESULTS: Callable[..., object] = getattr(
    torch._C,
    "_disabled_torch_function_impl",
    classmethod(_plain_results),  # pyright: ignore
)


# Inductor


def inductor_settings() -> dict[str, object]:
    """All settings of inductor as they are, but for private ones."""
    from torch._inductor import config

    return config.save_config_portable()


def set_inductor(settings: dict[str, object]) -> None:
    """Let the settings of inductor be those of :func:`inductor_settings`."""
    from torch._inductor import config

    config.load_config(settings)


def inductor_folder() -> str:
    """The folder in which torch keeps what it compiles."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if folder is None:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        folder = default_cache_dir()
    return os.path.abspath(folder)
