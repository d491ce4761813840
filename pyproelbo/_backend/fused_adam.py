"""The update of torch's fused Adam, without what ``Optimizer.step`` does around it.

Each step that looks for hooks, profilers and devices, and gathers parameters and states; where
these are small, it takes longer than the update.
"""

import sys
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "grad_scale", "found_inf")
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
_grad = attrgetter("grad")
_LEFT = ("amsgrad", "differentiable", "capturable")


class FusedAdam:
    """The update of the parameters that have had one by an optimiser's last step.

    Args:
        optimizer: an Adam or AdamW with one group of parameters, for which :func:`is_simple`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        (self._group,) = optimizer.param_groups
        self._optimizer = optimizer
        self._all: list[Tensor] = list(self._group["params"])
        self._params = [p for p in self._all if p.grad is not None]
        self._others = [p for p in self._all if p.grad is None]
        states = [optimizer.state[p] for p in self._params]
        # one operation advances them all
        self._counts = torch.stack([state["step"] for state in states])
        for state, count in zip(states, self._counts.unbind(), strict=True):
            state["step"] = count
        self._states: list[list[Tensor]] = [
            [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
        ]
        is_decoupled = self._group.get("decoupled_weight_decay", isinstance(optimizer, AdamW))
        self._update: Any = getattr(torch, "_fused_adamw_" if is_decoupled else "_fused_adam_")

    def made(self) -> bool:
        """Make the update, if it is of the same parameters; whether it has been made."""
        group, gradients = self._group, list(map(_grad, self._params))
        are_same = (
            len(group["params"]) == len(self._all)
            and all(map(is_, group["params"], self._all))
            and not any(map(is_, gradients, repeat(None)))
            and all(map(is_, map(_grad, self._others), repeat(None)))
        )
        if not are_same or has_hooks(self._optimizer):
            return False
        means, squares, steps = self._states
        beta1, beta2 = group["betas"]
        with torch.no_grad():
            self._counts += 1
            self._update(
                self._params,
                gradients,
                means,
                squares,
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
            )
        return True


def is_simple(optimizer: Optimizer) -> bool:
    """Whether an optimiser's last step was one update of one kind of tensors, and nothing else."""
    (group, *others) = optimizer.param_groups
    gradients = [p.grad for p in group["params"] if p.grad is not None]
    return (
        type(optimizer) in (Adam, AdamW)
        and not others
        and bool(group["fused"])
        and not any(group[name] for name in _LEFT)
        and isinstance(group["lr"], float)
        and len({(x.dtype, x.device, x.layout) for x in gradients}) == 1
        and gradients[0].layout == torch.strided
        and hasattr(torch, "_fused_adam_")
        and not has_hooks(optimizer)
    )


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether anything is called at an optimiser's steps, or scales them."""
    own = any(getattr(optimizer, name, None) for name in _HOOKS)
    module = sys.modules[Optimizer.__module__]
    return own or any(getattr(module, name, None) for name in _GLOBAL_HOOKS)
