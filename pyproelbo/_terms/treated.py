"""How the gradient treats the guide's draws, if not as functions of its parameters."""

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyproelbo._backend.autograd import holdable
from pyproelbo._backend.pyro_private import site_is_subsample
from pyproelbo._terms.roles import is_drawn
from pyproelbo._terms.terms import Treatment
from pyproelbo._terms.traces import Site


class Treated(Messenger):
    """The guide's draws as separate variables, or as constants."""

    def __init__(self, treatment: Treatment) -> None:
        super().__init__()
        self._treatment = treatment
        self._of_guide: dict[int, Tensor] = {}  # its values, which the model's run has again

    def _pyro_post_sample(self, msg: Site) -> None:
        if self._treatment == "functions" or site_is_subsample(msg):
            return
        value = msg["value"]
        if id(value) in self._of_guide:
            return
        if is_drawn(msg) and value.requires_grad:
            value = value.detach() if self._treatment == "constants" else holdable(value)
            msg["value"] = value
        self._of_guide[id(value)] = value
