"""Reweighted wake-sleep."""

from typing import Literal, Unpack, get_args

from torch import Tensor

from pyproelbo._terms.log_weights import log_mean_exp
from pyproelbo.elbo.options import DrawsOptions
from pyproelbo.elbo.weighted import (
    WeightedDraws,
    WeightedELBO,
    through_draws,
    weighted,
)

Gradient = Literal["standard", "doubly_reparameterised"]


class ReweightedWakeSleepELBO(WeightedELBO):
    r"""Fit the model by the importance-weighted bound, the guide by KL(p(z | x) || q(z | x)).

    The value is the bound of :class:`~pyproelbo.ImportanceWeightedELBO`; so is the gradient for the
    model's parameters theta. The guide's parameters phi descend the inclusive KL of the posterior,
    which spreads q over all of it, where the ELBO's KL(q || p) ignores what q does not reach. With
    the normalised weights v_nk = w_nk / sum_j w_nj of each datum and the draws z_nk from q as
    constants, the step ascends

        sum_n N/B sum_k v_nk (log p(x_n, z_nk; theta) + log q(z_nk | x_n; phi)),

    the wake phases of reweighted wake-sleep (Bornschein & Bengio 2015; Le et al. 2019, "Revisiting
    Reweighted Wake-Sleep for Models with Stochastic Control Flow"), without the sleep phase. No
    gradient goes through a draw: discrete latents need no more than continuous ones. The weights of
    a few draws understate the spread of the posterior: the gradient for phi has a bias that falls
    as 1 / K.

    Args:
        num_particles: K, at least 2.
        gradient: for phi. "standard" is the above. "doubly_reparameterised" has the same mean, and
            is zero at every draw where q is the posterior: sum_k (v_k - v_k^2) (d log w_k / dz_k)
            (dz_k / d phi), for draws that are differentiable functions of phi (Tucker et al. 2019,
            "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives").
        plate, **kwargs: as in :class:`~pyproelbo.ImportanceWeightedELBO`.

    Raises:
        ValueError: for fewer particles, and as for :class:`~pyproelbo.ImportanceWeightedELBO`.
    """

    def __init__(
        self,
        num_particles: int,
        gradient: Gradient = "standard",
        plate: str | None = None,
        **kwargs: Unpack[DrawsOptions],
    ) -> None:
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient should be one of {get_args(Gradient)}, got {gradient!r}")
        if num_particles < 2:
            raise ValueError(
                f"num_particles should be at least 2, got {num_particles}: the normalised weight "
                "of a single draw is always 1"
            )
        draws = "constants" if gradient == "standard" else "variables"
        super().__init__(num_particles, plate, draws, **kwargs)
        self.gradient: Gradient = gradient

    def bound(self, log_weight: Tensor) -> Tensor:
        """log (1/K) sum_k w_k, the importance-weighted bound."""
        return log_mean_exp(log_weight)

    def surrogate(self, log: WeightedDraws) -> Tensor:
        """sum_k v_k (log p(x, z_k) + log q(z_k | x)), with the normalised weights v_k constant."""
        v = log.weight.detach().softmax(0)
        if self.gradient == "standard":
            return weighted(v, log.target) + weighted(v, log.proposal)
        return through_draws(log, v, along=v - v.square())
