"""Draws of a guide by rows of the data, and the terms of the ELBO there."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._rows.batches import Batch
from pyproelbo._rows.latent_rows import LatentRows, per_row
from pyproelbo._rows.runs import Runs
from pyproelbo._surgery.local_latents import LocalLatents, checked
from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.traces import Program, Traces

# Where each datum has one draw, every fourth block of this many rows is drawn a second time: the
# difference of the two draws shows the Monte Carlo noise, apart from the spread of the data.
_BLOCK = 256


class DataDraws(NamedTuple):
    """One draw for each of B data, and the terms of the ELBO there, in nats.

    Attributes:
        rows: (B,), the indices of the data.
        terms: by name, float64: ``reconstruction``, ``factor``, and ``log_q`` of the chosen
            latents, (B,); ``kl`` of each latent (in closed form where that is valid) and
            ``sampled_kl`` (at the draw), (B, L), the chosen ones first.
        by_dim: (B, K) by name: ``z``, the draw; ``mean``, the means of q(z | x) where they are
            known, else the draw; ``log_q`` where each dimension's is known; ``kl`` and
            ``sampled_kl`` where, in addition, the prior's dimensions are independent; ``loc`` and
            ``scale`` where q's are independent and normal.
        values: the draw by the guide's site, (B, ...): of the chosen latents, then of those that
            they are conditional on; none where q's dimensions are independent and normal.
    """

    rows: Tensor
    terms: dict[str, Tensor]
    by_dim: dict[str, Tensor]
    values: dict[str, Tensor]

    def at(self, rows: Tensor) -> "DataDraws":
        """The draws of some of the data."""
        number, *parts = self
        return DataDraws(number[rows], *({n: v[rows] for n, v in part.items()} for part in parts))


def draw(
    model: Program, guide: Program, batch: Batch, which: LocalLatents, num_samples: int, seed: int
) -> list[DataDraws | None]:
    """``num_samples`` draws for a batch; if one, a second draw for a part of the data.

    None if that part has no data of the batch.
    """
    runs = Runs(model, guide, batch, seed)
    drawn: list[DataDraws | None] = []
    for s in range(max(num_samples, 2)):
        again = (torch.arange(batch.start, batch.start + batch.size) // _BLOCK % 4 == 0).cpu()
        found = None
        if s < num_samples or again.any():
            found = _draw(checked(partial(_one, runs, which.plate, s), batch), batch, which)
            found = found if s < num_samples else found.at(again)
        drawn.append(found)
    return drawn


def of_data(draws: Sequence[DataDraws], rows: Tensor) -> list[DataDraws]:
    """Those of the draws that are of some data, by the indices of these."""
    rows = rows.to(draws[0].rows.device)
    return [part.at(torch.isin(part.rows, rows)) for part in draws]


def joined(parts: Iterable[list[DataDraws | None]]) -> list[DataDraws]:
    """The draws of several batches, draw by draw."""
    columns = zip(*parts, strict=True)
    return [concatenated([part for part in column if part is not None]) for column in columns]


def _one(runs: Runs, plate: str, draw: int) -> Traces:
    return runs.traces(plate, range(draw, draw + 1))[0]


def _draw(traces: Traces, batch: Batch, which: LocalLatents) -> DataDraws:
    """One draw for each datum of a batch."""
    terms, sampled = terms_of(traces), terms_of(traces, "sampled")
    found = [terms.latents[0][key] for key in (*which.keys, *which.given)]
    all_rows = [LatentRows(latent.value, latent.q, latent.p, which.dim) for latent in found]
    latents = all_rows[: len(which.keys)]
    plate = next(plate for plate in found[0].plates if plate.dim == which.dim)
    unscaled = plate.size / plate.full_size
    zero = torch.zeros(batch.size, dtype=torch.float64, device=found[0].value.device)
    keys = [*which.keys, *(key for key in terms.kl if key not in which.keys)]

    def rows(value: Tensor) -> Tensor:
        return per_row(value.double(), which.dim) * unscaled

    by_row = {
        "reconstruction": sum(map(rows, terms.log_likelihood.values()), zero),
        "factor": sum(map(rows, terms.factors.values()), zero),
        "kl": torch.stack([rows(terms.kl[key]) for key in keys], 1),
        "sampled_kl": torch.stack([rows(sampled.kl[key]) for key in keys], 1),
        "log_q": sum((latent.log_q.double() for latent in latents), zero),
    }
    by_dim: dict[str, Iterable[Tensor]] = {
        "z": [latent.values.reshape(batch.size, -1) for latent in latents],
        "mean": [latent.mean for latent in latents],
    }
    if which.has_marginals:
        by_dim["log_q"] = [latent.log_q_by_dim for latent in latents]
    if which.has_factorised_prior:
        pairs = [latent.kl_by_dim() for latent in latents]
        by_dim["kl"], by_dim["sampled_kl"] = zip(*pairs, strict=True)
    if which.is_gaussian:
        pairs = [latent.normal() for latent in latents]
        by_dim["loc"], by_dim["scale"] = zip(*pairs, strict=True)
    values = {latent.name: part.values for latent, part in zip(found, all_rows, strict=True)}
    return DataDraws(
        torch.arange(batch.start, batch.start + batch.size, device=zero.device),
        by_row,
        {name: torch.cat(list(parts), 1) for name, parts in by_dim.items()},
        {} if which.is_gaussian else values,
    )


def concatenated(parts: Sequence[DataDraws]) -> DataDraws:
    """The draws of several groups of data, one after another."""
    rows, *fields = zip(*parts, strict=True)
    joined = ({n: torch.cat([part[n] for part in field]) for n in field[0]} for field in fields)
    return DataDraws(torch.cat(rows), *joined)
