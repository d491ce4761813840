"""The beta-weighted ELBO."""

from typing import Unpack

from pyro.infer import TraceEnum_ELBO
from torch import Tensor
from torch.distributions import Distribution

from pyproelbo._terms.collect import KL
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import Program
from pyproelbo.elbo.base import TermsELBO
from pyproelbo.elbo.options import Options
from pyproelbo.elbo.per_site import PerSite, SiteWeights


class BetaELBO(TermsELBO):
    r"""L = E_q[log p(x | z)] - sum_z beta_z KL(q(z | x) || p(z)).

    beta = 1 is the ELBO, a lower bound on log p(x). With beta > 1 the latents hold less about x,
    and the posterior is pressed to factorise as the prior does (Higgins et al. 2017, eq. 4); with
    beta < 1 they hold more. beta rising from 0 to 1 (annealing, Bowman et al. 2016) lets the
    decoder learn to use z before the KL takes effect. Whatever beta is, ``last_terms.elbo`` is the
    true ELBO.

    >>> from pyproelbo.schedules import Linear
    >>> objective = BetaELBO(beta=Linear(0.0, 1.0, steps=1000), num_particles=4)

    Args:
        beta: a number, a schedule, or a mapping from the names of latent sites to either; a
            site that a mapping does not name keeps 1. Latents that share one KL (under a joint
            guide) must have one beta.
        kl: "auto", "analytic" or "sampled", as in :class:`TermsELBO`.
        **kwargs: as in :class:`TermsELBO`.

    Raises:
        ValueError: for a negative beta; at the first evaluation, for a site that does not
            exist, and for different betas of latents that share one KL.
    """

    additive = True

    def __init__(self, beta: PerSite = 1.0, kl: KL = "auto", **kwargs: Unpack[Options]) -> None:
        weights = SiteWeights("beta", beta, default=1.0)
        super().__init__(kl=kl, schedules=weights.schedules, **kwargs)
        self.beta = weights

    def compute_marginals(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> dict[str, Distribution]:
        """The posterior of each discrete latent that the model enumerates, by its site.

        Computed by Pyro's ``TraceEnum_ELBO.compute_marginals``, given one draw of the guide.

        Raises:
            NotImplementedError: for several particles, and for latents in nested plates.
        """
        return self._of_pyro().compute_marginals(model, guide, *args, **kwargs)

    def sample_posterior(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> object:
        """A joint draw of what the model enumerates, given the guide's draws; also by Pyro."""
        return self._of_pyro().sample_posterior(model, guide, *args, **kwargs)

    def _of_pyro(self) -> TraceEnum_ELBO:
        return TraceEnum_ELBO(
            num_particles=self.num_particles,
            max_plate_nesting=self.max_plate_nesting,
            strict_enumeration_warning=self.strict_enumeration_warning,
        )

    def objective(self, terms: Terms) -> Tensor:
        """E_q[log p(x | z)] - sum_z beta_z KL_z, each site's KL with its weight."""
        beta, label = self.weights(terms), self.beta.labels(terms)
        weighted = [beta[label[site]] * kl.sum() for site, kl in terms.kl.items()]
        return terms.data_fit - terms.mean(weighted)
