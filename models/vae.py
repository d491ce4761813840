"""The variational autoencoder."""

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyproelbo._messages.renamed import renamed
from pyproelbo.models.base import NamedModule, check_last_dim, plate_over
from pyproelbo.models.nets import Net, mlp
from pyproelbo.priors import StandardNormal


class BernoulliLikelihood(nn.Module):
    """x_d ~ Bernoulli, for x of zeros and ones; the decoder gives logits (..., D)."""

    def forward(self, logits: Tensor) -> TorchDistribution:
        """p(x | logits), for logits (..., D): batch shape (...), event shape (D,)."""
        return dist.Bernoulli(logits=logits).to_event(1)


class GaussianLikelihood(PyroModule):
    """x_d ~ N(loc_d, scale^2), for real x; the decoder gives loc (..., D), scale is learned.

    Args:
        scale: the initial scale: a number, or a tensor (D,) for a scale for each feature.

    Attributes:
        log_scale: the logarithm of the scale, a scalar or (D,).
    """

    def __init__(self, scale: float | Tensor = 1.0) -> None:
        super().__init__()
        start = torch.as_tensor(scale, dtype=torch.get_default_dtype())
        if not (start > 0).all():
            raise ValueError(f"scale should be positive, got {scale}")
        self.log_scale = nn.Parameter(start.log())

    @property
    def scale(self) -> Tensor:
        """The noise scale: positive, a scalar or (D,)."""
        return self.log_scale.exp()

    def forward(self, loc: Tensor) -> TorchDistribution:
        """p(x | loc), for loc (..., D): batch shape (...), event shape (D,)."""
        return dist.Normal(loc, self.scale).to_event(1)


class VAE(NamedModule):
    r"""z ~ p(z), x ~ p(x | f(z)) with a neural network f.

    Kingma & Welling (2014), "Auto-Encoding Variational Bayes". With no hidden layer and a
    Gaussian likelihood it is PPCA (:class:`pyproelbo.models.ppca.PPCA`).

    Args:
        num_latents: k, the size of z.
        num_features: D, the size of x.
        hidden: the widths of f's hidden layers, from z to x; none for a linear f.
        likelihood: from f's output (..., D) to a distribution of event shape (D,);
            :class:`GaussianLikelihood` by default.
        prior: a function that returns the distribution of z, event shape (k,); N(0, I) by default.
            An ``nn.Module`` is trained with the rest.
        dataset_size: N, the number of all rows, if x will be a part of them: log-densities are then
            scaled by N / B. Give the guide the same.
        net: makes f from its sizes: :func:`~pyproelbo.models.nets.mlp`, or ``gated_mlp``.
    """

    @renamed(size="dataset_size")
    def __init__(
        self,
        num_latents: int,
        num_features: int,
        hidden: Sequence[int] = (),
        likelihood: Callable[[Tensor], TorchDistribution] | None = None,
        prior: Callable[[], TorchDistribution] | None = None,
        dataset_size: int | None = None,
        net: Net = mlp,
    ) -> None:
        super().__init__()
        self.num_latents, self.num_features = num_latents, num_features
        self.dataset_size = dataset_size
        self.decoder = net(num_latents, hidden, num_features)
        self.likelihood = GaussianLikelihood() if likelihood is None else likelihood
        self.prior = StandardNormal(num_latents) if prior is None else prior

    def decode(self, z: Tensor) -> TorchDistribution:
        """p(x | z), for z (..., k): batch shape (...), event shape (D,)."""
        check_last_dim("z", z, self.num_latents)
        return self.likelihood(self.decoder(z))

    def forward(self, x: Tensor | None = None, num: int = 1) -> Tensor:
        """The generative program, for data x (B, D); without x it simulates ``num`` rows."""
        with plate_over(x, self.num_features, self.dataset_size, num):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z), obs=x)
