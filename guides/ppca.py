"""Guides of PPCA: the exact posterior, and linear ones to learn."""

from typing import Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyproelbo.guides.base import Amortised
from pyproelbo.guides.base import Exact as Exact
from pyproelbo.guides.families import Correlated, Factorised, Family
from pyproelbo.models.base import check_last_dim, check_sizes
from pyproelbo.models.ppca import PPCA


class _Linear(Amortised):
    """q(z | x) = N(A x + b, S), with one covariance S for all x, of a family."""

    def __init__(
        self, family: type[Family], num_latents: int, num_features: int, size: int | None
    ) -> None:
        super().__init__(num_features, size)
        check_sizes(num_latents=num_latents, num_features=num_features)
        self.loc = nn.Linear(num_features, num_latents)
        self.family = family(num_latents)
        self.raw = nn.Parameter(torch.zeros(self.family.num_raw))

    def posterior(self, x: Tensor) -> TorchDistribution:
        check_last_dim("x", x, self.num_features)
        return self.family(self.loc(x), self.raw)

    @torch.no_grad()
    def _approach(self, model: PPCA) -> Self:
        """Take the parameters that minimise KL(q(z | x) || p(z | x)), for every x."""
        basis = torch.eye(model.num_features).to(model.W)
        p = model.posterior(torch.cat([torch.zeros_like(basis[:1]), basis]))
        self.to(model.W)
        self.loc.bias.copy_(p.mean[0])
        self.loc.weight.copy_((p.mean[1:] - p.mean[0]).mT)
        self.raw.copy_(self.family.nearest(model.posterior(basis[0])))
        return self


class Diagonal(_Linear):
    """q(z | x) = N(A x + b, diag(scale)^2).

    With P the precision of PPCA's posterior, it can come as near to the evidence as
    1/2 (sum_i log P_ii - log |P|) nats a datum: exact where the columns of W are orthogonal,
    as they are in ``PPCA.optimum``.

    Args:
        num_latents: k, the size of z.
        num_features: D, the size of x.
        size: N, the rows of the whole data, as in the model.
    """

    def __init__(self, num_latents: int, num_features: int, size: int | None = None) -> None:
        super().__init__(Factorised, num_latents, num_features, size)

    @classmethod
    def optimum(cls, model: PPCA) -> "Diagonal":
        """The best such guide of ``model``: the exact mean, 1 / scale_i^2 = P_ii."""
        return cls(model.num_latents, model.num_features, model.size)._approach(model)


class FullCovariance(_Linear):
    """q(z | x) = N(A x + b, L L^T): PPCA's posterior is one of these.

    Args:
        num_latents: k, the size of z.
        num_features: D, the size of x.
        size: N, the rows of the whole data, as in the model.
    """

    def __init__(self, num_latents: int, num_features: int, size: int | None = None) -> None:
        super().__init__(Correlated, num_latents, num_features, size)

    @classmethod
    def optimum(cls, model: PPCA) -> "FullCovariance":
        """The posterior of ``model`` at its present parameters, with parameters of its own."""
        return cls(model.num_latents, model.num_features, model.size)._approach(model)
