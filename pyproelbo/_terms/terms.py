r"""The contribution of each sample site to the ELBO.

Everything in the library that needs an ELBO uses :class:`Terms`. The path from a site to the loss:

    traces.run           the guide runs, then the model on its samples: log p, log q of each site
    collect.terms_of     sites get a role, log p and log q become expectations, pairs of them a KL
    objective(terms)     one number to maximise (:mod:`pyproelbo.elbo`)
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyproelbo._messages.warn import warn
from pyproelbo._terms.by_time import ByTime, merge_by_time
from pyproelbo._terms.traces import Plates

# How the gradient treats the guide's draws: as functions of its parameters; as variables, whose
# gradient is separate from that of q's parameters; or as constants.
Treatment = Literal["functions", "variables", "constants"]


class Latent(NamedTuple):
    """The sample behind one KL, and its source: the joint law, not only its value.

    Attributes:
        value: z, of shape ``q.batch_shape + q.event_shape`` (a batch dim of 1 may represent more).
        q: q(z | x), the guide's distribution.
        p: p(z), the model's prior; None where z is an auxiliary variable of the guide, of which the
            model's latents are functions.
        plates: the dims of its batch; vectorised particles are one of them.
        scale: Pyro's factor on log q(z | x).
        prior_scale: likewise on log p(z); None where there is none.
        is_masked: whether there is a mask, in the guide or in the model.
        name: the guide's site that draws it.
    """

    value: Tensor
    q: Distribution
    p: Distribution | None
    plates: Plates
    scale: float | Tensor
    prior_scale: float | Tensor | None
    is_masked: bool
    name: str = ""


@dataclass(frozen=True, eq=False)
class Terms:
    r"""The ELBO by sample site, in nats.

    Tensors have the dims of their site's plates, aligned at the right, scaled and masked, all as in
    Pyro. With several particles, looped or vectorised, the leading dim is that of the particles. A
    site that some particles lack counts as zero in them.

    Attributes:
        log_likelihood: log p(x | z) of each observed site. Where the model enumerates a
            discrete latent, its sum is in here, under the names of the data joined by "+".
        log_prior: log p(z) of each latent site.
        log_q: log q(z | x) of each site that the guide draws, including auxiliary ones.
        kl: log q(z | x) - log p(z), in closed form for the sites in ``analytic``. The keys are
            those of ``groups``.
        factors: log-factors of ``pyro.factor`` in the model: part of the ELBO, but of neither the
            reconstruction nor the KL.
        guide_log_likelihood: log q(x) of each site that the guide observes, as an auxiliary
            regressor does. As in Pyro the loss includes it, with the sign of log q; the ELBO and
            log q(z | x) do not, since it is not a density of a draw.
        analytic: the keys of ``kl`` that are in closed form.
        groups: for each key of ``kl`` the latent sites that it covers: the site itself, or all
            sites represented by one auxiliary site of the guide (which is then the key).
        counts: for each key of ``kl`` the number of data that it sums over, scaled and masked in
            the same way: rows of the plate over the data, whatever plates are nested in it; 1 for a
            global latent. That plate contains latents and observed sites. Of several it is one that
            subsamples, else one with as many rows as the first tensor argument of the programs,
            else the outermost.
        num_particles: the number of samples of the guide, the size of the leading dim; 1 adds no
            dim.
        latents: for each looped particle (vectorised ones form one) the sample of each key of
            ``kl``, except those that are enumerated, or made from several random sites of the
            guide. Empty once detached.
        by_time: the reconstruction and the KL by timestep, where the objective is a
            :class:`~pyproelbo.SequentialELBO`; else None.
        plates: for each site of model or guide, the plates that are dims of its tensors; for a site
            of both, the plates that it has in both.
        scales: Pyro's factor on the log-density of each site: in the model, in the guide, or in
            both.
        drawn: the sites that the guide draws at random: neither factors, nor functions of others,
            nor summed out.
        scored: those of them whose draws have no gradient, or only a partial one: the gradient for
            the guide's parameters then uses the score function.
        enumerated: the sites that the guide sums out.
        draws: for each looped particle the values at ``drawn``. Empty once detached.
        treatment: how the gradient treats draws, where an objective of several weighted draws has
            made these Terms; else None, and tensors are estimates of expectations.
        conditional: latents that the guide draws given others of them, where an objective has
            examined the guide; otherwise None.
        log_evidence: estimates of log p(x) in place of all else, by the latent that was integrated
            out: the result of a particle filter.
    """

    log_likelihood: Mapping[str, Tensor]
    log_prior: Mapping[str, Tensor]
    log_q: Mapping[str, Tensor]
    kl: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]
    guide_log_likelihood: Mapping[str, Tensor] = field(default_factory=dict)
    analytic: frozenset[str] = frozenset()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    counts: Mapping[str, float | Tensor] = field(default_factory=dict)
    num_particles: int = 1
    latents: tuple[Mapping[str, Latent], ...] = ()
    by_time: ByTime | None = None
    plates: Mapping[str, Plates] = field(default_factory=dict)
    scales: Mapping[str, tuple[float | Tensor, ...]] = field(default_factory=dict)
    drawn: frozenset[str] = frozenset()
    scored: frozenset[str] = frozenset()
    enumerated: frozenset[str] = frozenset()
    draws: tuple[Mapping[str, Tensor], ...] = ()
    treatment: Treatment | None = None
    conditional: frozenset[str] | None = None
    log_evidence: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def time(self) -> tuple[int, ...]:
        """The timesteps, in rising order: the leading dim of the next two."""
        return self._by_time.time

    @property
    def reconstruction_by_time(self) -> Tensor:
        """log p(x_t | z, x_0, ..., x_{t-1}) by timestep: (T, plates), particles after T."""
        return self._by_time.reconstruction

    @property
    def kl_by_time(self) -> Tensor:
        """KL(q(z_t | ...) || p(z_t | ...)) by timestep, given the sampled z_0, ..., z_{t-1}.

        The dims are (T, plates), with particles after T.
        """
        return self._by_time.kl

    @property
    def timeless(self) -> tuple[str, ...]:
        """The keys of ``kl`` that belong to no timestep."""
        return self._by_time.timeless

    @property
    def _by_time(self) -> ByTime:
        if self.by_time is None:
            raise ValueError(
                "these Terms are not split by timestep: take those of a SequentialELBO"
            )
        return self.by_time

    @property
    def reconstruction(self) -> Tensor:
        """sum E_q[log p(x | z)], over all plates, mean over particles: a scalar."""
        return self.mean(self.log_likelihood.values())

    @property
    def data_fit(self) -> Tensor:
        """The loss's counterpart of the KL: a scalar.

        reconstruction + factor, minus log q(x) of what the guide observes.
        """
        guide = (-value for value in self.guide_log_likelihood.values())
        return self.mean([*self.log_likelihood.values(), *self.factors.values(), *guide])

    @property
    def fit(self) -> Tensor:
        """An old name of :attr:`data_fit`, to be removed in the next release."""
        warn("Terms.fit is called Terms.data_fit now", DeprecationWarning)
        return self.data_fit

    @property
    def shrinkage(self) -> Tensor:
        """sum KL(q(z | x) || p(z)): a scalar."""
        return self.mean(self.kl.values())

    @property
    def factor(self) -> Tensor:
        """The sum of the model's log-factors: a scalar, 0 where it has none."""
        return self.mean(self.factors.values())

    @property
    def energy(self) -> Tensor:
        """E_q[log p(x, z)], log-factors included: a scalar.

        It is *minus* the mean energy in the sign convention of physics: with E(z) = -log p(x, z)
        the ELBO is entropy - E_q[E(z)], minus the variational free energy.
        """
        parts = (self.log_likelihood, self.log_prior, self.factors)
        return self.mean(value for part in parts for value in part.values())

    @property
    def entropy(self) -> Tensor:
        """H[q] = -E_q[log q(z | x)]: a scalar."""
        return -self.mean(self.log_q.values())

    @property
    def elbo(self) -> Tensor:
        """reconstruction - shrinkage + factor: a scalar; energy + entropy in expectation.

        For a particle filter it is the filter's bound, the mean of ``log_evidence``.
        """
        elbo = self.reconstruction + self.factor - self.shrinkage
        return elbo + self.mean(self.log_evidence.values()) if self.log_evidence else elbo

    @property
    def num_data(self) -> float | Tensor:
        """The largest of ``counts``: the number of data where latents are local, else 1."""
        return largest(self.counts.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        for part in (self.log_likelihood, self.kl, self.factors, self.log_evidence):
            for value in part.values():
                return value.dtype
        return torch.get_default_dtype()

    def mean(self, values: Iterable[Tensor]) -> Tensor:
        """The sum of tensors of these Terms over plates, averaged over particles: a scalar."""
        sums = [value.sum() if value.dim() else value for value in values]
        if not sums:
            return torch.zeros((), dtype=self.dtype)
        value = sum(sums[1:], start=sums[0])
        return value if self.num_particles == 1 else value / self.num_particles

    def non_finite(self) -> dict[str, list[str]]:
        """For each part of the ELBO, the sites with values that are NaN or infinite."""
        parts = {name: getattr(self, name) for name in _TENSORS if name != "kl"}
        found = {
            part: [site for site, value in values.items() if not value.isfinite().all()]
            for part, values in parts.items()
        }
        return {part: sites for part, sites in found.items() if sites}

    def detach(self) -> "Terms":
        """The same values without their graph."""
        tensors = {
            name: {site: value.detach() for site, value in getattr(self, name).items()}
            for name in _TENSORS
        }
        by_time = self.by_time and self.by_time.detach()
        scales = {
            site: tuple(s.detach() if isinstance(s, Tensor) else s for s in both)
            for site, both in self.scales.items()
        }
        return replace(self, **tensors, scales=scales, latents=(), draws=(), by_time=by_time)


def largest(counts: Iterable[float | Tensor]) -> float | Tensor:
    """The largest of several counts, on their device; 1 if there are none."""
    counts = list(counts)
    tensors = [count for count in counts if isinstance(count, Tensor)]
    numbers = [count for count in counts if not isinstance(count, Tensor)]
    if not tensors:
        return max(numbers, default=1.0)
    value = reduce(torch.maximum, tensors)
    return value.clamp(min=max(numbers)) if numbers else value


_TENSORS = (
    "log_likelihood",
    "log_prior",
    "log_q",
    "kl",
    "factors",
    "guide_log_likelihood",
    "log_evidence",
)


def stack_terms(particles: list[Terms]) -> Terms:
    """One Terms from particles that ran one by one; particles lead, as if vectorised."""
    if len(particles) == 1:
        return particles[0]
    values = [v for terms in particles for name in _TENSORS for v in getattr(terms, name).values()]
    nesting = max((value.dim() for value in values), default=0)

    def stacked(values: list[Tensor]) -> Tensor:
        value = torch.stack(values)
        padding = (1,) * (nesting + 1 - value.dim())
        return value.reshape(value.shape[:1] + padding + value.shape[1:])

    return replace(
        _merged(particles, stacked, partial(torch.stack, dim=1)),
        num_particles=len(particles),
        latents=tuple(latents for terms in particles for latents in terms.latents),
        draws=tuple(draws for terms in particles for draws in terms.draws),
    )


def add_terms(parts: list[Terms]) -> Terms:
    """One Terms from the parts of an expectation."""
    return parts[0] if len(parts) == 1 else _merged(parts, _sum, _sum)


def _sum(values: list[Tensor]) -> Tensor:
    return sum(values[1:], start=values[0])


def _merged(
    parts: list[Terms],
    join: Callable[[list[Tensor]], Tensor],
    join_by_time: Callable[[list[Tensor]], Tensor],
) -> Terms:
    """One Terms by joining the tensors of each site, 0 in the parts that lack the site."""

    def of(name: str) -> dict[str, Tensor]:
        dicts = [getattr(terms, name) for terms in parts]
        return {site: join(_filled(site, dicts)) for site in _union(dicts)}

    by_time = [terms.by_time for terms in parts if terms.by_time is not None]

    return Terms(
        log_likelihood=of("log_likelihood"),
        log_prior=of("log_prior"),
        log_q=of("log_q"),
        kl=of("kl"),
        factors=of("factors"),
        guide_log_likelihood=of("guide_log_likelihood"),
        log_evidence=of("log_evidence"),
        analytic=frozenset.intersection(*(terms.analytic for terms in parts)),
        groups=_union([terms.groups for terms in parts]),
        counts=_union([terms.counts for terms in parts]),
        num_particles=parts[0].num_particles,
        plates=_union([terms.plates for terms in parts]),
        scales=_union([terms.scales for terms in parts]),
        drawn=frozenset[str]().union(*(terms.drawn for terms in parts)),
        scored=frozenset[str]().union(*(terms.scored for terms in parts)),
        enumerated=frozenset[str]().union(*(terms.enumerated for terms in parts)),
        treatment=parts[0].treatment,
        conditional=parts[0].conditional,
        by_time=merge_by_time(by_time, join_by_time) if by_time else None,
    )


def _union(parts: list) -> dict:
    return {key: value for part in parts for key, value in part.items()}


def _filled(site: str, parts: list[Mapping[str, Tensor]]) -> list[Tensor]:
    values = [part.get(site) for part in parts]
    present = [value for value in values if value is not None]
    if len({value.shape for value in present}) > 1:
        raise ValueError(
            f"site {site!r} has plates of different sizes in different runs, "
            f"{sorted({tuple(value.shape) for value in present})}: use num_particles=1, or "
            "plates of one size"
        )
    absent = torch.zeros_like(present[0])
    return [absent if value is None else value for value in values]
