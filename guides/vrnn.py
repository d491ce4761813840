"""Guides of the variational recurrent network: they remember z as the model does."""

from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyproelbo.guides.dmm import RNN, Combiner, gru
from pyproelbo.guides.dmm import MeanField as MeanField
from pyproelbo.guides.sequences import Backward, Forward, SequenceGuide, step_features
from pyproelbo.models.base import check_sizes
from pyproelbo.models.vrnn import VRNN
from pyproelbo.sequences import Autoregressive


class Filtering(SequenceGuide):
    """q(z_t | s_t, x_0, ..., x_t), where s_t is the model's memory of z_0, ..., z_{t-1}.

    It has the past and the present only: its bound of log p(x_0, ..., x_t) holds for every t.
    The recurrence is the model's own: its parameters are in the model's ``parameters()`` and
    ``state_dict()`` only. Copy model and guide in one call to keep them together.

    Args:
        model: the VRNN. Its ``size`` is taken as it is.
        hidden: the size of the net that reads x.
        rnn: from the sizes of its input and of ``hidden`` to that net, batch first; ``nn.GRU``
            by default.
    """

    reader: ClassVar[type[Forward]] = Forward

    def __init__(self, model: VRNN, hidden: int = 64, rnn: RNN = gru) -> None:
        super().__init__(model.num_features, model.num_inputs, model.size)
        check_sizes(hidden=hidden)
        self._model = (model,)  # in a tuple nn.Module does not see it
        self.hidden = hidden
        self.read_sequence = self.reader(rnn(model.num_features + 1 + model.num_inputs, hidden))
        self.combine = Combiner(len(model.start), model.num_latents, hidden)

    @property
    def model(self) -> VRNN:
        """The model whose memory this shares."""
        return self._model[0]

    def posterior(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> Autoregressive:
        data = self.read(x, lengths, observed, inputs)
        h = self.read_sequence(step_features(data), lengths)
        if data.inputs is not None:
            h = torch.cat([h, data.inputs], -1)
        return Autoregressive(self.model.start, self._step, self._advance, inputs=h, mask=data.own)

    def _step(self, s: Tensor, h: Tensor) -> TorchDistribution:
        return self.combine(s, h[..., : self.hidden])

    def _advance(self, s: Tensor, z: Tensor, h: Tensor) -> Tensor:
        u = [h[..., self.hidden :]] if self.num_inputs else []
        return self.model.advance(s, z, *u)


class Smoothing(Filtering):
    """q(z_t | s_t, x_t, ..., x_{T-1}): the future too. Args: as :class:`Filtering`."""

    reader = Backward
