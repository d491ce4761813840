"""Which latents share a KL."""

from collections.abc import Container, Mapping
from typing import NamedTuple

from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.sites import Names, Sites


class Group(NamedTuple):
    """Latents that share a KL, and its parts."""

    key: str
    latents: Names
    guide: Names  # keys of log_q
    prior: tuple[Names, ...] = ()  # keys of the log-prior


def groups_of(sites: Sites, priors: list[Names]) -> list[Group]:
    """Which sites of the guide and which of the model make one KL.

    An auxiliary site of Pyro's AutoNormal and AutoStructured represents one latent, by its name.
    Any other may represent all latents that the guide derives from it (as Deltas): they form one
    group, named after the first such site.
    """
    auxiliary = {name for name in sites.guide if name not in sites.latents}
    if not auxiliary and all(len(prior) == 1 for prior in priors):  # as in most programs
        return [Group(z, (z,), (z,), ((z,),)) for z in sites.guide]
    groups = {group.key: group for group in _by_auxiliary(sites, auxiliary)}
    for prior in priors:
        if len(keys := _keys(groups, prior)) > 1:  # what latents share makes them one group
            groups = _together(groups, keys, "+".join(prior))
    of_group: dict[str, list[Names]] = {key: [] for key in groups}
    for prior in priors:
        of_group[_keys(groups, prior)[0]].append(prior)
    return [group._replace(prior=tuple(of_group[key])) for key, group in groups.items()]


def _by_auxiliary(sites: Sites, auxiliary: set[str]) -> list[Group]:
    """The latents that the guide makes from one draw: of an auxiliary site, or their own."""
    own = {z: own_auxiliary(z, auxiliary) for z in sites.guide if z in sites.latents}
    owned = {a for names in own.values() for a in names}
    shared = tuple(a for a in sites.guide if a in auxiliary and a not in owned)
    derived = [z for z in own if shared and not own[z] and is_delta(sites.guide[z])]
    groups = [Group(z, (z,), (*names, z)) for z, names in own.items() if z not in derived]
    if shared:
        groups.append(Group(shared[0], tuple(derived), (*shared, *derived)))
    return groups


def _keys(groups: Mapping[str, Group], latents: Names) -> list[str]:
    """The groups that some latents are in, in the order of the latents."""
    owner = {z: key for key, group in groups.items() for z in group.latents}
    return list(dict.fromkeys(owner[z] for z in latents))


def _together(groups: Mapping[str, Group], keys: list[str], name: str) -> dict[str, Group]:
    """The groups, of which some have become one."""
    latents = tuple(z for key in keys for z in groups[key].latents)
    guide = tuple(site for key in keys for site in groups[key].guide)
    others = {key: group for key, group in groups.items() if key not in keys}
    return {**others, name: Group(name, latents, guide)}


def own_auxiliary(latent: str, names: Container[str]) -> Names:
    """Those of ``names`` that Pyro's AutoNormal and AutoStructured have for one latent."""
    return tuple(a for a in (f"{latent}_unconstrained", f"{latent}_aux") if a in names)
