"""Probabilistic principal component analysis: the linear VAE, with known answers."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import MultivariateNormal, TorchDistribution
from torch import Tensor, nn

from pyproelbo._messages.renamed import renamed
from pyproelbo.models.base import NamedModule, check_last_dim, check_sizes, plate_over
from pyproelbo.models.linalg import cholesky_of_inverse
from pyproelbo.priors import StandardNormal


class PPCA(NamedModule):
    r"""z ~ N(0, I), x = W z + mu + sigma eps with eps ~ N(0, I).

    The evidence and the posterior are known at any parameters, and the maximum-likelihood
    parameters for any data: a reference for an ELBO. Its optimum is that of a VAE with a linear
    decoder and one noise scale (Lucas et al. 2019, "Don't Blame the ELBO!").

    Tipping & Bishop (1999), "Probabilistic Principal Component Analysis", JRSS B 61(3).

    Args:
        num_latents: k, the size of z.
        num_features: D, the size of x.
        dataset_size: N, the number of all rows, if x will be a part of them: log-densities are then
            scaled by N / B. Give the guide the same.

    Attributes:
        W: the loadings, (D, k).
        mu: the mean of x, (D,).
        log_sigma: the logarithm of the noise scale ``sigma``, a scalar.
    """

    @renamed(size="dataset_size")
    def __init__(
        self, num_latents: int, num_features: int, dataset_size: int | None = None
    ) -> None:
        super().__init__()
        check_sizes(num_latents=num_latents, num_features=num_features)
        self.num_latents, self.num_features = num_latents, num_features
        self.dataset_size = dataset_size
        self.W = nn.Parameter(torch.randn(num_features, num_latents) / math.sqrt(num_latents))
        self.mu = nn.Parameter(torch.zeros(num_features))
        self.log_sigma = nn.Parameter(torch.zeros(()))
        self.prior = StandardNormal(num_latents)

    @classmethod
    @renamed(size="dataset_size")
    def optimum(cls, x: Tensor, num_latents: int, dataset_size: int | None = None) -> "PPCA":
        """The maximum-likelihood model for the data x (N, D), on its device, in its dtype.

        With eigenvalues l_1 >= ... >= l_D of the covariance of x (with 1/N) and U_k the
        eigenvectors of the first k: sigma^2 is the mean of the other D - k eigenvalues, and
        W = U_k (L_k - sigma^2 I)^(1/2) (Tipping & Bishop, eqs. 7 and 8, without rotation).

        Raises:
            ValueError: if x varies in no more than k directions: sigma would be zero.
        """
        if x.dim() != 2 or not 1 <= num_latents < min(x.shape):
            raise ValueError(
                f"num_latents={num_latents} should be at least 1 and less than both sizes of x "
                f"(N, D), got {tuple(x.shape)}"
            )
        model = cls(num_latents, x.shape[-1], dataset_size).to(x)
        with torch.no_grad():
            mu = x.mean(0)
            eigenvalues, eigenvectors = torch.linalg.eigh((x - mu).mT @ (x - mu) / len(x))
            variance = eigenvalues[:-num_latents].mean()
            if variance <= eigenvalues[-1] * torch.finfo(x.dtype).eps:
                raise ValueError(
                    f"x varies in no more than num_latents={num_latents} directions, and the "
                    "likelihood has no maximum: take fewer latents"
                )
            signal = (eigenvalues[-num_latents:] - variance).clamp(min=0).sqrt()
            model.W.copy_((eigenvectors[:, -num_latents:] * signal).flip(-1))
            model.mu.copy_(mu)
            model.log_sigma.copy_(variance.log() / 2)
        return model

    @property
    def sigma(self) -> Tensor:
        """The noise scale: a positive scalar."""
        return self.log_sigma.exp()

    def decode(self, z: Tensor) -> TorchDistribution:
        """p(x | z), for z (..., k): batch shape (...), event shape (D,)."""
        check_last_dim("z", z, self.num_latents)
        return dist.Normal(z @ self.W.mT + self.mu, self.sigma).to_event(1)

    def forward(self, x: Tensor | None = None, num: int = 1) -> Tensor:
        """The generative program, for data x (B, D); without x it simulates ``num`` rows."""
        with plate_over(x, self.num_features, self.dataset_size, num):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z), obs=x)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        r"""p(z | x) = N(M^-1 W^T (x - mu), sigma^2 M^-1) with M = W^T W + sigma^2 I.

        Args:
            x: (..., D).

        Returns:
            A distribution of batch shape (...) and event shape (k,).
        """
        check_last_dim("x", x, self.num_features)
        M = self.W.mT @ self.W + torch.diag_embed(self.sigma.square().expand(self.num_latents))
        T = cholesky_of_inverse(M)
        loc = (x - self.mu) @ self.W @ T @ T.mT
        return dist.MultivariateNormal(loc, scale_tril=self.sigma * T)

    def log_evidence(self, x: Tensor) -> Tensor:
        r"""log p(x) = log N(x; mu, W W^T + sigma^2 I), for x (..., D): (...).

        By Bayes' rule, which holds at any z: log p(x | z) + log p(z) - log p(z | x), here at the
        mean of the posterior. No D x D matrix is formed.
        """
        q = self.posterior(x)
        z = q.mean
        return self.decode(z).log_prob(x) + self.prior().log_prob(z) - q.log_prob(z)
