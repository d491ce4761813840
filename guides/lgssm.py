r"""Guides of the linear-Gaussian state space model: exact ones, and linear ones to learn.

For any guide q(z_t | z_{t-1}, x), the sum over the steps up to tau of

    log p(x_t | z_t) + log p(z_t | z_{t-1}) - log q(z_t | z_{t-1}, x)

has a mean below log p(x_0, ..., x_tau). A filtering guide uses only the past and the present of x:
a bound once reached does not change when more of x arrives. A smoothing guide uses the future,
which brings the whole sum closer to log p(x).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from pyproelbo._messages.renamed import renamed
from pyproelbo.guides.families import Correlated
from pyproelbo.guides.sequences import Backward, Forward, LinearRNN, SequenceGuide, step_features
from pyproelbo.guides.sequences import Exact as Exact
from pyproelbo.models.base import check_sizes
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.sequences import Sequences
from pyproelbo.sequences import IndependentSteps, LinearGaussianChain


class ExactFilter(Exact):
    r"""q(z_t | z_{t-1}, x_t) = p(z_t | z_{t-1}, x_t) of an LGSSM, at its parameters.

    The term of step t is log p(x_t | z_{t-1}) for every sample, or log p(x_0) at t = 0: no guide
    that uses only the past and the present of x has a larger mean of it, given z_{t-1}. It has no
    parameters, like :class:`Exact`.

    Args:
        model: an LGSSM. Its ``dataset_size`` is used.
    """

    def __init__(self, model: LGSSM) -> None:
        super().__init__(model)

    def posterior(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> LinearGaussianChain:
        """The product over t of p(z_t | z_{t-1}, x_t), for x (..., T, D): event shape (T, k)."""
        return self.model.optimal_proposal(x, lengths, observed, inputs)


class _Linear(SequenceGuide):
    """Gaussian steps with one covariance S, and means linear in features of x.

    The features h_t of a step are x_t, whether it is observed, u_t, and the outputs of linear
    recurrent nets, of the size of z, that read other steps.
    """

    readers: ClassVar[tuple[type[Forward], ...]] = ()

    def __init__(
        self,
        num_latents: int,
        num_features: int,
        num_inputs: int = 0,
        dataset_size: int | None = None,
    ) -> None:
        super().__init__(num_features, num_inputs, dataset_size)
        check_sizes(num_latents=num_latents)
        width = num_features + 1 + num_inputs
        self.read_elsewhere = nn.ModuleList(
            reader(LinearRNN(width, num_latents)) for reader in self.readers
        )
        self.num_latents, self.num_read = num_latents, width + num_latents * len(self.readers)
        self.family = Correlated(num_latents)
        self.raw = nn.Parameter(torch.zeros(self.family.num_raw))

    def features(self, data: Sequences) -> Tensor:
        """h for all steps, (..., T, num_read)."""
        y = step_features(data)
        return torch.cat([y, *(read(y, data.lengths) for read in self.read_elsewhere)], -1)


class Filtering(_Linear):
    """q(z_t | z_{t-1}, x_t) = N(A z_{t-1} + C h_t + c, S), with h_t only from x_t and u_t.

    z_0 has its own C, c and S. Where no x_t is missing, :class:`ExactFilter` is one of these.

    Args:
        num_latents: k, the size of z_t.
        num_features: D, the size of x_t.
        num_inputs: U, the size of the inputs u_t; 0 for none.
        dataset_size: N, the number of all sequences, as in the model.
    """

    @renamed(size="dataset_size")
    def __init__(
        self,
        num_latents: int,
        num_features: int,
        num_inputs: int = 0,
        dataset_size: int | None = None,
    ) -> None:
        super().__init__(num_latents, num_features, num_inputs, dataset_size)
        self.initial_loc = nn.Linear(self.num_read, num_latents)
        self.initial_raw = nn.Parameter(torch.zeros(self.family.num_raw))
        self.loc = nn.Linear(num_latents + self.num_read, num_latents)

    def infer(self, data: Sequences) -> LinearGaussianChain:
        """q(z | x), a product over t of q(z_t | z_{t-1}, h_t): event shape (T, k)."""
        h = self.features(data)
        initial = self.family(self.initial_loc(h[..., 0, :]), self.initial_raw)
        of_past, of_read = self.loc.weight.split([self.num_latents, self.num_read], -1)
        offsets = h @ of_read.mT + self.loc.bias
        scale_tril = self.family.scale_tril(self.raw)
        return LinearGaussianChain(initial, of_past, offsets, scale_tril, data.own)


class Smoothing(Filtering):
    """q(z_t | z_{t-1}, x_t, ..., x_{T-1}) = N(A z_{t-1} + C h_t + c, S): h_t has the future too.

    Away from the end of a sequence the posterior of an LGSSM is one of these, where no x_t is
    missing. Args: as :class:`Filtering`.
    """

    readers = (Backward,)


class MeanField(_Linear):
    """q(z_t | x) = N(C h_t + c, S), with independent steps and h_t from all x.

    Away from both ends the best mean of such a guide is one of these. The dependence of z_t on
    z_{t-1} is lost: with little noise between the steps the ELBO remains far from the evidence.
    Args: as :class:`Filtering`.
    """

    readers = (Forward, Backward)

    @renamed(size="dataset_size")
    def __init__(
        self,
        num_latents: int,
        num_features: int,
        num_inputs: int = 0,
        dataset_size: int | None = None,
    ) -> None:
        super().__init__(num_latents, num_features, num_inputs, dataset_size)
        self.loc = nn.Linear(self.num_read, num_latents)

    def infer(self, data: Sequences) -> IndependentSteps:
        """q(z | x), a product over t of q(z_t | h_t): event shape (T, k)."""
        h = self.features(data)
        return IndependentSteps(self.family(self.loc(h), self.raw), data.own)
