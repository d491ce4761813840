"""The result of ``objective(model, guide)``: an ``nn.Module`` whose forward is the loss."""

import inspect
from collections.abc import Generator, Iterable, Mapping, Sequence

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from pyproelbo._backend import rng
from pyproelbo._backend.autograd import some_leaves_of
from pyproelbo._backend.torch_private import version_of
from pyproelbo._messages.warn import warn
from pyproelbo._terms.traces import Program
from pyproelbo.elbo.untrained import UntrainedWarning


class LossModule(ELBOModule):
    """A model, a guide and an objective.

    Modules may make parameters at their first call, as AutoGuides do, and programs may use
    parameters that this module does not hold: an optimiser of its parameters may lack both. An
    AutoGuide of a model without arguments is therefore called here. Otherwise an
    :class:`~pyproelbo.UntrainedWarning` names the parameters: at the first step, those made after
    the parameters had been asked for; at the second, those that have not moved when others have.
    """

    def __init__(self, model: Program, guide: Program, elbo: ELBO) -> None:
        super().__init__(model, guide, elbo)  # type: ignore[arg-type]
        for module in (model, guide):
            if isinstance(module, AutoGuide) and _can_be_called(module):
                with torch.no_grad(), rng.put_aside(), poutine.block():
                    module()
        self._is_settled = self._asked = False
        self._watched: Mapping[str, Tensor] = {}
        self._versions: dict[Tensor, int] = {}  # of parameters, before the optimiser's first step

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Generator[tuple[str, nn.Module], None, None]:
        """As torch's; a request for parameters starts with one for modules."""
        self._asked = True
        return super().named_modules(memo, prefix, remove_duplicate)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """The loss of the objective at these arguments, with the warnings of its first steps."""
        if self._is_settled:
            return super().forward(*args, **kwargs)
        asked, known = self._asked, set(self.parameters())
        self._look_for_steps()
        loss = super().forward(*args, **kwargs)
        named = {n: p for n, p in self.named_parameters() if p.requires_grad}
        late = {n: p for n, p in named.items() if p not in known}
        if asked and late:
            _warn(f"this call has made {', '.join(late)} after parameters had been asked for")
        if loss.requires_grad and not self._versions:
            others = _others([loss], named.values())
            self._watched = others if asked else {**late, **others}
            self._versions = {p: version_of(p) for p in (*named.values(), *others.values())}
            self._is_settled = not (named and self._watched)
        self._asked = asked
        return loss

    def _look_for_steps(self) -> None:
        """Warn of parameters that have not moved when others have."""
        moved = {p for p, version in self._versions.items() if version_of(p) != version}
        if moved:
            self._is_settled = True
            watched = self._watched.items()
            still = [n for n, p in watched if p not in moved and p.grad is not None]
            if still:
                _warn(f"the optimiser's first step has not moved {', '.join(still)}")


def _can_be_called(guide: AutoGuide) -> bool:
    """Whether a guide that has not been called yet needs no arguments."""
    if guide.prototype_trace is not None:
        return False
    model = poutine.unwrap(guide.model)
    return not inspect.signature(getattr(model, "forward", model)).parameters


def _others(outputs: Sequence[Tensor], known: Iterable[Tensor]) -> dict[str, Tensor]:
    """Parameters that ``outputs`` depend on besides the known ones, by name."""
    store, held = pyro.get_param_store(), set(known)
    found = {}
    for i, x in enumerate(some_leaves_of(outputs)):
        name = store.param_name(x)
        if x not in held and (name or isinstance(x, nn.Parameter)):
            found[name or f"the {i + 1}. parameter, of shape {tuple(x.shape)},"] = x
    return found


def _warn(what: str) -> None:
    warn(
        f"{what}: an optimiser without them does not train them. If modules make them at their "
        "first call, make the optimiser after that call; if the programs use a module or a "
        "pyro.param that this one does not hold, make it part of a PyroModule; freeze what "
        "should stay fixed by requires_grad_(False)",
        UntrainedWarning,
    )
