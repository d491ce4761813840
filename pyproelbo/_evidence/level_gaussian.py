"""A Gaussian of global latents, and of those of each datum given them, found by gradients."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._distributions.row_noise import Noise
from pyproelbo._evidence.descent import descend
from pyproelbo._evidence.gaussian import LR, ROUNDS
from pyproelbo._evidence.level_coordinates import LevelDensities, LevelPoints


class LevelGaussian(NamedTuple):
    r"""q(w) = N(m, R R^T), and q(z_n | w) = N(m_n + A_n e, L_n L_n^T) with e = R^{-1} (w - m).

    Together they are the Gaussian whose precision has no entries between the latents of two data.

    Attributes:
        mean: m, (J,).
        root: R, lower triangular, (J, J).
        local_mean: m_n, (N, K).
        slope: A_n, (N, K, J).
        local_root: L_n, lower triangular, (N, K, K).
    """

    mean: Tensor
    root: Tensor
    local_mean: Tensor
    slope: Tensor
    local_root: Tensor

    @classmethod
    def of_draws(cls, points: LevelPoints) -> "LevelGaussian":
        """With the means and sds of draws of w, and for z the best linear function of w."""
        w, z = points
        mean, sd = w.mean(0), _positive(w.std(0))
        e = (w - mean) / sd
        off = z - z.mean(0)
        ridge = torch.eye(e.shape[-1], dtype=e.dtype, device=e.device)
        slope = torch.einsum("sj,snk->jnk", e, off)
        slope = torch.linalg.solve(e.mT @ e + ridge, slope.flatten(1)).unflatten(1, off.shape[1:])
        rest = _positive((off - torch.einsum("sj,jnk->snk", e, slope)).std(0))
        return cls(mean, sd.diag_embed(), z.mean(0), slope.permute(1, 2, 0), rest.diag_embed())

    def standard(self, w: Tensor) -> Tensor:
        """e for points (P, J)."""
        return torch.linalg.solve_triangular(self.root, (w - self.mean).mT, upper=False).mT

    def globals_at(self, e: Tensor) -> Tensor:
        """w, (P, J)."""
        return self.mean + e @ self.root.mT

    def locals_at(self, e: Tensor, noise: Tensor) -> Tensor:
        """z, from e (P, J) and standard normal numbers (P, N, K)."""
        given = torch.einsum("nkj,pj->pnk", self.slope, e)
        return self.local_mean + given + torch.einsum("nkl,pnl->pnk", self.local_root, noise)

    def log_prob(self, points: LevelPoints) -> LevelDensities:
        """log q(w), (P,), and log q(z_n | w), (P, N)."""
        e = self.standard(points.globals_)
        off = points.locals_ - self.local_mean - torch.einsum("nkj,pj->pnk", self.slope, e)
        columns = off.permute(1, 2, 0)
        noise = torch.linalg.solve_triangular(self.local_root, columns, upper=False)
        return LevelDensities(
            _log_normal(e) - _log_det(self.root),
            _log_normal(noise.permute(2, 0, 1)) - _log_det(self.local_root),
        )

    def where_finite(self, other: "LevelGaussian") -> "LevelGaussian":
        """This, or the other for data where this has a number that is not finite.

        The other for all data if a number of q(w) is not finite.
        """
        if not all(part.isfinite().all() for part in self[:2]):
            return other
        fine = torch.stack([part.flatten(1).isfinite().all(1) for part in self[2:]]).all(0)
        pairs = zip(self[2:], other[2:], strict=True)
        parts = [
            torch.where(fine.reshape(-1, *(1,) * (new.dim() - 1)), new, old) for new, old in pairs
        ]
        return LevelGaussian(*self[:2], *parts)


Target = Callable[[LevelPoints], LevelDensities]


def fitted_levels(
    log_target: Target,
    start: LevelGaussian,
    steps: int,
    num_particles: int,
    noise: Noise,
    given: Tensor | None = None,
) -> LevelGaussian:
    """The one with the highest ELBO, from ``start`` on; by row it is :func:`~.gaussian.fitted`.

    Args:
        log_target: log p(x, w, z) by level.
        steps: of all rounds together.
        noise: for its steps, with numbered parts.
        given: draws of w, (S, J), used in their order; q(w) is fixed, and only q(z | w) is fitted.
            None to fit both.
    """
    q = start
    for r in range(ROUNDS):
        counts = math.ceil(steps / ROUNDS), num_particles
        q = _round(log_target, q, *counts, noise.within(r), given).where_finite(start)
    return q


def _round(
    log_target: Target,
    start: LevelGaussian,
    steps: int,
    num_particles: int,
    noise: Noise,
    given: Tensor | None,
) -> LevelGaussian:
    """One round of Adam, with a learning rate that falls to 0, on path gradients."""
    of_globals = [torch.zeros_like(part) for part in (start.mean, start.root)]
    of_locals = [torch.zeros_like(part) for part in start[2:]]
    learned = [*of_locals, *(of_globals if given is None else ())]
    for value in learned:
        value.requires_grad_()

    def now() -> LevelGaussian:
        (off, raw), (local_off, tilt, local_raw) = of_globals, of_locals
        turn, local_turn = _triangular(raw), _triangular(local_raw)
        mean = start.mean + start.root @ off
        local_mean = start.local_mean + start.slope @ off + _times(start.local_root, local_off)
        slope = start.slope @ turn + start.local_root @ tilt
        root, local_root = start.root @ turn, start.local_root @ local_turn
        return LevelGaussian(mean, root, local_mean, slope, local_root)

    N, K = start.local_mean.shape

    def loss(step: int) -> Tensor:
        q, part = now(), noise.within(step)
        if given is None:
            shape = torch.Size((num_particles, 1, len(start.mean)))
            e = part.within(0).normal(start.mean, shape, 1)[:, 0]
            w = q.globals_at(e)
        else:
            index = torch.arange(step * num_particles, (step + 1) * num_particles)
            w = given[index.to(given.device) % len(given)]
            e = q.standard(w)
        shape = torch.Size((num_particles, N, K))
        points = LevelPoints(w, q.locals_at(e, part.within(1).normal(w, shape, 1)))
        log_q = LevelGaussian(*(part.detach() for part in q)).log_prob(points)
        log_p = log_target(points)
        apart = (log_q.locals_ - log_p.locals_).sum(-1)
        if given is None:
            apart = apart + log_q.globals_ - log_p.globals_
        return apart.mean()

    descend(loss, learned, steps, LR)
    return LevelGaussian(*(part.detach() for part in now()))


def _triangular(raw: Tensor) -> Tensor:
    return raw.tril(-1) + raw.diagonal(dim1=-2, dim2=-1).exp().diag_embed()


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _log_normal(e: Tensor) -> Tensor:
    return -e.square().sum(-1) / 2 - e.shape[-1] * math.log(2 * math.pi) / 2


def _log_det(root: Tensor) -> Tensor:
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _positive(sd: Tensor) -> Tensor:
    return torch.where(sd > 0, sd, 1.0)
