"""The base of objectives that weigh several draws of the guide by importance."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyproelbo._rows.plate import by_row, check_sampled, check_scales, data_plate, scale_of
from pyproelbo._rows.several import OneSubsample
from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.expectations import Plates
from pyproelbo._terms.roles import is_data, is_delta
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import PARTICLES, Plate, Program, Site, Traces
from pyproelbo.elbo.base import TermsELBO

# What the guide's draws are to the gradient: functions of its parameters; variables, whose
# gradient is taken apart from that of q's parameters; or constants.
Treatment = Literal["functions", "variables", "constants"]


class LogDensities(NamedTuple):
    """Log-densities of B rows at K draws z of the guide, (K, B) each, in nats.

    Attributes:
        target: log p(x, z). Where the guide makes latents of its draws (Deltas, with factors),
            less the log-densities of those: what parameters they have belongs to the target.
        proposal: log q(z | x) of what the guide draws.
        score: the part of ``proposal`` whose draws have no gradient; None where all have one.
    """

    target: Tensor
    proposal: Tensor
    score: Tensor | None

    @property
    def weight(self) -> Tensor:
        """log w = log p(x, z) - log q(z | x)."""
        return self.target - self.proposal


class MultiSampleELBO(TermsELBO):
    r"""An objective of the weights w_nk = p(x_n, z_nk) / q(z_nk | x_n) of K draws of the guide.

    Where a plate is around all sites of model and guide, weights are those of each of its rows,
    and the objective is a sum over rows; N / B of a plate that subsamples scales that sum, and
    no weight. Where there is none (global latents), a weight is of all data together, which
    then cannot be subsampled. Looped particles see one subsample.

    A subclass says what is maximised (:meth:`bound`), and with which gradient
    (:meth:`surrogate`). ``last_terms`` has the mean over draws, as in other objectives:
    ``last_terms.elbo`` is the ELBO.

    Args:
        num_particles: K.
        plate: the plate over the data, to be named where all sites share several.
        draws: what draws are to the gradient. "functions" of the guide's parameters;
            "variables", for :meth:`through_draws`; or "constants".
        **kwargs: as in :class:`TermsELBO`, without ``kl``.

    Raises:
        ValueError: at the first evaluation, for a site outside of ``plate``, for densities that
            something else than that plate scales, for enumeration by the guide, and for a draw
            that has no gradient where one is needed.
    """

    additive = False

    def __init__(
        self,
        num_particles: int,
        plate: str | None = None,
        draws: Treatment = "functions",
        **kwargs: Any,
    ) -> None:
        super().__init__(kl="sampled", num_particles=num_particles, **kwargs)
        self.plate = plate
        self.draws: Treatment = draws
        self._variables = _Variables(draws)
        self._layout = _Layout(None, frozenset(), frozenset())

    @abstractmethod
    def bound(self, log_weight: Tensor) -> Tensor:
        """What is maximised, of each row: (K, ...) -> (...)."""

    @abstractmethod
    def surrogate(self, log: LogDensities) -> Tensor:
        """A scalar that has the gradient; its value does not matter."""

    def objective(self, terms: Terms) -> Tensor:
        log = self._log_densities(terms)
        value = self.bound(log.weight).sum()
        if log.weight.requires_grad:
            surrogate = self.surrogate(log)
            value = value.detach() + (surrogate - surrogate.detach())
        return value * scale_of(self._layout.plate)

    def through_draws(self, log: LogDensities, weight: Tensor, along: Tensor) -> Tensor:
        r"""A scalar with the gradient

            sum_nk weight_nk d log p(x_n, z_nk) / d theta + along_nk (d log w_nk / dz) (dz / d phi),

        where d log w / dz leaves q's parameters phi as they are, also where one draw is drawn
        given another. Parameters that model and guide share get both parts.

        Args:
            weight, along: (K, B), constants. That they are one tensor spares half of a pass.
        """
        rest = -weighted(along, log.proposal)
        if along is not weight:
            rest = rest + weighted(along - weight, log.target)
        return weighted(weight, log.target) + self._variables.with_gradient_of(rest)

    def _log_densities(self, terms: Terms) -> LogDensities:
        plate, drawn, scored = self._layout
        log_q = terms.log_q

        def rows(*values: Tensor) -> Tensor:
            return by_row(values, terms.num_particles, plate)

        log_p = (terms.log_likelihood, terms.log_prior, terms.factors)
        derived = [-log_q[name] for name in log_q if name not in drawn]
        derived += [-value for value in terms.guide_log_likelihood.values()]
        return LogDensities(
            rows(*(value for part in log_p for value in part.values()), *derived),
            rows(*(log_q[name] for name in log_q if name in drawn)),
            rows(*(log_q[name] for name in log_q if name in scored)) if scored else None,
        )

    def _particles(
        self, model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> Iterator[Terms]:
        one, self._variables = OneSubsample(), _Variables(self.draws)
        particles = super()._particles(model, guide, args, kwargs)
        while True:
            with one, self._variables:  # around the traces, so that they hold what is put here
                terms = next(particles, None)
            if terms is None:
                return
            yield terms

    def _run_anew(self) -> None:
        self._variables.forget()

    def _terms_of(self, traces: Traces) -> Terms:
        check_sampled(traces)
        sites = Sites.of(traces)
        plate = _plate_around(sites, self.plate)
        check_scales(_all(sites), plate)
        drawn = frozenset(name for name, site in sites.guide.items() if is_draw(site))
        scored = frozenset(self._without_gradient(traces))
        self._layout = _Layout(plate, drawn, scored)
        return terms_of(traces, self.kl)

    def _without_gradient(self, traces: Traces) -> Iterator[str]:
        """Draws whose gradient is that of a score; from here on log q is a density, and no more."""
        for name, site in traces.guide_sites.items():
            log_prob, score, _ = site["score_parts"]
            if is_data(site):
                continue
            if getattr(score, "requires_grad", False):
                in_part = site["fn"].has_rsample  # as of rejection samplers
                if self.draws == "variables" or (self.draws == "functions" and in_part):
                    raise ValueError(
                        f"the draws of site {name!r} are no differentiable function of the "
                        "guide's parameters, or are one only in part, where this gradient needs "
                        "them to be: use ReweightedWakeSleepELBO"
                        + ("" if in_part else ", or gradient='standard'")
                    )
                yield name
            zero: Any = 0
            site["score_parts"] = ScoreParts(log_prob, zero, log_prob)


def log_mean_exp(values: Tensor) -> Tensor:
    """log (1/K) sum_k exp values_k: (K, ...) -> (...)."""
    return values.logsumexp(0) - math.log(len(values))


def weighted(weight: Tensor, log: Tensor) -> Tensor:
    """sum weight * log, over all; a log-density of -inf of weight 0 adds nothing."""
    return (weight * torch.where(weight == 0, 0.0, log)).sum()


def is_draw(site: Site) -> bool:
    """Whether a site of the guide is drawn at random: neither a factor nor a function of others."""
    return not (site["is_observed"] or is_delta(site))


class _Layout(NamedTuple):
    """How log-densities make weights: the plate of the rows, and names of sites of the guide."""

    plate: Plate | None
    drawn: frozenset[str]
    scored: frozenset[str]


def _all(sites: Sites) -> list[Site]:
    return [site for part in sites for site in part.values()]


def _plate_around(sites: Sites, name: str | None) -> Plate | None:
    """The plate that all sites share, or None if there is none."""
    plates: dict[str, Plates] = {}
    for site in _all(sites):
        plates[site["name"]] = site["plates"] & plates.get(site["name"], site["plates"])
    shared = frozenset.intersection(*plates.values()) if plates else frozenset()
    if name is None and all(plate.name == PARTICLES for plate in shared):
        return None
    return data_plate(plates, name)


class _Variables(Messenger):
    """The guide's draws, which can be told from the parameters that they are functions of."""

    def __init__(self, draws: Treatment) -> None:
        super().__init__()
        self._draws = draws
        self._values: list[Tensor] = []
        self._of_guide: set[str] = set()
        self.are_held = False

    def __reduce__(self) -> Any:
        return _Variables, (self._draws,)  # a copy of an objective has no draws

    def __enter__(self) -> Any:
        self._of_guide = set()  # its sites come first, those of the same names in the model after
        return super().__enter__()

    def forget(self) -> None:
        """The draws so far are not used."""
        self._of_guide, self._values = set(), []

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._draws == "functions" or site_is_subsample(msg) or msg["name"] in self._of_guide:
            return
        self._of_guide.add(msg["name"])
        if not is_draw(msg) or not msg["value"].requires_grad:
            return
        if self._draws == "constants":
            msg["value"] = msg["value"].detach()
        else:
            msg["value"] = _Variable.apply(msg["value"], self)
            self._values.append(msg["value"])

    def with_gradient_of(self, value: Tensor) -> Tensor:
        """A scalar with the gradient sum_i (d value / d z_i) dz_i of a scalar ``value``.

        Each derivative is for all other draws and all parameters as they are.
        """
        if not self._values:
            return value.new_zeros(())
        self.are_held = True
        grads = torch.autograd.grad(value, self._values, retain_graph=True, allow_unused=True)
        self.are_held = False
        pairs = zip(grads, self._values, strict=True)
        parts = [(grad * z).sum() for grad, z in pairs if grad is not None]
        return sum(parts[1:], start=parts[0])


class _Variable(torch.autograd.Function):
    """The identity, whose gradient goes no further while variables are held."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, variables: _Variables) -> Tensor:
        ctx.variables = variables
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return None if ctx.variables.are_held else grads[0], None
