"""A Gaussian for each row over its coordinates, with its own covariance, found by gradients."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._distributions.row_noise import Noise
from pyproelbo._evidence.descent import descend

LR = 0.1  # of Adam initially, in units of the sds at the start of a round
ROUNDS = 3


class Gaussian(NamedTuple):
    """N(mean, L L^T) for each of B rows.

    Attributes:
        mean: (B, K).
        scale: L, lower triangular, (B, K, K); or, where it is diagonal, its diagonal (B, K).
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of_draws(cls, u: Tensor) -> "Gaussian":
        """The Gaussian with the means and sds of draws (S, B, K), without correlations."""
        sd = u.std(0)
        return cls(u.mean(0), torch.where(sd > 0, sd, 1.0))

    @property
    def factor(self) -> Tensor:
        """L, (B, K, K)."""
        return self.scale if self.scale.dim() == 3 else self.scale.diag_embed()

    def at(self, noise: Tensor) -> Tensor:
        """Draws, from standard normal numbers (S, B, K)."""
        if self.scale.dim() == 2:
            return self.mean + self.scale * noise
        return self.mean + torch.einsum("bij,sbj->sbi", self.scale, noise)

    def log_prob(self, u: Tensor) -> Tensor:
        """Of points (S, B, K): (S, B)."""
        off, diagonal = u - self.mean, self.scale
        if self.scale.dim() == 2:
            e = off / self.scale
        else:
            columns = off.permute(1, 2, 0)
            e = torch.linalg.solve_triangular(self.scale, columns, upper=False).permute(2, 0, 1)
            diagonal = self.scale.diagonal(dim1=-2, dim2=-1)
        constant = diagonal.log().sum(-1) + u.shape[-1] * math.log(2 * math.pi) / 2
        return -e.square().sum(-1) / 2 - constant

    def where_finite(self, other: "Gaussian") -> "Gaussian":
        """This, or the other in rows where this has a number that is not finite."""
        is_fine = self.mean.isfinite().all(-1) & self.scale.isfinite().flatten(1).all(-1)
        mean = torch.where(is_fine[:, None], self.mean, other.mean)
        return Gaussian(mean, torch.where(is_fine[:, None, None], self.factor, other.factor))

    def take(self, index: Tensor) -> "Gaussian":
        """The Gaussians of some rows."""
        index = index.to(self.mean.device)
        return Gaussian(self.mean[index], self.scale[index])


def fitted(
    log_target: Callable[[Tensor], Tensor],
    start: Gaussian,
    steps: int,
    num_particles: int,
    noise: Noise,
) -> Gaussian:
    """The Gaussians with the highest ELBO, of any covariance, starting from ``start``.

    Several rounds of Adam, each with a learning rate that falls to 0, on path gradients: these have
    no variance where the target is Gaussian (Roeder, Wu & Duvenaud 2017, "Sticking the landing").
    A round works in coordinates in which the previous Gaussian is N(0, I): correlations, once
    found, do not slow it down.

    Args:
        log_target: from points (S, B, K) to their log-densities (S, B), up to a constant.
        steps: of all rounds together.
        noise: for its steps, with numbered parts.
    """
    q = start
    for r in range(ROUNDS):
        q = _round(log_target, q, math.ceil(steps / ROUNDS), num_particles, noise.within(r))
        q = q.where_finite(start)
    return q


def _round(
    log_target: Callable[[Tensor], Tensor],
    start: Gaussian,
    steps: int,
    num_particles: int,
    noise: Noise,
) -> Gaussian:
    factor = start.factor
    off = torch.zeros_like(start.mean).requires_grad_()
    raw = torch.zeros_like(factor).requires_grad_()

    def now() -> Gaussian:
        scale = raw.tril(-1) + raw.diagonal(dim1=-2, dim2=-1).exp().diag_embed()
        mean = start.mean + (factor @ off.unsqueeze(-1)).squeeze(-1)
        return Gaussian(mean, factor @ scale)

    def loss(step: int) -> Tensor:
        q = now()
        e = noise.within(step).normal(off, torch.Size((num_particles, *off.shape)), 1)
        u = q.at(e)
        detached = Gaussian(q.mean.detach(), q.scale.detach())
        return (detached.log_prob(u) - log_target(u)).mean(0).sum()

    descend(loss, [off, raw], steps, LR)
    q = now()
    return Gaussian(q.mean.detach(), q.scale.detach())
