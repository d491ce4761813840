r"""What each sample site adds to the ELBO.

Everything in the library that asks about an ELBO asks :class:`Terms`; :func:`terms_of` is the
only place that makes them from traces. The way from a site to the loss:

    traces.run       the guide runs, then the model on its samples: log p and log q of each site
    terms_of         sites get a role, log p and log q become terms, pairs of them a KL
    objective(terms) one number to maximise (:mod:`pyproelbo.elbo`)
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyproelbo.expectations import Enumerated, Sampled, Term, total
from pyproelbo.kl import closed_form
from pyproelbo.traces import PARTICLES, Site, Traces

KL = Literal["auto", "analytic", "sampled"]


@dataclass(frozen=True)
class Terms:
    r"""The ELBO by sample site, in nats.

    Tensors have the dims of their site's plates, aligned at the right as Pyro aligns them, and
    are scaled and masked as Pyro scales and masks. With several particles, looped or
    vectorised, the particles lead. A site that several particles lack counts as zero in those.

    Attributes:
        log_likelihood: log p(x | z) of each observed site. Where the model enumerates a
            discrete latent, its sum is in here, under the names of the data joined by "+".
        log_prior: log p(z) of each latent site.
        log_q: log q(z) of each site of the guide, auxiliary ones too.
        kl: log q(z) - log p(z), in closed form for the sites in ``analytic``. Keys are those
            of ``groups``.
        factors: log-factors of ``pyro.factor`` in the model: part of the ELBO, but neither of
            the reconstruction nor of the KL.
        analytic: the keys of ``kl`` that are in closed form.
        groups: for each key of ``kl`` the latent sites that it covers: the site itself, or all
            sites that one auxiliary site of the guide stands for (the key is then that site).
        counts: for each key of ``kl`` how many elements of its plates it sums over, scaled
            and masked as it is.
        num_particles: how many samples of the guide lead the tensors; 1 adds no dim.
    """

    log_likelihood: Mapping[str, Tensor]
    log_prior: Mapping[str, Tensor]
    log_q: Mapping[str, Tensor]
    kl: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]
    analytic: frozenset[str] = frozenset()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    counts: Mapping[str, float | Tensor] = field(default_factory=dict)
    num_particles: int = 1

    @property
    def reconstruction(self) -> Tensor:
        """sum E_q[log p(x | z)], over all plates, mean over particles: a scalar."""
        return self.mean(self.log_likelihood.values())

    @property
    def fit(self) -> Tensor:
        """reconstruction + factor, what the KL is weighed against: a scalar."""
        return self.mean([*self.log_likelihood.values(), *self.factors.values()])

    @property
    def shrinkage(self) -> Tensor:
        """sum KL(q(z) || p(z)): a scalar."""
        return self.mean(self.kl.values())

    @property
    def factor(self) -> Tensor:
        """The sum of the model's log-factors: a scalar, 0 where it has none."""
        return self.mean(self.factors.values())

    @property
    def energy(self) -> Tensor:
        """E_q[log p(x, z)], log-factors included: a scalar."""
        parts = (self.log_likelihood, self.log_prior, self.factors)
        return self.mean(value for part in parts for value in part.values())

    @property
    def entropy(self) -> Tensor:
        """-E_q[log q(z)]: a scalar."""
        return -self.mean(self.log_q.values())

    @property
    def elbo(self) -> Tensor:
        """reconstruction - shrinkage + factor: a scalar; energy + entropy in expectation."""
        return self.fit - self.shrinkage

    @property
    def num_data(self) -> float | Tensor:
        """The largest of ``counts``: the size of the data where latents are local, else 1."""
        counts = list(self.counts.values())
        if any(isinstance(count, Tensor) for count in counts):
            return torch.stack([torch.as_tensor(count) for count in counts]).max()
        return max(counts, default=1.0)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        parts = (self.log_likelihood, self.kl, self.factors)
        values = (value for part in parts for value in part.values())
        return next((value.dtype for value in values), torch.get_default_dtype())

    def mean(self, values: Iterable[Tensor]) -> Tensor:
        """The sum of tensors of these Terms over plates, its mean over particles: a scalar."""
        sums = [value.sum() if value.dim() else value for value in values]
        if not sums:
            return torch.zeros((), dtype=self.dtype)
        value = sum(sums[1:], start=sums[0])
        return value if self.num_particles == 1 else value / self.num_particles

    def non_finite(self) -> dict[str, list[str]]:
        """For each part of the ELBO, the sites with values that are NaN or infinite."""
        parts = {
            name: getattr(self, name)
            for name in ("log_likelihood", "log_prior", "log_q", "factors")
        }
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
        return replace(self, **tensors)


_TENSORS = ("log_likelihood", "log_prior", "log_q", "kl", "factors")


def stack(particles: list[Terms]) -> Terms:
    """One Terms of particles that ran one after the other; they lead, as if vectorised."""
    if len(particles) == 1:
        return particles[0]
    values = [v for terms in particles for name in _TENSORS for v in getattr(terms, name).values()]
    nesting = max((value.dim() for value in values), default=0)

    def stacked(values: list[Tensor]) -> Tensor:
        value = torch.stack(values)
        padding = (1,) * (nesting + 1 - value.dim())
        return value.reshape(value.shape[:1] + padding + value.shape[1:])

    return replace(_merged(particles, stacked), num_particles=len(particles))


def add(parts: list[Terms]) -> Terms:
    """One Terms of the parts of an expectation."""
    return (
        parts[0] if len(parts) == 1 else _merged(parts, lambda values: sum(values[1:], values[0]))
    )


def _merged(parts: list[Terms], merge: Callable[[list[Tensor]], Tensor]) -> Terms:
    """One Terms by merging the tensors of each site, 0 in the parts that lack the site."""

    def of(name: str) -> dict[str, Tensor]:
        dicts = [getattr(terms, name) for terms in parts]
        return {site: merge(_filled(site, dicts)) for site in _union(dicts)}

    return Terms(
        **{name: of(name) for name in _TENSORS},
        analytic=frozenset.intersection(*(terms.analytic for terms in parts)),
        groups=_union([terms.groups for terms in parts]),
        counts=_union([terms.counts for terms in parts]),
        num_particles=parts[0].num_particles,
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


def terms_of(traces: Traces, kl: KL = "auto") -> Terms:
    """Terms of one run of model and guide.

    Args:
        kl: "auto" takes the closed form of a KL where one is registered and valid, "analytic"
            insists on it, "sampled" takes log q - log p at the sample always.

    Raises:
        ValueError: where the model has a latent site that the guide lacks, or ``kl`` is
            "analytic" and a KL has no valid closed form.
    """
    sites = _Sites.of(traces)
    expect = Enumerated(traces) if traces.enumerates() else Sampled(traces)
    data, prior, factors = _model_terms(sites, expect)
    log_q = {name: expect.log_q(site) for name, site in sites.guide.items()}

    groups = _groups(sites, list(prior))
    in_order = _in_order(sites)
    divergences: dict[str, Term] = {}
    analytic = set()
    for group in groups:
        exact = None if kl == "sampled" else _closed_form(group, sites, in_order)
        if exact is not None:
            site = sites.latents[group.key]
            divergences[group.key] = Term(expect(exact, site, before=group.key), site["plates"])
            analytic.add(group.key)
        elif kl == "analytic" and not _is_enumerated(group, sites):
            raise ValueError(_why_not_analytic(group, sites, in_order))
        else:
            parts = [log_q[name] for name in group.guide]
            parts += [-prior[latents] for latents in group.prior]
            divergences[group.key] = total(parts)

    return Terms(
        log_likelihood=_named(data),
        log_prior=_named(prior),
        log_q={name: term.value for name, term in log_q.items()},
        kl={name: term.value for name, term in divergences.items()},
        factors=_named(factors),
        analytic=frozenset(analytic),
        groups={group.key: group.latents for group in groups},
        counts={group.key: _count(group, sites, divergences[group.key]) for group in groups},
        num_particles=traces.num_particles,
    )


Names = tuple[str, ...]


def _named(terms: Mapping[Names, Term]) -> dict[str, Tensor]:
    return {"+".join(names): term.value for names, term in terms.items()}


class _Sites(NamedTuple):
    """The sites of two traces by role; sites that add nothing (deterministic ones) are gone."""

    data: dict[str, Site]
    factors: dict[str, Site]
    latents: dict[str, Site]  # of the model, in the model's order
    enumerated: dict[str, Site]  # latents that the model sums out by itself
    guide: dict[str, Site]  # latents and auxiliary sites, in the guide's order

    @classmethod
    def of(cls, traces: Traces) -> "_Sites":
        guide = {n: s for n, s in traces.guide_sites.items() if not _is_deterministic(s)}
        sites = cls({}, {}, {}, {}, guide)
        for name, site in traces.model_sites.items():
            if site["is_observed"]:
                if site_is_factor(site) or (_is_delta(site) and not _is_masked_out(site)):
                    sites.factors[name] = site  # a Delta's log-density, as some reparam's leave
                elif not _is_deterministic(site):
                    sites.data[name] = site
            elif name in guide:
                sites.latents[name] = site
            elif site["infer"].get("_enumerate_dim") is not None:
                sites.enumerated[name] = site
            elif not _is_masked_out(site):
                raise ValueError(
                    f"the model samples {name!r}, but the guide has no such site: sample it in "
                    "the guide, observe it, or, if it is discrete, enumerate it with "
                    "infer={'enumerate': 'parallel'}"
                )
        return sites


def _is_masked_out(site: Site) -> bool:
    fn = site["fn"]
    return site["mask"] is False or (isinstance(fn, MaskedDistribution) and fn._mask is False)


def _is_deterministic(site: Site) -> bool:
    """Whether this is a value put into the trace, as pyro.deterministic does."""
    return site["is_observed"] and _is_masked_out(site)


def _is_delta(site: Site) -> bool:
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _model_terms(sites: _Sites, expect: Sampled | Enumerated) -> list[dict[Names, Term]]:
    """log p(x | z), log p(z) and log-factors, by the names of the sites that share one."""
    observable = sites.data | sites.factors
    entangled: list[list[Site]] = []
    if isinstance(expect, Enumerated):
        entangled = expect.components(sites.enumerated, observable | sites.latents)
    summed = {site["name"] for component in entangled for site in component}

    data, prior, factors = (
        {(name,): expect.log_prob(site) for name, site in part.items() if name not in summed}
        for part in (sites.data, sites.latents, sites.factors)
    )
    for component in entangled:  # log sum_c p(c) p(z | c) p(x | z, c), c enumerated by the model
        assert isinstance(expect, Enumerated)
        observed = tuple(site["name"] for site in component if site["name"] in observable)
        latents = tuple(site["name"] for site in component if site["name"] in sites.latents)
        joint = expect.marginal(component, sites.enumerated)
        if latents:
            unobserved = [site for site in component if site["name"] not in observed]
            prior[latents] = expect.marginal(unobserved, sites.enumerated)
            joint = total([joint, -prior[latents]])
        if observed:
            data[observed] = joint
    return [data, prior, factors]


class _Group(NamedTuple):
    """Latents that have one KL together, and what it is made of."""

    key: str
    latents: Names
    guide: Names  # keys of log_q
    prior: tuple[Names, ...] = ()  # keys of the log-prior


def _groups(sites: _Sites, priors: list[Names]) -> list[_Group]:
    """Which sites of the guide and which of the model make one KL.

    An auxiliary site of Pyro's AutoNormal and AutoStructured stands for one latent, by its
    name. Any other may stand for all latents that the guide derives from it (as a Delta): they
    are one group, named after the first such site.
    """
    auxiliary = [name for name in sites.guide if name not in sites.latents]
    own = {z: _own(z, auxiliary) for z in sites.guide if z in sites.latents}
    owned = {a for names in own.values() for a in names}
    shared = tuple(a for a in auxiliary if a not in owned)
    derived = tuple(
        z for z, names in own.items() if shared and not names and _is_delta(sites.guide[z])
    )
    groups = {z: _Group(z, (z,), (*names, z)) for z, names in own.items() if z not in derived}
    if shared:
        groups[shared[0]] = _Group(shared[0], derived, (*shared, *derived))

    for prior in priors:  # a prior that several latents share makes them one group
        together = [g for g in groups.values() if not set(prior).isdisjoint(g.latents)]
        merged = _Group(
            key=together[0].key if len(together) == 1 else "+".join(prior),
            latents=tuple(z for group in together for z in group.latents),
            guide=tuple(name for group in together for name in group.guide),
            prior=(*(names for group in together for names in group.prior), prior),
        )
        for group in together:
            del groups[group.key]
        groups[merged.key] = merged
    return list(groups.values())


def _own(latent: str, auxiliary: list[str]) -> Names:
    return tuple(a for a in (f"{latent}_unconstrained", f"{latent}_aux") if a in auxiliary)


def _in_order(sites: _Sites) -> set[str]:
    """Latents for which no latent that the model samples before, the guide samples after.

    Only then are a latent's parents in the model no descendants of it in the guide, for sure,
    and E_q[log q(z) - log p(z)] is the closed-form KL given what was sampled before z.
    """
    position = {name: i for i, name in enumerate(sites.guide)}
    latest, names = -1, set()
    for name in sites.latents:
        if position[name] > latest:
            latest = position[name]
            names.add(name)
    return names


def _is_same(a: object, b: object) -> bool:
    """Whether two scales or masks are surely equal; tensors are not compared by value."""
    return a is b or (not (isinstance(a, Tensor) or isinstance(b, Tensor)) and a == b)


def _closed_form(group: _Group, sites: _Sites, in_order: set[str]) -> Tensor | None:
    """The KL of a group, scaled and masked, in closed form if that is valid."""
    if _obstacle(group, sites, in_order):
        return None
    q, p = sites.guide[group.key], sites.latents[group.key]
    kl = closed_form(q["fn"], p["fn"])
    return None if kl is None else scale_and_mask(kl, q["scale"], q["mask"])


def _obstacle(group: _Group, sites: _Sites, in_order: set[str]) -> str | None:
    """What in the programs stands against a closed form, None where nothing does."""
    if len(group.guide) > 1 or group.key not in sites.latents:
        return "its sample is derived from an auxiliary site of the guide"
    if group.prior != ((group.key,),) or group.key in sites.enumerated:
        return "the model sums a discrete site out of its prior"
    if group.key not in in_order:
        return (
            "the model samples sites before it that the guide samples after it; give both the "
            "same order"
        )
    q, p = sites.guide[group.key], sites.latents[group.key]
    if not (_is_same(q["scale"], p["scale"]) and _is_same(q["mask"], p["mask"])):
        return "model and guide scale or mask it differently"
    if q["plates"] != p["plates"]:
        return "model and guide have it in different plates"
    return None


def _why_not_analytic(group: _Group, sites: _Sites, in_order: set[str]) -> str:
    reason = _obstacle(group, sites, in_order)
    if reason is None:
        q, p = (type(part[group.key]["fn"]).__name__ for part in (sites.guide, sites.latents))
        reason = f"none is known that is valid for {q} against {p}"
    return (
        f"kl='analytic', but the KL of site {group.key!r} has no closed form: {reason}. Use "
        "kl='auto' to sample this one"
    )


def _is_enumerated(group: _Group, sites: _Sites) -> bool:
    """Whether the KL is exact because the guide enumerates."""
    return all(sites.guide[n]["infer"].get("_enumerate_dim") is not None for n in group.guide)


def _count(group: _Group, sites: _Sites, divergence: Term) -> float | Tensor:
    """How many elements a KL sums over, scaled and masked as it is."""
    size = math.prod(plate.size for plate in divergence.plates if plate.name != PARTICLES)
    if len(group.latents) != 1:
        return float(size)
    site = sites.latents[group.latents[0]]
    mask = site["mask"]
    unmasked = mask.float().mean() if isinstance(mask, Tensor) else float(mask is not False)
    return size * site["scale"] * unmasked
