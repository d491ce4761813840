"""From traces to :class:`~pyproelbo.Terms`; nothing else reads the sites of a trace."""

import math
from collections.abc import Mapping
from typing import Any

from pyro.distributions import Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyproelbo.by_time import ByTime, Timed, TimeOf, by_time_of
from pyproelbo.divergences import KL as KL
from pyproelbo.divergences import Divergence, Divergences
from pyproelbo.expectations import Enumerated, Sampled, Term, total
from pyproelbo.kl import Mask
from pyproelbo.sequences.base import SequenceDistribution
from pyproelbo.sites import Group, Names, Sites, groups_of, is_delta
from pyproelbo.terms import Latent, Terms
from pyproelbo.traces import PARTICLES, Site, Traces


def terms_of(traces: Traces, kl: KL = "auto", time: TimeOf | None = None) -> Terms:
    """Terms of one run of model and guide.

    Args:
        kl: "auto" takes the closed form of a KL where one is registered and valid, "analytic"
            insists on it, "sampled" takes log q - log p at the sample always.
        time: the timestep of each site that is not a whole sequence; the Terms then have
            ``by_time``.

    Raises:
        ValueError: where the model has a latent site that the guide lacks, where ``kl`` is
            "analytic" and a KL has no valid closed form, and where ``time`` is given and a
            term cannot be taken apart by timestep.
    """
    sites = Sites.of(traces)
    expect = Enumerated(traces) if traces.enumerated else Sampled(traces)
    data, prior, factors = _model_terms(sites, expect)
    log_q = {name: expect.log_q(site) for name, site in sites.guide.items()}

    groups = groups_of(sites, list(prior))
    divergence = Divergences(sites, expect, kl)
    divergences = {group.key: divergence(group, log_q, prior) for group in groups}

    return Terms(
        log_likelihood=_named(data),
        log_prior=_named(prior),
        log_q={name: term.value for name, term in log_q.items()},
        kl={name: divergence.term.value for name, divergence in divergences.items()},
        factors=_named(factors),
        analytic=frozenset(n for n, divergence in divergences.items() if divergence.is_analytic),
        groups={group.key: group.latents for group in groups},
        counts={group.key: _count(group, sites, divergences[group.key].term) for group in groups},
        num_particles=traces.num_particles,
        latents=() if traces.enumerated else (_latents(groups, sites),),
        by_time=None if time is None else _by_time(time, sites, expect, data, groups, divergences),
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


def _by_time(
    time: TimeOf,
    sites: Sites,
    expect: Sampled | Enumerated,
    data: Mapping[Names, Term],
    groups: list[Group],
    divergences: Mapping[str, Divergence],
) -> ByTime:
    """The terms of data and latents by timestep."""
    reconstruction, kl, timeless = [], [], []
    for names, term in data.items():
        if "steps" in (site := sites.data[names[0]]):
            reconstruction.append(_timed(None, _sampled_by_time(expect, site), site))
        elif (t := _one_time(time, names, "have one term together")) is not None:
            reconstruction.append(_timed(t, term, site))
    for group in groups:
        divergence, latents = divergences[group.key], [sites.latents[n] for n in group.latents]
        if divergence.by_time is not None:
            kl.append(_timed(None, divergence.by_time, latents[0]))
        elif sequences := [site["name"] for site in latents if "steps" in site]:
            raise ValueError(
                f"site {sequences[0]!r} is a sequence in the model, but not in the guide, so that "
                "its KL has no steps: give it a SequenceDistribution in both, such as "
                "IndependentSteps; for an AutoGuide, take unrolled(model) as the model"
            )
        elif (t := _one_time(time, group.latents, "have one KL together")) is not None:
            kl.append(_timed(t, divergence.term, latents[0]))
        else:
            timeless.append(group.key)
    return by_time_of(reconstruction, kl, tuple(timeless))


def _timed(time: int | None, term: Term, site: Site) -> Timed:
    """A term of a site of the model, and where the site is not masked."""
    ones = term.value.new_ones(()).expand(term.value.shape)
    counts = scale_and_mask(scale_and_mask(ones, mask=site["mask"]), mask=_own_mask(site["fn"]))
    return Timed(time, term, Term(counts, term.plates))


def _own_mask(fn: Any) -> Mask:
    """What a distribution masks itself: by dims (T, *plates) for a sequence, else (*plates)."""
    if isinstance(fn, SequenceDistribution):
        return None if fn.step_mask is None else fn.step_mask.movedim(-1, 0)
    if isinstance(fn, Independent):
        mask, n = _own_mask(fn.base_dist), fn.reinterpreted_batch_ndims
        return mask.flatten(mask.dim() - n).any(-1) if isinstance(mask, Tensor) and n else mask
    return fn._mask if isinstance(fn, MaskedDistribution) else None


def _sampled_by_time(expect: Sampled | Enumerated, site: Site) -> Term:
    if isinstance(expect, Sampled):
        return expect.by_time(site)
    raise ValueError(
        f"site {site['name']!r} is a sequence, which has no terms by timestep where other sites "
        "are enumerated: write its steps as sites of their own"
    )


def _one_time(time: TimeOf, names: Names, why: str) -> int | None:
    """The timestep that all names share.

    Raises:
        ValueError: if they are of several.
    """
    times = {time(name) for name in names}
    if len(times) > 1:
        raise ValueError(
            f"sites {list(names)} belong to several timesteps but {why}: sample and enumerate "
            "the steps in the guide, each at its own site"
        )
    return times.pop() if times else None


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
