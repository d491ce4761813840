"""Methods to draw from the posterior of some rows, in order of cost."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import pyro
import torch
from torch import Tensor

from pyproelbo._evidence.annealed import MoveNoise, Path
from pyproelbo._evidence.best_posterior import fit_posteriors
from pyproelbo._evidence.coordinates import Coordinates, Densities, NotContinuousError
from pyproelbo._evidence.gaussian import Gaussian, fitted
from pyproelbo._evidence.hmc import hmc
from pyproelbo._evidence.modes import mixture_at
from pyproelbo._evidence.pareto import pareto_smooth
from pyproelbo._evidence.proposals import at_prior_draws, mixture_weight, prior_draws
from pyproelbo._evidence.repair_judged import finite
from pyproelbo._evidence.repair_settings import (
    CannotRepairError,
    Near,
    Settings,
    Target,
    Way,
    Weighted,
)
from pyproelbo._evidence.resampling import shuffled, systematic, taken
from pyproelbo._evidence.trained_guide import parameters_of, trained
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.runs import Use
from pyproelbo._rows.values import drawn_by_row
from pyproelbo._terms.traces import Program

WIDEST = 256  # coordinates of a row for which a full covariance is fitted
CHAINS = 200  # of a row, that are annealed
WIDE = 2.0  # times the sds of their start, which may be too narrow
MOVES = 10  # of each draw at the end, to make resampled draws distinct
ACCEPTED = 0.3  # of moves, at least
APART = 4.0  # standard errors by which two halves of the chains may differ


def of_guide(to: Settings, batch: Batch, near: Near | None = None) -> Weighted:
    """The guide's draws."""
    draws = to.draws(batch)
    try:
        coordinates = to.coordinates(batch)
    except NotContinuousError:
        coordinates = None
    return _weighed(draws, coordinates, draws.ranges(to.num_samples, to.chunk), Use.WEIGHTS)


def of_family(to: Settings, batch: Batch, near: Near | None = None) -> Weighted:
    """Draws from the member of the guide's family with the highest ELBO, for each row."""
    with _best(to, batch) as guide:
        draws, coordinates = to.draws(batch, guide), to.coordinates(batch, guide)
        return _weighed(draws, coordinates, draws.ranges(to.num_samples, to.chunk), Use.BEST)


@contextmanager
def _best(to: Settings, batch: Batch) -> Iterator[Program]:
    programs = to.model, to.guide, batch
    parameters = [] if to.unit.per == "datum" else parameters_of(to.guide, to.model, batch)
    if parameters:
        fit = (to.steps, to.num_particles, 0.01 if to.lr is None else to.lr, to.seed)
        with trained(*programs, to.unit, parameters, *fit):
            yield to.guide
    else:
        fit = (to.steps, to.num_particles, 0.1 if to.lr is None else to.lr, to.seed)
        yield fit_posteriors(*programs, to.unit, *fit)(to.guide)


def correlated(to: Settings, batch: Batch, near: Near) -> Weighted:
    """Draws from the best Gaussian of any covariance, in unconstrained coordinates, by row."""
    start, target = _start(to, batch, near)
    with pyro.validation_enabled(False):
        noise = to.noise(batch, range(to.num_particles), Use.CORRELATED, 0)
        q = fitted(target, start, to.steps, to.num_particles, noise).where_finite(start)
        u = to.points(batch, q, range(to.num_samples), Use.CORRELATED, 1)
        return Weighted(target.coordinates.values(u), target(u) - q.log_prob(u), u, q)


def modes(to: Settings, batch: Batch, near: Near) -> Weighted:
    """Draws from a mixture of Gaussians, one at each known mode."""
    if near.modes is None:
        raise CannotRepairError("its modes are not known, since the prior cannot be drawn from")
    start, target = _start(to, batch, near)
    with pyro.validation_enabled(False):
        q = mixture_at(target, start, near.modes, to, batch)
        u = q.draws(to, batch, 1)
        return Weighted(target.coordinates.values(u), target(u) - q.log_prob(u), u)


def annealed(to: Settings, batch: Batch, near: Near) -> Weighted:
    """Chains of annealed importance sampling from Gaussians to the posteriors.

    They are resampled by their weights, and then each is moved.
    """
    start = _gaussian(to, batch, near)
    wide = start._replace(scale=WIDE * start.scale)
    target, how = Target.of(to, batch, wide), to.annealed

    def densities(u: Tensor) -> Densities:
        log_p = target(u)
        return Densities(wide.log_prob(u), log_p, torch.zeros_like(log_p))

    def noise(chains: range, use: Use) -> MoveNoise:
        return MoveNoise(to.seed, batch.places, chains, use)

    path = Path(densities, how.temperatures, how.num_leapfrog, False)
    pilots, chains, all_draws = map(range, (how.num_pilot, CHAINS, to.num_samples))
    with pyro.validation_enabled(False):
        u = to.points(batch, wide, pilots, Use.PILOT)
        steps = path.tuned(u, how.target_acceptance, noise(pilots, Use.PILOT))
        u = to.points(batch, wide, chains, Use.CHAINS)
        u, (log_weight, _, acceptance) = path.chains(steps, u, noise(chains, Use.CHAINS))
        good = _agree(log_weight, u)
        u = resampled(u, log_weight, to, batch)
        at_end, moves = partial(path.at, 1.0), noise(all_draws, Use.MOVES)
        for _ in range(MOVES if steps.sizes else 0):
            step = steps.sizes[-1] * steps.scale
            u, _ = hmc(at_end, at_end(u), step, how.num_leapfrog, *moves.of_move(u))
        if acceptance is not None:
            good &= acceptance.mean(0) > ACCEPTED
        return Weighted(target.coordinates.values(u), log_weight, u, None, True, good)


def mixture(to: Settings, batch: Batch, near: Near | None = None) -> Weighted:
    """Draws from the guide and the prior, half of each, with deterministic mixture weights."""
    draws = to.draws(batch)
    of_prior = prior_draws(to.model, batch, to.unit, to.seed)
    num = to.num_samples - to.num_samples // 2
    parts: list[tuple[Mapping[str, Tensor], Tensor]] = []

    def add(runs: Iterator) -> None:
        for traces in runs:
            weight = mixture_weight(draws.terms(traces), num / to.num_samples)
            parts.append((drawn_by_row(traces, draws.first, draws.plate), weight))

    add(at_prior_draws(draws, of_prior, to.num_samples - num, to.chunk))
    add(t for part in draws.ranges(num, to.chunk) for t in draws.traces(part, Use.WEIGHTS))
    return _joined(parts)


WAYS: Mapping[str, Way] = {
    "family": of_family,
    "correlated": correlated,
    "modes": modes,
    "annealed": annealed,
    "mixture": mixture,
}


def resampled(values: Tensor, log_weight: Tensor, to: Settings, batch: Batch) -> Tensor:
    """``num_samples`` draws of equal weight from draws (S, B, ...)."""
    return taken(values, picks_of(pareto_smooth(finite(log_weight))[0], to, batch))


def picks_of(smoothed: np.ndarray, to: Settings, batch: Batch) -> Tensor:
    """Their indices, (num_samples, B), by smoothed log-weights (S, B)."""
    weights = np.exp(np.nan_to_num(smoothed, nan=0.0))
    noise = to.noise(batch, range(to.num_samples + 1), Use.RESAMPLED)
    shape = torch.Size((to.num_samples + 1, weights.shape[1]))
    random = noise.uniform(torch.zeros((), dtype=torch.float64, device="cpu"), shape)
    return shuffled(systematic(weights, random[-1].numpy(), to.num_samples), random[:-1])


def _weighed(
    draws: RowDraws, coordinates: Coordinates | None, ranges: Iterator[range], use: Use
) -> Weighted:
    parts, points = list[tuple[Mapping[str, Tensor], Tensor]](), list[Tensor]()
    for part in ranges:
        for traces in draws.traces(part, use):
            values = drawn_by_row(traces, draws.first, draws.plate)
            parts.append((values, draws.terms(traces).log_weight))
            if coordinates is not None:
                points.append(coordinates.packed([traces]).detach())
    found = _joined(parts)
    if not points:
        return found
    u = torch.cat(points)
    return found._replace(points=u, near=Gaussian.of_draws(u))


def _joined(parts: list[tuple[Mapping[str, Tensor], Tensor]]) -> Weighted:
    values, log_weights = zip(*parts, strict=True)
    joined = {name: torch.cat([part[name] for part in values]) for name in values[0]}
    return Weighted(joined, torch.cat(log_weights).detach())


def _start(to: Settings, batch: Batch, near: Near) -> tuple[Gaussian, Target]:
    """The start and the target of fits of Gaussians of any covariance.

    Raises:
        CannotRepairError: where a row has too many coordinates.
    """
    start = _gaussian(to, batch, near)
    if (size := start.mean.shape[-1]) > WIDEST:
        raise CannotRepairError(
            f"a row has {size:,} coordinates, more than the {WIDEST} for which a full covariance "
            "is fitted"
        )
    return start, Target.of(to, batch, start)


def _gaussian(to: Settings, batch: Batch, near: Near) -> Gaussian:
    """
    Raises:
        NotContinuousError: for a latent that is discrete.
    """
    if near.gaussian is None:
        to.coordinates(batch)
    assert near.gaussian is not None
    return near.gaussian


def _agree(log_weight: Tensor, u: Tensor) -> Tensor:
    """Whether both halves of the chains have the same mean of every coordinate, (B,)."""
    means, variances = [], []
    for w, x in zip(log_weight.chunk(2), u.chunk(2), strict=True):
        w = w.softmax(0).unsqueeze(-1).to(x)
        means.append((w * x).sum(0))
        variances.append((w.square() * (x - means[-1]).square()).sum(0))
    off = (means[0] - means[1]).square()
    return (off <= APART**2 * (variances[0] + variances[1]) + torch.finfo(u.dtype).eps).all(-1)
