"""The public names: read by type checkers, and by ``__init__.py`` at run time.

Objectives and figures are listed in their packages.
"""

from pyproelbo import capture as capture
from pyproelbo import cli as cli
from pyproelbo import datasets as datasets
from pyproelbo import elbo as elbo
from pyproelbo import guides as guides
from pyproelbo import lightning as lightning
from pyproelbo import models as models
from pyproelbo import plots as plots
from pyproelbo import priors as priors
from pyproelbo import schedules as schedules
from pyproelbo import sequences as sequences
from pyproelbo._arviz.corrected import CorrectionWarning as CorrectionWarning
from pyproelbo._arviz.from_svi import SkippedWarning as SkippedWarning
from pyproelbo._arviz.from_svi import from_svi as from_svi
from pyproelbo._diagnostics.calibration import Calibration as Calibration
from pyproelbo._diagnostics.calibration import calibration as calibration
from pyproelbo._diagnostics.check import check as check
from pyproelbo._diagnostics.check_result import Check as Check
from pyproelbo._diagnostics.convergence import Convergence as Convergence
from pyproelbo._diagnostics.convergence import convergence as convergence
from pyproelbo._diagnostics.gradient_noise import gradient_noise as gradient_noise
from pyproelbo._diagnostics.gradient_report import GradientNoise as GradientNoise
from pyproelbo._diagnostics.loo import Loo as Loo
from pyproelbo._diagnostics.loo import loo as loo
from pyproelbo._diagnostics.refits import Refit as Refit
from pyproelbo._distributions.mixture_kernel import (
    log_aggregate_posterior as log_aggregate_posterior,
)
from pyproelbo._distributions.sobol import Sobol as Sobol
from pyproelbo._evidence.annealed import Annealed as Annealed
from pyproelbo._evidence.decompositions import Decompositions as Decompositions
from pyproelbo._evidence.decompositions import decompositions as decompositions
from pyproelbo._evidence.fisher import FisherDivergence as FisherDivergence
from pyproelbo._evidence.fisher import fisher_divergence as fisher_divergence
from pyproelbo._evidence.gaps import InferenceGap as InferenceGap
from pyproelbo._evidence.gaps import inference_gap as inference_gap
from pyproelbo._evidence.importance import evidence as evidence
from pyproelbo._evidence.linear_response import LinearResponse as LinearResponse
from pyproelbo._evidence.linear_response import linear_response as linear_response
from pyproelbo._evidence.moments import Moments as Moments
from pyproelbo._evidence.moments import moments as moments
from pyproelbo._evidence.pareto import pareto_smooth as pareto_smooth
from pyproelbo._evidence.psis import Psis as Psis
from pyproelbo._evidence.psis import psis as psis
from pyproelbo._evidence.repair import repair as repair
from pyproelbo._evidence.repair_result import Repair as Repair
from pyproelbo._evidence.sensitivity import Sensitivity as Sensitivity
from pyproelbo._evidence.sensitivity import sensitivity as sensitivity
from pyproelbo._evidence.weights import Evidence as Evidence
from pyproelbo._fitting.fit import Fit as Fit
from pyproelbo._fitting.fit import NotConvergedWarning as NotConvergedWarning
from pyproelbo._fitting.fit import fit as fit
from pyproelbo._fitting.fixed_draws import FixedDraws as FixedDraws
from pyproelbo._fitting.history import History as History
from pyproelbo._fitting.semi_amortised import SemiAmortised as SemiAmortised
from pyproelbo._fitting.stochastic import Stochastic as Stochastic
from pyproelbo._optim import SharedOptim as SharedOptim
from pyproelbo._results.files import load_result as load_result
from pyproelbo._results.merging import merge as merge
from pyproelbo._rows.batches import Shard as Shard
from pyproelbo._rows.executors import LostWorkerWarning as LostWorkerWarning
from pyproelbo._rows.passes import UnfinishedWarning as UnfinishedWarning
from pyproelbo._rows.several import LoopedWarning as LoopedWarning
from pyproelbo._rows.shared_parameters import SharedParametersWarning as SharedParametersWarning
from pyproelbo._surgery.expected_time import LongRunWarning as LongRunWarning
from pyproelbo._surgery.part import SurgeryPart as SurgeryPart
from pyproelbo._surgery.result import Surgery as Surgery
from pyproelbo._surgery.surgery import surgery as surgery
from pyproelbo._surgery.surgery_part import surgery_part as surgery_part
from pyproelbo._terms.masked_latents import MaskWarning as MaskWarning
from pyproelbo._terms.terms import Terms as Terms
from pyproelbo.capture import Capture as Capture
from pyproelbo.capture import CaptureWarning as CaptureWarning
from pyproelbo.elbo import *
from pyproelbo.plots import *
from pyproelbo.priors import VampPrior as VampPrior

__version__: str
