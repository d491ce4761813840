"""Guides of the mixture of Gaussians."""

from collections.abc import Sequence

import pyro.distributions as dist
from pyro.distributions import Categorical
from torch import Tensor

from pyproelbo._messages.renamed import renamed
from pyproelbo.guides.base import Amortised
from pyproelbo.guides.base import Exact as Exact
from pyproelbo.models.base import check_last_dim
from pyproelbo.models.nets import mlp


class Softmax(Amortised):
    """q(z = k | x) = softmax(f(x))_k with a neural network f.

    With components of equal scale the posterior's logits are linear in x, and no hidden layer is
    needed. z is sampled; ``pyro.infer.config_enumerate(guide)`` sums over it instead.

    Args:
        num_components: K, the number of values of z.
        num_features: D, the size of x.
        hidden: the widths of f's hidden layers; none for a linear f.
        dataset_size: N, the number of all rows, as in the model.
    """

    @renamed(size="dataset_size")
    def __init__(
        self,
        num_components: int,
        num_features: int,
        hidden: Sequence[int] = (),
        dataset_size: int | None = None,
    ) -> None:
        super().__init__(num_features, dataset_size)
        self.encoder = mlp(num_features, hidden, num_components)

    def posterior(self, x: Tensor) -> Categorical:
        """q(z | x), for x (..., D): batch shape (...)."""
        check_last_dim("x", x, self.num_features)
        return dist.Categorical(logits=self.encoder(x))
