"""The prior that is not learned."""

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn


class StandardNormal(nn.Module):
    """N(0, I): a call returns the distribution, event shape (num_latents,).

    Args:
        num_latents: K, the size of z.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, num_latents: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(num_latents), persistent=False)
        self.register_buffer("scale", torch.ones(num_latents), persistent=False)

    def forward(self) -> TorchDistribution:
        """N(0, I), event shape (num_latents,)."""
        return dist.Normal(self.loc, self.scale).to_event(1)
