"""The settings of the methods of a repair, and what they return."""

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
    "its posterior is repaired by gradients: take methods=('mixture',), half of whose draws come "
    "from the prior"
)


class CannotRepairError(ValueError):
    """A method that does not apply to these programs."""


class Settings(NamedTuple):
    """The settings of all methods.

    Attributes:
        model, guide: the programs.
        unit: the meaning of a row.
        num_samples: S, the number of draws for each row.
        steps, num_particles: of Adam, and draws in each step.
        lr: its initial learning rate where the family is fitted.
        annealed: the settings of annealing.
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
        """Draws of the guide, or of another one, for a batch."""
        guide = self.guide if guide is None else guide
        return RowDraws(self.model, guide, batch, self.unit, self.seed)

    def coordinates(self, batch: Batch, guide: Program | None = None) -> Coordinates:
        """The same, as points.

        Raises:
            NotContinuousError: for a latent that is discrete.
        """
        return Coordinates(self.draws(batch, guide), self.chunk, _WHY)

    def noise(self, batch: Batch, draws: range, *use: int) -> Noise:
        """Random numbers for points (S, B, K)."""
        return Noise((self.seed, *use), draws, batch.places, draw_dim=-2, row_dim=-1, part=())

    def points(self, batch: Batch, q: Gaussian, draws: range, *use: int) -> Tensor:
        """Draws of Gaussians of a batch, (S, B, K)."""
        shape = torch.Size((len(draws), *q.mean.shape))
        return q.at(self.noise(batch, draws, *use).normal(q.mean, shape, 1))


class Target(NamedTuple):
    """log p(x, z) of a batch as a density of points.

    Attributes:
        coordinates: of the points.
        is_idle: coordinates on which nothing depends, such as masked ones, (B, K). They are
            standard normal.
    """

    coordinates: Coordinates
    is_idle: Tensor

    @classmethod
    def of(cls, to: Settings, batch: Batch, near: Gaussian) -> "Target":
        """The target of a batch.

        Args:
            near: its points show what depends on them.

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
    """Draws for each of B rows with weights that correct them to the posterior.

    Attributes:
        values: by site, (S, B, ...).
        log_weight: (S, B), in nats.
        points: the draws as points, (S, B, K); None where a latent is discrete.
        near: a Gaussian from which the next method starts; None to keep the previous one.
        equal: whether the values already have equal weights, and ``log_weight`` belongs to their
            source.
        is_good: where they have no fault besides the weights, (B,); None for everywhere.
    """

    values: Mapping[str, Tensor]
    log_weight: Tensor
    points: Tensor | None = None
    near: Gaussian | None = None
    equal: bool = False
    is_good: Tensor | None = None


class Modes(NamedTuple):
    """The ends of ascents of log p(x, z), M of them for each of B rows.

    Attributes:
        points: (M, B, K).
        height: log p(x, z) there, as a density of points, in nats, (M, B).
        matters: where that is not far below the highest of the row, (M, B).
        is_idle: as in :class:`Target`, (B, K).
    """

    points: Tensor
    height: Tensor
    matters: Tensor
    is_idle: Tensor

    def take(self, index: Tensor) -> "Modes":
        """The modes of some rows."""
        rows = index.to(self.height.device)
        of_rows = self.points[:, rows], self.height[:, rows], self.matters[:, rows]
        return Modes(*of_rows, self.is_idle[rows])


class Near(NamedTuple):
    """What is known about the posteriors of some rows, as a start.

    Attributes:
        gaussian: near a mode of each, or the one that an earlier method has used; None where a
            latent is discrete.
        modes: the ends of ascents; None where there were none.
    """

    gaussian: Gaussian | None = None
    modes: Modes | None = None

    def take(self, index: Tensor) -> "Near":
        """The same for some rows."""
        gaussian = None if self.gaussian is None else self.gaussian.take(index)
        return Near(gaussian, None if self.modes is None else self.modes.take(index))


class Way(Protocol):
    """From a batch of rows, and what is near their posteriors, to weighted draws of them."""

    def __call__(self, to: Settings, batch: Batch, near: "Near") -> Weighted:
        """
        Raises:
            CannotRepairError, ValueError: where the method does not apply to these programs.
        """
        ...
