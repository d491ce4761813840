"""Two programs with one set of parameters, since Pyro's store knows these by their names alone."""

from collections.abc import MutableMapping
from weakref import WeakSet

import pyro
from pyro.nn import PyroModule
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyproelbo._backend.pyro_private import name_of
from pyproelbo._messages.warn import warn
from pyproelbo._rows.modules import modules_of


class SharedParametersWarning(UserWarning):
    """Two modules that are not meant to share parameters do, by their names in Pyro's store."""


# from a parameter to the modules that have it
_holders: MutableMapping[Tensor, WeakSet[PyroModule]] = WeakIdKeyDictionary()


def warn_of_shared_parameters(*programs: object) -> None:
    """Remember who has which parameters, and warn where two modules of one name have the same.

    Pyro's AutoGuides are called by their classes. The second of a class takes the parameters of
    the first, whatever its model, and the fit of one changes both; or, where the store was cleared
    in between, the first takes those of the second when it is called again.

    Modules that are parts of several programs share nothing but themselves, and parameters that are
    tied have several names: neither is meant.
    """
    if pyro.settings.get("module_local_params"):
        return
    found = dict[str, str]()
    for program in programs:
        for module in modules_of(program):
            if not isinstance(module, PyroModule) or not name_of(module):
                continue
            for name, value in module._parameters.items():
                if value is None:
                    continue
                holders = _holders.get(value) or WeakSet()
                holders.add(module)
                _holders[value] = holders
                others = (m for m in holders if m is not module)
                if any(name_of(other) == name_of(module) for other in others):
                    label = f"{name_of(module)}.{name.removesuffix('_unconstrained')}"
                    found[label] = name_of(module).partition(".")[0]
    if found:
        label, kind = next(iter(found.items()))
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        warn(
            f"two modules called {kind!r} have one set of parameters ({label!r}{more}), for Pyro's "
            "store knows parameters by their names: a fit of one changes the other, and reports on "
            "both are of the last fit. Give each its own: pyro.settings.set("
            "module_local_params=True) before they are made, or let each be an attribute of "
            "another name of a PyroModule",
            SharedParametersWarning,
        )
