"""The ELBO with a controlled capacity."""

from typing import Unpack

from torch import Tensor

from pyproelbo._terms.terms import Terms
from pyproelbo.elbo.base import TermsELBO
from pyproelbo.elbo.options import KLOptions
from pyproelbo.schedules import Schedule


class CapacityELBO(TermsELBO):
    r"""L = E_q[log p(x | z)] - gamma N |KL / N - C|, with KL summed over sites and over N data.

    The KL per datum is held at the capacity C, in nats. C rising slowly from 0 lets the latents
    take up one factor of variation after another (Burgess et al. 2018, eq. 8). gamma, large
    compared with 1 (1000 in the paper), is the strength with which C is held. C fixes the KL, not
    the information in z: with a large gamma the marginal KL, KL(q(z) || p(z)) of the aggregate
    posterior, may meet C in place of the mutual information I(n; z). With C = 12 on binarised
    digits (log N = 7.3), I(n; z) was 7.1 nats with gamma = 10, 4.0 with 100 and 3.0 with 1000.
    Check with :func:`~pyproelbo.surgery`, and take a smaller gamma if necessary.

    N is ``terms.num_data``, the rows of the plate over the data (with subsampling: of all the
    data), whatever plates are nested in it; 1 where all latents are global.

    >>> from pyproelbo.schedules import Linear
    >>> objective = CapacityELBO(capacity=Linear(0.0, 25.0, steps=10_000), gamma=1000.0)

    Args:
        capacity: C in nats per datum, a number or a schedule, not negative.
        gamma: a number or a schedule, not negative.
        **kwargs: as in :class:`TermsELBO`.

    Raises:
        ValueError: for a constant that is negative.
    """

    def __init__(
        self,
        capacity: float | Schedule,
        gamma: float | Schedule = 1000.0,
        **kwargs: Unpack[KLOptions],
    ) -> None:
        super().__init__(schedules={"capacity": capacity, "gamma": gamma}, **kwargs)

    def objective(self, terms: Terms) -> Tensor:
        """E_q[log p(x | z)] - gamma |KL - N C|, which is gamma N |KL / N - C|."""
        weights = self.weights(terms)
        excess = terms.shrinkage - weights["capacity"] * terms.num_data
        return terms.data_fit - weights["gamma"] * excess.abs()
