"""What ``objective(model, guide)`` is: an ``nn.Module`` whose forward is the loss."""

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.elbo import ELBOModule
from torch import Tensor

from pyproelbo.elbo.untrained import UntrainedWarning


class LossModule(ELBOModule):
    """A model, a guide and an objective.

    Modules may make parameters at their first call, as AutoGuides do, and an optimiser that was
    made before does not train them. So an AutoGuide of a model without arguments is called here;
    of all others' late parameters an :class:`~pyproelbo.UntrainedWarning` tells, unless the
    optimiser has them.
    """

    def __init__(self, model: Any, guide: Any, elbo: Any) -> None:
        super().__init__(model, guide, elbo)
        for module in (model, guide):
            if isinstance(module, AutoGuide) and _can_be_called(module):
                with torch.no_grad(), torch.random.fork_rng(), poutine.block():
                    module()
        self._is_settled = self._asked = False
        self._versions: dict[Tensor, int] = {}  # of parameters, before the optimiser's first step
        self._late: Mapping[str, Tensor] = {}

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; who asks for parameters asks for modules first."""
        self._asked = True
        return super().named_modules(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_settled:
            return super().forward(*args, **kwargs)
        asked, known = self._asked, set(self.parameters())
        self._look_for_steps()
        loss = super().forward(*args, **kwargs)
        if not self._versions:
            self._versions = {p: p._version for p in self.parameters()}
            late = {n: p for n, p in self.named_parameters() if p.requires_grad and p not in known}
            self._is_settled = asked or not late
            if asked and late:
                _warn(late)
            elif late:
                self._late = late
        return loss

    def _look_for_steps(self) -> None:
        """Warn of late parameters that stay as they were when others have moved."""
        moved = {p for p, version in self._versions.items() if p._version != version}
        if moved:
            self._is_settled = True
            still = {n: p for n, p in self._late.items() if p not in moved and p.grad is not None}
            if still:
                _warn(still)


def _can_be_called(guide: AutoGuide) -> bool:
    """Whether a guide that has not been called yet needs no arguments."""
    if guide.prototype_trace is not None:
        return False
    model = poutine.unwrap(guide.model)
    return not inspect.signature(getattr(model, "forward", model)).parameters


def _warn(names: Iterable[str]) -> None:
    warnings.warn(
        f"these parameters were made by the first call of this module: {', '.join(names)}. An "
        "optimiser that took its parameters before does not train them: call the module once "
        "with a batch, then make the optimiser",
        UntrainedWarning,
        stacklevel=6,
    )
