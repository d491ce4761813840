r"""Means over all data of values known for some of them: two-phase sampling.

In the first phase each of N data has a draw. In the second, log q(z) is known at the draws of m of
them, one from each of m strata of the data in their order. For all draws there are covariates C.
The mean of y over all data is estimated by regression on these,

    mean_m(y) + (mean_N(C') - mean_m(C)) . b,    b the slopes of the least squares of y on C,

which is a mean over the m with the same weights for any y. C' has the means of C, and less noise:
the noise of densities whose expectations are known is subtracted. The bias is of order 1 / m, and
the variance

    V + (1 - m / N) s^2 / m,

with V the variance of mean_N(y - (C - C') . b) over the draws, and s^2 the variance of the
residuals within the strata. Half the mean square of the differences between neighbours is no less
than s^2.

Cochran (1977), "Sampling Techniques", chapters 5A, 7 and 12; Wolter (2007), "Introduction to
Variance Estimation", chapter 8, for the differences.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ROWS_PER_SLOPE = 20  # with fewer, noise dominates the slopes
_SINGULAR = 1e-9


@dataclass(frozen=True)
class Parted:
    """A value of each draw of each datum, the sum of two.

    Attributes:
        known: the part known for all data, (draws, N, ...).
        rest: the part known only for m of them, (draws, m, ...); None where there is none.
    """

    known: Tensor
    rest: Tensor | None = None

    def __add__(self, other: "Parted") -> "Parted":
        parts = [part.rest for part in (self, other) if part.rest is not None]
        rest = parts[0] + parts[1] if len(parts) == 2 else (parts or [None])[0]
        return Parted(self.known + other.known, rest)

    def __neg__(self) -> "Parted":
        return Parted(-self.known, None if self.rest is None else -self.rest)

    def __sub__(self, other: "Parted") -> "Parted":
        return self + -other

    def sum(self) -> "Parted":
        """The sum over the last dim."""
        return Parted(self.known.sum(-1), None if self.rest is None else self.rest.sum(-1))


class Covariates(NamedTuple):
    """Covariates known for each draw of each datum, (draws, N, p): the most important first.

    Attributes:
        values: C.
        controlled: C'.
    """

    values: Tensor
    controlled: Tensor


class TwoPhase:
    """Means over data and draws, and their standard errors.

    Args:
        num_samples: S, the first draws, over which means are taken; others only show their noise.
        rows: (m,), ascending, the data of the second phase; None where all values are for all data.
        covariates: None where there are none.
    """

    def __init__(
        self,
        num_samples: int,
        rows: Tensor | None = None,
        covariates: Covariates | None = None,
    ) -> None:
        self._num_samples, self._rows = num_samples, rows
        if rows is None:
            return
        self._design = torch.ones(len(rows), 1, dtype=torch.float64, device=rows.device)
        self._noise: Tensor | None = None
        if covariates is not None:
            values, controlled = covariates
            of_data = values[:num_samples].mean(0)
            scale = of_data.std(0)
            varies = scale > _SINGULAR * (1 + of_data.abs().mean(0))
            few = varies.nonzero()[: max(0, len(rows) // ROWS_PER_SLOPE - 1), 0]
            mean, scale = controlled[:num_samples, :, few].mean((0, 1)), scale[few]
            scaled = (of_data[rows][:, few] - mean) / scale
            self._design = torch.cat([self._design, scaled], 1)
            self._noise = (values[:, rows] - controlled[:, rows])[..., few] / scale
        self._solve = torch.linalg.pinv(self._design, rtol=_SINGULAR)
        # of a residual in the mean, if its datum had not been used to find the slopes
        leverage = (self._design * self._solve.mT).sum(1)
        self._shares = self._solve[0] / (1 - leverage).clamp(min=1e-3)

    def without_covariates(self) -> "TwoPhase":
        """Plain means of the same data."""
        return TwoPhase(self._num_samples, self._rows)

    def mean(self, value: Parted) -> Tensor:
        """The mean over data and draws, (...)."""
        mean = value.known[: self._num_samples].mean((0, 1))
        if value.rest is None:
            return mean
        return mean + self._coefficients(value.rest)[0]

    def stderr(self, value: Parted) -> Tensor:
        """Its standard error: from the draws, and from the data of the second phase."""
        num_data = value.known.shape[1]
        num = self._num_samples * num_data
        if value.rest is None:
            return (noise(value.known) / num).sqrt()
        y, coefficients = self._of_data(value.rest), self._coefficients(value.rest)
        residual = y - torch.einsum("mp,p...->m...", self._design, coefficients)
        shares = torch.einsum("m...,m->m...", residual, self._shares)
        variance = shares.diff(dim=0).square().sum(0) / (2 * (len(y) - 1))
        of_rows = len(y) * (1 - len(y) / num_data) * variance
        of_draws = value.known[:, self._rows] + value.rest
        if self._noise is not None:
            of_draws = of_draws - torch.einsum("smp,p...->sm...", self._noise, coefficients[1:])
        return (noise(of_draws) / num + of_rows).sqrt()

    def _coefficients(self, value: Tensor) -> Tensor:
        """The coefficients (1 + p, ...), first the mean at the covariates' own means."""
        return torch.einsum("pm,m...->p...", self._solve, self._of_data(value))

    def _of_data(self, value: Tensor) -> Tensor:
        return value[: self._num_samples].mean(0)


def noise(value: Tensor) -> Tensor:
    """The mean over data of the variance between the draws of each."""
    # not by .var, which takes ten times as long over so few draws
    return (value - value.mean(0)).square().sum(0).div(len(value) - 1).nanmean(0)
