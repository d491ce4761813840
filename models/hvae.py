"""The variational autoencoder with two levels of latents."""

from collections.abc import Callable, Sequence

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyproelbo._messages.renamed import renamed
from pyproelbo.models.base import NamedModule, check_last_dim, check_sizes, plate_over
from pyproelbo.models.nets import DiagonalNormal, Joined, Net, mlp
from pyproelbo.models.vae import GaussianLikelihood
from pyproelbo.priors import StandardNormal


class HVAE(NamedModule):
    r"""z2 ~ p(z2), z1 ~ p(z1 | z2), x ~ p(x | f(z1, z2)): two levels, with neural networks.

    p(z1 | z2) = N(loc(z2), diag(scale(z2))^2). The model of Tomczak & Welling (2018), "VAE with
    a VampPrior", section 3. Theirs has two hidden layers of 300 units,

    >>> from pyproelbo.models.nets import gated_mlp
    >>> from pyproelbo.models.vae import BernoulliLikelihood
    >>> paper = {"hidden": (300, 300), "net": gated_mlp, "log_scale": (-3.0, 1.0)}
    >>> model = HVAE((40, 40), 784, likelihood=BernoulliLikelihood(), **paper)

    a guide with the same settings, and a ``VampPrior`` of the guide's ``posterior`` for z2.

    Args:
        num_latents: (k1, k2), the sizes of z1 and z2.
        num_features: D, the size of x.
        hidden: the widths of each net's hidden layers, from z to x; none for linear nets. The first
            layer of f has two parts of this width, one for z1 and one for z2.
        likelihood: from f's output (..., D) to a distribution of event shape (D,);
            :class:`~pyproelbo.models.vae.GaussianLikelihood` by default.
        prior: a function that returns the distribution of z2, event shape (k2,); N(0, I) by
            default. An ``nn.Module`` is trained with the rest.
        dataset_size: N, the number of all rows, if x will be a part of them: log-densities are then
            scaled by N / B. Give the guide the same.
        net: makes nets from their sizes: :func:`~pyproelbo.models.nets.mlp`, or ``gated_mlp``.
        log_scale: the limits at which the log scale of p(z1 | z2) is clamped; None for none.
    """

    @renamed(size="dataset_size")
    def __init__(
        self,
        num_latents: tuple[int, int],
        num_features: int,
        hidden: Sequence[int] = (),
        likelihood: Callable[[Tensor], TorchDistribution] | None = None,
        prior: Callable[[], TorchDistribution] | None = None,
        dataset_size: int | None = None,
        net: Net = mlp,
        log_scale: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        k1, k2 = self.num_latents = two_sizes(num_latents)
        self.num_features, self.dataset_size = num_features, dataset_size
        self.prior = StandardNormal(k2) if prior is None else prior
        self.prior_net = net(k2, hidden, 2 * k1)
        self.normal = DiagonalNormal(log_scale)
        self.decoder = Joined((k1, k2), hidden, num_features, net)
        self.likelihood = GaussianLikelihood() if likelihood is None else likelihood

    def conditional_prior(self, z2: Tensor) -> TorchDistribution:
        """p(z1 | z2), for z2 (..., k2): batch shape (...), event shape (k1,)."""
        check_last_dim("z2", z2, self.num_latents[1])
        return self.normal(*self.prior_net(z2).chunk(2, -1))

    def decode(self, z1: Tensor, z2: Tensor) -> TorchDistribution:
        """p(x | z1, z2), for z1 (..., k1) and z2 (..., k2): batch shape (...), event shape (D,)."""
        check_last_dim("z1", z1, self.num_latents[0])
        check_last_dim("z2", z2, self.num_latents[1])
        return self.likelihood(self.decoder(z1, z2))

    def forward(self, x: Tensor | None = None, num: int = 1) -> Tensor:
        """The generative program, for data x (B, D); without x it simulates ``num`` rows."""
        with plate_over(x, self.num_features, self.dataset_size, num):
            z2 = pyro.sample("z2", self.prior())
            z1 = pyro.sample("z1", self.conditional_prior(z2))
            return pyro.sample("x", self.decode(z1, z2), obs=x)


def two_sizes(num_latents: tuple[int, int]) -> tuple[int, int]:
    """(k1, k2); a ValueError for anything else."""
    if not isinstance(num_latents, Sequence) or len(num_latents) != 2:
        raise ValueError(
            f"num_latents should be two sizes, (k1, k2) of z1 and z2, got {num_latents!r}"
        )
    k1, k2 = num_latents
    check_sizes(**{"num_latents[0]": k1, "num_latents[1]": k2})
    return k1, k2
