"""The ELBO, with the parts of its KL beside it."""

from collections.abc import Iterator, Sequence
from typing import Unpack

import torch
from torch import Tensor

from pyproelbo._terms.collect import KL
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import Program
from pyproelbo.elbo.aggregated import AggregatedELBO
from pyproelbo.elbo.minibatch import Estimator, mean_of
from pyproelbo.elbo.options import Options


class SurgeryELBO(AggregatedELBO):
    r"""L = E_q[log p(x | z)] - KL(q(z | x) || p(z)), as ``BetaELBO(1.0)``, watched in training.

    After each training step ``last_surgery`` has the parts of the KL per datum (Hoffman &
    Johnson 2016, "ELBO surgery"), with the aggregate posterior q(z), the
    mean of q(z | x_n) over all data:

        average KL = mutual information + marginal KL
                   = mutual information + total correlation + dimension-wise KL.

    They are estimates from the minibatch, whose errors :mod:`pyproelbo.elbo.minibatch` describes:
    the mutual information is too high, and at most log N. ``pyproelbo.surgery`` estimates the parts
    from the whole data.

    Where the guide draws one of the latents given another, q(z1 | x, z2), their joint parts need
    log q(z1, z2 | x) for the z of each datum at the x of every other: the guide runs for B^2 pairs
    in each step, without a gradient. It should then broadcast as for vectorised particles.

    >>> objective = SurgeryELBO(dataset_size=60_000)

    Args:
        dataset_size: N, the number of all data. None takes it from the plate over the data: the
            full size of a plate that subsamples; otherwise the batch is taken for the whole.
        site: a latent, or several, whose joint q(z) is taken; None takes all.
        plate: the plate over the data, to be named where the latents share several. The dims of all
            other plates are dimensions of z.
        estimator: "stratified" or "weighted", as in :mod:`pyproelbo.elbo.minibatch`.
        kl: as in :class:`TermsELBO`; the average KL of ``last_surgery`` is always sampled.
        **kwargs: as in :class:`TermsELBO`.

    Raises:
        ValueError: as for :class:`~pyproelbo.elbo.aggregated.AggregatedELBO`.
    """

    needs_marginals = False

    def __init__(
        self,
        dataset_size: int | None,
        *,
        site: str | Sequence[str] | None = None,
        plate: str | None = None,
        estimator: Estimator = "stratified",
        kl: KL = "auto",
        **kwargs: Unpack[Options],
    ) -> None:
        super().__init__(dataset_size, site, plate, estimator, kl, **kwargs)

    def objective(self, terms: Terms) -> Tensor:
        """E_q[log p(x | z)] - KL(q(z | x) || p(z)): the ELBO, whatever the surgery finds."""
        return terms.data_fit - terms.shrinkage

    def _particles(
        self, model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> Iterator[Terms]:
        surgeries = []
        for terms in super()._particles(model, guide, args, kwargs):
            if torch.is_grad_enabled():
                with torch.no_grad():
                    surgeries.append(self.surgery(terms, guide, *args, **kwargs))
                self.records["surgery"] = mean_of(surgeries)
            yield terms
