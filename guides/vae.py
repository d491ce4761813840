"""Guides of the variational autoencoder: encoders with a Gaussian q(z | x)."""

from collections.abc import Callable, Sequence
from functools import partial

from pyro.distributions import TorchDistribution
from torch import Tensor

from pyproelbo._messages.renamed import renamed
from pyproelbo.guides.base import Amortised
from pyproelbo.guides.families import Correlated, Factorised, GaussianFamily
from pyproelbo.models.base import check_last_dim, check_sizes
from pyproelbo.models.nets import Net, mlp


class _Encoder(Amortised):
    """q(z | x) of a Gaussian family, with mean and spread from a neural network."""

    def __init__(
        self,
        family: Callable[[int], GaussianFamily],
        num_latents: int,
        num_features: int,
        hidden: Sequence[int],
        dataset_size: int | None,
        net: Net,
    ) -> None:
        super().__init__(num_features, dataset_size)
        check_sizes(num_latents=num_latents)
        self.num_latents, self.family = num_latents, family(num_latents)
        self.encoder = net(num_features, tuple(hidden)[::-1], num_latents + self.family.num_raw)

    def posterior(self, x: Tensor) -> TorchDistribution:
        """q(z | x), for x (..., D): batch shape (...), event shape (k,)."""
        check_last_dim("x", x, self.num_features)
        loc, raw = self.encoder(x).split([self.num_latents, self.family.num_raw], dim=-1)
        return self.family(loc, raw)


class Diagonal(_Encoder):
    """q(z | x) = N(loc(x), diag(scale(x))^2), the encoder of Kingma & Welling (2014).

    Args:
        num_latents: k, the size of z.
        num_features: D, the size of x.
        hidden: the widths of the hidden layers in the order of the decoder, from z to x: model and
            guide take the same; none for a linear encoder.
        dataset_size: N, the number of all rows, as in the model.
        net: makes the encoder from its sizes: :func:`~pyproelbo.models.nets.mlp`, or ``gated_mlp``.
        log_scale: the limits at which the log scale is clamped; None for none.
    """

    @renamed(size="dataset_size")
    def __init__(
        self,
        num_latents: int,
        num_features: int,
        hidden: Sequence[int] = (),
        dataset_size: int | None = None,
        net: Net = mlp,
        log_scale: tuple[float, float] | None = None,
    ) -> None:
        family = partial(Factorised, log_scale=log_scale)
        super().__init__(family, num_latents, num_features, hidden, dataset_size, net)


class FullCovariance(_Encoder):
    """q(z | x) = N(loc(x), L(x) L(x)^T), L lower triangular with a positive diagonal.

    Args: as :class:`Diagonal`, without ``log_scale``.
    """

    @renamed(size="dataset_size")
    def __init__(
        self,
        num_latents: int,
        num_features: int,
        hidden: Sequence[int] = (),
        dataset_size: int | None = None,
        net: Net = mlp,
    ) -> None:
        super().__init__(Correlated, num_latents, num_features, hidden, dataset_size, net)
