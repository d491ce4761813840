r"""Guides of the deep Markov model: inference networks that read the past, the future or both.

Krishnan, Shalit & Sontag (2017), "Structured Inference Networks for Nonlinear State Space
Models", table 1. Those with z_{t-1} among the inputs of q(z_t | ...) have the structure of the
posterior: given z_{t-1}, only x_t, ..., x_{T-1} carry further information about z_t.
"""

from collections.abc import Callable
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyproelbo._messages.renamed import renamed
from pyproelbo.guides.sequences import Backward, Forward, SequenceGuide, step_features
from pyproelbo.models.base import check_sizes
from pyproelbo.models.sequences import Sequences
from pyproelbo.sequences import IndependentSteps, MarkovChain
from pyproelbo.sequences.loops import Loop, plain

RNN = Callable[[int, int], nn.Module]  # from the sizes of y_t and h_t to a net, batch first


def gru(num_inputs: int, num_hidden: int) -> nn.GRU:
    """The default recurrent net of the guides."""
    return nn.GRU(num_inputs, num_hidden, batch_first=True)


class Combiner(nn.Module):
    r"""q(z_t | s, h_t) = N(loc(c), diag(softplus(raw(c)))^2), c = (tanh(W s + b) + h_t) / (1 + n).

    The paper's section 4, where softplus gives the variance.

    Args:
        num_past: the size of s, q's summary of the past of z: z_{t-1}, say.
        num_latents: k, the size of z_t.
        hidden: H, the size of h_t.
        num_nets: n, the number of recurrent nets whose sum is h_t.
    """

    def __init__(self, num_past: int, num_latents: int, hidden: int, num_nets: int = 1) -> None:
        super().__init__()
        self.num_nets = num_nets
        self.past = nn.Linear(num_past, hidden)
        self.to_normal = ToNormal(num_latents, hidden)

    def forward(self, s: Tensor, h: Tensor) -> TorchDistribution:
        """q(z_t | s, h_t), for s (..., num_past) and h_t (..., H)."""
        return self.to_normal((self.past(s).tanh() + h) / (1 + self.num_nets))


class ToNormal(nn.Module):
    """N(loc(c), diag(softplus(raw(c)))^2), loc and raw linear in c."""

    def __init__(self, num_latents: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, 2 * num_latents)

    def forward(self, c: Tensor) -> TorchDistribution:
        """For c (..., hidden): batch shape (...), event shape (k,)."""
        loc, raw = self.linear(c).chunk(2, -1)
        return dist.Normal(loc, softplus(raw)).to_event(1)


class _Network(SequenceGuide):
    """Shared by the guides: h_t, the sum of the outputs of recurrent nets."""

    readers: ClassVar[tuple[type[Forward], ...]]

    def __init__(
        self,
        num_latents: int,
        num_features: int,
        hidden: int = 600,
        rnn: RNN = gru,
        dataset_size: int | None = None,
        num_inputs: int = 0,
    ) -> None:
        super().__init__(num_features, num_inputs, dataset_size)
        check_sizes(num_latents=num_latents, hidden=hidden)
        self.read_sequence = nn.ModuleList(
            reader(rnn(num_features + 1 + num_inputs, hidden)) for reader in self.readers
        )

    def features(self, data: Sequences) -> Tensor:
        """h for all steps, (..., T, H)."""
        y = step_features(data)
        return torch.stack([read(y, data.lengths) for read in self.read_sequence]).sum(0)


class _Structured(_Network):
    @renamed(size="dataset_size")
    def __init__(
        self,
        num_latents: int,
        num_features: int,
        hidden: int = 600,
        rnn: RNN = gru,
        dataset_size: int | None = None,
        loop: Loop = plain,
    ) -> None:
        super().__init__(num_latents, num_features, hidden, rnn, dataset_size)
        self.loop = loop
        self.start = nn.Parameter(torch.zeros(num_latents))
        self.combine = Combiner(num_latents, num_latents, hidden, len(self.readers))

    def infer(self, data: Sequences) -> MarkovChain:
        """q(z | x), a product over t of q(z_t | z_{t-1}, h_t): event shape (T, k)."""
        h = self.features(data)
        initial = self.combine(self.start, h[..., 0, :])
        return MarkovChain(initial, self.combine, inputs=h, mask=data.own, loop=self.loop)


class Filtering(_Structured):
    """q(z_t | z_{t-1}, x_0, ..., x_t), the paper's ST-L: the past and the present only.

    The terms of the ELBO up to step t do not change when more of x arrives.

    Args:
        num_latents: k, the size of z_t.
        num_features: D, the size of x_t.
        hidden: H, the size of a recurrent net's output at each step.
        rnn: from the size of its input and H to a recurrent net, batch first; ``nn.GRU`` by
            default. Its input is x_t, 0 where it is missing, and whether it is observed: D + 1.
        dataset_size: N, the number of all sequences, as in the model.
        loop: ``sequences.loops.compiled`` draws z faster where k and H are small, ``recomputed``
            with less memory where they are large.
    """

    readers = (Forward,)


class Smoothing(_Structured):
    """q(z_t | z_{t-1}, x_t, ..., x_{T-1}), the paper's DKS: the posterior's own structure.

    Args: as :class:`Filtering`.
    """

    readers = (Backward,)


class Bidirectional(_Structured):
    """q(z_t | z_{t-1}, x_0, ..., x_{T-1}), the paper's ST-LR. Args: as :class:`Filtering`."""

    readers = (Forward, Backward)


class MeanField(_Network):
    """q(z_t | x_0, ..., x_{T-1}), the paper's MF-LR: the steps of z are independent given x.

    Args: as :class:`Filtering`, without ``loop``, which it does not need, and
        num_inputs: U, the size of the inputs u_t of a model that has them, which the recurrent
            nets read too; 0 for none.
    """

    readers = (Forward, Backward)

    @renamed(size="dataset_size")
    def __init__(
        self,
        num_latents: int,
        num_features: int,
        hidden: int = 600,
        rnn: RNN = gru,
        dataset_size: int | None = None,
        num_inputs: int = 0,
    ) -> None:
        super().__init__(num_latents, num_features, hidden, rnn, dataset_size, num_inputs)
        self.to_normal = ToNormal(num_latents, hidden)

    def infer(self, data: Sequences) -> IndependentSteps:
        """q(z | x), a product over t of q(z_t | h_t): event shape (T, k)."""
        h = self.features(data)
        return IndependentSteps(self.to_normal(h), data.own)
