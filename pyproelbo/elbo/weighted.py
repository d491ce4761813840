"""The base of objectives with importance weights of several draws of the guide."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from pyproelbo._backend.autograd import is_holdable, through
from pyproelbo._rows.plate import by_row, check_sampled, check_scales, data_plate, scale_of
from pyproelbo._rows.several import OneSubsample
from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.roles import is_drawn
from pyproelbo._terms.terms import Terms, Treatment
from pyproelbo._terms.traces import PARTICLES, Plate, Program, Site, Traces
from pyproelbo._terms.treated import Treated
from pyproelbo.elbo.base import TermsELBO
from pyproelbo.elbo.baselines import Runs
from pyproelbo.elbo.ignored import warn_of_baselines
from pyproelbo.elbo.options import DrawsOptions


class WeightedDraws(NamedTuple):
    """Log-densities of B rows at K draws z of the guide, (K, B) each, in nats.

    Attributes:
        target: log p(x, z). Where the guide makes latents from its draws (Deltas, with factors),
            minus their log-densities: their parameters belong to the target.
        proposal: log q(z | x) of what the guide draws.
        score: the part of ``proposal`` whose draws have no gradient; None where all have one.
        variables: the draws, where they must be distinguished from the parameters that they are
            functions of.
    """

    target: Tensor
    proposal: Tensor
    score: Tensor | None
    variables: list[Tensor]

    @property
    def weight(self) -> Tensor:
        """log w = log p(x, z) - log q(z | x)."""
        return self.target - self.proposal


class WeightedELBO(TermsELBO):
    r"""An objective of the weights w_nk = p(x_n, z_nk) / q(z_nk | x_n) of K draws of the guide.

    Where a plate encloses all sites of model and guide, each of its rows has its own weights, and
    the objective is a sum over rows; the scale N / B of a plate that subsamples multiplies that
    sum, not the weights. Where there is none (global latents), a weight covers all data together,
    which then cannot be subsampled. Looped particles see one subsample.

    A subclass defines what is maximised (:meth:`bound`), and with which gradient
    (:meth:`surrogate`). ``last_terms`` has the mean over draws, as in other objectives:
    ``last_terms.elbo`` is the ELBO.

    Args:
        num_particles: K.
        plate: the plate over the data, to be named where all sites share several.
        draws: how the gradient treats draws. "functions" of the guide's parameters;
            "variables", for :meth:`through_draws`; or "constants".
        **kwargs: as in :class:`TermsELBO`, without ``kl``.

    Raises:
        ValueError: at the first evaluation, for a site outside ``plate``, for densities scaled by
            anything other than that plate, for enumeration by the guide, and for a draw that has no
            gradient where one is needed.
    """

    additive = False

    def __init__(
        self,
        num_particles: int,
        plate: str | None = None,
        draws: Treatment = "functions",
        **kwargs: Unpack[DrawsOptions],
    ) -> None:
        super().__init__(kl="sampled", num_particles=num_particles, baselines="none", **kwargs)
        self._warned_of_baselines = False
        self.plate = plate
        self.draws: Treatment = draws

    @abstractmethod
    def bound(self, log_weight: Tensor) -> Tensor:
        """What is maximised, for each row: (K, ...) -> (...)."""

    @abstractmethod
    def surrogate(self, log: WeightedDraws) -> Tensor:
        """A scalar that has the gradient; its value does not matter."""

    def objective(self, terms: Terms) -> Tensor:
        """N/B times the sum of the bound over rows, with the gradient of the surrogate.

        Raises:
            ValueError: for terms that give no weights, and, where they have a graph, for terms
                whose draws were not treated as this gradient needs.
        """
        check_sampled(terms)
        plate = _plate_around(terms, self.plate)
        check_scales(terms.scales, plate)
        log = _weighted_draws(terms, plate)
        value = self.bound(log.weight).sum()
        if log.weight.requires_grad:
            self._check_treatment(terms)
            surrogate = self.surrogate(log)
            value = value.detach() + (surrogate - surrogate.detach())
        return value * scale_of(plate)

    def _particles(
        self, model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> Iterator[Terms]:
        one, treated = OneSubsample(), Treated(self.draws)
        particles = super()._particles(model, guide, args, kwargs)
        while True:
            with one, treated:  # around the traces, so that they hold what is put here
                terms = next(particles, None)
            if terms is None:
                return
            yield terms

    def _together(self, particles: Iterator[Runs]) -> Iterator[list[Runs]]:
        for runs in particles:
            if not self._warned_of_baselines:
                self._warned_of_baselines = warn_of_baselines(runs[0])
            yield [runs]

    def _terms_of(self, traces: Traces) -> Terms:
        for name in traces.scored:
            if is_drawn(site := traces.guide_sites[name]):
                self._check_gradient(name, site)
        return terms_of(traces, self.kl, treatment=self.draws)

    def _check_gradient(self, name: str, site: Site) -> None:
        """Check that the gradient can use the score of a draw that has no other gradient.

        Raises:
            ValueError: if not.
        """
        in_part = site["fn"].has_rsample  # as of rejection samplers
        if self.draws == "variables" or (self.draws == "functions" and in_part):
            raise ValueError(
                f"the draws of site {name!r} are not, or only in part, a differentiable function "
                "of the guide's parameters, as this gradient needs them to be: use "
                "ReweightedWakeSleepELBO" + ("" if in_part else ", or gradient='standard'")
            )

    def _check_treatment(self, terms: Terms) -> None:
        """Check that the graph of the terms has the gradient that is asked for."""
        is_same = terms.treatment == self.draws
        is_plain = terms.treatment is None and self.draws == "functions" and not terms.scored
        if not (is_same or is_plain):
            raise ValueError(
                f"these terms' draws are {terms.treatment or 'those of an expectation'}, but the "
                f"gradient of this {type(self).__name__} takes them as {self.draws}: give it terms "
                "that it has computed itself"
            )


def through_draws(log: WeightedDraws, weight: Tensor, along: Tensor) -> Tensor:
    r"""A scalar with the gradient

        sum_nk weight_nk d log p(x_n, z_nk) / d theta + along_nk (d log w_nk / dz) (dz / d phi),

    where d log w / dz holds q's parameters phi fixed, even where one draw is drawn given another.
    Parameters that model and guide share get both parts.

    Args:
        weight, along: (K, B), constants. If both are the same tensor, half of a pass is saved.
    """
    rest = -weighted(along, log.proposal)
    if along is not weight:
        rest = rest + weighted(along - weight, log.target)
    return weighted(weight, log.target) + through(rest, log.variables)


def _weighted_draws(terms: Terms, plate: Plate | None) -> WeightedDraws:
    log_q = terms.log_q

    def rows(*values: Tensor) -> Tensor:
        return by_row(values, terms.num_particles, plate)

    log_p = (terms.log_likelihood, terms.log_prior, terms.factors)
    derived = [-log_q[name] for name in log_q if name not in terms.drawn]
    derived += [-value for value in terms.guide_log_likelihood.values()]
    scored = [log_q[name] for name in log_q if name in terms.scored]
    return WeightedDraws(
        rows(*(value for part in log_p for value in part.values()), *derived),
        rows(*(log_q[name] for name in log_q if name in terms.drawn)),
        rows(*scored) if scored else None,
        [z for draws in terms.draws for z in draws.values() if is_holdable(z)],
    )


def weighted(weight: Tensor, log: Tensor) -> Tensor:
    """sum weight * log, over all; a log-density of -inf of weight 0 adds nothing."""
    return (weight * torch.where(weight == 0, 0.0, log)).sum()


def _plate_around(terms: Terms, name: str | None) -> Plate | None:
    """The plate that all sites share, or None if there is none."""
    shared = frozenset.intersection(*terms.plates.values()) if terms.plates else frozenset()
    if name is None and all(plate.name == PARTICLES for plate in shared):
        return None
    return data_plate(terms.plates, name)
