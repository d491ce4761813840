"""The variational recurrent network: a state space model whose prior depends on all the past."""

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyproelbo._messages.renamed import renamed
from pyproelbo.models.base import check_last_dim, check_sizes
from pyproelbo.models.nets import mlp
from pyproelbo.models.sequences import SequenceProgram
from pyproelbo.models.vae import GaussianLikelihood
from pyproelbo.sequences import Autoregressive, Emission


class VRNN(SequenceProgram):
    r"""z_t ~ p(z | s_t, u_t), x_t ~ p(x | z_t, s_t, u_t), s_{t+1} = GRU(s_t, [z_t, u_t]).

    Both densities, p(z_t | z_0, ..., z_{t-1}, u) and p(x_t | z_0, ..., z_t, u), depend on the whole
    past, and on the inputs u_1, ..., u_t: an action, say, that leads from step t-1 to t. The models
    in deep variational reinforcement learning (Igl et al. 2018) and MERLIN (Wayne et al. 2018) have
    this structure. u_0 is not used, as nothing precedes z_0.

    The model of Chung et al. (2015), "A Recurrent Latent Variable Model for Sequential Data",
    section 3, also depends on past x. For that, give x_{t-1} as the inputs u_t.

    Args:
        num_latents: k, the size of z_t.
        num_features: D, the size of x_t.
        state: H, the size of s_t.
        hidden: the widths of the hidden layers of the prior's and the emission's net.
        num_inputs: U, the size of the inputs u_t; 0 for none.
        likelihood: from the emission net's output (..., D) to a distribution of event shape (D,); a
            Gaussian of learned scale by default.
        dataset_size: N, the number of all sequences, if x will be a part of them: log-densities are
            then scaled by N / B. Give the guide the same.
    """

    @renamed(size="dataset_size")
    def __init__(
        self,
        num_latents: int,
        num_features: int,
        state: int = 64,
        hidden: Sequence[int] = (64,),
        num_inputs: int = 0,
        likelihood: Callable[[Tensor], TorchDistribution] | None = None,
        dataset_size: int | None = None,
    ) -> None:
        super().__init__(num_features, num_inputs, dataset_size)
        check_sizes(num_latents=num_latents, state=state)
        self.num_latents = num_latents
        self.start = nn.Parameter(torch.zeros(state))
        self.cell = nn.GRUCell(num_latents + num_inputs, state)
        self.prior_net = mlp(state + num_inputs, hidden, 2 * num_latents)
        self.emission = mlp(num_latents + state + num_inputs, hidden, num_features)
        self.likelihood = GaussianLikelihood() if likelihood is None else likelihood

    def step(self, s: Tensor, *u: Tensor) -> TorchDistribution:
        """p(z_t | s_t, u_t), for s_t (..., H) and u_t (..., U)."""
        loc, raw = self.prior_net(torch.cat([s, *u], -1)).chunk(2, -1)
        return dist.Normal(loc, softplus(raw)).to_event(1)

    def advance(self, s: Tensor, z: Tensor, *u: Tensor) -> Tensor:
        """s_{t+1}, for s_t (B, H), z_t (B, k) and u_t (B, U)."""
        return self.cell(torch.cat([z, *u], -1), s)

    def decode(self, z: Tensor, s: Tensor, *u: Tensor) -> TorchDistribution:
        """p(x_t | z_t, s_t, u_t), for z_t (..., k), s_t (..., H) and u_t (..., U)."""
        check_last_dim("z", z, self.num_latents)
        return self.likelihood(self.emission(torch.cat([z, s, *u], -1)))

    def prior(
        self, num_steps: int, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> Autoregressive:
        """p(z_0, ..., z_{T-1}), for inputs (..., T, U) and a mask (..., T) of steps that count."""
        return Autoregressive(self.start, self.step, self.advance, num_steps, inputs, mask)

    def forward(
        self,
        x: Tensor | None = None,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
        num: int = 1,
        num_steps: int | None = None,
    ) -> Tensor:
        """The generative program, for data x (B, T, D).

        Without x it simulates: a sequence for each of the inputs (B, T, U), or ``num`` sequences
        of ``num_steps`` steps.
        """
        data = self.read(x, lengths, observed, inputs, num, num_steps)
        prior = self.prior(data.shape[-1], data.inputs, data.own)
        with self.plate_over(x, data.shape[0]):
            z = pyro.sample("z", prior)
            emission = Emission(self.decode, z, prior, data.inputs, data.observed)
            return pyro.sample("x", emission, obs=x)
