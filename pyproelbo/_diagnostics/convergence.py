"""Has stochastic optimisation converged? A test of its iterates, as for a Markov chain."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from pyproelbo._messages.warn import warn
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Table, row

if TYPE_CHECKING:
    import xarray

RHAT = 1.1  # Dhaka et al. (2020), section 3
DRIFT = 3.0  # Monte Carlo standard errors


@dataclass(frozen=True, eq=False, repr=False)
class Convergence(Result):
    r"""Whether the last iterates of an optimisation are draws from one distribution.

    With a constant learning rate iterates end in a stationary distribution around the optimum
    (Dhaka et al. 2020, "Robust, Accurate Stochastic Optimization for Variational Inference"). Their
    mean is then a better answer than the last of them.

    Attributes:
        rhat: R-hat between the two halves of the window, for each quantity, (P,): near 1 at rest.
        mcse: the Monte Carlo standard error of the mean over the window, (P,), which accounts for
            the dependence of iterates.
        mean: the mean over the window, (P,).
        drift: the mean of the second half minus that of the first, in standard errors, (P,).
        window: the number of iterates judged, the last ones.
    """

    rhat: np.ndarray
    mcse: np.ndarray
    mean: np.ndarray
    drift: np.ndarray
    window: int

    @property
    def is_at_rest(self) -> bool:
        """Whether R-hat is below 1.1, and the drift below 3 standard errors, everywhere."""
        return bool((self.rhat < RHAT).all() and (np.abs(self.drift) < DRIFT).all())

    @property
    def notes(self) -> list[str]:
        """Whether to continue, in a sentence."""
        if self.is_at_rest:
            return ["At rest: stop, or lower the learning rate and see if it moves on."]
        worst = int(np.abs(self.drift).argmax())
        which = f" (quantity {worst})" if len(self.drift) > 1 else ""
        way = "rising" if self.drift[worst] > 0 else "falling"
        return [f"Not at rest: still {way}{which}. Go on."]

    @property
    def advice(self) -> str:
        """The only element of ``notes``, which other results have too: use that (deprecated)."""
        warn("Convergence.advice is deprecated: use notes[0], the same", DeprecationWarning)
        return self.notes[0]

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dim "quantity"; ``mcse`` is there as ``mean_stderr``."""
        import xarray

        columns = {
            "mean": (self.mean, "as the iterates"),
            "mean_stderr": (self.mcse, "as the iterates"),
            "rhat": (self.rhat, "1"),
            "drift": (self.drift, "standard errors"),
        }
        values = {
            name: ("quantity", value, {"units": unit}) for name, (value, unit) in columns.items()
        }
        attributes = {"window": self.window, "is_at_rest": int(self.is_at_rest)}
        return xarray.Dataset(values, attrs=attributes)

    def _table(self) -> Table:
        drift = np.abs(self.drift).max()
        rows = [
            row("R-hat, at most", self.rhat.max(), None, f"(below {RHAT} at rest)", decimals=3),
            row(
                "drift, at most",
                drift,
                None,
                f"standard errors (below {DRIFT:.0f} at rest)",
                decimals=1,
            ),
        ]
        if len(self.rhat) == 1:
            rows.insert(0, row("mean", self.mean[0], self.mcse[0]))
        return Table(f"Convergence, over the last {self.window:,} iterates", rows)


def convergence(iterates: ArrayLike | Tensor, *, window: float = 0.5) -> Convergence:
    """Whether an optimisation has converged (see :class:`Convergence`).

    Args:
        iterates: what was recorded at each step or epoch, in order: (T,), such as the ELBO, or
            (T, P) for several quantities, such as parameters.
        window: the fraction of them, from the end, to judge.

    Raises:
        ValueError: for fewer than 20 iterates in the window, and for NaN or infinite iterates.

    >>> noise = np.random.default_rng(0).normal(size=1000)
    >>> convergence(-100.0 * np.exp(-np.arange(1000) / 50) + noise).is_at_rest
    True
    >>> convergence(0.01 * np.arange(1000) + noise).notes
    ['Not at rest: still rising. Go on.']
    """
    values = np.asarray(
        iterates.detach().cpu() if isinstance(iterates, Tensor) else iterates, float
    )
    if not 0 < window <= 1:
        raise ValueError(f"window should be a fraction above 0 and at most 1, got {window}")
    if values.ndim not in (1, 2):
        raise ValueError(f"iterates should have shape (T,) or (T, P), got {values.shape}")
    half = round(len(values) * window) // 2
    if half < 10:
        raise ValueError(
            f"the window should have at least 20 iterates, got {2 * half} of {len(values)}: record "
            "more, or take a larger window"
        )
    last = values[-2 * half :].reshape(2 * half, -1)
    if not np.isfinite(last).all():
        raise ValueError("iterates should be finite: find where the optimisation has diverged")
    import arviz as az

    halves = last.reshape(2, half, -1)
    still = np.ptp(last, 0) == 0  # R-hat is undefined for what does not move
    rhat, mcse, errors = (
        np.array([0.0 if s else float(f(x)) for s, x in zip(still, halves.T, strict=True)])
        for f in (
            lambda x: az.rhat(x.T),
            lambda x: az.mcse(x.T),
            lambda x: sum(float(az.mcse(part[None])) ** 2 for part in x.T) ** 0.5,
        )
    )
    first, second = halves.mean(1)
    drift = (second - first) / np.where(errors > 0, errors, 1.0)
    return Convergence(np.where(still, 1.0, rhat), mcse, last.mean(0), drift, 2 * half)
