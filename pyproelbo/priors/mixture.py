"""Mixtures of distributions of one family, and priors of this kind."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Normal, constraints
from torch.distributions.utils import lazy_property

from pyproelbo._distributions.family import Family
from pyproelbo._distributions.marginals import is_factorised, is_normal, marginals
from pyproelbo._distributions.mixture_kernel import log_aggregate_posterior
from pyproelbo._distributions.sharing import once


class Mixture(TorchDistribution):
    r"""p(z) = sum_k w_k q_k(z).

    >>> import pyro.distributions as dist
    >>> mixture = Mixture(dist.Normal(torch.zeros(500, 40), 1.0).to_event(1))
    >>> mixture.batch_shape, mixture.event_shape
    (torch.Size([]), torch.Size([40]))
    >>> mixture.log_prob(torch.zeros(100, 40)).shape
    torch.Size([100])

    Independent normal components use the kernel of :func:`log_aggregate_posterior`, whose memory is
    independent of the number of components and of points. Components of other families are
    evaluated in parallel. Samples have no gradient, neither through the component's index nor
    through its parameters.

    Args:
        components: q_k, batch shape (K,), event shape E. Whatever the batch shape of the mixture,
            all its elements have the same components.
        log_weights: log w_k, shape (K,), normalised; 1 / K each if None.

    Raises:
        ValueError: if ``components`` does not have exactly one batch dim, ``log_weights`` does not
            have its shape, or the family has no parameters to choose from.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # type: ignore[assignment]
    has_rsample = False

    def __init__(
        self,
        components: Distribution,
        log_weights: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if len(components.batch_shape) != 1 or components.batch_shape[0] < 1:
            raise ValueError(
                "components should have batch shape (K,), one batch dim with at least one "
                f"component, got {tuple(components.batch_shape)} with event shape "
                f"{tuple(components.event_shape)}: .to_event(1) makes dims of z event dims"
            )
        if log_weights is not None and log_weights.shape != components.batch_shape:
            raise ValueError(
                f"log_weights should have shape {tuple(components.batch_shape)}, one for each "
                f"component, got {tuple(log_weights.shape)}"
            )
        self.components, self._log_weights = components, log_weights
        super().__init__(torch.Size(), components.event_shape, validate_args=validate_args)

    @property
    def num_components(self) -> int:
        """K."""
        return self.components.batch_shape[0]

    @lazy_property
    def log_weights(self) -> Tensor:
        """log w_k, shape (K,)."""
        if self._log_weights is not None:
            return self._log_weights
        like = self._family.tensors(self.components)[0]
        return like.new_zeros(self.num_components).log_softmax(0)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the components."""
        return self.components.support  # type: ignore[return-value]

    @property
    def mean(self) -> Tensor:
        """sum_k w_k E_k[z], of shape batch shape + E."""
        return self._average(self.components.mean).expand(self.shape())

    @property
    def variance(self) -> Tensor:
        """sum_k w_k E_k[z^2] - (sum_k w_k E_k[z])^2, elementwise, in the shape of ``mean``."""
        spread = self.components.variance + self.components.mean.square()
        return (self._average(spread) - self._average(self.components.mean).square()).expand(
            self.shape()
        )

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "Mixture":
        """The same mixture in another batch shape: all its elements have these components."""
        new: Any = self._get_checked_instance(Mixture, _instance)
        new.components, new._log_weights = self.components, self._log_weights
        TorchDistribution.__init__(
            new, torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """log sum_k w_k q_k(value), in nats: value (..., *E) -> (...)."""
        if self._validate_args:
            self._validate_sample(value)
        normal = self._normal
        if normal is None:
            log_prob = (self._log_probs(value) + self.log_weights).logsumexp(-1)
        else:
            shape = value.shape[: value.dim() - self.event_dim]
            loc, scale = (x.reshape(self.num_components, -1) for x in (normal.loc, normal.scale))
            z = value.reshape(*shape, loc.shape[1])
            log_prob = log_aggregate_posterior(z, loc, scale, self._log_weights)
        return log_prob.expand(broadcast_shape(log_prob.shape, self.batch_shape))

    def responsibilities(self, value: Tensor) -> Tensor:
        """p(k | value), each component's share of the density: (..., *E) -> (..., K)."""
        return (self._log_probs(value) + self.log_weights).softmax(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """k ~ w, then z ~ q_k: (*sample_shape, *batch_shape, *E), without a gradient."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            k = Categorical(logits=self.log_weights, validate_args=False).sample(shape)
            tensors = self._family.tensors(self.components)
            return self._family.made_of(x[k] for x in tensors).sample()

    @property
    def _family(self) -> Family:
        return Family.of(self.components)

    @property
    def _normal(self) -> Normal | None:
        """The components, if their dimensions are independent and normal: (K, *E)."""
        each = marginals(self.components) if is_factorised(self.components) else None
        return each if is_normal(each) else None

    def _log_probs(self, value: Tensor) -> Tensor:
        """log q_k(value): (..., *E) -> (..., K)."""
        return self.components.log_prob(value.unsqueeze(value.dim() - self.event_dim))

    def _average(self, x: Tensor) -> Tensor:
        """sum_k w_k x_k: (K, *E) -> E."""
        return torch.tensordot(self.log_weights.exp(), x, 1)


class MixturePrior(nn.Module, ABC):
    """A prior that is a mixture: a call returns the :class:`Mixture`.

    Args:
        num_components: K.
        learned_weights: whether the components' weights are learned, as the softmax of ``logits``;
            otherwise each is 1 / K.
    """

    def __init__(self, num_components: int, learned_weights: bool = False) -> None:
        super().__init__()
        if not isinstance(num_components, int) or num_components < 1:
            raise ValueError(
                f"num_components should be a positive whole number, got {num_components!r}"
            )
        self.num_components = num_components
        self.logits = nn.Parameter(torch.zeros(num_components)) if learned_weights else None

    @property
    def log_weights(self) -> Tensor | None:
        """The logarithms of the components' weights, (K,); None where each is 1 / K."""
        return None if self.logits is None else self.logits.log_softmax(0)

    @abstractmethod
    def components(self) -> Distribution:
        """The distributions that are mixed, batch shape (K,)."""

    def forward(self) -> Mixture:
        """p(z), from ``components()`` and their weights: event shape E."""
        return Mixture(once(self, self.components), self.log_weights)
