"""The terms of each row, at draws of its guide, from which importance weights are made."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._distributions.sobol import Points
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.plate import (
    by_row,
    check_all_in_plate,
    check_sampled,
    check_scales,
    data_plate,
)
from pyproelbo._rows.report_data import Unit
from pyproelbo._rows.runs import Runs, Use, in_chunks
from pyproelbo._rows.support import check_weighable, has_improper
from pyproelbo._terms.collect import KL, terms_of
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import Program, Traces


class RowTerms(NamedTuple):
    """Log-densities of each of B rows at S draws of the guide, (S, B) each, in nats.

    Attributes:
        log_likelihood: log p(x | z).
        log_factor: the model's log-factors.
        log_prior: log p(z).
        log_q: log q(z | x).
        kl: KL(q(z | x) || p(z)), in closed form where there is one and it was requested.
    """

    log_likelihood: Tensor
    log_factor: Tensor
    log_prior: Tensor
    log_q: Tensor
    kl: Tensor

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z), with the log-factors."""
        return self.log_likelihood + self.log_factor + self.log_prior

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z | x)."""
        return self.log_joint - self.log_q


class RowDraws:
    """Draws of a guide for a batch of rows, where a row is a datum or the whole data set.

    Attributes:
        plate: the plate over the data, which has all sites; None where all data are one row.
        num_rows: the number of rows.
        rows: the place of the batch in the whole data.
        unit: the meaning of a row.
        is_improper: whether a prior is, which gives log p(x) an arbitrary constant.
        points: the Sobol points that draws are made from; None where they are independent.

    Raises:
        ValueError: for a latent or data outside the plate, for a latent that is not a draw, for
            enumeration, for densities scaled by anything other than the plate, for a guide that
            does not cover the model's support.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        batch: Batch,
        unit: Unit,
        seed: int,
        points: Points | None = None,
    ) -> None:
        self._runs = Runs(model, guide, batch, seed, points)
        self.seed, self.unit, self.points, first = seed, unit, points, self._runs.first
        sites = Sites.of(first)
        check_weighable(sites)
        terms = _terms(first, "sampled")
        self.plate, self.num_rows = None, batch.size
        self.rows = slice(batch.start, batch.start + batch.size)
        self.is_improper = has_improper(sites)
        self._numbers = max(max(s["value"].numel(), s["log_prob"].numel()) for s in first.sites)
        self._size = max(s["log_prob"].numel() for s in first.sites)
        self._device = next(s["log_prob"].device for s in first.sites)
        if unit.per == "datum":
            latents = {n: s["plates"] for n, s in first.guide_sites.items() if n in terms.log_q}
            if not latents:  # the model sums all of them out, or has none
                latents = {n: s["plates"] for n, s in (sites.data | sites.factors).items()}
            self.plate = data_plate(latents, unit.plate, batch.size)
            self._size = batch.size
            check_all_in_plate(terms, self.plate, batch.size)
        check_scales(terms.scales, self.plate)
        self._log_weights: dict[int, Tensor] = {}

    def log_weights(self, num: int, chunk: int | None) -> Tensor:
        """The log-weights of the first ``num`` draws, (num, B): made once, and kept."""
        if num not in self._log_weights:
            parts = self.chunks(num, chunk, Use.WEIGHTS)
            self._log_weights[num] = torch.cat([part.log_weight.double() for part in parts])
        return self._log_weights[num]

    def ranges(self, num: int, chunk: int | None = None) -> Iterator[range]:
        """The indices of ``num`` draws for each row, grouped as they are made at once."""
        return in_chunks(num, chunk, self._size, self._numbers)

    def chunks(
        self, num: int, chunk: int | None, use: Use, kl: KL = "sampled"
    ) -> Iterator[RowTerms]:
        """``num`` draws for each row, at most ``chunk`` at a time."""
        return (self.at(draws, use, kl=kl) for draws in self.ranges(num, chunk))

    def at(self, draws: range, *use: int, kl: KL = "sampled") -> RowTerms:
        """The draws with these indices for each row."""
        parts = [self.terms(traces, kl) for traces in self.traces(draws, *use)]
        return RowTerms(*(torch.cat(part) for part in zip(*parts, strict=True)))

    @property
    def first(self) -> Traces:
        """A run of one draw, which has no index."""
        return self._runs.first

    @property
    def at_once(self) -> bool:
        """Whether several draws may be made in one run."""
        return self._runs.at_once

    def run(self, num: int) -> Traces:
        """One run of ``num`` draws, which surrounding handlers make."""
        return self._runs.run(num)

    def traces(self, draws: range, *use: int) -> list[Traces]:
        """The runs of draws with these indices, as vectorised particles where that is correct."""
        return self._runs.traces(None if self.plate is None else self.plate.name, draws, *use)

    def terms(self, traces: Traces, kl: KL = "sampled") -> RowTerms:
        """The terms of a run."""
        terms, num = _terms(traces, kl), traces.num_particles
        parts = (terms.log_likelihood, terms.factors, terms.log_prior, terms.log_q, terms.kl)
        return RowTerms(*(self._by_row(part.values(), num) for part in parts))

    def _by_row(self, values: Iterable[Tensor], num: int) -> Tensor:
        value = by_row(values, num, self.plate).to(self._device)
        return value.expand(num, self.num_rows)


def _terms(traces: Traces, kl: KL) -> Terms:
    terms = terms_of(traces, kl)
    check_sampled(terms)
    return terms
