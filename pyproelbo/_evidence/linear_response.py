"""Covariances of latents from the response of q's means to a change of the model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyproelbo._distributions.sobol import Kind
from pyproelbo._evidence.fixed_draws import FixedObjective, fixed_draws
from pyproelbo._evidence.response import (
    COARSE,
    Optimum,
    by_groups,
    checked_draws,
    chosen_latents,
    covariance_of,
    jackknife_error,
    notes_of_optimum,
    optimum_of,
    without_group,
)
from pyproelbo._messages.arguments import check_names, check_shared
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Number, Row, Table
from pyproelbo._rows.batches import Arguments, ReportData
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.report_data import rows_of
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray

_NARROW = 1.3
_SHOWN = 20  # lines of a table


@dataclass(frozen=True, eq=False, repr=False)
class LinearResponse(Result):
    r"""Posterior covariances of latents by linear response, with those of q itself.

    With eta the guide's unconstrained parameters, L(eta) the ELBO at S fixed draws, H its Hessian
    at the optimum, and g(eta) = E_q[h(z)] the means of latents over the same draws,

        covariance = (dg / d eta) (-H)^-1 (dg / d eta)^T:

    the derivative of the means when the log-density of the model is tilted by t^T h(z), which for
    the posterior itself is its covariance (Giordano, Broderick & Jordan 2018, "Covariances,
    robustness, and variational Bayes"). It is as accurate as q's means: exact where the posterior
    and q are Gaussian in h(z), however narrow q is. Elsewhere it is an approximation, whose error
    ``stderr`` does not include.

    Attributes:
        names: the labels of the P elements of latents, such as "beta[0]".
        mean: g at the optimum, (P,).
        mean_stderr: its error from the S draws, (P,).
        q_sd: the sds of q at the optimum, by the same draws, (P,).
        covariance: (P, P).
        stderr: the Monte Carlo error of each covariance from the S draws, (P, P): a jackknife that
            leaves out in turn each of 20 groups of draws, or each replicate of Sobol draws.
        num_samples: S.
        moved: the distance of the optimum at these draws from the given q: the largest shift of a
            mean, in sds of q.
        distance: the last Newton step to the optimum, or without ``polish`` the one that would be
            made, likewise.
        gradient_norm: the norm of L's gradient there, in nats per unit of eta.
        is_single: whether the programs computed in float32 or lower precision.
    """

    names: tuple[str, ...]
    mean: Tensor
    mean_stderr: Tensor
    q_sd: Tensor
    covariance: Tensor
    stderr: Tensor
    num_samples: int
    moved: float
    distance: float
    gradient_norm: float
    is_single: bool = False

    @property
    def sd(self) -> Tensor:
        """The standard deviations by linear response, (P,)."""
        return self.covariance.diagonal().sqrt()

    @property
    def sd_stderr(self) -> Tensor:
        """The Monte Carlo error of ``sd``, (P,)."""
        return self.stderr.diagonal() / (2 * self.sd)

    @property
    def correlation(self) -> Tensor:
        """The correlations by linear response, (P, P)."""
        return self.covariance / (self.sd.unsqueeze(1) * self.sd)

    @property
    def notes(self) -> list[str]:
        """Remarks on how reliable the numbers are, in sentences; empty where nothing stands out."""
        notes = []
        ratio, error = self.sd / self.q_sd, self.sd_stderr / self.sd
        worst = int(ratio.argmax())
        if ratio[worst] > _NARROW:
            notes.append(
                f"q's sds are too small by up to a factor of {ratio[worst]:.1f} "
                f"({self.names[worst]})."
            )
        if error.max() > COARSE:
            notes.append(
                f"The Monte Carlo error of an sd is up to {float(error.max()):.0%} of it: take a "
                "larger num_samples."
            )
        return notes + notes_of_optimum(self.moved, self.distance, self.is_single)

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dims "latent_dim" and "latent_dim_2", alike."""
        import xarray

        of, units = "latent_dim", {"units": "as the latent"}
        columns = ("mean", "mean_stderr", "q_sd", "sd", "sd_stderr")
        values: dict[str, Any] = {
            name: (of, getattr(self, name).numpy(), units) for name in columns
        }
        both, squared = (of, f"{of}_2"), {"units": "product of those of the latents"}
        values["covariance"] = (both, self.covariance.numpy(), squared)
        values["covariance_stderr"] = (both, self.stderr.numpy(), squared)
        attributes = {"num_samples": self.num_samples, "moved": self.moved}
        attributes |= {"distance": self.distance, "gradient_norm": self.gradient_norm}
        labels = list(self.names)
        return xarray.Dataset(values, dict.fromkeys(both, labels), attributes)

    def _table(self) -> Table:
        ratio = self.sd / self.q_sd
        off = ratio.log().abs()
        order = off.argsort(descending=True, stable=True)[:_SHOWN].sort().values.tolist()
        rows = [
            Row(
                self.names[k],
                (
                    Number(float(self.mean[k]), float(self.mean_stderr[k])),
                    Number(float(self.q_sd[k])),
                    Number(float(self.sd[k]), float(self.sd_stderr[k])),
                    Number(float(ratio[k]), None, 2),
                ),
            )
            for k in order
        ]
        left = len(self.names) - len(order)
        if left:
            rows.append(Row(f"and {left:,} that are less off", ()))
        title = f"Posterior sds by linear response ({self.num_samples:,} fixed draws)"
        return Table(title, rows, ("latent", "mean", "q's sd", "sd", "sd / q's sd"))


def linear_response(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    site: str | Sequence[str] | None = None,
    num_samples: int | None = None,
    draws: Kind = "independent",
    polish: bool = True,
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LinearResponse:
    """Covariances of latents by linear response (see :class:`LinearResponse`).

    At draws whose noise is fixed the ELBO is a smooth function of the guide's parameters. Its
    maximum is found from their current values, by L-BFGS and then by Newton's method; there, one
    linear system of the Hessian for each element of a latent gives all covariances. For up to 1,000
    parameters the whole Hessian is computed; for more, only its products, with conjugate gradients.
    The parameters of local latents are included, and respond with the global ones. The parameters
    of the model are unchanged, and the guide's are restored afterwards.

    Ctrl-C, once the covariance is known, returns it with the error from the groups of draws that
    are finished.

    Args:
        model, guide, data, arguments, chunk, seed, progress: as :func:`evidence`. The data must be
            given at once, and draws reparameterised, with second derivatives: normal ones and their
            transforms, as in all AutoGuides except AutoDelta.
        site: the latents whose covariances are wanted, a name or several. By default the global
            ones, outside the plate over the data.
        num_samples: S. For a joint draw of D latents, as in AutoMultivariateNormal, it must be well
            above D: with fewer draws the ELBO has no maximum. By default 100, or 128 Sobol draws.
        draws: "independent"; or "sobol" for scrambled Sobol points, which leave a smaller error
            where latents are few, and whose S is 8 times a power of two (see
            :class:`~pyproelbo.Sobol`).
        polish: whether to search for the maximum. If not, q must be at it.

    Raises:
        ValueError: "not at an optimum", where minus the Hessian is not positive definite, or the
            maximum is not found; for a guide without parameters, for data in several batches or
            subsampled, for latents without reparameterised draws, such as discrete ones that the
            model does not enumerate, and for densities without second derivatives.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> def model():
    ...     pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))
    >>> found = linear_response(model, AutoNormal(model), None, progress=False)
    >>> torch.allclose(found.covariance, covariance.double(), atol=1e-4)
    True
    >>> bool((found.q_sd < 0.5).all())  # the best independent q has (1 - 0.9^2)^(1/2)
    True
    """
    num, points = checked_draws(num_samples, draws, polish)
    check_shared(None, seed, arguments, chunk)
    check_names(site=site)
    unit, (batch,) = rows_of(model, guide, data, sys.maxsize, arguments, is_joint=True)
    with (
        evaluating(model, guide, seed=seed),
        fixed_draws(model, guide, batch, unit, num, seed, chunk, points) as objective,
    ):
        sites = chosen_latents(objective.first, site)

        def of_next(state: _State | None, j: int) -> _State:
            if state is None:
                state = _State(optimum_of(objective, sites, polish, seed), [])
            return _State(state.optimum, [*state.without, _without(objective, state.optimum, j)])

        return by_groups(objective, of_next, _result, "linear_response", progress)


def check_response(linear_response: object) -> None:
    """Raise a ValueError for anything but such a result or None."""
    if not isinstance(linear_response, LinearResponse | None):
        raise ValueError(
            "linear_response should be a result of pe.linear_response, or None, got "
            f"{linear_response!r}"
        )


class _Part(NamedTuple):
    """The means (P,) and the covariances (P, P) without a group of draws."""

    mean: np.ndarray
    covariance: np.ndarray


class _State(NamedTuple):
    """What is known so far: from all draws, and without each of the first groups."""

    optimum: Optimum
    without: list[_Part]


def _without(objective: FixedObjective, optimum: Optimum, j: int) -> _Part:
    """From all draws except the j-th group, at their optimum by a Newton step."""
    rest = without_group(objective, j)
    gradient = objective.value(optimum.eta, rest)[1]
    eta = optimum.eta + optimum.solve(gradient[:, None])[:, 0]
    mean = np.delete(optimum.values, objective.groups[j], 0).mean(0)
    mean = mean + optimum.response.T @ gradient
    return _Part(mean, covariance_of(objective, eta, optimum.sites, optimum.response, rest))


def _result(state: _State, _: bool) -> LinearResponse:
    optimum, errors = state.optimum, []
    for column in map(np.stack, zip(*state.without, strict=True)):
        spread = column.std(0, ddof=1) if len(column) > 1 else column[0] * np.nan
        errors.append(torch.from_numpy(jackknife_error(spread, optimum.num_groups)))
    return LinearResponse(
        optimum.labels,
        torch.from_numpy(optimum.values.mean(0)),
        errors[0],
        torch.from_numpy(optimum.values.std(0)),
        torch.from_numpy(optimum.covariance),
        errors[1],
        len(optimum.values),
        optimum.moved,
        optimum.distance,
        optimum.gradient_norm,
        optimum.is_single,
    )
