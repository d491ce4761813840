"""Shared by guides of sequences: q(z_0, ..., z_{T-1} | x), and features of x for it."""

from typing import Any, Protocol

import pyro
import torch
from torch import Tensor, nn

from pyproelbo._backend.unregistered import Unregistered
from pyproelbo.models.base import dataset_size_of
from pyproelbo.models.sequences import SequenceProgram, Sequences
from pyproelbo.sequences import SequenceDistribution, opaque
from pyproelbo.sequences.linear import linear_scan


class SequenceGuide(SequenceProgram):
    """A guide that samples z from ``posterior(x, ...)``; a subclass defines ``infer``.

    Args:
        num_features: D, the size of x_t.
        num_inputs: U, the size of the inputs u_t; 0 for none.
        dataset_size: N, the number of all sequences, as in the model.
    """

    def posterior(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> SequenceDistribution:
        """q(z | x), for x (..., T, D): batch shape (...), event shape (T, k)."""
        return self.infer(self.read(x, lengths, observed, inputs))

    def infer(self, data: Sequences) -> SequenceDistribution:
        """q(z | x), from the arguments read."""
        raise NotImplementedError(f"{type(self).__name__} should define infer(data)")

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """The guide's program, for data x (B, T, D)."""
        with self.plate_over(x):
            return pyro.sample("z", self.posterior(x, lengths, observed, inputs))


class Solved(Protocol):
    """A model of sequences whose posterior is known."""

    num_features: int
    num_inputs: int
    dataset_size: int | None

    def posterior(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> SequenceDistribution:
        """p(z | x), for x (..., T, D): batch shape (...), event shape (T, k)."""
        ...


class Exact(SequenceGuide):
    r"""q(z | x) = p(z | x) of a model, at the model's current parameters.

    The ELBO is then the evidence, for every single sample:

        sum_t [log p(x_t | z_t) + log p(z_t | z_{t-1}) - log q(z_t | z_{t-1})] = log p(x).

    This holds only for the whole sum. Neither a single term nor its mean is log p(x_t | x_0, ...,
    x_{t-1}): the sum up to step tau is on average below log p(x_0, ..., x_tau) by the information
    of the future of x about the latents so far, KL(p(z_0, ..., z_tau | x) || p(z_0, ..., z_tau |
    x_0, ..., x_tau)).

    The guide has no parameters: those of the model are only in the model's ``parameters()`` and
    ``state_dict()``. A deep copy of the guide alone has its own copy of the model; copy both in one
    call to keep them together.

    Args:
        model: a model with ``posterior(x, lengths, observed, inputs)``. Its ``dataset_size`` is
            used.
    """

    def __init__(self, model: Solved) -> None:
        super().__init__(model.num_features, model.num_inputs, dataset_size_of(model))
        self._model = Unregistered(model)

    @property
    def model(self) -> Any:
        """The model whose posterior this is."""
        return self._model.module

    def posterior(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> SequenceDistribution:
        """p(z | x) of the model, for x (..., T, D): batch shape (...), event shape (T, k)."""
        return self.model.posterior(x, lengths, observed, inputs)


def step_features(data: Sequences) -> Tensor:
    """The features of each step, (..., T, D + 1 + U): x_t, whether it is observed, and u_t.

    All are 0 in padding; x_t is 0 where it is missing.
    """
    there = data.x.new_ones(data.shape) if data.observed is None else data.observed.to(data.x)
    parts = [data.x, there.unsqueeze(-1)] + ([] if data.inputs is None else [data.inputs])
    return torch.cat(parts, -1)


def reverse(y: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The steps of each sequence in reverse order; its padding stays in place.

    Args:
        y: (..., T, n).
        lengths: whole numbers (...); all steps if None.
    """
    if lengths is None:
        return y.flip(-2)
    t, n = torch.arange(y.shape[-2], device=y.device), lengths.unsqueeze(-1)
    t = torch.where(t < n, n - 1 - t, t)
    return y.gather(-2, t.unsqueeze(-1).expand_as(y))


class Forward(nn.Module):
    """h_t, a recurrent net's output after steps 0, ..., t: (..., T, n) -> (..., T, H).

    Args:
        rnn: from (B, T, n) to (B, T, H) and anything: ``nn.GRU(n, H, batch_first=True)``, or
            a :class:`LinearRNN`.
    """

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, y: Tensor, lengths: Tensor | None = None) -> Tensor:
        """h (..., T, H), for y (..., T, n); lengths have no effect, as padding comes last."""
        (h,) = opaque(lambda y: self.rnn(y)[:1], y.reshape(-1, *y.shape[-2:]))
        return h.unflatten(0, y.shape[:-2]) if y.dim() > 2 else h.squeeze(0)


class Backward(Forward):
    """h_t, a recurrent net's output after steps T-1, ..., t: (..., T, n) -> (..., T, H).

    It starts at the last step of each sequence, not in its padding. Args: as :class:`Forward`.
    """

    def forward(self, y: Tensor, lengths: Tensor | None = None) -> Tensor:
        """h (..., T, H), for y (..., T, n) and lengths (...), all steps if None."""
        return reverse(super().forward(reverse(y, lengths)), lengths)


class LinearRNN(nn.Module):
    """h_t = M h_{t-1} + C y_t from h_{-1} = 0, like ``nn.RNN`` without tanh and biases.

    The filters and smoothers of linear-Gaussian models have this form in the steady state.

    Args:
        num_inputs: n, the size of y_t.
        num_hidden: H, the size of h_t.
    """

    def __init__(self, num_inputs: int, num_hidden: int) -> None:
        super().__init__()
        self.C = nn.Parameter(torch.randn(num_hidden, num_inputs) / num_inputs**0.5)
        self.M = nn.Parameter(0.5 * torch.eye(num_hidden))

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """For y (..., T, n): all h (..., T, H), and the last (..., H)."""
        h = linear_scan(self.M, y @ self.C.mT)
        return h, h[..., -1, :]
