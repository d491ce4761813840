"""The role of a site."""

from pyro.distributions import Delta

from pyproelbo._backend.pyro_private import is_enumerated as is_enumerated
from pyproelbo._backend.pyro_private import site_is_factor
from pyproelbo._backend.sites import Site as Site
from pyproelbo._distributions.layers import innermost


def is_delta(site: Site) -> bool:
    """Whether a site's value is given: a Delta, whatever is wrapped around it."""
    return isinstance(innermost(site["fn"]), Delta)


def is_drawn(site: Site) -> bool:
    """Whether a site is drawn at random: not observed, not a function of others, not summed out."""
    return not (site["is_observed"] or is_delta(site) or is_enumerated(site))


def is_data(site: Site) -> bool:
    """Whether a value is an observation from a distribution, not a factor or a Delta."""
    return site["is_observed"] and not (site_is_factor(site) or is_delta(site))
