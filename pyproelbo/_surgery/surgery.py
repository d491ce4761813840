r"""ELBO surgery: where the KL goes, on the whole data set.

Hoffman & Johnson (2016), "ELBO surgery: yet another way to carve up the variational evidence
lower bound", take the average KL apart at the aggregate posterior q(z) = (1/N) sum_n q(z | x_n):

    (1/N) sum_n KL(q(z | x_n) || p(z)) = I(n; z) + KL(q(z) || p(z)),

the mutual information between a datum's number and its code, and the marginal KL. Where the
prior's dimensions are independent, Chen et al. (2018) take the latter apart in turn:

    KL(q(z) || p(z)) = KL(q(z) || prod_k q(z_k)) + sum_k KL(q(z_k) || p(z_k)),

the total correlation and the dimension-wise KL.

A hierarchical guide draws z1 given another latent z2, so that q(z1 | x) is not known. Both
jointly can be taken apart, and z2, and z1 given z2:

    (1/N) sum_n E KL(q(z1 | x_n, z2) || p(z1 | z2))
        = I(n; z1 | z2) + E KL(q(z1 | z2) || p(z1 | z2)),    q(z1 | z2) = q(z1, z2) / q(z2).

By the chain rule each part of both is the sum of those of the two levels, so that, say,
I(n; z1, z2) = I(n; z2) + I(n; z1 | z2).
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import length_hint
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from pyproelbo._messages.arguments import check_counts, check_names, check_shared
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Row, Table, row
from pyproelbo._rows.batches import Arguments, Batch, ReportData
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.passes import bar, by_part, data_until
from pyproelbo._rows.report_data import batches_of, first_rows
from pyproelbo._surgery.draws import DataDraws, draw, joined
from pyproelbo._surgery.estimates import estimates_of
from pyproelbo._surgery.guide_aggregate import DataPart, Sums, data_parts
from pyproelbo._surgery.held_globals import has_globals, held
from pyproelbo._surgery.local_latents import LocalLatents, local_latents
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray

COLLAPSED = 0.1  # nats of average KL, below which z is taken to tell nothing of x


@dataclass(frozen=True, eq=False, repr=False)
class Surgery(Result):
    """The ELBO of a data set and where its KL goes: nats per datum, means over N data.

    Exactly, whatever the Monte Carlo error: ``elbo = reconstruction + factor -
    mutual_information - marginal_kl - other_kl``; ``average_kl = mutual_information +
    marginal_kl``; ``marginal_kl = total_correlation + dimension_wise_kl``.

    Attributes:
        elbo: the evidence lower bound.
        reconstruction: E_q[log p(x | z)].
        average_kl: (1/N) sum_n KL(q(z | x_n) || p(z)).
        mutual_information: I(n; z), how much a code tells which datum it is of; at most
            ``log_n``.
        marginal_kl: KL(q(z) || p(z)), what of the average KL is not of single data.
        log_n: log N.
        kl_per_dim: (K,), (1/N) sum_n KL(q(z_k | x_n) || p(z_k)); None like the next three.
        marginal_kl_per_dim: (K,), KL(q(z_k) || p(z_k)).
        total_correlation: KL(q(z) || prod_k q(z_k)), how far the dimensions of the aggregate
            posterior are from independent. None where q(z_k | x) is not known, as for a flow.
        dimension_wise_kl: sum_k KL(q(z_k) || p(z_k)). None, like ``kl_per_dim`` and
            ``marginal_kl_per_dim``, also where the prior's dimensions are not independent.
        active_units: (K,), whether the posterior mean of a dimension varies over the data with
            a variance above 0.01 (Burda et al. 2016). None for a latent without a mean.
        num_data: N.
        num_samples: draws of the guide per datum.
        stderr: the Monte Carlo standard error of each of the above, by name, from the draws of
            the guide at these data; 0 where nothing was sampled.
        other_kl: the KL of latents of single data that ``site`` leaves out.
        global_kl: KL(q(w) || p(w)) / N of latents w that all data share, less what of the data is
            of no single datum; 0 where there are none. The ELBO is then ``reconstruction + factor
            - mutual_information - marginal_kl - other_kl - global_kl``.
        num_globals: over how many draws of w all numbers are means; 0 where there are none.
        factor: log-factors of ``pyro.factor``.
        dims: the labels of the K dimensions, such as "z[0]".
        codes: (N, K), one draw of z for each datum, in the order of the data.
        given: latents u that z is taken given. ``average_kl`` is then (1/N) sum_n E KL(q(z | x_n,
            u) || p(z | u)), ``mutual_information`` I(n; z | u) and ``marginal_kl`` E KL(q(z | u)
            || p(z | u)); what else speaks of dimensions, but ``active_units``, is None.
    """

    elbo: float
    reconstruction: float
    average_kl: float
    mutual_information: float
    marginal_kl: float
    log_n: float
    kl_per_dim: Tensor | None
    marginal_kl_per_dim: Tensor | None
    total_correlation: float | None
    dimension_wise_kl: float | None
    active_units: Tensor | None
    num_data: int
    num_samples: int
    stderr: Mapping[str, float | Tensor]
    other_kl: float = 0.0
    global_kl: float = 0.0
    num_globals: int = 0
    factor: float = 0.0
    dims: tuple[str, ...] = ()
    codes: Tensor = field(default_factory=lambda: torch.empty(0, 0), repr=False)
    given: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What the numbers say about the posterior, in sentences; none where nothing stands out."""
        return _notes(self)

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset``: each number by its name, its standard error as ``<name>_stderr``.

        What is there for each dimension has the dim "latent_dim", with ``dims`` as coordinates.
        """
        import xarray

        values: dict[str, Any] = {}
        for name in (*_SCALARS, "log_n", *_VECTORS, "active_units"):
            value = getattr(self, name)
            if value is None:
                continue
            dims = ("latent_dim",) if isinstance(value, Tensor) else ()
            units = {} if name == "active_units" else {"units": "nats per datum"}
            values[name] = (dims, np.asarray(value), units)
            if name in self.stderr:
                values[f"{name}_stderr"] = (dims, np.asarray(self.stderr[name]), units)
        attributes = {"num_data": self.num_data, "num_samples": self.num_samples}
        return xarray.Dataset(values, {"latent_dim": list(self.dims)}, attributes)

    def _table(self) -> Table:
        shown = [(label, name) for label, name in _TABLE if getattr(self, name) is not None]
        shown = [line for line in shown if line[1] not in _RARE or getattr(self, line[1])]
        if self.dimension_wise_kl is None and self.total_correlation is not None:
            # which is then no part of the marginal KL
            shown = [line for line in shown if line[1] != "total_correlation"]
            shown.append(("total correlation of q(z)", "total_correlation"))
        rows = [
            row(
                label,
                getattr(self, name),
                float(self.stderr.get(name, 0.0)),
                f"(log N = {self.log_n:.4f})" if name == "mutual_information" else "",
            )
            for label, name in shown
        ]
        if (active := self.active_units) is not None:
            rows.append(Row("active units", (f"{int(active.sum()):,} of {len(active):,}",)))
        given = f" given {', '.join(self.given)}" if self.given else ""
        given += f" over {self.num_globals} draws of the global latents" * bool(self.num_globals)
        num, draws = f"{self.num_data:,}", f"{self.num_samples:,}"
        return Table(f"ELBO surgery{given}, nats per datum ({num} data, draws: {draws})", rows)


_SCALARS = (
    "elbo",
    "reconstruction",
    "average_kl",
    "mutual_information",
    "marginal_kl",
    "total_correlation",
    "dimension_wise_kl",
    "other_kl",
    "global_kl",
    "factor",
)
_VECTORS = ("kl_per_dim", "marginal_kl_per_dim")
_TABLE = (
    ("ELBO", "elbo"),
    ("  reconstruction", "reconstruction"),
    ("  factor", "factor"),
    ("  average KL", "average_kl"),
    ("    mutual information", "mutual_information"),
    ("    marginal KL", "marginal_kl"),
    ("      total correlation", "total_correlation"),
    ("      dimension-wise KL", "dimension_wise_kl"),
    ("  KL of other latents", "other_kl"),
    ("  KL of global latents / N", "global_kl"),
)
_RARE = ("factor", "other_kl", "global_kl")  # shown where they are not 0


def surgery(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    site: str | Sequence[str] | None = None,
    given: str | Sequence[str] | None = None,
    plate: str | None = None,
    num_samples: int = 1,
    num_nested: int = 10,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Surgery:
    """Take the ELBO of a whole data set apart at the aggregate posterior (see :class:`Surgery`).

    The sum over the data in q(z) is exact; only z is sampled, ``num_samples`` draws for each
    datum. That of each dimension is computed to 1e-5 nats where posteriors are independent and
    normal. Where the KL of the draws is known in closed form, it corrects the estimates (as a
    control variate). Time grows with N^2: seconds for N = 10,000, minutes for 60,000. A guide
    that draws one of the latents given another runs on each of the N^2 pairs of data: with nets
    of 300 units that is about a minute for N = 1,000.

    Modules are evaluated in eval mode, and are put back as they were, as is Pyro's parameter
    store. Nothing random outside changes. What is finished is not lost: Ctrl-C returns the surgery
    of the first data, with an :class:`~pyproelbo.UnfinishedWarning`; an error has it as its
    attribute ``surgery``. The result depends on the seed, but neither on
    ``batch_size`` nor on torch's generators, for all draws that can be made by row (see
    :mod:`pyproelbo._rows.noise`).

    Args:
        model: a Pyro program, called as ``model(x)``; its latents are drawn for every datum
            under one ``pyro.plate``.
        guide: its guide, called likewise. q(z | x) may be of any kind whose density can be
            evaluated; independent normal ones are fast.
        data, arguments: as :func:`evidence`. A ``DataLoader`` is gone through once, and what it
            gives is kept until the end, for another pass may be of other rows.
        site: the latent, or the latents jointly, to take apart; None for all.
        given: a latent, or several, that those are taken given: for z1 of a guide that draws z2
            and then z1 given z2, "z2". The KL of those is in ``other_kl``.
        plate: the name of the plate over the data, where others are as large as a batch.
        num_samples: S, draws of the guide for each datum.
        num_nested: where ``site`` names latents of single data, and the guide draws global ones
            beside them, over how many draws of these the surgery is a mean. Each is a surgery of
            its own; what their KL costs is in ``global_kl``.
        batch_size: rows that model and guide see at once; a loader has its own.
        seed: of the draws.
        progress: whether to show a progress bar, on a terminal.

    Raises:
        ValueError: for a global latent that ``site`` does not leave out; for latents of which
            q(z | x_n) cannot be evaluated or that have no one prior (conditional on others that
            are neither chosen nor given, enumerated, masked or scaled); for terms that are not
            finite; for data without rows.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> x = torch.randn(200, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> result = surgery(ppca, Exact(ppca), x)
    >>> result.mutual_information <= result.log_n
    True
    """
    check_counts(num_samples=num_samples, num_nested=num_nested)
    check_names(site=site, given=given)
    check_shared(plate, seed, arguments)
    if site is not None and not isinstance(poutine.unwrap(guide), GuideMessenger):
        first = first_rows(model, guide, data, batch_size, arguments)
        with evaluating(model, guide, seed=seed):
            if first is not None and has_globals(model, guide, first, plate):
                whole = next(iter(batches_of(model, guide, data, sys.maxsize, arguments)))
                options = {"arguments": arguments, "site": site, "given": given, "plate": plate}
                options |= {"num_samples": num_samples, "batch_size": batch_size}
                programs = held(model, guide, whole, plate, num_nested, seed)
                shown = bar(enumerate(programs), "global latents", progress, num_nested)
                found = [
                    (
                        surgery(p.model, p.guide, data, seed=seed + s, progress=False, **options),
                        p.kl,
                    )
                    for s, p in shown
                ]
                return _mean(found)
    batches = batches_of(model, guide, data, batch_size, arguments)
    with evaluating(model, guide, seed=seed):
        once, again = batches.in_one_pass()
        total = length_hint(once) or None
        passing = iter(once)
        first = next(passing)
        which = local_latents(model, guide, first, site, plate, given)

        def drawn(parts: _Drawn | None, batch: Batch) -> _Drawn:
            return [*(parts or []), draw(model, guide, batch, which, num_samples, seed)]

        def taken_apart(parts: _Drawn, _: bool) -> Surgery:
            draws = joined(parts)

            def added(sums: Sums | None, part: DataPart) -> Sums:
                return (Sums(which, draws) if sums is None else sums).after(part)

            return by_part(
                bar(data_parts(guide, again, which, draws), "aggregate posterior", progress, total),
                added,
                lambda sums, _: _surgery(which, draws, sums, num_samples),
                "surgery",
                lambda part: f"{part.stop} data",
            )

        shown = bar(chain([first], passing), "draws", progress, total)
        return by_part(shown, drawn, taken_apart, "surgery", data_until)


_Drawn = list[list[DataDraws | None]]


def _mean(found: Sequence[tuple[Surgery, float]]) -> Surgery:
    """The mean of surgeries at several draws of the global latents, with their KL apart."""
    parts = [part for part, _ in found]
    kl = (
        torch.tensor([kl for _, kl in found], dtype=torch.float64, device="cpu") / parts[0].num_data
    )
    values, stderr = {}, {}
    for name in (*_SCALARS, *_VECTORS):
        of = [getattr(part, name) for part in parts]
        if name == "global_kl" or any(value is None for value in of):
            continue
        series = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in of])
        if name == "elbo":
            series = series - kl
        values[name], stderr[name] = _over_draws(series)
    values["global_kl"], stderr["global_kl"] = _over_draws(kl)
    return replace(parts[0], **values, stderr=stderr, num_globals=len(parts))


def _over_draws(series: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """The mean, and its standard error by the spread over draws."""
    mean, num = series.mean(0), len(series)
    error = series.std(0) / num**0.5 if num > 1 else torch.full_like(mean, math.nan)
    return (mean.item(), error.item()) if mean.dim() == 0 else (mean, error)


def _surgery(
    which: LocalLatents, draws: Sequence[DataDraws], sums: Sums, num_samples: int
) -> Surgery:
    """That of the data that the sums are over."""
    seen = [part.rows < sums.num_data for part in draws]
    draws = [part.at(rows) for part, rows in zip(draws, seen, strict=True)]
    log_q, log_q_by_dim = (
        None if value is None else value[torch.cat(seen)] for value in sums.log_mean()
    )
    assert log_q is not None
    found = estimates_of(which, draws, log_q, log_q_by_dim, num_samples)
    return Surgery(
        **{**dict.fromkeys((*_SCALARS, *_VECTORS)), "global_kl": 0.0, **found.mean},
        stderr=found.stderr,
        active_units=found.active_units,
        log_n=math.log(found.num_data),
        num_data=found.num_data,
        num_samples=num_samples,
        dims=which.dims,
        codes=draws[0].by_dim["z"].cpu(),
        given=which.given,
    )


def _notes(result: Surgery) -> list[str]:
    notes = []
    active, kl = result.active_units, result.average_kl
    if result.num_data == 1:
        return ["One datum tells nothing of an aggregate posterior."]
    if result.given and kl < COLLAPSED:
        return [
            f"Given {', '.join(result.given)}, q(z | x) is nearly the prior for every x: z tells "
            "nothing more about x."
        ]
    if kl < COLLAPSED or (active is not None and not active.any()):
        notes.append(
            "Posterior collapse: q(z | x) is nearly the same for every x, so that z tells nothing "
            "about x. Let beta rise from 0 (schedules.Linear), give free bits (FreeBitsELBO), or a "
            "decoder that needs z more."
        )
        return notes
    if active is not None and not active.all():
        names = [result.dims[i] for i in (~active).nonzero().flatten().tolist()]
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        notes.append(
            f"{len(names)} of {len(active)} dimensions are inactive ({shown}): their posterior "
            "mean does not vary with x."
        )
    if result.mutual_information > result.log_n - 0.1:
        notes.append(
            "Mutual information is at its bound log N: each z tells which datum it is of. More KL "
            "than that goes into the marginal KL."
        )
    if result.marginal_kl > max(0.5 * kl, 1.0):
        notes.append(
            "Most of the KL is marginal: the codes of all data together are not distributed as "
            "the prior, so that draws from the prior are not what the decoder has learned from. A "
            "prior that is learned would fit them."
        )
    return notes
