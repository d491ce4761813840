"""Where a site counts: one notion of masking for handlers, distributions and sequences."""

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, transform_to

from pyproelbo._backend.pyro_private import mask_of as masked_by
from pyproelbo._distributions.closed_form import Mask
from pyproelbo._terms.roles import Site
from pyproelbo.sequences.base import SequenceDistribution


def mask_of(site: Site) -> Mask:
    """Where a site counts, by ``poutine.mask`` and by its distribution.

    Returns:
        With dims (*plates, *event), or broadcastable to them; None where it counts everywhere,
        False where nowhere.
    """
    return _both(_with_event(site["mask"], site["fn"].event_dim), _own(site["fn"]))


def counts_nowhere(site: Site) -> bool:
    """Whether a mask certainly leaves out all of a site, without reading values."""
    return site["mask"] is False or mask_of(site) is False


def counted(site: Site) -> Mask:
    """Where any part of a site counts, by the elements of its plates: (*plates), None or False."""
    mask, num = mask_of(site), site["fn"].event_dim
    if not isinstance(mask, Tensor) or not num:
        return mask
    mask = mask.expand(torch.broadcast_shapes(mask.shape, (1,) * num))
    return mask.flatten(mask.dim() - num).any(-1)


def filled(site: Site) -> Tensor:
    """The value of a site, with numbers where a mask leaves out observed values.

    These may be NaN, which a mask removes from a density, but not from its gradient.
    """
    value = site["value"]
    is_number = isinstance(value, Tensor) and value.is_floating_point()
    if not (site["is_observed"] and is_number):
        return value
    mask, support = mask_of(site), getattr(site["fn"], "support", None)
    if (
        not isinstance(mask, Tensor)
        or support is None
        or isinstance(site["fn"], SequenceDistribution)
    ):
        return value
    try:
        filler = transform_to(support)(torch.zeros_like(value)).detach()
    except (NotImplementedError, ValueError):
        filler = torch.zeros_like(value)
    return torch.where(mask, value, filler) if filler.shape == value.shape else value


def _own(fn: Distribution) -> Mask:
    """A distribution's own mask, with its batch and event dims."""
    if isinstance(fn, SequenceDistribution):
        return _with_event(fn.step_mask, fn.event_dim - 1)
    if isinstance(fn, Independent):  # whose dims are those of what it wraps
        return _own(fn.base_dist)
    if isinstance(fn, MaskedDistribution):
        return _both(_with_event(masked_by(fn), fn.event_dim), _own(fn.base_dist))
    return None


def _with_event(mask: Mask, num: int) -> Mask:
    return mask.reshape(mask.shape + (1,) * num) if isinstance(mask, Tensor) else mask


def _both(a: Mask, b: Mask) -> Mask:
    if a is False or b is False:
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a & b
    return a if isinstance(a, Tensor) else b if isinstance(b, Tensor) else None
