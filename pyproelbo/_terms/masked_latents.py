"""Latents that only the model, or only the guide, masks."""

from pyproelbo._distributions.closed_form import as_tensor, is_same
from pyproelbo._messages.warn import warn
from pyproelbo._terms.groups import own_auxiliary
from pyproelbo._terms.masks import counted, mask_of
from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.sites import Sites


class MaskWarning(UserWarning):
    """A latent is masked only in the model or only in the guide; the message names it."""


def check_masks(sites: Sites) -> None:
    """Check that model and guide mask their latents alike.

    Raises:
        ValueError: where only one of them masks a latent.
    """
    if (found := masked_apart(sites)) is not None:
        raise ValueError(found)


def warn_of_masks(sites: Sites) -> bool:
    """Warn where only one of model and guide masks a latent; returns whether so."""
    found = masked_apart(sites)
    if found is not None:
        warn(found, MaskWarning)
    return found is not None


def masked_apart(sites: Sites) -> str | None:
    """A message on what only one of model and guide masks; None where both mask alike.

    Values of masks are read only where the two are different tensors.
    """
    for name, p in sites.latents.items():
        drawn = [sites.guide[n] for n in (name, *own_auxiliary(name, sites.guide))]
        drawn = [site for site in drawn if not is_delta(site)]
        if not drawn:  # of a joint draw, in which it has no part of its own
            joint = (n for n in sites.guide if n not in sites.latents)
            if is_delta(p) or all(is_delta(sites.guide[n]) for n in joint):
                continue
        for q in drawn or [None]:
            one_event = q is not None and q["fn"].event_dim == p["fn"].event_dim
            get = mask_of if one_event else counted
            masks = get(p), None if q is None else get(q)
            if is_same(*masks):
                continue
            model, guide = map(as_tensor, masks)
            for does, other, apart in (
                ("model", "guide", guide & ~model),
                ("guide", "model", model & ~guide),
            ):
                if apart.any():
                    return _text(name, does, other)
    return None


def _text(name: str, does: str, other: str) -> str:
    alone = "log q(z)" if other == "guide" else "-log p(z)"
    rises = ", which falls without bound as q widens" if other == "guide" else ""
    return (
        f"the {does} masks latent {name!r} where the {other} does not: its KL there is the mean of "
        f"{alone} alone{rises}, and the ELBO is not a bound on log p(x). Mask it in the {other} "
        "too, by poutine.mask(mask=...) around its site; for a site with obs_mask=m, "
        "NAME_unobserved counts where m is False, and its mask is ~m"
    )
