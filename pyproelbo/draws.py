"""Draws of a guide by rows of the data, and its density at the draws of other rows."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyproelbo.batches import Batch
from pyproelbo.collect import terms_of
from pyproelbo.local_latents import LocalLatents, run_once
from pyproelbo.rows import LatentRows, per_row
from pyproelbo.traces import Program

_PAIRS = 2**13  # of a sample and a datum, for which a guide runs at once
_ELEMENTS = 2**20  # of samples at which densities are evaluated at once


class Draws(NamedTuple):
    """One draw for each of B data, and the terms of the ELBO there, in nats.

    Attributes:
        terms: (B,) by name, float64: ``reconstruction``, ``factor``, ``kl`` of the chosen
            latents (in closed form where that is valid), ``sampled_kl`` (at the draw),
            ``other_kl`` of the other latents, ``log_q`` of the chosen ones.
        by_dim: (B, K) by name: ``mean``, the means of q(z | x) where they are known, else the
            draw; ``log_q`` at the draw where each dimension's is known; ``kl`` and ``sampled_kl``
            where, in addition, the prior's dimensions are independent; ``loc`` and ``scale``
            where q's are independent and normal.
        values: (B, ...) by the guide's site.
    """

    terms: dict[str, Tensor]
    by_dim: dict[str, Tensor]
    values: dict[str, Tensor]

    def rows(self, index: Tensor) -> "Draws":
        """Those of some rows."""
        return Draws(*({name: v[index] for name, v in part.items()} for part in self))


def draw(model: Program, guide: Program, batch: Batch, which: LocalLatents) -> Draws:
    """Run the guide on a batch, and the model on its sample."""
    traces = run_once(model, guide, batch)
    terms, sampled = terms_of(traces), terms_of(traces, "sampled")
    found = [terms.latents[0][key] for key in which.keys]
    latents = [LatentRows(latent.value, latent.q, latent.p, which.dim) for latent in found]
    plate = next(plate for plate in found[0].plates if plate.dim == which.dim)
    scale = plate.size / plate.full_size
    zero = torch.zeros(batch.size, dtype=torch.float64, device=found[0].value.device)

    def total(values: Iterable[Tensor], scale: float = scale) -> Tensor:
        return sum((per_row(value.double(), which.dim) for value in values), zero) * scale

    by_row = {
        "reconstruction": total(terms.log_likelihood.values()),
        "factor": total(terms.factors.values()),
        "kl": total(terms.kl[key] for key in which.keys),
        "sampled_kl": total(sampled.kl[key] for key in which.keys),
        "other_kl": total(kl for key, kl in terms.kl.items() if key not in which.keys),
        "log_q": sum((latent.log_q.double() for latent in latents), zero),
    }
    by_dim = {"mean": [latent.mean for latent in latents]}
    if which.has_marginals:
        by_dim["log_q"] = [latent.log_q_by_dim for latent in latents]
    if which.has_factorised_prior:
        pairs = [latent.kl_by_dim() for latent in latents]
        by_dim |= zip(("kl", "sampled_kl"), zip(*pairs, strict=True), strict=True)
    if which.is_gaussian:
        pairs = [latent.normal() for latent in latents]
        by_dim |= zip(("loc", "scale"), zip(*pairs, strict=True), strict=True)
    return Draws(
        by_row,
        {name: torch.cat(list(parts), 1) for name, parts in by_dim.items()},
        {latent.name: rows.values for latent, rows in zip(found, latents, strict=True)},
    )


def log_q_blocks(
    guide: Program, batch: Batch, which: LocalLatents, values: Mapping[str, Tensor]
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """log q(z_m | x_n) at any samples, for the rows x_n of a batch, block by block.

    Args:
        values: by the guide's site, M samples (M, ...) as :class:`Draws` has them.

    Yields:
        A slice of the samples; log q, summed over the chosen sites, (m, B); log q of each
        dimension, (m, B, K), or None where it is not known.
    """
    sites = _sites(guide, batch)
    latents = {
        name: LatentRows(sites[name]["value"], sites[name]["fn"], None, which.dim)
        for name in values
    }
    num = sum(value[0].numel() for value in values.values()) * batch.size
    rows = max(1, _ELEMENTS // num)
    if not which.is_mean_field:
        full = next(f for f in sites[next(iter(values))]["cond_indep_stack"] if f.dim == which.dim)
        limit = _PAIRS if full.full_size in (None, full.size) else min(_PAIRS, full.full_size)
        rows = max(1, limit // batch.size)
    for start in range(0, len(next(iter(values.values()))), rows):
        here = slice(start, start + rows)
        part = {name: value[here] for name, value in values.items()}
        if not which.is_mean_field:
            yield here, _at_pairs(guide, batch, part, latents), None
            continue
        log_q = sum(latents[name].log_q_at(value) for name, value in part.items())
        by_dim = None
        if which.has_marginals:
            by_dim = torch.cat([latents[n].log_q_by_dim_at(v) for n, v in part.items()], 2)
        yield here, log_q, by_dim


def _at_pairs(
    guide: Program, batch: Batch, values: Mapping[str, Tensor], latents: dict[str, LatentRows]
) -> Tensor:
    """log q where sites depend on each other: the guide runs on every pair of sample and datum."""
    num = len(next(iter(values.values())))
    paired = {
        name: value.repeat_interleave(batch.size, 0).movedim(0, latents[name].axis)
        for name, value in values.items()
    }
    sites = _sites(poutine.condition(guide, data=paired), batch.repeat(num))
    rows = [LatentRows(value, sites[n]["fn"], None, latents[n].dim) for n, value in paired.items()]
    return sum(latent.log_q for latent in rows).reshape(num, batch.size)


def _sites(guide: Program, batch: Batch) -> dict:
    return poutine.trace(guide).get_trace(*batch.args, **batch.kwargs).nodes
