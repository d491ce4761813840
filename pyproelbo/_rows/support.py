"""Whether draws of a guide can be weighted: it draws every latent, on all the prior's support."""

import torch
from pyro.distributions import ImproperUniform
from torch import Tensor
from torch.distributions import Distribution

from pyproelbo._backend import rng
from pyproelbo._distributions.layers import layers
from pyproelbo._terms.groups import groups_of
from pyproelbo._terms.masked_latents import check_masks
from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.sites import Sites

_DRAWS = 100  # of the prior, that are tried


def check_weighable(sites: Sites) -> None:
    """Check that the programs' draws have weights p(x, z) / q(z | x).

    Raises:
        ValueError: for data that the model draws, for a latent that only one program masks, that
            the guide sets to a value, or that it draws from a smaller support than the prior's.
    """
    sites.check_observed()
    check_masks(sites)
    check_drawn(sites)
    check_covered(sites)


def check_drawn(sites: Sites) -> None:
    """Raise a ValueError for a latent that the guide sets to a value, as AutoDelta does."""
    for group in groups_of(sites, []):
        points = [n for n in group.latents if not is_delta(sites.latents[n])]
        if points and all(is_delta(sites.guide[name]) for name in group.guide):
            raise ValueError(
                f"the guide has one value for the latent {points[0]!r}, as AutoDelta does, but a "
                "point has no weight p(x, z) / q(z | x): draw the latent in the guide"
            )


def check_covered(sites: Sites) -> None:
    """Check that the supports of the guide's distributions contain the prior's draws.

    Otherwise no draw of the guide ever finds a part of the posterior: weights p(x, z) / q(z | x)
    have a mean below p(x), and no number shows it.

    Raises:
        ValueError: for a latent that the guide draws from a smaller support.
    """
    for name, site in sites.guide.items():
        prior = sites.latents.get(name)
        if prior is None or is_delta(site) or is_delta(prior):
            continue
        if not _covers(site["fn"], prior["fn"]):
            raise ValueError(
                f"the guide draws latent {name!r} from {_support(site['fn'])}, but the model from "
                f"{_support(prior['fn'])}: no draw of the guide finds the rest of the posterior. "
                "Give it a distribution of the model's support, as AutoGuides do"
            )


def has_improper(sites: Sites) -> bool:
    """Whether a latent has an improper prior, by ``ImproperUniform``."""
    priors = (d for site in sites.latents.values() for d in layers(site["fn"]))
    return any(isinstance(d, ImproperUniform) for d in priors)


def _covers(q: Distribution, p: Distribution) -> bool:
    support = getattr(q, "support", None)
    if support is None or support is getattr(p, "support", None):
        return True
    with torch.no_grad(), rng.put_aside():
        try:
            z = p.sample(torch.Size([_DRAWS]))
            inside = support.check(z)
        except (NotImplementedError, RuntimeError, ValueError):  # as of an improper prior
            return True
    # a few may lie on the boundary, by rounding
    return not isinstance(inside, Tensor) or float(inside.double().mean()) > 0.98


def _support(d: Distribution) -> str:
    return f"{type(d).__name__} with support {d.support}"
