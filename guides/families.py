"""Gaussian families: from the output of a net, or a parameter, to a distribution of z.

A family is called with the mean ``loc`` (..., k) and ``raw`` (..., num_raw), any real numbers,
which give the spread; the two broadcast.
"""

import torch
from pyro import distributions as dist
from pyro.distributions import MultivariateNormal, TorchDistribution
from torch import Tensor, nn

from pyproelbo._messages.renamed import renamed_members
from pyproelbo.models.nets import DiagonalNormal


class Factorised(DiagonalNormal):
    """N(loc, diag(scale)^2), with raw = log scale.

    Args:
        num_latents: k, the size of z.
        log_scale: as in :class:`~pyproelbo.models.nets.DiagonalNormal`.
    """

    def __init__(self, num_latents: int, log_scale: tuple[float, float] | None = None) -> None:
        super().__init__(log_scale)
        self.num_raw = num_latents

    def nearest(self, p: MultivariateNormal) -> Tensor:
        """The raw of the q that minimises KL(q || p): 1 / scale^2 = diag(precision of p)."""
        return -p.precision_matrix.diagonal(dim1=-2, dim2=-1).log() / 2


class Correlated(nn.Module):
    """N(loc, L L^T), L lower triangular: raw has its rows, with logarithms on the diagonal."""

    rows: Tensor
    columns: Tensor

    def __init__(self, num_latents: int) -> None:
        super().__init__()
        rows, columns = torch.tril_indices(num_latents, num_latents)
        self.num_latents, self.num_raw = num_latents, len(rows)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, loc: Tensor, raw: Tensor) -> TorchDistribution:
        """N(loc, L L^T), for loc (..., k) and raw (..., k (k + 1) / 2): event shape (k,)."""
        return dist.MultivariateNormal(loc, scale_tril=self.scale_tril(raw))

    def scale_tril(self, raw: Tensor) -> Tensor:
        """L (..., k, k), for raw (..., k (k + 1) / 2)."""
        L = raw.new_zeros(*raw.shape[:-1], self.num_latents, self.num_latents)
        L[..., self.rows, self.columns] = raw
        return L.tril(-1) + L.diagonal(dim1=-2, dim2=-1).exp().diag_embed()

    def nearest(self, p: MultivariateNormal) -> Tensor:
        """The raw of p itself."""
        L = p.scale_tril
        L = L.tril(-1) + L.diagonal(dim1=-2, dim2=-1).log().diag_embed()
        return L[..., self.rows, self.columns]


GaussianFamily = Factorised | Correlated
__getattr__ = renamed_members(__name__, Family="GaussianFamily")
