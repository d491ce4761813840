"""The aggregate posterior as prior."""

from collections.abc import Callable

from torch import Tensor
from torch.distributions import Distribution

from pyproelbo._backend.unregistered import Unregistered
from pyproelbo.priors.inputs import RowsOf
from pyproelbo.priors.mixture import MixturePrior
from pyproelbo.priors.vamp import encode


class AggregatePosterior(MixturePrior):
    r"""p(z) = (1/N) sum_n q(z | x_n), the aggregate posterior of the training data.

    Of all priors it has the highest ELBO on these data, with marginal KL 0 (Hoffman & Johnson
    2016; Tomczak & Welling 2018, eq. 7 and 8). For the same reason it overfits: it predicts new
    data less well. Each call encodes all data, in one pass.

    Args:
        encoder: returns q(z | x), batch shape (N,), for data of shape (N, *S), as in
            :class:`~pyproelbo.VampPrior`.
        data: x, (N, *S). They are not a parameter, and not in the ``state_dict()``.

    Attributes:
        data: x.
    """

    data: Tensor

    def __init__(self, encoder: Callable[[Tensor], Distribution], data: Tensor) -> None:
        RowsOf(data)  # checks them
        super().__init__(len(data))
        self._encoder = Unregistered(encoder)
        self.register_buffer("data", data, persistent=False)

    def components(self) -> Distribution:
        """q(z | x_n) of all data, batch shape (N,)."""
        return encode(self._encoder.module, self.data)
