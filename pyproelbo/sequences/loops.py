r"""A loop over time whose steps depend on each other.

:func:`plain`; :func:`compiled`, which is faster where steps are small; :func:`recomputed`, which
needs less memory.

    c_0 = carry,    c_{t+1}, y_t = step(c_t, x_t),    t = 0, ..., T - 1

A sampler of a chain is such a loop: the carry is z_{t-1}, and y_t is what a step draws. In Python
each of its operations costs some microseconds, whatever its size, and its gradient as much again.
Compiled, ``CHUNK`` steps are one call: their graph is made once, for any T.

torch's own ``scan`` is not used: with gradients it is slower where the steps are large and takes
several times the memory; two of them in one graph get wrong gradients without a warning in torch
2.13.0 (pytorch#153679), as one may in 2.11 and 2.12 (pytorch#184528).
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from pyro.distributions import validation_enabled
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyproelbo._backend.captures import is_captured

Tensors = tuple[Tensor, ...]
Step = Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]
Loop = Callable[[Step, Tensors, Tensors], tuple[Tensors, Tensors]]

CHUNK = 8  # steps in a compiled call: time to compile grows with it, time to run hardly falls


def plain(step: Step, carry: Tensors, xs: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
    """Run ``step`` over the leftmost dim of ``xs``, in Python.

    Args:
        step: from c_t and x_t to c_{t+1} and y_t, tuples of tensors.
        carry: c_0.
        xs: x_0, ..., x_{T-1}, each tensor of shape (T, ...), T at least 1.

    Returns:
        c_T, and y_0, ..., y_{T-1} stacked at the left: shape (T, ...).
    """
    ys = []
    for x in zip(*(x.unbind() for x in xs), strict=True):
        carry, y = step(carry, x)
        ys.append(y)
    return carry, tuple(torch.stack(y) for y in zip(*ys, strict=True))


def compiled(step: Step, carry: Tensors, xs: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
    """As :func:`plain`, with the same values, gradients and random numbers, but compiled.

    It pays where the steps are small and many. The first call takes some twenty seconds; later ones
    reuse what it has compiled, for any T, whether ``step`` is the same object or a new one, if its
    code and the kinds of objects that it closes over are the same. Up to ``CHUNK`` steps at the
    start run uncompiled, as do all loops inside another ``torch.compile`` or make_fx. Where nothing
    can be compiled, for want of a C++ compiler or because of what a step does, there is one
    ``CompileWarning``, and all further loops run uncompiled.

    Args:
        step: as in :func:`plain`. It may close over tensors and modules, which get their gradients,
            and may build distributions and sample from them. c_{t+1} should have the shape and
            dtype of c_t. It should have no other effects, no Pyro statements and no
            ``validate_args=True``: take submodules of a PyroModule, such as ``self.net``, before
            the loop and not in the step.
        carry: c_0.
        xs: x_0, ..., x_{T-1}, each tensor of shape (T, ...), T at least 1.

    Returns:
        c_T, and y_0, ..., y_{T-1} stacked at the left: shape (T, ...).
    """
    num_steps = len(xs[0])
    if num_steps <= CHUNK or is_captured():
        return plain(step, carry, xs)
    # the inputs of the first chunk then have the strides, and the gradient, of all later ones
    sizes = [(num_steps - 1) % CHUNK + 1] + [CHUNK] * ((num_steps - 1) // CHUNK)
    # and strides do not depend on T
    first, *rest = zip(*(x.contiguous().split(sizes) for x in xs), strict=True)
    carry, ys = plain(step, carry, first)
    parts = [ys]
    for chunk in rest:
        carry, ys = _compiled_or_not(step, carry, chunk)
        parts.append(ys)
    return carry, tuple(torch.cat(y) for y in zip(*parts, strict=True))


def recomputed(step: Step, carry: Tensors, xs: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
    """As :func:`plain`, in memory that grows with sqrt(T), except for inputs and outputs.

    About sqrt(T) steps at a time are computed again, with the same random numbers, when their
    gradients are taken, which makes a training step about a third slower (Chen et al. 2016,
    "Training deep nets with sublinear memory cost"). Without gradients, and in a captured step that
    is being traced, it is :func:`plain`.

    Args:
        step, carry, xs: as in :func:`plain`. ``step`` should have no effects that a second call
            would repeat, such as those of BatchNorm.

    Returns:
        c_T, and y_0, ..., y_{T-1} stacked at the left: shape (T, ...).
    """
    if is_captured() or not torch.is_grad_enabled():
        return plain(step, carry, xs)
    size = math.isqrt(len(xs[0]) - 1) + 1
    parts = []
    for chunk in zip(*(x.split(size) for x in xs), strict=True):
        carry, ys = checkpoint(plain, step, carry, chunk, use_reentrant=False)
        parts.append(ys)
    return carry, tuple(torch.cat(y) for y in zip(*parts, strict=True))


class CompileWarning(UserWarning):
    """Loops could not be compiled, and run uncompiled."""


@functools.cache
def _compiler(device: str) -> Callable[[Step, Tensors, Sequence[Tensor]], tuple[Tensors, Tensors]]:
    # torch's own random numbers: seeds mean the same as without
    options: dict = {"fallback_random": True, "cpp_wrapper": device == "cpu"}
    return torch.compile(plain, fullgraph=True, options=options)


_off: list[str] = []  # why compilation has stopped


def _compiled_or_not(step: Step, carry: Tensors, xs: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
    if _off:
        return plain(step, carry, xs)
    try:
        # distributions that validate cannot be traced; torch.compile disables it permanently
        with validation_enabled(False):
            return _compiler(carry[0].device.type)(step, carry, xs)
    except RuntimeError as error:  # what torch raises where it cannot compile
        done = plain(step, carry, xs)  # raises it again if the error is the step's own
        _off.append(" ".join(str(error).split("\n")[:2]))
        warnings.warn(
            f"loops over time are not compiled: {_off[0]}; use loops.plain to silence this",
            CompileWarning,
            stacklevel=3,
        )
        return done
