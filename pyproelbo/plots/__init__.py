"""Figures of results: each function draws into one matplotlib ``Axes`` and returns it."""

from pyproelbo.plots.aggregate_posterior import plot_aggregate_posterior as plot_aggregate_posterior
from pyproelbo.plots.by_time import plot_kl_by_time as plot_kl_by_time
from pyproelbo.plots.by_time import plot_reconstruction_by_time as plot_reconstruction_by_time
from pyproelbo.plots.calibration import plot_calibration as plot_calibration
from pyproelbo.plots.elbo_trace import plot_elbo_trace as plot_elbo_trace
from pyproelbo.plots.evidence_gap import plot_evidence_gap as plot_evidence_gap
from pyproelbo.plots.gradient_noise import plot_gradient_noise as plot_gradient_noise
from pyproelbo.plots.khat import plot_khat as plot_khat
from pyproelbo.plots.kl_per_dim import plot_kl_per_dim as plot_kl_per_dim
from pyproelbo.plots.pseudo_inputs import plot_pseudo_inputs as plot_pseudo_inputs
from pyproelbo.plots.rate_distortion import plot_rate_distortion as plot_rate_distortion
from pyproelbo.plots.reconstructions import plot_reconstructions as plot_reconstructions
from pyproelbo.plots.surgery import plot_surgery as plot_surgery
