"""Programs with global latents held at a draw, which leaves those of single data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyproelbo._backend.sites import Site
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.levels import Placed
from pyproelbo._rows.noise import RowNoise
from pyproelbo._rows.runs import Runs, Use
from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.roles import is_drawn
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import Program


@dataclass(frozen=True)
class Held:
    """Model and guide at one draw of the global latents.

    Attributes:
        model, guide: with these hidden in them.
        kl: log q(w) - log p(w) at the draw, or in closed form where there is one, in nats; minus
            log p of observations that belong to no single datum.
    """

    model: Program
    guide: Program
    kl: float


def has_globals(model: Program, guide: Program, batch: Batch, plate: str | None) -> bool:
    """Whether the guide draws latents both outside and inside a plate over the data."""
    first = Runs(model, guide, batch, 0).first
    drawn = [s for s in Sites.of(first).guide.values() if is_drawn(s)]
    inside = [_is_local(site, plate, batch.size) for site in drawn]
    return any(inside) and not all(inside)


def held(
    model: Program, guide: Program, batch: Batch, plate: str | None, num: int, seed: int
) -> Iterator[Held]:
    """Both at each of ``num`` draws of the global latents of q.

    Args:
        batch: all data, given which these are drawn.
    """
    for s in range(num):
        runs = Runs(model, guide, batch, seed)
        with RowNoise(plate, 0, range(s, s + 1), seed, Use.GLOBALS):
            traces = runs.run(1)
        sites = Sites.of(traces)
        outside = partial(_is_global, plate=plate, size=batch.size)
        of_guide = {n: x for n, x in sites.guide.items() if outside(x)}
        values = {n: x["value"] for n, x in of_guide.items() if is_drawn(x)}
        of_model = {n: x["value"] for n, x in sites.latents.items() if outside(x)}
        at_guide = Placed({n: partial(_given, v) for n, v in values.items()})(guide)
        at_model = poutine.condition(model, data=of_model)
        yield Held(
            poutine.block(at_model, hide=list(of_model)),
            poutine.block(at_guide, hide=list(of_guide)),
            _kl(terms_of(traces), plate, batch.size),
        )


def _kl(terms: Terms, plate: str | None, size: int) -> float:
    def total(parts: Mapping[str, Tensor]) -> float:
        outside = (v for n, v in parts.items() if not _terms_local(terms, n, plate, size))
        return float(sum((v.sum() for v in outside), torch.zeros(())))

    return total(terms.kl) - total(terms.log_likelihood) - total(terms.factors)


def _terms_local(terms: Terms, name: str, plate: str | None, size: int) -> bool:
    names = terms.groups.get(name, (name,))
    names = [part for n in names for part in ([n] if n in terms.plates else n.split("+"))]
    return all(
        any(_fits(p.name, p.size, plate, size) for p in terms.plates.get(n, ())) for n in names
    )


def _is_local(site: Site, plate: str | None, size: int) -> bool:
    return any(_fits(p.name, p.size, plate, size) for p in site["plates"])


def _is_global(site: Site, plate: str | None, size: int) -> bool:
    return not _is_local(site, plate, size)


def _fits(name: str, found: int, plate: str | None, size: int) -> bool:
    return found == size if plate is None else name == plate


def _given(value: Tensor, _: TorchDistribution) -> Tensor:
    return value
