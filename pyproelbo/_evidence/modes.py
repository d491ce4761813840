"""Modes of each row's posterior, whether draws reach them, and a Gaussian at each."""

from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyproelbo._distributions.sobol import Points
from pyproelbo._evidence.coordinates import Coordinates
from pyproelbo._evidence.descent import descend
from pyproelbo._evidence.gaussian import Gaussian, fitted
from pyproelbo._evidence.proposals import prior_draws
from pyproelbo._evidence.repair_settings import Modes, Settings, Target
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.runs import Use

STARTS = 16  # draws of the prior, a power of two, from which log p(x, z) is ascended
OWN = 4  # points of q in addition
STEPS = 100  # of an ascent
LR = 0.1  # of Adam at first, in sds of the starts
BELOW = 10.0  # nats below the highest mode, beyond which a mode has negligible mass
GROUP = 25  # draws nearest to a mode
APART = 4.0  # of their sds by which a mode may be away from their mean
PATH, DIP = 8, 1.0  # parts of a path between two points, and nats of a dip that separates modes
NARROW = 0.3  # times the known sds, from which a Gaussian at a mode starts
MOST = 8  # Gaussians of a mixture
KEPT = 0.2  # of the draws, shared equally by all


def search(to: Settings, batch: Batch, near: Gaussian) -> Modes | None:
    """The ends of ascents from draws of the prior, and from points of q.

    Adam, with a learning rate that falls to 0, in the sds of the starts.

    Args:
        near: the source of the points of q.

    Returns:
        None where the prior cannot be drawn from, or has other coordinates than q.
    """
    of_prior = _starts(to, batch)
    if of_prior is None:
        return None
    target = Target.of(to, batch, near)
    own = to.points(batch, near, range(OWN), Use.STARTS)
    u = _ascended(target, torch.cat([of_prior, own]), of_prior.std(0))
    with pyro.validation_enabled(False):
        height = target(u).detach()
    height = torch.where(height.isfinite() & u.isfinite().all(-1), height, -torch.inf)
    matters = (height >= height.amax(0) - BELOW) & height.isfinite()
    return Modes(u, height, matters, target.is_idle)


def _starts(to: Settings, batch: Batch) -> Tensor | None:
    """Draws of the prior as points of the guide's coordinates, (STARTS, B, K)."""
    try:
        draws = prior_draws(to.model, batch, to.unit, to.seed, Points(STARTS.bit_length() - 1))
    except ValueError:
        return None
    if draws.is_improper:
        return None
    coordinates, own = Coordinates(draws, to.chunk), to.coordinates(batch)
    (traces,) = to.draws(batch).traces(range(1), Use.STARTS)
    sites = draws.first.guide_sites.keys() & traces.model_sites.keys()
    try:  # the same draw, by both
        there = coordinates.of({n: traces.model_sites[n]["value"] for n in sites}, 1)
    except (KeyError, RuntimeError, ValueError):
        return None
    here = own.packed([traces])
    if here.shape != there.shape or not torch.allclose(here, there, rtol=1e-3, atol=1e-4):
        return None
    return coordinates.draw(range(STARTS), Use.STARTS)


def _ascended(target: Callable[[Tensor], Tensor], start: Tensor, unit: Tensor) -> Tensor:
    unit = torch.where(unit.isfinite() & (unit > 0), unit, 1.0)
    off = torch.zeros_like(start).requires_grad_()
    with pyro.validation_enabled(False):
        descend(lambda _: -target(start + unit * off).sum(), [off], STEPS, LR)
    return (start + unit * off).detach()


def unreached(modes: Modes, u: Tensor, target: Callable[[], Target]) -> Tensor:
    """Whether there is an important mode that none of the draws u (S, B, K) reach, (B,).

    The draws nearest to it are then all on one side, far away in units of their own sds, and
    between the nearest and the mode log p(x, z) is lower than at both: otherwise it would be the
    same mode, which the ascent, or the draws, have not quite reached.

    Args:
        target: makes log p(x, z), which is called only where there are such modes.
    """
    sd = torch.where(modes.is_idle, torch.inf, u.std(0))
    found, nearest = torch.zeros_like(modes.matters), torch.empty_like(modes.points)
    for m, point in enumerate(modes.points):
        distance = ((u - point) / sd).square().sum(-1)
        index = distance.topk(min(GROUP, len(u)), 0, largest=False).indices
        group = u.gather(0, index.unsqueeze(-1).expand(-1, -1, u.shape[-1]))
        z = torch.where(modes.is_idle, 0.0, (group.mean(0) - point).abs() / group.std(0))
        found[m], nearest[m] = modes.matters[m] & (z > APART).any(-1), group[0]
    if not found.any():
        return found.any(0)
    log_p = target()
    with torch.no_grad(), pyro.validation_enabled(False):
        start = log_p(nearest)
        least = torch.minimum(start, modes.height)
        between = [log_p(torch.lerp(nearest, modes.points, i / PATH)) for i in range(1, PATH)]
    lowest = torch.stack(between).amin(0)
    return (found & ~(lowest > least - DIP)).any(0)


class Mixture(NamedTuple):
    """Gaussians of each of B rows, with shares that are multiples of 1 / S.

    Attributes:
        parts: J of them.
        share: (J, B); 0 where a row does not need one.
    """

    parts: list[Gaussian]
    share: Tensor

    def draws(self, to: Settings, batch: Batch, use: int) -> Tensor:
        """S points, (S, B, K): from a row's first Gaussian, then from the next.

        The order is for systematic resampling, where weights should not alternate.
        """
        numbers = torch.arange(to.num_samples, device=self.share.device)[:, None]
        ends = (self.share.cumsum(0) * to.num_samples).round()
        u = to.points(batch, self.parts[0], range(to.num_samples), Use.MODES, 0, use)
        for part, end in zip(self.parts[1:], ends[:-1], strict=True):
            own = to.points(batch, part, range(to.num_samples), Use.MODES, 0, use)
            u = torch.where((numbers >= end).unsqueeze(-1), own, u)
        return u

    def log_prob(self, u: Tensor) -> Tensor:
        """log q at points (S, B, K): (S, B)."""
        parts = torch.stack([part.log_prob(u) for part in self.parts])
        return (parts + self.share.log().unsqueeze(1)).logsumexp(0)

    def adapted(self, u: Tensor, log_weight: Tensor) -> "Mixture":
        """With the shares of the posterior's mass, except a minimum that all parts keep.

        Args:
            u: draws, (S, B, K), with their log-weights (S, B).
        """
        weights = log_weight.nan_to_num(-torch.inf).softmax(0)
        parts = torch.stack([part.log_prob(u) for part in self.parts])
        of_part = (parts + self.share.log().unsqueeze(1)).softmax(0)
        found = (weights * of_part).sum(1).nan_to_num(0.0)
        return self._replace(share=_shares(self.share > 0, KEPT, found, len(u)))


def _shares(has: Tensor, kept: float, found: Tensor, num: int) -> Tensor:
    """Shares (J, B), multiples of 1 / num, a part of which is equal for all Gaussians of a row."""
    share = kept * has / has.sum(0) + (1 - kept) * found
    ends = (share.cumsum(0) * num).round() / num
    return torch.cat([ends[:1], ends.diff(dim=0)])


def mixture_at(
    target: Callable[[Tensor], Tensor], near: Gaussian, modes: Modes, to: Settings, batch: Batch
) -> Mixture:
    """The Gaussians with the highest ELBO, from ``near`` and from each mode that others lack."""
    counts, first, num = (to.steps, to.num_particles), near, to.num_samples
    if near.scale.dim() == 2:
        use = to.noise(batch, range(to.num_particles), Use.CORRELATED, 0)
        first = fitted(target, near, *counts, use).where_finite(near)
    sd = first.factor.square().sum(-1).sqrt()
    parts, has = [first], [torch.ones_like(modes.matters[0])]
    left = modes.matters & ~_within(first, modes)
    while left.any() and len(parts) < MOST:
        best = torch.where(left, modes.height, -torch.inf).argmax(0)
        point = modes.points.gather(0, best[None, :, None].expand(1, *first.mean.shape))[0]
        start, wanted = Gaussian(point, NARROW * sd), left.any(0)
        noise = to.noise(batch, range(to.num_particles), Use.MODES, len(parts))
        part = fitted(target, start, *counts, noise).where_finite(first)
        parts.append(part)
        has.append(wanted)
        is_tried = torch.arange(len(left), device=best.device)[:, None] == best
        left = left & ~_within(part, modes) & ~is_tried
    here = torch.stack(has)
    q = Mixture(parts, _shares(here, 1.0, torch.zeros_like(here, dtype=first.mean.dtype), num))
    u = q.draws(to, batch, 0)
    return q.adapted(u, target(u) - q.log_prob(u))


def _within(q: Gaussian, modes: Modes) -> Tensor:
    """Which modes are near the mean of a Gaussian, in every coordinate, (M, B)."""
    sd = q.factor.square().sum(-1).sqrt()
    z = torch.where(modes.is_idle, 0.0, (modes.points - q.mean) / sd)
    return (z.abs() <= APART).all(-1)
