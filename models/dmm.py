"""The deep Markov model."""

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
from pyproelbo.models.vae import BernoulliLikelihood
from pyproelbo.sequences import Emission, MarkovChain


class GatedTransition(nn.Module):
    r"""p(z_t | z_{t-1}) = N((1 - g) (W z + b) + g h, diag(scale)^2), z = z_{t-1}.

    The gate g(z) in (0, 1) chooses for each dimension between a linear step and a non-linear
    one, h(z); scale = softplus(A relu(h(z)) + a). W starts as the identity.

    Krishnan, Shalit & Sontag (2017), "Structured Inference Networks for Nonlinear State Space
    Models", section 5, where softplus gives the variance.

    Args:
        num_latents: k, the size of z_t.
        hidden: the width of the hidden layers of g and of h.
    """

    def __init__(self, num_latents: int, hidden: int) -> None:
        super().__init__()
        self.gate = mlp(num_latents, (hidden,), num_latents, nn.ReLU)
        self.proposal = mlp(num_latents, (hidden,), num_latents, nn.ReLU)
        self.linear = nn.Linear(num_latents, num_latents)
        self.raw_scale = nn.Linear(num_latents, num_latents)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> TorchDistribution:
        """p(z_t | z_{t-1}), for z_{t-1} (..., k): batch shape (...), event shape (k,)."""
        h = self.proposal(z)
        loc = torch.lerp(self.linear(z), h, self.gate(z).sigmoid())
        return dist.Normal(loc, softplus(self.raw_scale(h.relu()))).to_event(1)


class DMM(SequenceProgram):
    r"""z_0 ~ p(z | start), z_t ~ p(z | z_{t-1}), x_t ~ p(x | f(z_t)) with neural networks.

    The Gaussian state space model of Krishnan, Shalit & Sontag (2017), "Structured Inference
    Networks for Nonlinear State Space Models": a gated transition and an emission net. Its density
    needs no loop over time.

    Args:
        num_latents: k, the size of z_t.
        num_features: D, the size of x_t.
        hidden: the widths of the emission net's hidden layers.
        transition: the width of the transition's hidden layers.
        likelihood: from the emission net's output (..., D) to a distribution of event shape (D,);
            Bernoulli by default.
        dataset_size: N, the number of all sequences, if x will be a part of them: log-densities are
            then scaled by N / B. Give the guide the same.
    """

    @renamed(size="dataset_size")
    def __init__(
        self,
        num_latents: int,
        num_features: int,
        hidden: Sequence[int] = (100, 100),
        transition: int = 200,
        likelihood: Callable[[Tensor], TorchDistribution] | None = None,
        dataset_size: int | None = None,
    ) -> None:
        super().__init__(num_features, dataset_size=dataset_size)
        check_sizes(num_latents=num_latents)
        self.num_latents = num_latents
        self.start = nn.Parameter(torch.zeros(num_latents))
        self.transition = GatedTransition(num_latents, transition)
        self.emission = mlp(num_latents, hidden, num_features, nn.ReLU)
        self.likelihood = BernoulliLikelihood() if likelihood is None else likelihood

    def decode(self, z: Tensor) -> TorchDistribution:
        """p(x_t | z_t), for z (..., k): batch shape (...), event shape (D,)."""
        check_last_dim("z", z, self.num_latents)
        return self.likelihood(self.emission(z))

    def prior(self, num_steps: int, mask: Tensor | None = None) -> MarkovChain:
        """p(z_0, ..., z_{T-1}), for a mask (..., T) of the steps that count."""
        return MarkovChain(self.transition(self.start), self.transition, num_steps, mask=mask)

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

        Without x it simulates ``num`` sequences of ``num_steps`` steps.
        """
        data = self.read(x, lengths, observed, inputs, num, num_steps)
        with self.plate_over(x, data.shape[0]):
            z = pyro.sample("z", self.prior(data.shape[-1], data.own))
            return pyro.sample("x", Emission(self.decode, z, mask=data.observed), obs=x)
