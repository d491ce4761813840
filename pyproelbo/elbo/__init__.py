"""Objectives: functions of :class:`pyproelbo.Terms` that plug into Pyro's SVI."""

from pyproelbo.elbo.base import NoParametersWarning as NoParametersWarning
from pyproelbo.elbo.base import TermsELBO as TermsELBO
from pyproelbo.elbo.beta import BetaELBO as BetaELBO
from pyproelbo.elbo.capacity import CapacityELBO as CapacityELBO
from pyproelbo.elbo.free_bits import FreeBitsELBO as FreeBitsELBO
from pyproelbo.elbo.ignored import IgnoredOptionWarning as IgnoredOptionWarning
from pyproelbo.elbo.importance_weighted import ImportanceWeightedELBO as ImportanceWeightedELBO
from pyproelbo.elbo.minibatch import MinibatchSurgery as MinibatchSurgery
from pyproelbo.elbo.particle_filter import ParticleFilterELBO as ParticleFilterELBO
from pyproelbo.elbo.renyi import RenyiELBO as RenyiELBO
from pyproelbo.elbo.reweighted_wake_sleep import ReweightedWakeSleepELBO as ReweightedWakeSleepELBO
from pyproelbo.elbo.sequential import SequentialELBO as SequentialELBO
from pyproelbo.elbo.surgery import SurgeryELBO as SurgeryELBO
from pyproelbo.elbo.total_correlation import TotalCorrelationELBO as TotalCorrelationELBO
from pyproelbo.elbo.training import NonFiniteWarning as NonFiniteWarning
from pyproelbo.elbo.untrained import UntrainedWarning as UntrainedWarning
