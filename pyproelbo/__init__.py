"""See, weight and judge every part of an ELBO, for any Pyro model and guide."""

import typing as _typing

from pyproelbo import priors as priors
from pyproelbo import schedules as schedules
from pyproelbo import sequences as sequences
from pyproelbo.aggregate import log_aggregate_posterior as log_aggregate_posterior
from pyproelbo.calibration import Calibration as Calibration
from pyproelbo.calibration import calibration as calibration
from pyproelbo.capture import Capture as Capture
from pyproelbo.capture import CaptureWarning as CaptureWarning
from pyproelbo.check import Check as Check
from pyproelbo.check import check as check
from pyproelbo.convergence import Convergence as Convergence
from pyproelbo.convergence import convergence as convergence
from pyproelbo.convert import SkippedWarning as SkippedWarning
from pyproelbo.convert import from_svi as from_svi
from pyproelbo.elbo import BetaELBO as BetaELBO
from pyproelbo.elbo import CapacityELBO as CapacityELBO
from pyproelbo.elbo import FreeBitsELBO as FreeBitsELBO
from pyproelbo.elbo import IgnoredOptionWarning as IgnoredOptionWarning
from pyproelbo.elbo import ImportanceWeightedELBO as ImportanceWeightedELBO
from pyproelbo.elbo import NonFiniteWarning as NonFiniteWarning
from pyproelbo.elbo import NoParametersWarning as NoParametersWarning
from pyproelbo.elbo import ParticleFilterELBO as ParticleFilterELBO
from pyproelbo.elbo import RenyiELBO as RenyiELBO
from pyproelbo.elbo import ReweightedWakeSleepELBO as ReweightedWakeSleepELBO
from pyproelbo.elbo import SequentialELBO as SequentialELBO
from pyproelbo.elbo import SurgeryELBO as SurgeryELBO
from pyproelbo.elbo import TermsELBO as TermsELBO
from pyproelbo.elbo import TotalCorrelationELBO as TotalCorrelationELBO
from pyproelbo.elbo import UntrainedWarning as UntrainedWarning
from pyproelbo.evidence import Annealed as Annealed
from pyproelbo.evidence import Decompositions as Decompositions
from pyproelbo.evidence import Evidence as Evidence
from pyproelbo.evidence import InferenceGap as InferenceGap
from pyproelbo.evidence import Psis as Psis
from pyproelbo.evidence import UnfinishedWarning as UnfinishedWarning
from pyproelbo.evidence import decompositions as decompositions
from pyproelbo.evidence import evidence as evidence
from pyproelbo.evidence import inference_gap as inference_gap
from pyproelbo.evidence import pareto_smooth as pareto_smooth
from pyproelbo.evidence import psis as psis
from pyproelbo.loo import Loo as Loo
from pyproelbo.loo import loo as loo
from pyproelbo.masked_latents import MaskWarning as MaskWarning
from pyproelbo.minibatch import MinibatchSurgery as MinibatchSurgery
from pyproelbo.optim import SharedOptim as SharedOptim
from pyproelbo.priors import VampPrior as VampPrior
from pyproelbo.several import LoopedWarning as LoopedWarning
from pyproelbo.surgery import Surgery as Surgery
from pyproelbo.surgery import surgery as surgery
from pyproelbo.terms import Terms as Terms

if _typing.TYPE_CHECKING:
    from pyproelbo.plots import plot_aggregate_posterior as plot_aggregate_posterior
    from pyproelbo.plots import plot_calibration as plot_calibration
    from pyproelbo.plots import plot_elbo_trace as plot_elbo_trace
    from pyproelbo.plots import plot_evidence_gap as plot_evidence_gap
    from pyproelbo.plots import plot_khat as plot_khat
    from pyproelbo.plots import plot_kl_by_time as plot_kl_by_time
    from pyproelbo.plots import plot_kl_per_dim as plot_kl_per_dim
    from pyproelbo.plots import plot_pseudo_inputs as plot_pseudo_inputs
    from pyproelbo.plots import plot_rate_distortion as plot_rate_distortion
    from pyproelbo.plots import plot_reconstruction_by_time as plot_reconstruction_by_time
    from pyproelbo.plots import plot_reconstructions as plot_reconstructions
    from pyproelbo.plots import plot_surgery as plot_surgery

__version__ = "0.1.0"

_PLOTS = (
    "plot_aggregate_posterior",
    "plot_calibration",
    "plot_elbo_trace",
    "plot_evidence_gap",
    "plot_khat",
    "plot_kl_by_time",
    "plot_kl_per_dim",
    "plot_pseudo_inputs",
    "plot_rate_distortion",
    "plot_reconstruction_by_time",
    "plot_reconstructions",
    "plot_surgery",
)


def __getattr__(name: str):
    """``pyproelbo.lightning``, an optional extra, and what needs matplotlib: when asked for."""
    from importlib import import_module

    if name == "lightning":
        return import_module("pyproelbo.lightning")
    if name in _PLOTS:
        return getattr(import_module("pyproelbo.plots"), name)
    raise AttributeError(f"module 'pyproelbo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLOTS})
