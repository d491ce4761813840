"""A mixture of Gaussians with learned parameters."""

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import nn

from pyproelbo.priors.mixture import MixturePrior


class GaussianMixture(MixturePrior):
    r"""p(z) = sum_k w_k N(z; loc_k, diag(scale_k)^2), all learned.

    The mixture with which Tomczak & Welling (2018), section 4, compare the VampPrior: it has no
    encoder, and nothing ties its components to the posteriors.

    >>> prior = GaussianMixture(num_components=10, num_latents=2)
    >>> prior().event_shape
    torch.Size([2])

    Args:
        num_components: K.
        num_latents: the size of z.
        learned_weights: whether the components' weights are learned; otherwise each is 1 / K.

    Attributes:
        loc: the components' means, (K, num_latents), initially draws from N(0, I).
        log_scale: the logarithms of their standard deviations, initially 0.
    """

    def __init__(
        self, num_components: int, num_latents: int, *, learned_weights: bool = False
    ) -> None:
        super().__init__(num_components, learned_weights)
        self.loc = nn.Parameter(torch.randn(num_components, num_latents))
        self.log_scale = nn.Parameter(torch.zeros(num_components, num_latents))

    def components(self) -> TorchDistribution:
        """N(loc_k, diag(scale_k)^2): batch shape (K,), event shape (num_latents,)."""
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
