"""The sensitivity of posterior means to the weights of data and to hyperparameters."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyproelbo._distributions.sobol import Kind
from pyproelbo._evidence.fixed_draws import Draws, FixedObjective, fixed_draws
from pyproelbo._evidence.hyperparameters import Hyperparameters, hyperparameters_of
from pyproelbo._evidence.response import (
    COARSE,
    Optimum,
    by_groups,
    checked_draws,
    chosen_latents,
    jackknife_error,
    notes_of_optimum,
    optimum_of,
    without_group,
)
from pyproelbo._evidence.trained_guide import borrowed
from pyproelbo._evidence.weighed_data import WeighedData, weighed_data
from pyproelbo._messages.arguments import check_names, check_shared
from pyproelbo._results.result import Result, Section
from pyproelbo._results.tables import Number, Row, Table
from pyproelbo._rows.batches import Arguments, ReportData
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.report_data import rows_of
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray

_SHOWN = 10  # lines of a table
_STEPS = 3
_LARGE = 1.0  # sds by which a datum moves a mean


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity(Result):
    r"""Derivatives of latents' posterior means by the weights of data and by hyperparameters.

    With a weight w_n on the log-likelihood of each datum, and the model's parameters theta, the
    ELBO at S fixed draws is L(eta; w, theta), with its maximum at eta(w, theta). The means g(eta) =
    E_q[h(z)] of latents change with it. With the response A = (-H)^-1 (dg / d eta)^T of
    :class:`LinearResponse`,

        dE[h] / d w_n   = A^T d/d eta E_q[log p(x_n | z)]  at w = 1,
        dE[h] / d theta = A^T d^2 L / (d eta d theta),

    (Giordano, Broderick & Jordan 2018; Giordano et al. 2019, "A Swiss army infinitesimal
    jackknife"). Leaving datum n out moves the means by about *minus* ``by_datum[n]``, if that is
    small: it is the first term of a series, and too small for data with high leverage. The
    derivatives are as accurate as q's means: exact where the posterior and q are Gaussian in h(z).

    Attributes:
        names: the labels of the P elements of latents, such as "beta[0]".
        mean: E_q[h(z)] at the optimum, (P,).
        sd: the posterior sds by linear response, (P,).
        by_datum: dE[h] / d w_n, in the units of the latents, (\*plates, P); (0, P) without data. It
            is 0 for a masked datum.
        by_datum_stderr: its Monte Carlo error from the S draws: a jackknife, as in
            :class:`LinearResponse`.
        plates: the names of the dims of the data.
        hyperparameters: the labels of the T numbers theta.
        values: theta, as in the model, (T,).
        by_hyperparameter: dE[h] / d theta, in units of the latents per unit of theta, (T, P).
        by_hyperparameter_stderr: likewise.
        num_samples: S.
        moved, distance, gradient_norm, is_single: as in :class:`LinearResponse`.
    """

    names: tuple[str, ...]
    mean: Tensor
    sd: Tensor
    by_datum: Tensor
    by_datum_stderr: Tensor
    plates: tuple[str, ...]
    hyperparameters: tuple[str, ...]
    values: Tensor
    by_hyperparameter: Tensor
    by_hyperparameter_stderr: Tensor
    num_samples: int
    moved: float
    distance: float
    gradient_norm: float
    is_single: bool = False

    @property
    def by_datum_in_sds(self) -> Tensor:
        """``by_datum`` in posterior sds of the latents, (\\*plates, P).

        To first order these are the DFBETAS (Belsley, Kuh & Welsch 1980).
        """
        return self.by_datum / self.sd

    @property
    def by_hyperparameter_in_sds(self) -> Tensor:
        """``by_hyperparameter`` in posterior sds of the latents, (T, P)."""
        return self.by_hyperparameter / self.sd

    @property
    def notes(self) -> list[str]:
        """Remarks on the numbers, in sentences; empty where nothing stands out."""
        notes, most = [], self.by_datum_in_sds.abs().amax(-1).flatten()
        num = int((most > _LARGE).sum())
        if num:
            worst = int(most.argmax())
            what = "1 datum moves" if num == 1 else f"{num:,} data move"
            notes.append(
                f"{what} a mean by more than {_LARGE:g} sd; most of all {self._label(worst)}, by "
                f"{most[worst]:.1f}. For such large moves, the effect of leaving it out is only "
                "roughly known."
            )
        for values, error in (
            (self.by_datum, self.by_datum_stderr),
            (self.by_hyperparameter, self.by_hyperparameter_stderr),
        ):
            if values.numel() and (error / self.sd).max() > COARSE * (values / self.sd).abs().max():
                notes.append(
                    "The Monte Carlo error of a sensitivity is above "
                    f"{COARSE:.0%} of the largest: take a larger num_samples."
                )
                break
        return notes + notes_of_optimum(self.moved, self.distance, self.is_single)

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dims of the plates, "hyperparameter" and "latent_dim"."""
        import xarray

        of, units = "latent_dim", {"units": "as the latent"}
        values: dict[str, Any] = {n: (of, getattr(self, n).numpy(), units) for n in ("mean", "sd")}
        coordinates: dict[str, Any] = {of: list(self.names)}
        if self.plates:
            dims, per = (*self.plates, of), {"units": "as the latent, per unit of weight"}
            for name in ("by_datum", "by_datum_stderr"):
                values[name] = (dims, getattr(self, name).numpy(), per)
        if self.hyperparameters:
            dims, per = ("hyperparameter", of), {"units": "as the latent, per unit of value"}
            for name in ("by_hyperparameter", "by_hyperparameter_stderr"):
                values[name] = (dims, getattr(self, name).numpy(), per)
            of_values = {"units": "as the hyperparameter"}
            values["value"] = ("hyperparameter", self.values.numpy(), of_values)
            coordinates["hyperparameter"] = list(self.hyperparameters)
        attributes = {"num_samples": self.num_samples, "moved": self.moved}
        attributes |= {"distance": self.distance, "gradient_norm": self.gradient_norm}
        return xarray.Dataset(values, coordinates, attributes)

    def _label(self, n: int) -> str:
        """The label of a datum, from its index among all: its plates and its places there."""
        places = np.unravel_index(n, self.by_datum.shape[:-1])
        return ", ".join(f"{p} {int(i)}" for p, i in zip(self.plates, places, strict=True))

    def _table(self) -> Table:
        if not self.plates:
            return self._of_hyperparameters()
        values, errors = (x.flatten(0, -2) for x in (self.by_datum, self.by_datum_stderr))
        most = (values / self.sd).abs().amax(-1)
        order = most.argsort(descending=True, stable=True)[:_SHOWN].tolist()
        rows = [Row(self._label(n), self._cells(values[n], errors[n])) for n in order]
        left = len(values) - len(order)
        if left:
            rows.append(Row(f"and {left:,} that move less", ()))
        title = f"Posterior means by the weights of data ({self.num_samples:,} fixed draws)"
        return Table(title, rows, ("datum", "moves most", "by, per weight", "in sds"))

    def _of_hyperparameters(self) -> Table:
        values, errors = self.by_hyperparameter, self.by_hyperparameter_stderr
        most = (values / self.sd).abs().amax(-1)
        order = most.argsort(descending=True, stable=True)[:_SHOWN].sort().values.tolist()
        rows = [
            Row(
                self.hyperparameters[t],
                (Number(float(self.values[t])), *self._cells(values[t], errors[t])),
            )
            for t in order
        ]
        left = len(values) - len(order)
        if left:
            rows.append(Row(f"and {left:,} that move less", ()))
        title = f"Posterior means by hyperparameters ({self.num_samples:,} fixed draws)"
        heads = ("hyperparameter", "value", "moves most", "by, per unit", "in sds")
        return Table(title, rows, heads)

    def _cells(self, values: Tensor, errors: Tensor) -> tuple[str, Number, Number]:
        """The latent that moves most, and by how much."""
        in_sds = values / self.sd
        k = int(in_sds.abs().argmax())
        by = Number(float(values[k]), float(errors[k]))
        return self.names[k], by, Number(float(in_sds[k]), None, 2)

    def _sections(self) -> list[Section]:
        tables = [self._table()]
        if self.plates and self.hyperparameters:
            tables.append(self._of_hyperparameters())
        *before, last = tables
        return [*map(Section, before), Section(last, self.notes)]


def sensitivity(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    site: str | Sequence[str] | None = None,
    observed: str | Sequence[str] | None = None,
    plate: str | Sequence[str] | None = None,
    hyperparameters: str | Sequence[str] | None = None,
    num_samples: int | None = None,
    draws: Kind = "independent",
    polish: bool = True,
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """The sensitivity of posterior means to data and hyperparameters (see :class:`Sensitivity`).

    A datum is an element of the plates that the observed sites share; its log-likelihood is the sum
    of theirs at that element. The weight applies only to that: at 0 a local latent of the datum
    keeps its prior.

    Hyperparameters are the parameters of the model, which are fixed while the maximum is found. For
    a scale, the derivative is by the scale itself, not by its logarithm. Make those that no fit
    should change, such as a prior's, parameters with ``requires_grad=False``. One that the guide
    shares moves in both.

    Ctrl-C, once the sensitivities are known, returns them with the error from the groups of draws
    that are finished.

    Args:
        model, guide, data, arguments, site, num_samples, draws, polish, chunk, seed, progress: as
            :func:`linear_response`.
        observed: the sites whose log-likelihoods have weights, a name or several, of data or of
            factors. By default all data; () for none.
        plate: which of the plates that they share, a name or several: where groups have members,
            the datum may be a group. By default all.
        hyperparameters: the names of the model's parameters. By default all; () for none.

    Raises:
        ValueError: as for :func:`linear_response`; for observed sites without a common plate, for a
            model that has neither data nor parameters, and for parameters with a constraint that
            couples their elements.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     loc = pyro.param("loc", torch.tensor(0.0))
    ...     mean = pyro.sample("mean", dist.Normal(loc, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
    >>> x = torch.tensor([1.0, 2.0, 6.0])
    >>> found = sensitivity(model, AutoNormal(model), x, progress=False)
    >>> found.by_datum[:, 0]  # (x_n - E[mean]) / 4, and E[mean] is 9 / 4
    tensor([-0.3125, -0.0625,  0.9375], dtype=torch.float64)
    >>> found.by_hyperparameter[0]  # 1 / 4, the weight of the prior
    tensor([0.2500], dtype=torch.float64)
    """
    num, points = checked_draws(num_samples, draws, polish)
    check_shared(None, seed, arguments, chunk)
    check_names(site=site, plate=plate)
    for name, names in (("observed", observed), ("hyperparameters", hyperparameters)):
        if not (isinstance(names, list | tuple) and not names):
            check_names(**{name: names})
    unit, (batch,) = rows_of(model, guide, data, sys.maxsize, arguments, is_joint=True)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model, guide, seed=seed))
        objective = stack.enter_context(
            fixed_draws(model, guide, batch, unit, num, seed, chunk, points)
        )
        sites = chosen_latents(objective.first, site)
        theta = hyperparameters_of(model, guide, batch, hyperparameters)
        weighed = weighed_data(objective.first, observed, plate)
        if not (weighed.plates or theta.names):
            raise ValueError("nothing to differentiate by: neither data nor hyperparameters")
        stack.enter_context(borrowed(theta.leaves))
        moves = partial(_moves, objective, sites, theta, weighed)

        def of_next(state: _State | None, j: int) -> _State:
            if state is None:
                optimum = optimum_of(objective, sites, polish, seed)
                whole = moves(optimum.eta, optimum.response, objective.all)
                state = _State(optimum, whole, 0, 0 * whole, 0 * whole)
            return _next(state, moves(*_without(objective, state, j)))

        def result(state: _State, _: bool) -> Sensitivity:
            return _result(state, theta, weighed)

        return by_groups(objective, of_next, result, "sensitivity", progress)


class _State(NamedTuple):
    """What is known so far: from all draws, and from these without each of the first groups.

    Attributes:
        whole: the sensitivities of data, and then of hyperparameters, (N + T, P).
        num: the number of finished groups.
        mean: of the sensitivities without each of them.
        squares: the sum of the squared deviations from that mean.
    """

    optimum: Optimum
    whole: np.ndarray
    num: int
    mean: np.ndarray
    squares: np.ndarray


def _moves(
    objective: FixedObjective,
    sites: tuple[str, ...],
    theta: Hyperparameters,
    weighed: WeighedData,
    eta: np.ndarray,
    response: np.ndarray,
    draws: Draws,
) -> np.ndarray:
    """The derivatives of the means of some draws, (N + T, P), by the response (n, P) at eta."""
    parts = []
    if weighed.plates:
        parts.append(objective.slopes(eta, weighed.log_likelihood, response, draws))
    if theta.names:
        both, n = objective.beside(theta.leaves), objective.size
        at = np.concatenate([eta, both.start[n:]])
        directions = np.concatenate([response, np.zeros((both.size - n, response.shape[1]))])
        moved = both.hessian_product(at, directions, draws)[n:]
        of_guide = both.jacobian(at, sites, draws)[:, n:].T  # of what it has of the model's
        parts.append((moved + of_guide) / theta.slopes.numpy()[:, None])
    return np.concatenate(parts)


def _without(
    objective: FixedObjective, state: _State, j: int
) -> tuple[np.ndarray, np.ndarray, Draws]:
    """The optimum of all draws except the j-th group, the response there, and the draws.

    They are found from those of all draws, by steps with the latter's Hessian.
    """
    rest, optimum = without_group(objective, j), state.optimum

    def step_from(eta: np.ndarray) -> tuple[np.ndarray, float]:
        gradient = objective.value(eta, rest)[1]
        step = optimum.solve(gradient[:, None], is_there=False)[:, 0]
        return step, float(gradient @ step)

    eta = optimum.eta
    step, rise = step_from(eta)
    for _ in range(_STEPS):
        ahead, left = step_from(eta + step)
        if not left < rise:  # along a nearly flat direction
            break
        eta, step, rise = eta + step, ahead, left
    changed = objective.jacobian(eta, optimum.sites, rest)
    changed = changed.T + objective.hessian_product(eta, optimum.response, rest)
    return eta, optimum.response + optimum.solve(changed, is_there=False), rest


def _next(state: _State, part: np.ndarray) -> _State:
    """With one more group (Welford 1962)."""
    num, off = state.num + 1, part - state.mean
    mean = state.mean + off / num
    return state._replace(num=num, mean=mean, squares=state.squares + off * (part - mean))


def _result(state: _State, theta: Hyperparameters, weighed: WeighedData) -> Sensitivity:
    optimum, num = state.optimum, len(state.whole) - len(theta.names)
    spread = np.sqrt(state.squares / (state.num - 1)) if state.num > 1 else np.nan * state.whole
    shape = (*weighed.shape, len(optimum.labels))
    whole, error = map(torch.from_numpy, (state.whole, jackknife_error(spread, optimum.num_groups)))
    return Sensitivity(
        optimum.labels,
        torch.from_numpy(optimum.values.mean(0)),
        torch.from_numpy(optimum.covariance).diagonal().sqrt(),
        whole[:num].reshape(shape),
        error[:num].reshape(shape),
        tuple(plate.name for plate in weighed.plates),
        theta.names,
        theta.values,
        whole[num:],
        error[num:],
        len(optimum.values),
        optimum.moved,
        optimum.distance,
        optimum.gradient_norm,
        optimum.is_single,
    )
