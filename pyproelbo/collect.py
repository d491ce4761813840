"""From traces to :class:`~pyproelbo.Terms`; nothing else reads the sites of a trace."""

import math
from collections.abc import Mapping
from typing import Literal

from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyproelbo.expectations import Enumerated, Sampled, Term, total
from pyproelbo.kl import closed_form
from pyproelbo.sites import Group, Names, Sites, groups_of, is_delta
from pyproelbo.terms import Latent, Terms
from pyproelbo.traces import PARTICLES, Site, Traces

KL = Literal["auto", "analytic", "sampled"]


def terms_of(traces: Traces, kl: KL = "auto") -> Terms:
    """Terms of one run of model and guide.

    Args:
        kl: "auto" takes the closed form of a KL where one is registered and valid, "analytic"
            insists on it, "sampled" takes log q - log p at the sample always.

    Raises:
        ValueError: where the model has a latent site that the guide lacks, or ``kl`` is
            "analytic" and a KL has no valid closed form.
    """
    sites = Sites.of(traces)
    expect = Enumerated(traces) if traces.enumerated else Sampled(traces)
    data, prior, factors = _model_terms(sites, expect)
    log_q = {name: expect.log_q(site) for name, site in sites.guide.items()}

    groups = groups_of(sites, list(prior))
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
        latents=() if traces.enumerated else (_latents(groups, sites),),
    )


def _named(terms: Mapping[Names, Term]) -> dict[str, Tensor]:
    return {"+".join(names): term.value for names, term in terms.items()}


def _model_terms(sites: Sites, expect: Sampled | Enumerated) -> list[dict[Names, Term]]:
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


def _in_order(sites: Sites) -> set[str]:
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


def _closed_form(group: Group, sites: Sites, in_order: set[str]) -> Tensor | None:
    """The KL of a group, scaled and masked, in closed form if that is valid."""
    if _obstacle(group, sites, in_order):
        return None
    q, p = sites.guide[group.key], sites.latents[group.key]
    kl = closed_form(q["fn"], p["fn"])
    return None if kl is None else scale_and_mask(kl, q["scale"], q["mask"])


def _obstacle(group: Group, sites: Sites, in_order: set[str]) -> str | None:
    """What in the programs stands against a closed form, None where nothing does."""
    if len(group.guide) > 1 or group.key not in sites.latents:
        return "its sample is derived from an auxiliary site of the guide"
    if group.prior != ((group.key,),):
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


def _why_not_analytic(group: Group, sites: Sites, in_order: set[str]) -> str:
    reason = _obstacle(group, sites, in_order)
    if reason is None:
        q, p = (type(part[group.key]["fn"]).__name__ for part in (sites.guide, sites.latents))
        reason = f"none is known that is valid for {q} against {p}"
    return (
        f"kl='analytic', but the KL of site {group.key!r} has no closed form: {reason}. Use "
        "kl='auto' to sample this one"
    )


def _is_enumerated(group: Group, sites: Sites) -> bool:
    """Whether the KL is exact because the guide enumerates."""
    marks = ("_enumerate_dim", "_enum_total")
    return all(any(mark in sites.guide[n]["infer"] for mark in marks) for n in group.guide)


def _count(group: Group, sites: Sites, divergence: Term) -> float | Tensor:
    """How many elements a KL sums over, scaled and masked as it is."""
    size = math.prod(plate.size for plate in divergence.plates if plate.name != PARTICLES)
    if len(group.latents) != 1:
        return float(size)
    site = sites.latents[group.latents[0]]
    mask = site["mask"]
    unmasked = mask.float().mean() if isinstance(mask, Tensor) else float(mask is not False)
    return size * site["scale"] * unmasked


def _latents(groups: list[Group], sites: Sites) -> dict[str, Latent]:
    """The sample of each group that the guide draws at one random site."""
    latents = {}
    for group in groups:
        drawn = [name for name in group.guide if not is_delta(sites.guide[name])]
        if len(drawn) != 1:
            continue
        site, prior = sites.guide[drawn[0]], sites.latents.get(drawn[0])
        masks = [site["mask"], None if prior is None else prior["mask"]]
        latents[group.key] = Latent(
            site["value"],
            site["fn"],
            None if prior is None else prior["fn"],
            site["plates"],
            site["scale"],
            any(mask is not None and mask is not True for mask in masks),
            site["name"],
        )
    return latents
