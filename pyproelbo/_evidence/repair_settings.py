"""What the ways of a repair are told, and what they return."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import pyro
import torch
from torch import Tensor

from pyproelbo._distributions.row_noise import Noise
from pyproelbo._evidence.annealed import Annealed
from pyproelbo._evidence.coordinates import Coordinates
from pyproelbo._evidence.gaussian import Gaussian
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.report_data import Unit
from pyproelbo._rows.runs import Use
from pyproelbo._terms.traces import Program

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

    def points(self, batch: Batch, q: Gaussian, draws: range, *use: int) -> Tensor:
        """Draws of Gaussians of a batch, (S, B, K)."""
        shape = torch.Size((len(draws), *q.mean.shape))
        return q.at(self.noise(batch, draws, *use).normal(q.mean, shape, 1))


class Target(NamedTuple):
    """log p(x, z) of a batch as a density of points.

    Attributes:
        coordinates: what the points are.
        is_idle: coordinates on which nothing depends, as those that a mask leaves out, (B, K). They
            are standard normal.
    """

    coordinates: Coordinates
    is_idle: Tensor

    @classmethod
    def of(cls, to: Settings, batch: Batch, near: Gaussian) -> "Target":
        """That of a batch.

        Args:
            near: points of which tell what depends on them.

        Raises:
            NotContinuousError: for a latent that is discrete.
        """
        coordinates = to.coordinates(batch)
        with torch.enable_grad(), pyro.validation_enabled(False):
            u = to.points(batch, near, range(2), Use.PILOT).requires_grad_()
            log_q, log_joint, _ = coordinates.densities(u)
            (gradient,) = torch.autograd.grad((log_q + log_joint).sum(), u)
        return cls(coordinates, (gradient == 0).all(0))

    def __call__(self, u: Tensor) -> Tensor:
        """Of points (S, B, K): (S, B)."""
        log_p = self.coordinates.densities(u).log_target
        return log_p - (u.square() * self.is_idle).sum(-1) / 2


class Weighted(NamedTuple):
    """Draws of each of B rows with the weights that make them those of the posterior.

    Attributes:
        values: by site, (S, B, ...).
        log_weight: (S, B), in nats.
        points: the draws as points, (S, B, K); None where a latent is discrete.
        near: a Gaussian for the next way to start from; None for what there was before.
        equal: whether the values have equal weights already, and ``log_weight`` is of what they
            are from.
        is_good: where nothing but the weights is against them, (B,); None for everywhere.
    """

    values: Mapping[str, Tensor]
    log_weight: Tensor
    points: Tensor | None = None
    near: Gaussian | None = None
    equal: bool = False
    is_good: Tensor | None = None


class Modes(NamedTuple):
    """Where ascents of log p(x, z) have come to, M of them for each of B rows.

    Attributes:
        points: (M, B, K).
        height: log p(x, z) there, as a density of points, in nats, (M, B).
        matters: where that is not far below the highest of the row, (M, B).
        is_idle: as of :class:`Target`, (B, K).
    """

    points: Tensor
    height: Tensor
    matters: Tensor
    is_idle: Tensor

    def take(self, index: Tensor) -> "Modes":
        """Those of some rows."""
        rows = index.to(self.height.device)
        of_rows = self.points[:, rows], self.height[:, rows], self.matters[:, rows]
        return Modes(*of_rows, self.is_idle[rows])


class Near(NamedTuple):
    """What is known of the posteriors of some rows, to begin with.

    Attributes:
        gaussian: near a mode of each, or what a way before has taken for it; None where a latent
            is discrete.
        modes: where ascents have come to; None where there were none.
    """

    gaussian: Gaussian | None = None
    modes: Modes | None = None

    def take(self, index: Tensor) -> "Near":
        """That of some rows."""
        gaussian = None if self.gaussian is None else self.gaussian.take(index)
        return Near(gaussian, None if self.modes is None else self.modes.take(index))


class Way(Protocol):
    """From a batch of rows, and what is near their posteriors, to weighted draws of them."""

    def __call__(self, to: Settings, batch: Batch, near: "Near") -> Weighted:
        """
        Raises:
            CannotRepairError, ValueError: where this is no way for these programs.
        """
        ...
