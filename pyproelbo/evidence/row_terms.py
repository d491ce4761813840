"""The terms of each datum by itself, at draws of its guide: what importance weights are made of."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from pyproelbo.batches import Batch
from pyproelbo.collect import KL, terms_of
from pyproelbo.data_plate import check_all_in_plate, data_plate
from pyproelbo.terms import Terms
from pyproelbo.traces import Plate, Program, Traces, run

ROWS = 2560  # of draws of a batch, that are made at once


class RowTerms(NamedTuple):
    """Log-densities of each of B data at S draws of the guide, (S, B) each, in nats.

    Attributes:
        log_likelihood: log p(x | z), with the model's log-factors.
        log_prior: log p(z).
        log_q: log q(z | x).
        kl: KL(q(z | x) || p(z)), in closed form where there is one and it was asked for.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor
    kl: Tensor

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z)."""
        return self.log_likelihood + self.log_prior

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z | x)."""
        return self.log_joint - self.log_q


class RowDraws:
    """Draws of a guide for a batch of data, one plate over which has all sites.

    Raises:
        ValueError: for a latent or data outside of the plate, for enumeration, for densities
            that something else than the plate scales.
    """

    def __init__(self, model: Program, guide: Program, batch: Batch, plate: str | None) -> None:
        self._run = lambda **kwargs: run(model, guide, batch.args, batch.kwargs, **kwargs)
        first = self._run()
        terms = _terms(first, "sampled")
        latents = {n: s["plates"] for n, s in first[0].guide_sites.items() if n in terms.log_q}
        self._plate = data_plate(latents, plate, batch.size)
        self._nesting, self._size = first[0].plate_nesting, batch.size
        check_all_in_plate(terms, self._plate, batch.size)
        _check_scales(first[0], self._plate)

    def chunks(self, num: int, chunk: int | None = None, kl: KL = "sampled") -> Iterator[RowTerms]:
        """``num`` draws for each datum, at most ``chunk`` at a time."""
        chunk = max(1, ROWS // self._size) if chunk is None else chunk
        for start in range(0, num, chunk):
            yield self.draw(min(chunk, num - start), kl)

    def draw(self, num: int, kl: KL = "sampled") -> RowTerms:
        """``num`` draws for each datum, as vectorised particles."""
        terms = _terms(self._run(num_particles=num, max_plate_nesting=self._nesting), kl)
        fit = [*terms.log_likelihood.values(), *terms.factors.values()]
        parts = (fit, terms.log_prior.values(), terms.log_q.values(), terms.kl.values())
        return RowTerms(*(self._by_row(part, num) for part in parts))

    def _by_row(self, values: Iterable[Tensor], num: int) -> Tensor:
        """The sum of tensors over all dims but those of draws and rows: (num, B), unscaled."""
        total: Any = 0.0
        for value in values:
            rows = value.dim() + self._plate.dim
            keep = {0, rows} if num > 1 else {rows}
            drop = [dim for dim in range(value.dim()) if dim not in keep]
            total = total + (value.sum(drop) if drop else value)
        total = total / (self._plate.full_size / self._plate.size)
        return total if num > 1 else total.unsqueeze(0)


def _terms(runs: list[Traces], kl: KL) -> Terms:
    if len(runs) > 1 or any("_enumerate_dim" in s["infer"] for s in runs[0].guide_sites.values()):
        raise ValueError(
            "the guide enumerates its discrete latents, but importance weights are of samples: "
            "take config_enumerate or infer={'enumerate': ...} off the guide"
        )
    return terms_of(runs[0], kl)


def _check_scales(traces: Traces, plate: Plate) -> None:
    expected = plate.full_size / plate.size
    for site in traces.sites:
        scale = site["scale"]
        if isinstance(scale, Tensor):
            scale = scale.item() if scale.numel() == 1 else math.nan
        if not math.isclose(scale, expected, rel_tol=1e-6):
            raise ValueError(
                f"site {site['name']!r} has its density scaled by {scale}, where plate "
                f"{plate.name!r} gives {expected}: an evidence is of densities that only the plate "
                "over the data scales, in model and guide"
            )
