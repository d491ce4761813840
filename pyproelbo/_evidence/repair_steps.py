"""Ways to draw from the posterior of some rows, from the cheapest on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import pyro
import torch
from torch import Tensor

from pyproelbo._distributions.row_noise import Noise
from pyproelbo._evidence.annealed import Annealed, MoveNoise, Path
from pyproelbo._evidence.best_posterior import fit_posteriors
from pyproelbo._evidence.coordinates import Coordinates, Densities
from pyproelbo._evidence.gaussian import Gaussian, fitted
from pyproelbo._evidence.hmc import hmc
from pyproelbo._evidence.pareto import LEAST, pareto_smooth, usable
from pyproelbo._evidence.proposals import at_prior_draws, mixture_weight, prior_draws
from pyproelbo._evidence.resampling import shuffled, systematic, taken
from pyproelbo._evidence.trained_guide import parameters_of, trained
from pyproelbo._evidence.weights import LEAST_ESS
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.report_data import Unit
from pyproelbo._rows.runs import Use
from pyproelbo._rows.values import drawn_by_row
from pyproelbo._terms.traces import Program

WIDEST = 256  # coordinates of a row that have a full covariance
CHAINS = 200  # of a row, that are annealed
WIDE = 2.0  # times the sds of what they start from, which may be too narrow
MOVES = 10  # of each draw at the end, so that resampled draws are not alike
ACCEPTED = 0.3  # of moves, at least
APART = 4.0  # standard errors by which two halves of the chains may differ
_WHY = (
    "its posterior is repaired by gradients: take methods=('mixture',), half of whose draws are of "
    "the prior"
)


class CannotRepairError(ValueError):
    """A way that is none for these programs."""


class Settings(NamedTuple):
    """What all ways are told.

    Attributes:
        model, guide: the programs.
        unit: what a row is.
        num_samples: S, draws of each row.
        steps, num_particles: of Adam, and draws a step.
        lr: its first learning rate where the family is fitted.
        annealed: how chains are annealed.
        chunk, seed: as everywhere.
    """

    model: Program
    guide: Program
    unit: Unit
    num_samples: int
    steps: int
    num_particles: int
    lr: float | None
    annealed: Annealed
    chunk: int | None
    seed: int

    def draws(self, batch: Batch, guide: Program | None = None) -> RowDraws:
        """Of the guide, or of another one, for a batch."""
        guide = self.guide if guide is None else guide
        return RowDraws(self.model, guide, batch, self.unit, self.seed)

    def coordinates(self, batch: Batch, guide: Program | None = None) -> Coordinates:
        """Likewise, as points.

        Raises:
            NotContinuousError: for a latent that is discrete.
        """
        return Coordinates(self.draws(batch, guide), self.chunk, _WHY)

    def noise(self, batch: Batch, draws: range, *use: int) -> Noise:
        """Numbers for points (S, B, K)."""
        return Noise((self.seed, *use), draws, batch.start, draw_dim=-2, row_dim=-1, part=())


class Weighted(NamedTuple):
    """Draws of each of B rows with the weights that make them those of the posterior.

    Attributes:
        values: by site, (S, B, ...).
        log_weight: (S, B), in nats.
        near: a Gaussian for the next way to start from; None for what there was before.
        equal: whether the values have equal weights already, and ``log_weight`` is of what they
            are from.
        is_good: where nothing but the weights is against them, (B,); None for everywhere.
    """

    values: Mapping[str, Tensor]
    log_weight: Tensor
    near: Gaussian | None = None
    equal: bool = False
    is_good: Tensor | None = None


class Way(Protocol):
    """From a batch of rows, and Gaussians near their posteriors, to weighted draws of them."""

    def __call__(self, to: Settings, batch: Batch, near: Gaussian | None) -> Weighted:
        """
        Raises:
            CannotRepairError, ValueError: where this is no way for these programs.
        """
        ...


def of_guide(to: Settings, batch: Batch, near: Gaussian | None = None) -> Weighted:
    """The guide's draws."""
    draws = to.draws(batch)
    return _weighed(draws, draws.ranges(to.num_samples, to.chunk), Use.WEIGHTS)


def of_family(to: Settings, batch: Batch, near: Gaussian | None = None) -> Weighted:
    """Draws of the member of the guide's family with the highest ELBO, of each row."""
    with _best(to, batch) as guide:
        draws = to.draws(batch, guide)
        found = _weighed(draws, draws.ranges(to.num_samples, to.chunk), Use.BEST)
        return found._replace(near=_near(to, batch, guide))


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


def correlated(to: Settings, batch: Batch, near: Gaussian | None) -> Weighted:
    """Draws of the best Gaussian of any covariance, in unconstrained coordinates, of each row."""
    near = _near(to, batch, to.guide) if near is None else near
    if (size := near.mean.shape[-1]) > WIDEST:
        raise CannotRepairError(
            f"a row has {size:,} coordinates, more than the {WIDEST} of which a full covariance is "
            "fitted"
        )
    coordinates, log_target = _target(to, batch, near)
    with pyro.validation_enabled(False):
        noise = to.noise(batch, range(to.num_particles), Use.CORRELATED, 0)
        q = fitted(log_target, near, to.steps, to.num_particles, noise).where_finite(near)
        u = _draws_of(to, batch, q, range(to.num_samples), Use.CORRELATED, 1)
        return Weighted(coordinates.values(u), log_target(u) - q.log_prob(u), q)


def annealed(to: Settings, batch: Batch, near: Gaussian | None) -> Weighted:
    """Chains of annealed importance sampling from Gaussians to the posteriors.

    They are resampled by their weights, and then each moves on.
    """
    near = _near(to, batch, to.guide) if near is None else near
    near = near._replace(scale=WIDE * near.scale)
    coordinates, log_target = _target(to, batch, near)
    how = to.annealed

    def densities(u: Tensor) -> Densities:
        log_p = log_target(u)
        return Densities(near.log_prob(u), log_p, torch.zeros_like(log_p))

    def noise(chains: range, use: Use) -> MoveNoise:
        return MoveNoise(to.seed, batch.start, chains, use)

    path = Path(densities, how.temperatures, how.num_leapfrog, False)
    pilots, chains, all_draws = map(range, (how.num_pilot, CHAINS, to.num_samples))
    with pyro.validation_enabled(False):
        u = _draws_of(to, batch, near, pilots, Use.PILOT)
        steps = path.tuned(u, how.target_acceptance, noise(pilots, Use.PILOT))
        u = _draws_of(to, batch, near, chains, Use.CHAINS)
        u, (log_weight, _, acceptance) = path.chains(steps, u, noise(chains, Use.CHAINS))
        good = _agree(log_weight, u)
        u = resampled(u, log_weight, to, batch)
        target, moves = partial(path.at, 1.0), noise(all_draws, Use.MOVES)
        for _ in range(MOVES if steps.sizes else 0):
            step = steps.sizes[-1] * steps.scale
            u, _ = hmc(target, target(u), step, how.num_leapfrog, *moves.of_move(u))
        if acceptance is not None:
            good &= acceptance.mean(0) > ACCEPTED
        return Weighted(coordinates.values(u), log_weight, None, True, good)


def mixture(to: Settings, batch: Batch, near: Gaussian | None = None) -> Weighted:
    """Draws of the guide and of the prior, half of each, by deterministic mixture weights."""
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
    "annealed": annealed,
    "mixture": mixture,
}


def resampled(values: Tensor, log_weight: Tensor, to: Settings, batch: Batch) -> Tensor:
    """As many draws as are asked for, of equal weight, of draws (S, B, ...)."""
    return taken(values, picks_of(pareto_smooth(finite(log_weight))[0], to, batch))


def picks_of(smoothed: np.ndarray, to: Settings, batch: Batch) -> Tensor:
    """Their numbers, (num_samples, B), by smoothed log-weights (S, B)."""
    weights = np.exp(np.nan_to_num(smoothed, nan=0.0))
    noise = to.noise(batch, range(to.num_samples + 1), Use.RESAMPLED)
    shape = torch.Size((to.num_samples + 1, weights.shape[1]))
    random = noise.uniform(torch.zeros((), dtype=torch.float64, device="cpu"), shape)
    return shuffled(systematic(weights, random[-1].numpy(), to.num_samples), random[:-1])


def finite(log_weight: Tensor) -> Tensor:
    """With no weight where it is no number, nor where it has no bound."""
    return log_weight.detach().double().cpu().nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def _weighed(draws: RowDraws, ranges: Iterator[range], use: Use) -> Weighted:
    runs = (traces for part in ranges for traces in draws.traces(part, use))
    return _joined(
        [
            (drawn_by_row(traces, draws.first, draws.plate), draws.terms(traces).log_weight)
            for traces in runs
        ]
    )


def _joined(parts: list[tuple[Mapping[str, Tensor], Tensor]]) -> Weighted:
    values, log_weights = zip(*parts, strict=True)
    joined = {name: torch.cat([part[name] for part in values]) for name in values[0]}
    return Weighted(joined, torch.cat(log_weights).detach())


def _near(to: Settings, batch: Batch, guide: Program) -> Gaussian:
    """The Gaussian with the means and sds of a guide."""
    u = to.coordinates(batch, guide).draw(range(to.num_samples), Use.BEST)
    return Gaussian.of_draws(u.detach())


def _draws_of(to: Settings, batch: Batch, q: Gaussian, draws: range, *use: int) -> Tensor:
    shape = torch.Size((len(draws), *q.mean.shape))
    return q.at(to.noise(batch, draws, *use).normal(q.mean, shape, 1))


def _target(
    to: Settings, batch: Batch, near: Gaussian
) -> tuple[Coordinates, Callable[[Tensor], Tensor]]:
    """The points of a batch, and log p(x, z) as a density of them.

    Coordinates on which nothing depends, as those that a mask leaves out, are standard normal.
    """
    coordinates = to.coordinates(batch)
    with torch.enable_grad(), pyro.validation_enabled(False):
        u = _draws_of(to, batch, near, range(2), Use.PILOT).requires_grad_()
        log_q, log_joint, _ = coordinates.densities(u)
        (gradient,) = torch.autograd.grad((log_q + log_joint).sum(), u)
    is_idle = (gradient == 0).all(0)

    def log_target(u: Tensor) -> Tensor:
        return coordinates.densities(u).log_target - (u.square() * is_idle).sum(-1) / 2

    return coordinates, log_target


def _agree(log_weight: Tensor, u: Tensor) -> Tensor:
    """Whether both halves of the chains have the same mean of every coordinate, (B,)."""
    means, variances = [], []
    for w, x in zip(log_weight.chunk(2), u.chunk(2), strict=True):
        w = w.softmax(0).unsqueeze(-1).to(x)
        means.append((w * x).sum(0))
        variances.append((w.square() * (x - means[-1]).square()).sum(0))
    off = (means[0] - means[1]).square()
    return (off <= APART**2 * (variances[0] + variances[1]) + torch.finfo(u.dtype).eps).all(-1)


class Judged(NamedTuple):
    """Whether weighted draws can stand for the posterior, of each of B rows.

    Attributes:
        smoothed: the smoothed log-weights, (S, B); NaN where all weights are 0.
        khat, effective_sample_size: of them, (B,).
        log_evidence, stderr: log p(x) by them, (B,).
        passes: (B,).
    """

    smoothed: np.ndarray
    khat: Tensor
    effective_sample_size: Tensor
    log_evidence: Tensor
    stderr: Tensor
    passes: Tensor


def judged(found: Weighted, narrow: float) -> Judged:
    """k-hat is usable, the effective sample size is at least 50, and the draws reach far enough.

    Args:
        narrow: the factor by which weighted draws may be wider than the draws, at most.
    """
    log_weight = finite(found.log_weight)
    S = len(log_weight)
    assert S >= LEAST
    smoothed, k = pareto_smooth(log_weight)
    khat, weights = torch.from_numpy(k), torch.from_numpy(np.exp(smoothed)).nan_to_num(0.0)
    ess = torch.where(weights.sum(0) > 0, 1 / weights.square().sum(0), 0.0)
    passes = usable(khat, ess, S) & khat.isfinite()
    error = (1 / ess - 1 / S).clamp(min=0).sqrt()
    if not found.equal:
        for value in found.values.values():
            x = value.reshape(*value.shape[:2], -1).cpu().double()
            x = x - x.mean(0)
            if value.is_floating_point():  # numbers of categories have no width
                passes &= ~_is_narrow(x, weights, narrow)
            ess = torch.minimum(ess, _least_effective(x, weights))
    passes &= ess >= min(LEAST_ESS, S / 2)
    if found.is_good is not None:
        passes &= found.is_good.cpu()
    log_evidence = log_weight.logsumexp(0) - np.log(S)
    return Judged(smoothed, khat, ess, log_evidence, error, passes)


def _is_narrow(x: Tensor, weights: Tensor, narrow: float) -> Tensor:
    """Whether centred draws (S, B, K), weighted, are wider than by themselves by a factor, (B,)."""
    w = weights.unsqueeze(-1)
    of_weighted = (w * x.square()).sum(0) - (w * x).sum(0).square()
    return (of_weighted > narrow**2 * x.square().mean(0)).any(-1)


def _least_effective(x: Tensor, weights: Tensor) -> Tensor:
    """How many draws of the posterior would know every mean and variance as well, (B,).

    For a function h with posterior mean m that is sum_s w_s (h_s - m)^2 over sum_s w_s^2 (h_s -
    m)^2, which is below 1 / sum_s w_s^2 where the largest weights are at the largest h.
    """
    w = weights.unsqueeze(-1)
    found = torch.full(x.shape[1:2], torch.inf, dtype=torch.float64, device="cpu")
    x = x - (w * x).sum(0)
    for h in (x, x.square()):
        square = (h - (w * h).sum(0)).square()
        spread, error = (w * square).sum(0), (w.square() * square).sum(0)
        effective = torch.where(error > 0, spread / error, torch.inf)
        found = torch.minimum(found, effective.amin(-1))
    return found
