"""The variational Renyi bound."""

from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from pyproelbo._terms.log_weights import log_mean_exp
from pyproelbo.elbo.options import DrawsOptions
from pyproelbo.elbo.weighted import WeightedDraws, WeightedELBO, through_draws

Gradient = Literal["standard", "path", "doubly_reparameterised"]


class RenyiELBO(WeightedELBO):
    r"""L = sum_n N/B 1/(1 - alpha) log (1/K) sum_k w_nk^(1 - alpha), w = p(x, z) / q(z | x).

    Li & Turner (2016), "Renyi Divergence Variational Inference", section 4. alpha = 0 is the
    importance-weighted bound (:class:`~pyproelbo.ImportanceWeightedELBO`, which describes plates
    and gradients), alpha -> 1 the ELBO. As K grows, L tends to log p(x) minus the Renyi divergence
    of order alpha of q from p(z | x). At the same draws L falls as alpha rises: for alpha >= 0 it
    is at most log p(x) on average, whatever K; for alpha < 0 it lies above for large K.

    With normalised weights v_k, proportional to w_k^(1 - alpha), the factor of (d log w_k / dz) (dz
    / d phi) is alpha v_k + (1 - alpha) v_k^2 for "doubly_reparameterised", and v_k for "path".

    Args:
        alpha: any finite number; 1 is the limit, the ELBO.
        num_particles: K.
        gradient, plate, **kwargs: as in :class:`~pyproelbo.ImportanceWeightedELBO`.

    Raises:
        ValueError: as for :class:`~pyproelbo.ImportanceWeightedELBO`.
    """

    def __init__(
        self,
        alpha: float,
        num_particles: int,
        gradient: Gradient = "standard",
        plate: str | None = None,
        **kwargs: Unpack[DrawsOptions],
    ) -> None:
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient should be one of {get_args(Gradient)}, got {gradient!r}")
        if not abs(alpha) < float("inf"):
            raise ValueError(f"alpha should be a finite number, got {alpha}")
        draws = "functions" if gradient == "standard" else "variables"
        super().__init__(num_particles, plate, draws, **kwargs)
        self.alpha = alpha
        self.gradient: Gradient = gradient

    def bound(self, log_weight: Tensor) -> Tensor:
        """1/(1 - alpha) log (1/K) sum_k w_k^(1 - alpha); at alpha = 1 the mean of log w_k."""
        if self.alpha == 1:
            return log_weight.mean(0)
        power = 1 - self.alpha
        return log_mean_exp(power * log_weight) / power

    def surrogate(self, log: WeightedDraws) -> Tensor:
        """The bound plus score times advantage for "standard"; else :func:`through_draws`."""
        if self.gradient == "standard":
            value = self.bound(log.weight).sum()
            if log.score is not None:
                value = value + (self._advantage(log.weight.detach()) * log.score).sum()
            return value
        v = ((1 - self.alpha) * log.weight.detach()).softmax(0)
        if self.gradient == "path":
            return through_draws(log, v, along=v)
        return through_draws(log, v, along=self.alpha * v + (1 - self.alpha) * v.square())

    def _advantage(self, log_weight: Tensor) -> Tensor:
        """What each draw adds to the bound, (K, B), compared with a draw like the others.

        The weight that replaces a draw's own, the geometric mean of the others, does not depend on
        it. The score times this advantage therefore has no bias (Mnih & Rezende 2016, "Variational
        Inference for Monte Carlo Objectives").
        """
        K = len(log_weight)
        if K == 1:
            return self.bound(log_weight).unsqueeze(0)
        own = torch.eye(K, dtype=torch.bool, device=log_weight.device).unsqueeze(-1)
        others = torch.where(own, 0.0, log_weight.unsqueeze(1))
        without = torch.where(own, others.sum(0) / (K - 1), others)
        return self.bound(log_weight) - self.bound(without)
