"""A mixture of Gaussians: a discrete latent that can be summed out."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor, nn

from pyproelbo._messages.renamed import renamed
from pyproelbo.models.base import NamedModule, check_last_dim, check_sizes, plate_over


class GMM(NamedModule):
    r"""p(x) = sum_k w_k N(x; loc_k, diag(scale_k)^2): weighted copies of N(0, I).

    Each copy is shifted by loc_k and stretched by scale_k; z is the index of the copy that x comes
    from. The sum over z is short, which makes evidence and posterior known. All of Pyro's methods
    of training work: sampling z in the guide, enumerating it there (``config_enumerate(guide)``),
    and summing it out in the model (``config_enumerate(model)``, with a guide that samples
    nothing), where the ELBO is the evidence itself.

    Args:
        num_components: K, the number of values of z.
        num_features: D, the size of x.
        dataset_size: N, the number of all rows, if x will be a part of them: log-densities are then
            scaled by N / B. Give the guide the same.

    Attributes:
        logits: log w_k up to a constant, (K,).
        loc: the shifts, (K, D); initially random, since equal components would stay equal.
        log_scale: the logarithms of the stretches, (K, D).
    """

    @renamed(size="dataset_size")
    def __init__(
        self, num_components: int, num_features: int, dataset_size: int | None = None
    ) -> None:
        super().__init__()
        check_sizes(num_components=num_components, num_features=num_features)
        self.num_components, self.num_features = num_components, num_features
        self.dataset_size = dataset_size
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(torch.randn(num_components, num_features))
        self.log_scale = nn.Parameter(torch.zeros(num_components, num_features))

    @property
    def weights(self) -> Tensor:
        """w_k: positive, with sum one, (K,)."""
        return self.logits.softmax(-1)

    @property
    def scale(self) -> Tensor:
        """The stretches: positive, (K, D)."""
        return self.log_scale.exp()

    def decode(self, z: Tensor) -> TorchDistribution:
        """p(x | z), for whole numbers z (...): batch shape (...), event shape (D,)."""
        return dist.Normal(self.loc[z], self.scale[z]).to_event(1)

    def forward(self, x: Tensor | None = None, num: int = 1) -> Tensor:
        """The generative program, for data x (B, D); without x it simulates ``num`` rows."""
        with plate_over(x, self.num_features, self.dataset_size, num):
            z = pyro.sample("z", dist.Categorical(logits=self.logits))
            return pyro.sample("x", self.decode(z), obs=x)

    def posterior(self, x: Tensor) -> Categorical:
        """p(z | x), for x (..., D): batch shape (...)."""
        return dist.Categorical(logits=self._log_joint(x))

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) = log sum_k w_k N(x; loc_k, diag(scale_k)^2), for x (..., D): (...)."""
        return self._log_joint(x).logsumexp(-1)

    def _log_joint(self, x: Tensor) -> Tensor:
        """log p(x, z = k) for every k, for x (..., D): (..., K)."""
        check_last_dim("x", x, self.num_features)
        copies = dist.Normal(self.loc, self.scale).to_event(1)
        return self.logits.log_softmax(-1) + copies.log_prob(x.unsqueeze(-2))
