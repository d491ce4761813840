"""The maximum of the ELBO at fixed draws, and the response of latents' means there."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from pyproelbo._distributions.sobol import Kind, Points, enough, points_of
from pyproelbo._evidence.curvature import (
    Solve,
    check_second_derivatives,
    maximised,
    scales,
    solver,
)
from pyproelbo._evidence.fixed_draws import GROUPS, Draws, FixedObjective
from pyproelbo._messages.arguments import check_counts
from pyproelbo._rows.passes import bar, by_part
from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.traces import PARTICLES, Traces

State = TypeVar("State")
R = TypeVar("R")
COARSE = 0.1  # an error, relative
_FAR, _NEAR = 0.5, 0.01  # sds of q
_MOST = 1000  # elements of latents


class Optimum(NamedTuple):
    """The maximum of L, and the response there.

    Attributes:
        labels: of the P elements of latents.
        sites: the latents.
        eta: (n,).
        solve: a linear system of -H.
        response: (-H)^-1 (dg / d eta)^T, (n, P).
        values: of the latents, (S, P).
        num_groups: of draws, left out in turn.
        covariance: (P, P).
    """

    labels: tuple[str, ...]
    sites: tuple[str, ...]
    eta: np.ndarray
    solve: Solve
    response: np.ndarray
    values: np.ndarray
    num_groups: int
    covariance: np.ndarray
    moved: float
    distance: float
    gradient_norm: float
    is_single: bool


def checked_draws(num_samples: int | None, draws: Kind, polish: bool) -> tuple[int, Points | None]:
    """The number of draws, by default 100 or 128 Sobol draws, and their points.

    Raises:
        ValueError: for invalid numbers and kinds of draws, and an invalid ``polish``.
    """
    num = enough(draws, 100) if num_samples is None else num_samples
    check_counts(GROUPS, num_samples=num)
    if not isinstance(polish, bool):
        raise ValueError(f"polish should be True or False, got {polish!r}")
    return num, points_of(draws, num)


def optimum_of(
    objective: FixedObjective, sites: tuple[str, ...], polish: bool, seed: int
) -> Optimum:
    """The optimum at the current parameters, or with ``polish`` the maximum near them.

    Raises:
        ValueError: "not at an optimum"; for more than 1,000 elements of latents, and for densities
            without second derivatives.
    """
    eta = objective.start
    labels, before = objective.values(eta, sites)
    if len(labels) > _MOST:
        raise ValueError(
            f"latents {list(sites)} have {len(labels):,} elements together, but the covariances of "
            f"more than {_MOST:,} are too many: choose fewer by site="
        )
    if polish:
        eta = maximised(objective, eta, seed)
    d = scales(objective, eta, seed)
    check_second_derivatives(objective, eta, d, seed)
    jacobian = objective.jacobian(eta, sites)
    gradient = objective.value(eta)[1]
    solve = solver(objective, eta, d)
    solved = solve(np.column_stack([jacobian.T, gradient]))
    response, step = solved[:, :-1], solved[:, -1]
    _, values = objective.values(eta, sites)
    distance, rise = float(np.abs(jacobian @ step / values.std(0)).max()), gradient @ step / 2
    if not max(distance, np.sqrt(2 * rise / objective.size)) < _FAR:
        raise ValueError(
            "not at an optimum, where the response is defined: a Newton step would raise the ELBO "
            f"at fixed draws by {rise:.2g} nats, and move a mean by {distance:.2g} sds of q. Train "
            "the guide longer, or leave polish=True"
        )
    if polish and _is_lower(objective.value(eta + step)[1], gradient, d):
        eta = eta + step
        _, values = objective.values(eta, sites)
    return Optimum(
        labels,
        sites,
        eta,
        solve,
        response,
        values,
        len(objective.groups),
        covariance_of(objective, eta, sites, response, objective.all),
        float(np.abs((values - before).mean(0) / before.std(0)).max()),
        distance,
        float(np.linalg.norm(objective.value(eta)[1])),
        objective.eps > torch.finfo(torch.float64).eps,
    )


def _is_lower(gradient: np.ndarray, than: np.ndarray, d: np.ndarray) -> bool:
    """Whether a step has reduced the gradient, which may fail along a nearly flat direction."""
    return bool(np.linalg.norm(gradient / np.sqrt(d)) < np.linalg.norm(than / np.sqrt(d)))


def covariance_of(
    objective: FixedObjective,
    eta: np.ndarray,
    sites: tuple[str, ...],
    response: np.ndarray,
    draws: Draws,
) -> np.ndarray:
    """The covariance of some draws at ``eta``, (P, P), by an approximate response A.

    J A + A^T J^T - A^T (-H) A, whose error is quadratic in that of A.
    """
    linear = objective.jacobian(eta, sites, draws) @ response
    quadratic = response.T @ objective.hessian_product(eta, response, draws)
    return linear + linear.T + (quadratic + quadratic.T) / 2


def notes_of_optimum(moved: float, distance: float, is_single: bool) -> list[str]:
    """Remarks on how reliable the optimum is, in sentences; empty where nothing stands out."""
    notes = []
    if moved > _FAR:
        notes.append(
            f"The given q was far from its optimum: means moved by up to {moved:.1f} sds. Other "
            "reports use the given q: train it longer."
        )
    if distance > _NEAR:
        notes.append(
            "The optimum may not be quite reached: the last step moved means by up to "
            f"{distance:.2f} sds of q."
        )
    if is_single:
        notes.append(
            "The programs compute in float32, which leaves about three digits: take float64 for "
            "more."
        )
    return notes


def by_groups(
    objective: FixedObjective,
    of_next: Callable[[State | None, int], State],
    result: Callable[[State, bool], R],
    name: str,
    progress: bool,
) -> R:
    """The result from all draws, and then from these without each group in turn.

    Args:
        name: of the report.
    """
    num = len(objective.groups)
    groups = bar(range(num), name.replace("_", " "), progress)
    so_far = f"of {num} groups of draws, as to its errors"
    return by_part(groups, of_next, result, name, lambda j: f"{j + 1} {so_far}")


def without_group(objective: FixedObjective, j: int) -> list[range]:
    """The indices of all draws except those of the j-th group."""
    left = objective.groups[j]
    return [range(left.start), range(left.stop, objective.num_samples)]


def jackknife_error(spread: np.ndarray, num: int) -> np.ndarray:
    """The error of a value with this sd over ``num`` groups of draws, each left out in turn."""
    return (num - 1) / num**0.5 * spread


def chosen_latents(first: Traces, site: str | Sequence[str] | None) -> tuple[str, ...]:
    """The latents that ``site`` names; None for those outside the plate over the data.

    That plate has as many rows as the data; failing that, any plate with data.

    Raises:
        ValueError: for a name that is not a latent's, and where no latent is global.
    """
    sites = Sites.of(first)
    latents = {
        name: site
        for name, site in first.model_sites.items()
        if name in sites.latents and name in first.guide_sites and not is_delta(site)
    }
    if site is not None:
        names = [site] if isinstance(site, str) else list(site)
        for name in names:
            if name not in latents:
                raise ValueError(
                    f"site names {name!r}, but the latents are {sorted(latents)}: name one of those"
                )
        return tuple(name for name in latents if name in names)
    observed = [*sites.data.values(), *sites.factors.values()]
    plates = {plate for each in observed for plate in each["plates"] if plate.name != PARTICLES}
    of_rows = {plate for plate in plates if plate.size == first.num_rows} or plates
    data = {plate.name for plate in of_rows}
    found = [n for n, each in latents.items() if data.isdisjoint(p.name for p in each["plates"])]
    if not found:
        raise ValueError(
            f"no latent is global, outside the plate over the data: {sorted(latents)}. Name those "
            "whose covariances you want by site="
        )
    return tuple(found)
