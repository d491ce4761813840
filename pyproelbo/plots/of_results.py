"""The figure of each result."""

from collections.abc import Callable
from functools import singledispatch

import numpy as np
from matplotlib.axes import Axes

from pyproelbo._diagnostics.calibration import Calibration
from pyproelbo._diagnostics.check_result import Check
from pyproelbo._diagnostics.convergence import Convergence
from pyproelbo._diagnostics.gradient_report import GradientNoise
from pyproelbo._diagnostics.loo import Loo
from pyproelbo._evidence.decompositions import Decompositions
from pyproelbo._evidence.fisher import FisherDivergence
from pyproelbo._evidence.gaps import InferenceGap
from pyproelbo._evidence.linear_response import LinearResponse
from pyproelbo._evidence.moments import Moments
from pyproelbo._evidence.pareto import threshold_of
from pyproelbo._evidence.psis import Psis
from pyproelbo._evidence.repair_result import Repair
from pyproelbo._evidence.sensitivity import Sensitivity
from pyproelbo._evidence.weights import Evidence
from pyproelbo._fitting.fit import Fit
from pyproelbo._fitting.history import History
from pyproelbo._results.per import nats
from pyproelbo._results.result import Result
from pyproelbo._surgery.part import SurgeryPart
from pyproelbo._surgery.result import Surgery
from pyproelbo._terms.by_time import ByTime
from pyproelbo.plots.axes import array, axes, tidy
from pyproelbo.plots.by_time import plot_kl_by_time
from pyproelbo.plots.calibration import plot_calibration
from pyproelbo.plots.elbo_trace import plot_elbo_trace
from pyproelbo.plots.estimates import Reference, dots, strips
from pyproelbo.plots.evidence_gap import plot_evidence_gap
from pyproelbo.plots.gradient_noise import plot_gradient_noise
from pyproelbo.plots.khat import plot_khat
from pyproelbo.plots.surgery import plot_surgery
from pyproelbo.priors.usage import Usage

_WAYS = ("guide", "family", "correlated", "modes", "annealed", "mixture", "failed")


@singledispatch
def figure(result: Result, *, ax: Axes | None) -> Axes:
    """The figure of a result, drawn into ``ax`` or into a new one."""
    raise TypeError(f"{type(result).__name__} has no figure")


_FUNCTIONS: dict[type[Result], Callable[..., Axes]] = {
    Surgery: plot_surgery,
    InferenceGap: plot_evidence_gap,
    Psis: plot_khat,
    Loo: plot_khat,
    Calibration: plot_calibration,
    GradientNoise: plot_gradient_noise,
    ByTime: plot_kl_by_time,
}
for _kind, _function in _FUNCTIONS.items():
    figure.register(_kind, _function)


@figure.register
def _(result: Check, *, ax: Axes | None) -> Axes:
    return plot_khat(result.psis, ax=ax)


@figure.register
def _(result: Fit, *, ax: Axes | None) -> Axes:
    return figure(result.history, ax=ax)


@figure.register
def _(result: History, *, ax: Axes | None) -> Axes:
    ax = plot_elbo_trace(result.step, {"ELBO": result.elbo}, ax=ax)
    ax.set(ylabel=f"ELBO ({nats(result.per)})")
    return ax


@figure.register
def _(result: Moments, *, ax: Axes | None) -> Axes:
    """Standard deviations of q over those of the posterior."""
    label = "sd of q / sd of the posterior"
    return dots(
        result.dims,
        array(result.sd_ratio),
        array(result.sd_ratio_stderr),
        xlabel=label,
        reference=Reference(1.0, 1 / 1.15, 1.15),
        is_log=True,
        ax=ax,
    )


@figure.register
def _(result: LinearResponse, *, ax: Axes | None) -> Axes:
    sd = array(result.sd)
    errors = array(result.q_sd) / sd**2 * array(result.sd_stderr)
    label = "sd of q / sd by linear response"
    reference = Reference(1.0, 1 / 1.15, 1.15)
    ratio = array(result.q_sd) / sd
    return dots(result.names, ratio, errors, xlabel=label, reference=reference, is_log=True, ax=ax)


@figure.register
def _(result: FisherDivergence, *, ax: Axes | None) -> Axes:
    values, errors = array(result.scaled), array(result.scaled_stderr)
    label = "Fisher divergence times the variance of q"
    return dots(result.dims, values, errors, xlabel=label, reference=Reference(0.0), ax=ax)


@figure.register
def _(result: Sensitivity, *, ax: Axes | None) -> Axes:
    label = "change of the mean by a datum, posterior sds"
    values = array(result.by_datum_in_sds).reshape(-1, len(result.names))
    if not len(values):
        label = "change of the mean by a unit of a hyperparameter, posterior sds"
        values = array(result.by_hyperparameter_in_sds)
    return strips(result.names, values, xlabel=label, ax=ax)


@figure.register
def _(result: Convergence, *, ax: Axes | None) -> Axes:
    ax = axes(ax)
    ax.plot(np.arange(len(result.rhat)), result.rhat, "o", markersize=4)
    ax.axhline(1.0, color="0.3", linewidth=1, linestyle="dashed")
    ax.set(xlabel="quantity", ylabel=r"$\hat{R}$ of the last iterates")
    return tidy(ax)


@figure.register
def _(result: Evidence, *, ax: Axes | None) -> Axes:
    ax = axes(ax)
    gap = array(result.log_evidence - result.elbo)
    if len(gap) == 1:
        values = array(result.elbo)[0], array(result.log_evidence)[0]
        errors = array(result.elbo_stderr)[0], array(result.stderr)[0]
        labels = ["ELBO", "log p(x)"]
        return dots(labels, np.array(values), np.array(errors), xlabel=nats(result.per), ax=ax)
    ax.hist(gap, bins=min(50, max(10, len(gap) // 10)), color="C0")
    ax.axvline(gap.mean(), color="0.3", linewidth=1, linestyle="dashed")
    ax.set(xlabel="log p(x) \N{MINUS SIGN} ELBO, nats", ylabel="data")
    return tidy(ax)


@figure.register
def _(result: Decompositions, *, ax: Axes | None) -> Axes:
    """The gap below log p(x) in the ELBO's forms."""
    found = {
        "Jensen gap": result.jensen_gap,
        "KL to the posterior": result.posterior_kl,
        "slack of ln r \N{LESS-THAN OR EQUAL TO} r \N{MINUS SIGN} 1": result.slack,
        "half the variance of log w": result.half_variance,
    }
    values, errors = (np.array([float(x[i]) for x in found.values()]) for i in range(2))
    label = f"log p(x) \N{MINUS SIGN} ELBO, {nats(result.per)}"
    return dots([*found], values, errors, xlabel=label, reference=Reference(0.0), ax=ax)


@figure.register
def _(result: Repair, *, ax: Axes | None) -> Axes:
    ax = axes(ax)
    before, after = array(result.khat_before), array(result.khat_after)
    for i, way in enumerate(_WAYS):
        of = np.asarray(result.method) == way
        if of.any():
            label = f"{way} ({of.sum():,})"
            ax.plot(before[of], after[of], ".", color=f"C{i}", label=label)
    for line in (ax.axvline, ax.axhline):
        line(threshold_of(result.num_samples), color="0.6", linewidth=0.8)
    ax.set(xlabel=r"$\hat{k}$ of the guide's draws", ylabel=r"$\hat{k}$ of the repaired draws")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return tidy(ax)


@figure.register
def _(result: SurgeryPart, *, ax: Axes | None) -> Axes:
    """The density of the part's mixture of posteriors, at the draws of all data."""
    ax = axes(ax)
    log_mean = [array(one.log_sums[:, 0]) - np.log(len(one.draws[0].rows)) for one in result.sums]
    values = np.concatenate(log_mean)
    ax.hist(values[np.isfinite(values)], bins=min(50, max(10, len(values) // 10)), color="C0")
    ax.set(xlabel="log of the mean density of these posteriors, nats", ylabel="draws of z")
    return tidy(ax)


@figure.register
def _(result: Usage, *, ax: Axes | None) -> Axes:
    ax = axes(ax)
    usage, weights = array(result.usage), array(result.weights)
    order = np.argsort(-usage)
    ax.bar(np.arange(len(usage)), usage[order], color="C0", label="of the codes")
    ax.plot(np.arange(len(usage)), weights[order], ".", color="C1", label="weight in the prior")
    ax.set(xlabel="component, by its share", ylabel="share")
    ax.legend(frameon=False)
    return tidy(ax)
