"""Guides of the variational recurrent network: structured ones share its memory of z."""

from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyproelbo._backend.unregistered import Unregistered
from pyproelbo.guides import dmm
from pyproelbo.guides.dmm import RNN, Combiner, gru
from pyproelbo.guides.sequences import Backward, Forward, SequenceGuide, step_features
from pyproelbo.models.base import check_sizes
from pyproelbo.models.sequences import Sequences
from pyproelbo.models.vrnn import VRNN
from pyproelbo.sequences import Autoregressive
from pyproelbo.sequences.loops import Loop, plain


class Filtering(SequenceGuide):
    """q(z_t | s_t, x_0, ..., x_t), where s_t is the model's memory of z_0, ..., z_{t-1}.

    It uses only the past and the present: the terms of the ELBO up to step t do not change when
    more of x arrives. The recurrence is the model's own: its parameters are only in the model's
    ``parameters()`` and ``state_dict()``. Copy model and guide in one call to keep them together.

    Args:
        model: the VRNN. Its ``dataset_size`` is used.
        hidden: the size of the output, at each step, of the recurrent net that reads x.
        rnn: from the size of its input and ``hidden`` to that net, batch first; ``nn.GRU`` by
            default. Its input is x_t, 0 where it is missing, whether it is observed, and u_t.
        loop: ``sequences.loops.compiled`` draws z faster where the nets are small.
    """

    reader: ClassVar[type[Forward]] = Forward

    def __init__(self, model: VRNN, hidden: int = 64, rnn: RNN = gru, loop: Loop = plain) -> None:
        super().__init__(model.num_features, model.num_inputs, model.dataset_size)
        check_sizes(hidden=hidden)
        self.loop = loop
        self._model = Unregistered(model)
        self.hidden = hidden
        self.read_sequence = self.reader(rnn(model.num_features + 1 + model.num_inputs, hidden))
        self.combine = Combiner(len(model.start), model.num_latents, hidden)

    @property
    def model(self) -> VRNN:
        """The model whose memory this shares."""
        return self._model.module

    def infer(self, data: Sequences) -> Autoregressive:
        """q(z | x), a product over t of q(z_t | s_t, h_t): event shape (T, k)."""
        h = self.read_sequence(step_features(data), data.lengths)
        if data.inputs is not None:
            h = torch.cat([h, data.inputs], -1)
        combine, cell, H = self.combine, self.model.cell, self.hidden

        def step(s: Tensor, h: Tensor) -> TorchDistribution:
            return combine(s, h[..., :H])

        def advance(s: Tensor, z: Tensor, h: Tensor) -> Tensor:
            return cell(torch.cat([z, h[..., H:]], -1), s)

        start = self.model.start
        return Autoregressive(start, step, advance, inputs=h, mask=data.own, loop=self.loop)


class Smoothing(Filtering):
    """q(z_t | s_t, x_t, ..., x_{T-1}): the future too. Args: as :class:`Filtering`."""

    reader = Backward


class MeanField(dmm.MeanField):
    """q(z_t | x_0, ..., x_{T-1}): the steps of z are independent given x.

    It takes only the sizes from the model. Args: as :class:`Filtering`, without ``loop``.
    """

    def __init__(self, model: VRNN, hidden: int = 64, rnn: RNN = gru) -> None:
        sizes = model.num_latents, model.num_features
        super().__init__(*sizes, hidden, rnn, model.dataset_size, model.num_inputs)
