"""Where the ELBO at fixed draws is highest, and how the means of latents respond there."""

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
    """Where L is highest, and what responds there.

    Attributes:
        labels: of the P elements of latents.
        sites: the latents.
        eta: (n,).
        solve: a linear system of -H.
        response: (-H)^-1 (dg / d eta)^T, (n, P).
        values: of the latents, (S, P).
        num_groups: of draws, that are left out in turn.
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
    """How many draws there are, by default 100 or 128 Sobol draws, and their points.

    Raises:
        ValueError: for numbers and kinds of draws, and a ``polish``, that cannot be.
    """
    num = enough(draws, 100) if num_samples is None else num_samples
    check_counts(GROUPS, num_samples=num)
    if not isinstance(polish, bool):
        raise ValueError(f"polish should be True or False, got {polish!r}")
    return num, points_of(draws, num)


def optimum_of(
    objective: FixedObjective, sites: tuple[str, ...], polish: bool, seed: int
) -> Optimum:
    """From the parameters as they are, and with ``polish`` the maximum next to them.

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
            "not at an optimum, so that nothing responds: a step of Newton's would raise the "
            f"ELBO at fixed draws by {rise:.2g} nats, and move a mean by {distance:.2g} sds of q. "
            "Train the guide longer, or leave polish=True"
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
    """Whether a step has made the gradient smaller, as along a nearly flat direction it may not."""
    return bool(np.linalg.norm(gradient / np.sqrt(d)) < np.linalg.norm(than / np.sqrt(d)))


def covariance_of(
    objective: FixedObjective,
    eta: np.ndarray,
    sites: tuple[str, ...],
    response: np.ndarray,
    draws: Draws,
) -> np.ndarray:
    """That of some draws at ``eta``, (P, P), by a response A that need not be quite that of there.

    J A + A^T J^T - A^T (-H) A, whose error is that of A squared.
    """
    linear = objective.jacobian(eta, sites, draws) @ response
    quadratic = response.T @ objective.hessian_product(eta, response, draws)
    return linear + linear.T + (quadratic + quadratic.T) / 2


def notes_of_optimum(moved: float, distance: float, is_single: bool) -> list[str]:
    """What the optimum is worth, in sentences; none where nothing stands out."""
    notes = []
    if moved > _FAR:
        notes.append(
            f"q as it is was far from its optimum: means moved by up to {moved:.1f} sds. "
            "Other reports are of q as it is: train it longer."
        )
    if distance > _NEAR:
        notes.append(
            "The optimum may not quite be reached: the last step moved means by up to "
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
    """What is known of all draws, and then of these without each group in turn, as a result.

    Args:
        name: of the report.
    """
    num = len(objective.groups)
    groups = bar(range(num), name.replace("_", " "), progress)
    so_far = f"of {num} groups of draws, as to its errors"
    return by_part(groups, of_next, result, name, lambda j: f"{j + 1} {so_far}")


def without_group(objective: FixedObjective, j: int) -> list[range]:
    """The numbers of all draws but those of the j-th group."""
    left = objective.groups[j]
    return [range(left.start), range(left.stop, objective.num_samples)]


def jackknife_error(spread: np.ndarray, num: int) -> np.ndarray:
    """That of what has this sd when each of so many groups of draws is left out in turn."""
    return (num - 1) / num**0.5 * spread


def chosen_latents(first: Traces, site: str | Sequence[str] | None) -> tuple[str, ...]:
    """The latents that ``site`` names; None for those outside of the plate over the data.

    That has as many rows as the data, or else it is any that has data.

    Raises:
        ValueError: for a name that is none of a latent, and where no latent is global.
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
            f"no latent is global, outside of the plate over the data: {sorted(latents)}. Name "
            "those whose covariances you want by site="
        )
    return tuple(found)
