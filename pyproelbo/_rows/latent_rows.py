"""A latent by rows of the data: its sample, and its density at the samples of other rows."""

from torch import Tensor
from torch.distributions import Distribution

from pyproelbo._backend.pyro_private import SOFT
from pyproelbo._distributions.closed_form import closed_form
from pyproelbo._distributions.densities import log_density
from pyproelbo._distributions.marginals import marginals


def per_row(value: Tensor, dim: int) -> Tensor:
    """A tensor summed over all dims except ``dim`` < 0, that of the data: (B,)."""
    return value.movedim(dim, 0).reshape(value.shape[dim], -1).sum(1)


class NotBroadcastError(RuntimeError):
    """A distribution's log_prob does not take values with more dims than its batch."""


class LatentRows:
    """The latent of a site in a batch of B data.

    All other dims of its sample, of inner plates or of events, are the K dimensions of one
    datum's z, in this order.

    Args:
        value: the sample.
        q: q(z | x), with the data along ``dim`` < 0 of its batch.
        p: p(z), with the same batch; None where it is not needed.
    """

    def __init__(self, value: Tensor, q: Distribution, p: Distribution | None, dim: int) -> None:
        # straight-through draws have their density at the value before rounding
        self.value, self.q, self.p = getattr(value, SOFT, value), q, p
        self.axis = value.dim() - len(q.event_shape) + dim

    @property
    def values(self) -> Tensor:
        """The sample with its rows first, (B, ...)."""
        return self.value.movedim(self.axis, 0)

    @property
    def log_q(self) -> Tensor:
        """log q(z_n | x_n), (B,)."""
        return self._rows(self.q.log_prob(self.value)).sum(1)

    @property
    def log_q_by_dim(self) -> Tensor:
        """log q(z_nk | x_n) for a q with known marginals, (B, K)."""
        return self._rows(_marginals(self.q).log_prob(self.value))

    @property
    def mean(self) -> Tensor:
        """E[z | x_n], (B, K); the sample itself where q's mean is unknown."""
        try:
            return self._rows(self.q.mean)
        except NotImplementedError:
            return self._rows(self.value)

    def kl_by_dim(self) -> tuple[Tensor, Tensor]:
        """KL(q(z_k | x_n) || p(z_k)), in closed form where there is one, and at the sample.

        (B, K) each, for q and p that have marginals.
        """
        q, p = _marginals(self.q), _marginals(self.p)
        sampled = q.log_prob(self.value) - p.log_prob(self.value)
        exact = closed_form(q, p)
        return self._rows(sampled if exact is None else exact), self._rows(sampled)

    def normal(self) -> tuple[Tensor, Tensor]:
        """loc and scale, (B, K) each, of a q whose dimensions are independent and normal."""
        q = _marginals(self.q)
        return self._rows(q.mean), self._rows(q.stddev)

    def log_q_at(self, values: Tensor) -> Tensor:
        """log q(z_m | x_n) at ``values`` (M, ...) from anywhere: (M, B).

        Raises:
            ValueError: for a q that has no density at a given z.
            NotBroadcastError: for one whose density needs as many z as there are data.
        """
        return self._at(self.q, values).sum(2)

    def log_q_by_dim_at(self, values: Tensor) -> Tensor:
        """log q(z_mk | x_n) likewise, for a q that has marginals: (M, B, K)."""
        return self._at(_marginals(self.q), values)

    def _at(self, d: Distribution, values: Tensor) -> Tensor:
        shape = len(values), self.value.shape[self.axis]
        try:
            log_q = log_density(d, values.unsqueeze(self.axis + 1)).movedim(self.axis + 1, 1)
        except (RuntimeError, IndexError) as error:
            raise NotBroadcastError from error
        if log_q.shape[:2] != shape:
            raise NotBroadcastError
        return log_q.reshape(*shape, -1)

    def _rows(self, value: Tensor) -> Tensor:
        return value.movedim(self.axis, 0).reshape(value.shape[self.axis], -1)


def _marginals(d: Distribution | None) -> Distribution:
    known = None if d is None else marginals(d)
    assert known is not None, d
    return known
