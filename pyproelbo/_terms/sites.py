"""The sites of two traces by their role in the ELBO."""

from collections.abc import Container
from typing import NamedTuple

from pyro.distributions import MaskedDistribution
from pyro.poutine.util import site_is_factor

from pyproelbo._terms.roles import is_data, is_delta
from pyproelbo._terms.traces import Site, Traces

Names = tuple[str, ...]


class Sites(NamedTuple):
    """The sites of two traces by role; sites that add nothing (deterministic ones) are gone."""

    data: dict[str, Site]
    factors: dict[str, Site]
    latents: dict[str, Site]  # of the model, in the model's order
    enumerated: dict[str, Site]  # latents that the model sums out by itself
    guide: dict[str, Site]  # latents and auxiliary sites, in the guide's order
    observed: dict[str, Site]  # what the guide observes

    @classmethod
    def of(cls, traces: Traces) -> "Sites":
        guide = {n: s for n, s in traces.guide_sites.items() if not _is_deterministic(s)}
        observed = {n: s for n, s in guide.items() if is_data(s)}
        guide = {n: s for n, s in guide.items() if n not in observed}
        sites = cls({}, {}, {}, {}, guide, observed)
        for name, site in traces.model_sites.items():
            if site["is_observed"]:
                if site_is_factor(site) or (is_delta(site) and not _is_masked_out(site)):
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

    def check_observed(self) -> None:
        """Whether what the guide observes is data of the model, and no latent.

        Raises:
            ValueError: where it is not, as where model and guide are swapped.
        """
        for name in self.observed:
            if name in self.data or (name not in self.latents and (self.data or self.factors)):
                continue
            does = "draws" if name in self.latents else "does not have, as it has no data at all"
            raise ValueError(
                f"the guide observes {name!r}, which the model {does}: are model and guide "
                "swapped? What is observed belongs to the model"
            )


def _is_masked_out(site: Site) -> bool:
    fn = site["fn"]
    return site["mask"] is False or (isinstance(fn, MaskedDistribution) and fn._mask is False)


def _is_deterministic(site: Site) -> bool:
    """Whether this is a value put into the trace, as pyro.deterministic does."""
    return site["is_observed"] and _is_masked_out(site)


class Group(NamedTuple):
    """Latents that have one KL together, and what it is made of."""

    key: str
    latents: Names
    guide: Names  # keys of log_q
    prior: tuple[Names, ...] = ()  # keys of the log-prior


def groups_of(sites: Sites, priors: list[Names]) -> list[Group]:
    """Which sites of the guide and which of the model make one KL.

    An auxiliary site of Pyro's AutoNormal and AutoStructured stands for one latent, by its
    name. Any other may stand for all latents that the guide derives from it (as a Delta): they
    are one group, named after the first such site.
    """
    auxiliary = {name for name in sites.guide if name not in sites.latents}
    if not auxiliary and all(len(prior) == 1 for prior in priors):  # as in most programs
        return [Group(z, (z,), (z,), ((z,),)) for z in sites.guide]
    own = {z: own_auxiliary(z, auxiliary) for z in sites.guide if z in sites.latents}
    owned = {a for names in own.values() for a in names}
    shared = tuple(a for a in sites.guide if a in auxiliary and a not in owned)
    derived = [z for z in own if shared and not own[z] and is_delta(sites.guide[z])]
    groups = {z: Group(z, (z,), (*names, z)) for z, names in own.items()}
    for z in derived:
        del groups[z]
    if shared:
        groups[shared[0]] = Group(shared[0], tuple(derived), (*shared, *derived))

    owner = {z: key for key, group in groups.items() for z in group.latents}
    priors_of: dict[str, list[Names]] = {key: [] for key in groups}
    for prior in priors:
        keys = list(dict.fromkeys(owner[z] for z in prior))
        key = keys[0] if len(keys) == 1 else "+".join(prior)
        if len(keys) > 1:  # a prior that several latents share makes them one group
            together = [groups.pop(k) for k in keys]
            latents = tuple(z for group in together for z in group.latents)
            guide = tuple(name for group in together for name in group.guide)
            groups[key] = Group(key, latents, guide)
            priors_of[key] = [names for k in keys for names in priors_of.pop(k)]
            owner |= dict.fromkeys(latents, key)
        priors_of[key].append(prior)
    return [group._replace(prior=tuple(priors_of[key])) for key, group in groups.items()]


def own_auxiliary(latent: str, names: Container[str]) -> Names:
    """Those of ``names`` that Pyro's AutoNormal and AutoStructured have for one latent."""
    return tuple(a for a in (f"{latent}_unconstrained", f"{latent}_aux") if a in names)
