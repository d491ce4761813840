"""Guides of PPCA: the exact posterior, and linear ones to learn."""

from typing import ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyproelbo._messages.renamed import renamed
from pyproelbo.guides.base import Amortised
from pyproelbo.guides.base import Exact as Exact
from pyproelbo.guides.families import Correlated, Factorised, GaussianFamily
from pyproelbo.models.base import check_last_dim, check_sizes
from pyproelbo.models.ppca import PPCA


class _Linear(Amortised):
    """q(z | x) = N(A x + b, S), with one covariance S for all x, of a family."""

    family_type: ClassVar[type[GaussianFamily]]

    @renamed(size="dataset_size")
    def __init__(
        self, num_latents: int, num_features: int, dataset_size: int | None = None
    ) -> None:
        super().__init__(num_features, dataset_size)
        check_sizes(num_latents=num_latents, num_features=num_features)
        self.loc = nn.Linear(num_features, num_latents)
        self.family = self.family_type(num_latents)
        self.raw = nn.Parameter(torch.zeros(self.family.num_raw))

    def posterior(self, x: Tensor) -> TorchDistribution:
        """q(z | x), for x (..., D): batch shape (...), event shape (k,)."""
        check_last_dim("x", x, self.num_features)
        return self.family(self.loc(x), self.raw)

    @classmethod
    @torch.no_grad()
    def optimum(cls, model: PPCA) -> Self:
        """The guide that minimises KL(q(z | x) || p(z | x)) for every x, with p from ``model``."""
        guide = cls(model.num_latents, model.num_features, model.dataset_size).to(model.W)
        basis = torch.eye(model.num_features).to(model.W)
        p = model.posterior(torch.cat([torch.zeros_like(basis[:1]), basis]))
        guide.loc.bias.copy_(p.mean[0])
        guide.loc.weight.copy_((p.mean[1:] - p.mean[0]).mT)
        guide.raw.copy_(guide.family.nearest(model.posterior(basis[0])))
        return guide


class Diagonal(_Linear):
    """q(z | x) = N(A x + b, diag(scale)^2).

    With P the precision of PPCA's posterior, its smallest gap to the evidence is 1/2 (sum_i log
    P_ii - log |P|) nats per datum: 0 where the columns of W are orthogonal, as in ``PPCA.optimum``.

    Args:
        num_latents: k, the size of z.
        num_features: D, the size of x.
        dataset_size: N, the rows of the whole data, as in the model.
    """

    family_type = Factorised


class FullCovariance(_Linear):
    """q(z | x) = N(A x + b, L L^T): PPCA's posterior is one of these.

    Args:
        num_latents: k, the size of z.
        num_features: D, the size of x.
        dataset_size: N, the rows of the whole data, as in the model.
    """

    family_type = Correlated
