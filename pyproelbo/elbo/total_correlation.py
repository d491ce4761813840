"""The ELBO with a weight for each part of its KL."""

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from pyproelbo._terms.collect import KL
from pyproelbo._terms.terms import Terms
from pyproelbo.elbo.aggregated import AggregatedELBO
from pyproelbo.elbo.minibatch import Estimator, MinibatchSurgery, mean_of
from pyproelbo.elbo.options import Options
from pyproelbo.schedules import Schedule


class TotalCorrelationELBO(AggregatedELBO):
    r"""L = E_q[log p(x | z)] - alpha I(x; z) - beta TC(z) - gamma sum_d KL(q(z_d) || p(z_d)).

    I is the mutual information E[log q(z | x) - log q(z)] and TC the total correlation
    KL(q(z) || prod_d q(z_d)), with q(z) the mean of q(z | x_n) over all data (Chen et al. 2018,
    "Isolating Sources of Disentanglement in Variational Autoencoders", eq. 2 and section 4).
    With only beta > 1 this is beta-TCVAE: it presses the dimensions of z to be independent without
    penalising the information about x. With all weights 1 it is the ELBO, at any seed: the last
    term is computed as KL - I - TC, that is

        L = E_q[log p(x | z)] - gamma KL - (alpha - gamma) I - (beta - gamma) TC.

    I and TC are estimates from the minibatch, whose errors :mod:`pyproelbo.elbo.minibatch`
    describes. They are scaled as the KL is, by N / B where the plate over the data subsamples.
    Latents that are not chosen keep their KL, with weight 1.

    >>> objective = TotalCorrelationELBO(beta=6.0, dataset_size=60_000)

    Args:
        alpha: the weight of mutual information, a number or a schedule, not negative.
        beta: the weight of the total correlation.
        gamma: the weight of the dimension-wise KL.
        dataset_size: N, the number of all data. None takes it from the plate over the data: the
            full size of a plate that subsamples; otherwise the batch is taken for the whole.
        estimator: "stratified" or "weighted", as in :mod:`pyproelbo.elbo.minibatch`.
        site: a latent, or several, whose joint q(z) is taken; None takes all.
        plate: the plate over the data, to be named where the latents share several. The dims of all
            other plates are dimensions of z.
        kl: "sampled" takes all parts at the same samples; "auto" and "analytic" take the KL
            that gamma weighs in closed form, as in :class:`TermsELBO`.
        **kwargs: as in :class:`TermsELBO`.

    Raises:
        ValueError: for a negative weight. At the evaluation, for a guide whose samples are not
            reparameterised, or whose marginals are unknown; and as for
            :class:`~pyproelbo.elbo.aggregated.AggregatedELBO`.
    """

    def __init__(
        self,
        alpha: float | Schedule = 1.0,
        beta: float | Schedule = 1.0,
        gamma: float | Schedule = 1.0,
        dataset_size: int | None = None,
        estimator: Estimator = "stratified",
        *,
        site: str | Sequence[str] | None = None,
        plate: str | None = None,
        kl: KL = "sampled",
        **kwargs: Unpack[Options],
    ) -> None:
        weights = {"alpha": alpha, "beta": beta, "gamma": gamma}
        super().__init__(dataset_size, site, plate, estimator, kl, schedules=weights, **kwargs)

    def objective(self, terms: Terms) -> Tensor:
        """E_q[log p(x | z)] - gamma KL - (alpha - gamma) I - (beta - gamma) TC."""
        return self._evaluated(terms)[0]

    def _evaluated(self, terms: Terms) -> tuple[Tensor, MinibatchSurgery]:
        keys, plate = self.chosen(terms)
        for key in keys:
            q = terms.latents[0][key].q
            if not q.has_rsample:
                raise ValueError(
                    f"the guide's {type(q).__name__} of site {key!r} cannot be reparameterised, "
                    "and q(z) has a gradient only through the sample: choose other latents by "
                    "site=, or watch it with SurgeryELBO"
                )
        surgery = self.surgery(terms)
        if surgery.total_correlation is None:
            raise ValueError(
                f"the marginals of the guide's distributions of {list(keys)} are not known, nor is "
                "their total correlation: use a Normal or another distribution of independent "
                "dimensions, or a MultivariateNormal"
            )
        w = self.weights(terms)
        kl = [w["gamma"] * kl.sum() if z in keys else kl for z, kl in terms.kl.items()]
        rest = (w["alpha"] - w["gamma"]) * surgery.mutual_information
        rest = rest + (w["beta"] - w["gamma"]) * surgery.total_correlation
        value = terms.data_fit - terms.mean(kl) - plate.full_size * rest
        return value, surgery

    def _keep(self, parts: Sequence[MinibatchSurgery | None]) -> None:
        self.records["surgery"] = mean_of([part for part in parts if part is not None])
