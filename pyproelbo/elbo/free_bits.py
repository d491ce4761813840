"""The ELBO with free bits."""

from typing import Unpack

import torch
from torch import Tensor

from pyproelbo._terms.collect import KL
from pyproelbo._terms.terms import Terms
from pyproelbo.elbo.base import TermsELBO
from pyproelbo.elbo.options import Options
from pyproelbo.elbo.per_site import PerSite, SiteWeights


class FreeBitsELBO(TermsELBO):
    r"""L = E_q[log p(x | z)] - sum_z N_z max(lambda_z, KL_z / N_z), KL_z summed over N_z data.

    The first lambda nats (despite the name) of each latent site cost nothing: below them the KL has
    no gradient, and a site is not pressed to its prior before the decoder has learned to use it
    (Kingma et al. 2016, eq. 15, with sites for the paper's groups of latents). The mean over the
    data, N_z = ``terms.counts[z]``, is inside the maximum, as in the paper.

    >>> objective = FreeBitsELBO(free_bits=2.0)

    Args:
        free_bits: lambda in nats per datum, a number, a schedule, or a mapping from the names
            of latent sites to either; a site that a mapping does not name has none free.
        kl: "auto", "analytic" or "sampled", as in :class:`TermsELBO`.
        **kwargs: as in :class:`TermsELBO`.

    Raises:
        ValueError: as for :class:`BetaELBO`.
    """

    def __init__(self, free_bits: PerSite, kl: KL = "auto", **kwargs: Unpack[Options]) -> None:
        weights = SiteWeights("free_bits", free_bits, default=0.0)
        super().__init__(kl=kl, schedules=weights.schedules, **kwargs)
        self.free_bits = weights

    def objective(self, terms: Terms) -> Tensor:
        """E_q[log p(x | z)] - sum_z max(N_z lambda_z, KL_z); KL_z itself where lambda_z is 0."""
        free, label = self.weights(terms), self.free_bits.labels(terms)
        missing = []
        for site, kl in terms.kl.items():
            floor = free[label[site]] * terms.counts[site]
            # an estimate may be below 0 by chance: without free bits it counts as it is
            missing.append((floor > 0) * torch.relu(floor - terms.mean([kl])))
        return terms.data_fit - terms.shrinkage - sum(missing)
