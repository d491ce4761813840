"""What each dimension of a latent holds."""

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence


def kl_per_dim(posterior: Distribution, prior: Normal | None = None) -> Tensor:
    r"""(1/N) sum_n KL(q(z_d | x_n) || p(z_d)) of each dimension d, in nats: (D,).

    They sum to the KL per datum, when the dimensions are independent in q and in p.

    Args:
        posterior: q(z | x_n), batch shape (N,): ``Normal(loc, scale).to_event(1)``, loc (N, D).
        prior: of each dimension, N(0, 1) by default; its batch shape broadcasts with (N, D).

    Raises:
        ValueError: for another posterior, whose KL is no sum over dimensions.
    """
    base = posterior.base_dist if isinstance(posterior, Independent) else None
    if not isinstance(base, Normal) or base.loc.dim() != 2:
        raise ValueError(
            "posterior should be Normal(loc, scale).to_event(1) with loc (N, D), got "
            f"{posterior}: the KL of another is no sum over dimensions"
        )
    if prior is None:
        prior = Normal(torch.zeros_like(base.loc[0]), torch.ones_like(base.loc[0]))
    return kl_divergence(base, prior).mean(0)
