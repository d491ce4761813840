"""Several draws of a guide in one run of the programs, where this changes none of them.

Vectorised particles put a dim at the left of all plates. A program that counts dims from the left
(``softmax(z, 1)``, ``z[:, i]``), joins a draw with data (``cat([z, x], -1)``), or reduces a whole
tensor (``z.norm()``, ``z.sort()``, a BatchNorm) then computes something else, possibly without an
error. Two draws at once are therefore compared with the same two draws one by one, before any are
made at once.
"""

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyproelbo._backend.kept_samples import samples_forgotten
from pyproelbo._backend.pyro_private import SOFT, is_deterministic, site_is_subsample
from pyproelbo._distributions.layers import layers
from pyproelbo._messages.warn import warn
from pyproelbo._rows.evaluating import evaluating, report
from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.roles import is_delta, is_enumerated
from pyproelbo._terms.terms import add_terms
from pyproelbo._terms.traces import Program, Site, Traces, run

_DENSITIES = ("log_likelihood", "log_prior", "log_q", "factors")


class LoopedWarning(UserWarning):
    """Draws are made one by one, since several at once differ from single draws."""


class OneSubsample(Messenger):
    """Every run sees the data that the first one has drawn: other weights are not comparable."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            msg["value"] = self._kept.get(msg["name"])  # type: ignore[typeddict-item]

    def _pyro_post_sample(self, msg: Site) -> None:
        if site_is_subsample(msg):
            self._kept[msg["name"]] = msg["value"]


def may_be_at_once(
    model: Program, guide: Program, args: tuple, kwargs: dict, first: Traces | None = None
) -> bool:
    """Whether two draws at once equal single draws; if not, a note gives the reason."""
    known = report.get()
    if known is not None and "looped" in known:  # one batch of several, or one part of a check
        return False
    reason = obstacle(model, guide, args, kwargs, first)
    if reason is None:
        return True
    if known is not None:
        known["looped"] = reason
    warn(
        "draws are made one by one, which multiplies the time by about their number, since two "
        f"draws made at once differ from two single draws: {reason}. To make them at once, let "
        "model and guide accept dims at the left of their plates: count dims from the right "
        "(softmax(z, -1), z[..., i]), and expand data before torch.cat",
        LoopedWarning,
    )
    return False


def obstacle(
    model: Program, guide: Program, args: tuple, kwargs: dict, first: Traces | None = None
) -> str | None:
    """What differs for two draws made at once, None where nothing does.

    The shape, the value and the log-density of every site are compared, up to rounding in their
    dtype, with modules in eval mode. Random number generators are restored.

    Args:
        first: a run of one draw, if there has been one.
    """
    programs = model, guide, args, kwargs
    with (
        evaluating(model, guide),
        poutine.block(),
        samples_forgotten(),
        OneSubsample(),
    ):
        if first is None:
            try:
                first = run(*programs)[0]
            except Exception:  # which is raised again where draws are made
                return None
        nesting = first.plate_nesting
        try:
            both = run(*programs, num_particles=2, max_plate_nesting=nesting)
            if any("num_samples" in site["infer"] for site in both[0].sites):
                return None  # draws in dims of enumeration, which cannot be made again
            for i, draw in enumerate([_Draw(both[0], first, i) for i in range(2)]):
                alone = run(model, draw(guide), args, kwargs, max_plate_nesting=nesting)
                _check_same(both, alone, i)
        except _Different as difference:
            return str(difference)
        except Exception as error:  # of any kind: a single draw need not raise it
            return f"there is a {type(error).__name__}, {str(error).partition(chr(10))[0]!r}"
    return None


class _Draw(Messenger):
    """The i-th of two draws of a guide, made again on its own.

    Values are unchanged. A flow without an inverse has a density only at its own draws: it makes
    the value again, from the same noise.
    """

    def __init__(self, both: Traces, first: Traces, i: int) -> None:
        super().__init__()
        self._values: dict[str, Tensor] = {}
        self._noise: dict[str, Tensor] = {}
        for name, site in both.guide_sites.items():
            if site["is_observed"] or is_delta(site) or is_enumerated(site):
                continue
            dim, like = _dim(site, both), first.guide_sites[name]["value"]
            noise = _noise_of(site)
            if noise is not None:
                self._noise[name] = _part(noise, dim, like, i)
                continue
            self._values[name] = value = _part(site["value"], dim, like, i)
            if hasattr(site["value"], SOFT):  # of which the density is
                setattr(value, SOFT, _part(getattr(site["value"], SOFT), dim, like, i))

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self._values:
            msg["value"] = self._values[msg["name"]]
        elif msg["name"] in self._noise:
            value = self._noise[msg["name"]]
            for transform in _flow(msg["fn"]).transforms:
                value = transform(value)
            msg["value"] = value


def _flow(fn: Any) -> Any:
    """The transformed distribution that is in a distribution, None where there is none."""
    return next((d for d in layers(fn) if hasattr(d, "transforms")), None)


def _noise_of(site: Site) -> Tensor | None:
    """The noise from which a flow without an inverse made its value, by its cache; else None."""
    flow, noise = _flow(site["fn"]), site["value"]
    if flow is None:
        return None
    try:
        site["fn"].log_prob(noise.clone())
    except (KeyError, NotImplementedError):
        for transform in reversed(flow.transforms):
            noise = transform.inv(noise)
        return noise
    return None


class _Different(Exception):
    """A draw among others differs from a single one."""


def _check_same(both: list[Traces], alone: list[Traces], i: int) -> None:
    """
    Raises:
        _Different: where the i-th of two draws differs from a single one.
    """
    if len(both) == 1 and not any(map(is_enumerated, both[0].sites)):
        for sites in ("guide_sites", "model_sites"):
            found, expected = getattr(both[0], sites), getattr(alone[0], sites)
            if found.keys() != expected.keys():
                names = sorted(found.keys() ^ expected.keys())
                raise _Different(f"sites {names} are only in some of the runs")
            for name, site in found.items():
                dim, value = _dim(site, both[0]), expected[name]["value"]
                _check_close(name, "value", site["value"], dim, value, i)
    terms = [add_terms([terms_of(traces, "sampled") for traces in part]) for part in (both, alone)]
    for part in _DENSITIES:
        found, expected = (getattr(each, part) for each in terms)
        for name, value in found.items():
            dim = value.dim() - 1 - int(both[0].max_plate_nesting)
            _check_close(name, "log-density", value, dim, expected[name], i)


def _dim(site: Site, both: Traces) -> int:
    """The dim of the draws in a site's value; negative where there is none."""
    if is_deterministic(site):  # all its dims are its event's, those of draws, too
        return 0
    return site["value"].dim() - site["fn"].event_dim - 1 - int(both.max_plate_nesting)


def _check_close(name: str, what: str, found: Tensor, dim: int, expected: object, i: int) -> None:
    if not isinstance(expected, Tensor):
        return
    try:
        part = _part(found, dim, expected, i)
    except (RuntimeError, IndexError) as error:
        raise _Different(
            f"the {what} of site {name!r} has shape {tuple(found.shape)}, and "
            f"{tuple(expected.shape)} by itself"
        ) from error
    if not part.is_floating_point():
        same = torch.equal(part, expected)
    else:
        near = torch.finfo(part.dtype).eps ** 0.5
        same = torch.allclose(part, expected, rtol=near, atol=near, equal_nan=True)
    if not same:
        raise _Different(f"site {name!r} has another {what}")


def _part(found: Tensor, dim: int, like: Tensor, i: int) -> Tensor:
    """The part of the i-th draw in a tensor of two, in the shape for a single draw."""
    is_of_draws = 0 <= dim < found.dim() and found.shape[dim] == 2
    is_of_draws &= found.numel() == 2 * like.numel()
    return (found.select(dim, i) if is_of_draws else found).reshape(like.shape)
