"""Which latents have one KL together."""

from collections.abc import Container
from typing import NamedTuple

from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.sites import Names, Sites


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
