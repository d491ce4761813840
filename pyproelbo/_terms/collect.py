"""From traces to :class:`~pyproelbo.Terms`."""

from collections.abc import Mapping

from torch import Tensor

from pyproelbo._backend.pyro_private import scale_and_mask
from pyproelbo._terms.by_time import ByTime, Timed, TimeOf, by_time_of
from pyproelbo._terms.divergences import KL as KL
from pyproelbo._terms.divergences import Divergence, Divergences, Expectations
from pyproelbo._terms.enumerated import Enumerated
from pyproelbo._terms.expectations import Term, total
from pyproelbo._terms.groups import Group, groups_of
from pyproelbo._terms.masks import counted, mask_of
from pyproelbo._terms.roles import is_delta, is_drawn, is_enumerated
from pyproelbo._terms.score_function import AtDraws, Sampled
from pyproelbo._terms.sites import Names, Sites
from pyproelbo._terms.terms import Latent, Terms, Treatment, largest
from pyproelbo._terms.traces import PARTICLES, Plate, Plates, Site, Traces
from pyproelbo.sequences.base import SequenceDistribution


def terms_of(
    traces: Traces,
    kl: KL = "auto",
    time: TimeOf | None = None,
    treatment: Treatment | None = None,
) -> Terms:
    """Terms of one run of model and guide.

    Args:
        kl: "auto" takes the closed form of a KL where one is registered and valid, "analytic"
            requires it, "sampled" always takes log q - log p at the sample.
        time: the timestep of each site that is not a whole sequence; the Terms then have
            ``by_time``.
        treatment: how the gradient treats draws, where weights of several are made; the tensors are
            then the densities themselves. None for expectations.

    Raises:
        ValueError: where the model has a latent site that the guide lacks, where ``kl`` is
            "analytic" and a KL has no valid closed form, and where ``time`` is given and a term
            cannot be split by timestep.
    """
    sites = Sites.of(traces)
    expect = Enumerated(traces) if traces.enumerated else Sampled(traces)
    if treatment is not None and not traces.enumerated:
        expect = AtDraws()
    data, prior, factors = _model_terms(sites, expect)
    log_q = {name: expect.log_q(site) for name, site in sites.guide.items()}
    observed = {name: expect.log_prob(site).value for name, site in sites.observed.items()}

    groups = groups_of(sites, list(prior))
    divergence = Divergences(sites, expect, kl)
    divergences = {group.key: divergence(group, log_q, prior) for group in groups}

    plate = plate_of_data(sites, traces.num_rows)
    drawn = {name: site for name, site in sites.guide.items() if is_drawn(site)}
    plates, scales = _plates_and_scales(sites)

    return Terms(
        log_likelihood=_named(data),
        log_prior=_named(prior),
        log_q={name: term.value for name, term in log_q.items()},
        kl={name: divergence.term.value for name, divergence in divergences.items()},
        factors=_named(factors),
        guide_log_likelihood=observed,
        analytic=frozenset(n for n, divergence in divergences.items() if divergence.is_analytic),
        groups={group.key: group.latents for group in groups},
        counts={group.key: _count(group, sites, plate) for group in groups},
        num_particles=traces.num_particles,
        latents=() if traces.enumerated else (_latents(groups, sites),),
        by_time=None if time is None else _by_time(time, sites, expect, data, groups, divergences),
        plates=plates,
        scales=scales,
        drawn=frozenset(drawn),
        scored=frozenset(drawn).intersection(traces.scored),
        enumerated=frozenset(name for name, site in sites.guide.items() if is_enumerated(site)),
        draws=() if traces.enumerated else ({n: site["value"] for n, site in drawn.items()},),
        treatment=treatment,
    )


def _plates_and_scales(
    sites: Sites,
) -> tuple[dict[str, Plates], dict[str, tuple[float | Tensor, ...]]]:
    """The plates and scales of each site; for one in model and guide, the common plates."""
    plates: dict[str, Plates] = {}
    scales: dict[str, tuple[float | Tensor, ...]] = {}
    for part in sites:
        for name, site in part.items():
            if name in plates:
                plates[name] &= site["plates"]
                scales[name] = (*scales[name], site["scale"])
            else:
                plates[name], scales[name] = site["plates"], (site["scale"],)
    return plates, scales


def _named(terms: Mapping[Names, Term]) -> dict[str, Tensor]:
    return {"+".join(names): term.value for names, term in terms.items()}


def _model_terms(sites: Sites, expect: Expectations) -> list[dict[Names, Term]]:
    """log p(x | z), log p(z) and log-factors, by the names of the sites that share one."""
    observable = sites.data | sites.factors
    entangled: list[list[Site]] = []
    if isinstance(expect, Enumerated):
        entangled = expect.components(sites.enumerated, observable | sites.latents)
    summed = {site["name"] for component in entangled for site in component}

    parts: list[dict[Names, Term]] = [
        {(name,): expect.log_prob(site) for name, site in part.items() if name not in summed}
        for part in (sites.data, sites.latents, sites.factors)
    ]
    data, prior, _ = parts
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
    return parts


def _by_time(
    time: TimeOf,
    sites: Sites,
    expect: Expectations,
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
                f"site {sequences[0]!r} is a sequence in the model, but not in the guide, and its "
                "KL has no steps: give it a SequenceDistribution in both, such as "
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
    if isinstance(site["fn"], SequenceDistribution):  # by time, (T, *plates)
        own = site["fn"].step_mask
        own = None if own is None else own.movedim(-1, 0)
        ones, own_or_all = scale_and_mask(ones, mask=site["mask"]), own
    else:
        own_or_all = counted(site)
    return Timed(time, term, Term(scale_and_mask(ones, mask=own_or_all), term.plates))


def _sampled_by_time(expect: Expectations, site: Site) -> Term:
    if not isinstance(expect, Enumerated):
        return expect.by_time(site)
    raise ValueError(
        f"site {site['name']!r} is a sequence, which has no terms by timestep where other sites "
        "are enumerated: write its steps as separate sites"
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


def _count(group: Group, sites: Sites, plate: Plate | None) -> float | Tensor:
    """The number of data in the sum of a group's KL."""
    return largest(_rows(sites.latents[name], plate) for name in group.latents)


def _rows(site: Site, plate: Plate | None) -> float | Tensor:
    """The number of data of a latent, scaled and masked like it: 1 outside their plate."""
    mask = counted(site)
    size, within = 1, mask
    if plate is not None and _place(plate) in map(_place, site["plates"]):
        size = plate.size
        if isinstance(mask, Tensor) and mask.dim() >= -plate.dim:
            other = [dim for dim in range(-mask.dim(), 0) if dim != plate.dim]
            within = mask.any(dim=other) if other else mask
    if isinstance(within, Tensor):
        return size * site["scale"] * within.float().mean()
    return size * site["scale"] * float(within is not False)


def plate_of_data(sites: Sites, num_rows: int | None) -> Plate | None:
    """The plate whose rows are the data: it has latents and observed sites.

    Where there are several, it is one that subsamples; else one with as many rows as the data;
    else the outermost. None where all latents are global.
    """
    plates = [p for site in sites.latents.values() for p in _outermost_first(site)]
    if not plates:
        return None
    observed = [*sites.data.values(), *sites.factors.values()]
    seen = {_place(plate) for site in observed for plate in site["plates"]}
    plates = [plate for plate in plates if _place(plate) in seen] or plates
    marked = [plate for plate in plates if plate.size != plate.full_size]
    marked += [plate for plate in plates if plate.size == num_rows]
    return (marked or plates)[0]


def _place(plate: Plate) -> tuple[int, int]:
    """What two plates over the same rows have in common, even under two names."""
    return plate.dim, plate.size


def _outermost_first(site: Site) -> list[Plate]:
    by_name = {plate.name: plate for plate in site["plates"] if plate.name != PARTICLES}
    frames = [frame.name for frame in site["cond_indep_stack"] if frame.name in by_name]
    return [by_name[name] for name in frames]


def _latents(groups: list[Group], sites: Sites) -> dict[str, Latent]:
    """The sample of each group that the guide draws at one random site."""
    latents = {}
    for group in groups:
        drawn = [name for name in group.guide if not is_delta(sites.guide[name])]
        if len(drawn) != 1:
            continue
        site, prior = sites.guide[drawn[0]], sites.latents.get(drawn[0])
        masks = [mask_of(site), None if prior is None else mask_of(prior)]
        latents[group.key] = Latent(
            site["value"],
            site["fn"],
            None if prior is None else prior["fn"],
            site["plates"],
            site["scale"],
            None if prior is None else prior["scale"],
            any(mask is not None and mask is not True for mask in masks),
            site["name"],
        )
    return latents
