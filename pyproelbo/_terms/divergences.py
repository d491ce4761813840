"""The KL of each latent, in closed form where the programs around it allow one."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyproelbo._backend.pyro_private import scale_and_mask
from pyproelbo._distributions.closed_form import Mask, as_tensor, closed_form, is_same
from pyproelbo._terms.enumerated import Enumerated
from pyproelbo._terms.expectations import Term, total
from pyproelbo._terms.groups import Group
from pyproelbo._terms.roles import is_enumerated
from pyproelbo._terms.score_function import AtDraws, Sampled
from pyproelbo._terms.sites import Names, Sites
from pyproelbo._terms.traces import Site

KL = Literal["auto", "analytic", "sampled"]
Expectations = Sampled | AtDraws | Enumerated


class Divergence(NamedTuple):
    """E_q[log q(z | x) - log p(z)] of a group of latents.

    Attributes:
        term: its estimate.
        is_analytic: whether it is in closed form, given what was sampled before z.
        by_time: the KL of each step, given earlier steps, with dims (T, *plates). None where the
            latent is not a sequence.
    """

    term: Term
    is_analytic: bool
    by_time: Term | None = None


class Divergences:
    """The KL of each group of two programs' latents.

    Args:
        sites: the sites of the programs.
        expect: makes an expectation from a value at the sample.
        kl: "auto" takes the closed form where one is registered and valid, "analytic" requires it,
            "sampled" always takes log q - log p at the sample.
    """

    def __init__(self, sites: Sites, expect: Expectations, kl: KL) -> None:
        self._sites, self._expect, self._kl = sites, expect, kl
        self._in_order = _in_order(sites)

    def __call__(
        self, group: Group, log_q: Mapping[str, Term], prior: Mapping[Names, Term]
    ) -> Divergence:
        """The KL of one group, from the terms of its sites.

        Raises:
            ValueError: where a closed form is required and none is valid.
        """
        q, p = (part.get(group.key) for part in (self._sites.guide, self._sites.latents))
        by_time = None if isinstance(self._expect, Enumerated) else self._expect.by_time
        alone = group.guide == (group.key,) and group.prior == ((group.key,),)
        is_sequence = by_time is not None and alone and _is_sequence(q) and _is_sequence(p)

        def sampled() -> Term:
            if by_time is not None and is_sequence:
                assert q is not None and p is not None
                return total([by_time(q), -by_time(p)], leading=1)
            parts = [log_q[name] for name in group.guide]
            return total([*parts, *(-prior[names] for names in group.prior)])

        allowed = self._kl != "sampled" and not self._obstacle(group)
        exact = None
        if allowed and q is not None and p is not None:
            exact = self._closed_form(q, p, is_sequence, sampled)
        if exact is None and self._kl == "analytic" and not self._is_enumerated(group):
            raise ValueError(self._why_not_analytic(group))
        term = sampled() if exact is None else exact
        if is_sequence:
            return Divergence(Term(term.value.sum(0), term.plates), exact is not None, term)
        return Divergence(term, exact is not None)

    def _closed_form(
        self, q: Site, p: Site, is_sequence: bool, sampled: Callable[[], Term]
    ) -> Term | None:
        """The closed form where model and guide mask alike, the sampled one elsewhere."""
        if is_sequence:
            # a step's KL depends on the steps before, so that their scores count
            kl, before = closed_form(q["steps"], p["steps"]), None
            kl = None if kl is None else kl.movedim(-1, 0)
        else:
            kl, before = closed_form(q["fn"], p["fn"]), q["name"]
        if kl is None:
            return None
        mask = _mask(q)
        value = self._expect(scale_and_mask(kl, q["scale"], mask), p, before=before)
        if not _have_one_mask(q, p):
            if isinstance(self._expect, Enumerated):
                return None
            value = torch.where(as_tensor(mask) == as_tensor(_mask(p)), value, sampled().value)
        return Term(value, p["plates"])

    def _obstacle(self, group: Group) -> str | None:
        """What in the programs prevents a closed form, None where nothing does."""
        sites = self._sites
        if len(group.guide) > 1 or group.key not in sites.latents:
            return "its sample is derived from an auxiliary site of the guide"
        if group.prior != ((group.key,),):
            return "the model sums a discrete site out of its prior"
        if group.key not in self._in_order:
            return (
                "the model samples sites before it that the guide samples after it; give both the "
                "same order"
            )
        q, p = sites.guide[group.key], sites.latents[group.key]
        if not (is_same(q["scale"], p["scale"]) and _may_mask_alike(q["mask"], p["mask"])):
            return "model and guide scale or mask it differently"
        if q["plates"] != p["plates"]:
            return "model and guide have it in different plates"
        return None

    def _why_not_analytic(self, group: Group) -> str:
        reason = self._obstacle(group)
        if reason is None:
            pair = (self._sites.guide[group.key], self._sites.latents[group.key])
            q, p = (type(site.get("steps", site["fn"])).__name__ for site in pair)
            reason = f"none is known that is valid for {q} against {p}"
        return (
            f"kl='analytic', but the KL of site {group.key!r} has no closed form: {reason}. Use "
            "kl='auto' to sample this one"
        )

    def _is_enumerated(self, group: Group) -> bool:
        """Whether the KL is exact because the guide enumerates."""
        return all(is_enumerated(self._sites.guide[name]) for name in group.guide)


def _in_order(sites: Sites) -> set[str]:
    """Latents for which the guide samples no latent later that the model samples earlier.

    Only then are a latent's parents in the model certainly not its descendants in the guide, and
    E_q[log q(z) - log p(z)] is the closed-form KL given what was sampled before z.
    """
    position = {name: i for i, name in enumerate(sites.guide)}
    latest, names = -1, set()
    for name in sites.latents:
        if position[name] > latest:
            latest = position[name]
            names.add(name)
    return names


def _is_sequence(site: Site | None) -> bool:
    return site is not None and "steps" in site


def _mask(site: Site) -> Mask:
    """What masks a site: for a sequence of dims (T, *plates)."""
    mask, own = site["mask"], site["fn"].step_mask if _is_sequence(site) else None
    if own is None:
        return mask
    own = own.movedim(-1, 0)
    return own if mask is None else own & mask


def _have_one_mask(q: Site, p: Site) -> bool:
    own = (site["fn"].step_mask if _is_sequence(site) else None for site in (q, p))
    return is_same(q["mask"], p["mask"]) and is_same(*own)


def _may_mask_alike(a: Mask, b: Mask) -> bool:
    return is_same(a, b) or (isinstance(a, Tensor) and isinstance(b, Tensor))
