"""A distribution whose gradients come only through its draws."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyproelbo._distributions.row_noise import Noise, draw, draws_by_row


class PathOnly(TorchDistribution):
    """A distribution whose density has gradients by the value, but not by the parameters.

    The mean of the term that is left out is 0. Without it the gradient of the ELBO has no
    variance where q is the posterior (Roeder, Wu & Duvenaud 2017, "Sticking the landing").

    Args:
        drawn: the distribution to draw from.
        density: the same distribution, with other tensors than those of the gradient.
    """

    has_rsample = True
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # type: ignore[assignment]

    def __init__(self, drawn: TorchDistribution, density: TorchDistribution) -> None:
        self.drawn, self.density = drawn, density
        super().__init__(drawn.batch_shape, drawn.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint | None:
        return self.drawn.support

    def expand(
        self, batch_shape: tuple[int, ...] | list[int], _instance: object = None
    ) -> "PathOnly":
        return PathOnly(self.drawn.expand(batch_shape), self.density.expand(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.drawn.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.density.log_prob(value)


@draws_by_row(PathOnly)
def _path_only(d: PathOnly, noise: Noise) -> Tensor:
    return draw(d.drawn, noise)
