"""The guide of the variational autoencoder with two levels of latents."""

from collections.abc import Sequence

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyproelbo._messages.renamed import renamed
from pyproelbo.guides.base import Amortised
from pyproelbo.models.base import check_last_dim, check_rows, rows_plate
from pyproelbo.models.hvae import two_sizes
from pyproelbo.models.nets import DiagonalNormal, Joined, Net, mlp


class Diagonal(Amortised):
    r"""q(z2 | x) q(z1 | x, z2), both normal with independent dimensions.

    The encoders of Tomczak & Welling (2018), "VAE with a VampPrior", section 3. Their prior takes
    the bound method ``posterior``: ``VampPrior(guide.posterior, ...)``.

    Args:
        num_latents: (k1, k2), the sizes of z1 and z2.
        num_features: D, the size of x.
        hidden: the widths of the hidden layers in the order of the decoder, from z to x: model and
            guide take the same; none for linear encoders.
        dataset_size: N, the number of all rows, as in the model.
        net: makes nets from their sizes: :func:`~pyproelbo.models.nets.mlp`, or ``gated_mlp``.
        log_scale: the limits at which the log scale is clamped; None for none.
    """

    @renamed(size="dataset_size")
    def __init__(
        self,
        num_latents: tuple[int, int],
        num_features: int,
        hidden: Sequence[int] = (),
        dataset_size: int | None = None,
        net: Net = mlp,
        log_scale: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(num_features, dataset_size)
        k1, k2 = self.num_latents = two_sizes(num_latents)
        hidden = tuple(hidden)[::-1]
        self.encoder2 = net(num_features, hidden, 2 * k2)
        self.encoder1 = Joined((num_features, k2), hidden, 2 * k1, net)
        self.normal = DiagonalNormal(log_scale)

    def posterior(self, x: Tensor) -> TorchDistribution:
        """q(z2 | x), for x (..., D): batch shape (...), event shape (k2,)."""
        check_last_dim("x", x, self.num_features)
        return self.normal(*self.encoder2(x).chunk(2, -1))

    def conditional_posterior(self, x: Tensor, z2: Tensor) -> TorchDistribution:
        """q(z1 | x, z2), for x (..., D) and z2 (..., k2): batch shape (...), event shape (k1,)."""
        check_last_dim("x", x, self.num_features)
        check_last_dim("z2", z2, self.num_latents[1])
        return self.normal(*self.encoder1(x, z2).chunk(2, -1))

    def forward(self, x: Tensor) -> Tensor:
        """The guide's program, for data x (B, D); it returns z1."""
        check_rows("x", x, self.num_features)
        with rows_plate(len(x), self.dataset_size):
            z2 = pyro.sample("z2", self.posterior(x))
            return pyro.sample("z1", self.conditional_posterior(x, z2))
