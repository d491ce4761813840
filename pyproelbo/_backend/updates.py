"""The next update of parameters by an optimiser of torch's, by itself or as the end of a graph.

``Optimizer.step`` looks for hooks, profilers and devices each time, and gathers parameters and
states; where these are small, it takes longer than the update.
"""

import copy
import sys
from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, Self

import torch
from torch import Tensor
from torch.fx import GraphModule, Proxy
from torch.fx.proxy import GraphAppendingTracer
from torch.optim import Optimizer

from pyproelbo._backend.rules import Rule, Step, rule_of
from pyproelbo._backend.torch_private import memory_of

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "grad_scale", "found_inf")
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
_grad = attrgetter("grad")


class Update:
    """The update of the parameters that have had one by an optimiser's last step.

    Attributes:
        params: these parameters.
        rule: what it does.
        states: what the optimiser has for the parameters, which the update changes in place.
    """

    def __init__(self, optimizer: Optimizer, rule: Rule) -> None:
        (self._group,) = optimizer.param_groups
        self._optimizer, self.rule = optimizer, rule
        self._all: list[Tensor] = list(self._group["params"])
        self.params = [p for p in self._all if p.grad is not None]
        self._others = [p for p in self._all if p.grad is None]
        self._is_arranged = False
        self._gather()

    def _gather(self) -> None:
        self._states = self.rule.states([self._optimizer.state[p] for p in self.params])
        self.states = self.rule.inputs(self._states)
        self._inputs: list[Tensor] = []
        self._rate = 0.0

    @classmethod
    def after(cls, optimizer: Optimizer) -> Self | None:
        """That of an optimiser's last step; None where this was more than one simple update."""
        rule, params = rule_of(optimizer), optimizer.param_groups[0]["params"]
        kinds = {(g.dtype, g.device, g.layout) for p in params if (g := p.grad) is not None}
        if rule is None or len(kinds) != 1 or has_hooks(optimizer):
            return None
        ((dtype, device, layout),) = kinds
        is_known = dtype.is_floating_point and device.type in ("cpu", "cuda")
        return cls(optimizer, rule) if is_known and layout == torch.strided else None

    def is_next(self) -> bool:
        """Whether the optimiser has nothing else to do: gradients are of the same parameters."""
        gradients = map(_grad, self.params)
        return not any(map(is_, gradients, repeat(None))) and self._is_of(self._others)

    def is_made(self) -> bool:
        """Whether there is no gradient: a graph has made the update, or no step has been made."""
        return self._is_of(self._all)

    def make(self) -> None:
        """Make the update."""
        with torch.no_grad():
            gradients = list(map(_grad, self.params))
            self._now().apply(self.params, gradients, self._states, self._group["lr"])

    def _is_of(self, without: list[Tensor]) -> bool:
        """Whether the optimiser is as it was, and these have no gradient."""
        params = self._group["params"]
        return (
            all(map(is_, map(_grad, without), repeat(None)))
            and len(params) == len(self._all)
            and all(map(is_, params, self._all))
            and not has_hooks(self._optimizer)
        )

    def _now(self) -> Rule:
        return type(self.rule).of(self._group, type(self._optimizer))

    # As the end of a graph.

    def takes(self, leaves: Sequence[Tensor]) -> bool:
        """Whether a graph may update these tensors, each of them and no other.

        It then does so in their order: the one in which optimisers have them differs between
        processes, and with it the graph would.
        """
        if not self._is_arranged:
            are_same = {*map(id, leaves)} == {*map(id, self.params)}
            are_apart = len({memory_of(p) for p in self.params}) == len(self.params)
            is_known = self.params[0].dtype in (torch.float32, torch.float64)
            if not (are_same and are_apart and is_known and len(leaves) == len(self.params)):
                return False
            self.params, self._is_arranged = list(leaves), True
            self._gather()
        return len(leaves) == len(self.params) and all(map(is_, leaves, self.params))

    def is_same_rule(self) -> bool:
        """Whether the optimiser's settings, but for the learning rate, are as they were."""
        return self._now() == self.rule

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that a graph reads in addition: the learning rate, and the states."""
        rate = self._group["lr"]
        if not self._inputs:
            number = torch.tensor(rate, dtype=torch.float64, device=self.params[0].device)
            self._inputs = [number, *self.states]
        elif rate != self._rate:
            self._inputs[0].fill_(rate)
        self._rate = rate
        return self._inputs

    def by_torch(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """What becomes of copies of the parameters by the optimiser itself."""
        copies = [p.detach().clone().requires_grad_() for p in self.params]
        make: Any = type(self._optimizer)
        optimizer = make(copies, lr=self._group["lr"])
        optimizer.param_groups[0].update({k: x for k, x in self._group.items() if k != "params"})
        for p, it, gradient in zip(self.params, copies, gradients, strict=True):
            it.grad = gradient
            optimizer.state[it] = copy.deepcopy(self._optimizer.state[p])
        optimizer.step()
        return [p.detach() for p in copies]


def with_update(
    module: GraphModule, update: Update, leaves: Sequence[int], is_checked: bool
) -> GraphModule:
    """A graph that ends with an update, which it makes in place.

    Its further inputs are those of the update.

    Args:
        module: of which the first output is a loss, and then the gradient of each parameter.
        leaves: for each of the update's parameters, its number among the inputs.
        is_checked: whether nothing is changed where the loss is not finite.
    """
    module = copy.deepcopy(module)
    graph = module.graph
    places = [node for node in graph.nodes if node.op == "placeholder"]
    (end,) = (node for node in graph.nodes if node.op == "output")
    tracer = GraphAppendingTracer(graph)
    with graph.inserting_after(places[-1]):
        for i in reversed(range(1 + len(update.states))):
            graph.placeholder(f"update_{i}")
    rate, *states = [node for node in graph.nodes if node.op == "placeholder"][len(places) :]
    (loss, *gradients), params = end.args[0][: 1 + len(leaves)], [places[i] for i in leaves]

    def proxies(nodes: Sequence[Any]) -> list[Any]:
        return [Proxy(node, tracer) for node in nodes]

    loss, rate = proxies([loss, rate])
    own, by, kept = map(proxies, (params, gradients, states))
    with graph.inserting_before(end):
        changes = update.rule.changes(Step(own, by, kept, rate, update.params[0].dtype))
        is_finite = torch.isfinite(loss) if is_checked else None
        for old, new in changes:
            old.copy_(new if is_finite is None else torch.where(is_finite, new, old))
    module.recompile()
    return module


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether anything is called at an optimiser's steps, or scales them."""
    own, of_all = vars(optimizer), vars(sys.modules[Optimizer.__module__])
    return any(map(own.get, _HOOKS)) or any(map(of_all.get, _GLOBAL_HOOKS))
