"""See, weight and judge every part of an ELBO, for any Pyro model and guide."""

from pyproelbo import schedules as schedules
from pyproelbo.aggregate import log_aggregate_posterior as log_aggregate_posterior
from pyproelbo.elbo import BetaELBO as BetaELBO
from pyproelbo.elbo import CapacityELBO as CapacityELBO
from pyproelbo.elbo import FreeBitsELBO as FreeBitsELBO
from pyproelbo.elbo import NonFiniteWarning as NonFiniteWarning
from pyproelbo.elbo import NoParametersWarning as NoParametersWarning
from pyproelbo.elbo import SurgeryELBO as SurgeryELBO
from pyproelbo.elbo import TermsELBO as TermsELBO
from pyproelbo.elbo import TotalCorrelationELBO as TotalCorrelationELBO
from pyproelbo.minibatch import MinibatchSurgery as MinibatchSurgery
from pyproelbo.surgery import Surgery as Surgery
from pyproelbo.surgery import surgery as surgery
from pyproelbo.terms import Terms as Terms

__version__ = "0.1.0"


def __getattr__(name: str):
    """``pyproelbo.lightning``, imported when it is first asked for: it is an optional extra."""
    if name == "lightning":
        from importlib import import_module

        return import_module("pyproelbo.lightning")
    raise AttributeError(f"module 'pyproelbo' has no attribute {name!r}")
