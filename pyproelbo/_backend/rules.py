"""How torch's optimisers change each parameter by its gradient."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

States = list[list[Tensor]]  # of all parameters, each kind in a list
Changes = list[tuple[Tensor, Tensor]]  # tensors, and what becomes of them


class Step(NamedTuple):
    """What an update is made of.

    Attributes:
        inputs: those of the states.
        rate: the learning rate, in double precision.
        dtype: of the parameters.
    """

    params: Sequence[Tensor]
    gradients: Sequence[Tensor]
    inputs: Sequence[Tensor]
    rate: Tensor
    dtype: torch.dtype


class AdamRule(NamedTuple):
    """That of Adam and AdamW, whose weight decay is decoupled."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    is_decoupled: bool
    maximize: bool

    @classmethod
    def of(cls, group: dict[str, Any], kind: type[Optimizer]) -> Self:
        """That of a group of parameters."""
        beta1, beta2 = group["betas"]
        is_decoupled = bool(group.get("decoupled_weight_decay", kind is AdamW))
        eps, decay, maximize = group["eps"], group["weight_decay"], group["maximize"]
        return cls(beta1, beta2, eps, decay, is_decoupled, maximize)

    @staticmethod
    def states(states: list[dict[str, Tensor]]) -> States:
        """The counts in one tensor, its parts for each parameter, means and squares."""
        counts = torch.stack([state["step"] for state in states])  # one operation advances them all
        for state, count in zip(states, counts.unbind(), strict=True):
            state["step"] = count
        names = "step", "exp_avg", "exp_avg_sq"
        return [[counts], *([state[name] for state in states] for name in names)]

    @staticmethod
    def inputs(states: States) -> list[Tensor]:
        """Counts, means and squares, one after the other."""
        return [*states[0], *states[2], *states[3]]

    def apply(
        self, params: list[Tensor], gradients: list[Tensor], states: States, lr: float
    ) -> None:
        """Make the update by torch's function for all parameters."""
        (counts,), steps, means, squares = states
        counts += 1
        update = torch._fused_adamw_ if self.is_decoupled else torch._fused_adam_  # pyright: ignore
        update(
            *(params, gradients, means, squares, [], steps),
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=self.maximize,
        )

    def changes(self, step: Step) -> Changes:
        """The update in formulas."""
        params, gradients, inputs, rate, dtype = step
        (counts, *moments), num = inputs, len(params)
        made = counts + 1
        # inductor computes an exp that is used often once, and a power each time
        powers = [torch.exp(made.double() * math.log(b or 5e-324)) for b in self[:2]]
        sizes, roots = rate / (1 - powers[0]), torch.sqrt(1 - powers[1])
        found: Changes = [(counts, made)]
        for i in range(num):
            p, g, mean, square = params[i], gradients[i], moments[i], moments[num + i]
            g = -g if self.maximize else g
            if self.weight_decay and self.is_decoupled:
                decayed = p * (1 - rate * self.weight_decay).to(dtype)
            else:
                decayed, g = p, g + self.weight_decay * p if self.weight_decay else g
            mean_now = mean + (g - mean) * (1 - self.beta1)
            square_now = square * self.beta2 + g * g * (1 - self.beta2)
            size, root = sizes[i].to(dtype), roots[i].to(dtype)
            moved = decayed - size * mean_now / (torch.sqrt(square_now) / root + self.eps)
            found += [(p, moved), (mean, mean_now), (square, square_now)]
        return found


class SgdRule(NamedTuple):
    """That of SGD."""

    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool

    @classmethod
    def of(cls, group: dict[str, Any], kind: type[Optimizer]) -> Self:
        """That of a group of parameters."""
        return cls(*(group[name] for name in cls._fields))

    @staticmethod
    def states(states: list[dict[str, Tensor]]) -> States:
        """The momenta, where there is momentum."""
        momenta = [state.get("momentum_buffer") for state in states]
        return [[x for x in momenta if x is not None]]

    @staticmethod
    def inputs(states: States) -> list[Tensor]:
        """The momenta."""
        return states[0]

    def apply(
        self, params: list[Tensor], gradients: list[Tensor], states: States, lr: float
    ) -> None:
        """Make the update by torch's function for all parameters."""
        torch._fused_sgd_(  # pyright: ignore
            params, gradients, *states, lr=lr, is_first_step=False, **self._asdict()
        )

    def changes(self, step: Step) -> Changes:
        """The update in formulas."""
        params, gradients, inputs, rate, dtype = step
        found: Changes = []
        for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
            g = -g if self.maximize else g
            g = g + self.weight_decay * p if self.weight_decay else g
            if inputs:
                momentum = inputs[i] * self.momentum + g * (1 - self.dampening)
                found.append((inputs[i], momentum))
                g = g + momentum * self.momentum if self.nesterov else momentum
            found.append((p, p - rate.to(dtype) * g))
        return found


Rule = AdamRule | SgdRule
_RULES: dict[type[Optimizer], tuple[type[Rule], str]] = {
    Adam: (AdamRule, "_fused_adam_"),
    AdamW: (AdamRule, "_fused_adamw_"),
    SGD: (SgdRule, "_fused_sgd_"),
}
_OTHERS = ("amsgrad", "differentiable", "capturable")


def rule_of(optimizer: Optimizer) -> Rule | None:
    """The rule of an optimiser of one group of parameters; None where it is no such one."""
    (group, *others), kind = optimizer.param_groups, type(optimizer)
    if others or kind not in _RULES or not isinstance(group["lr"], float):
        return None
    rule, function = _RULES[kind]
    if any(group.get(name) for name in _OTHERS) or not hasattr(torch, function):
        return None
    is_left_to_torch = group["fused"] is None and not group["foreach"]
    is_fused = group["fused"] or (kind is SGD and is_left_to_torch)  # as torch's SGD may be
    return rule.of(group, kind) if is_fused else None
