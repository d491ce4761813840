"""Simulation-based calibration: does the guide know how sure it may be?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from scipy import stats
from torch import Tensor

from pyproelbo._distributions.row_noise import Noise
from pyproelbo._messages.arguments import check_counts, check_shared
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Number, Row, Table
from pyproelbo._rows.batches import Arguments, Batch
from pyproelbo._rows.batches import arguments as called_with
from pyproelbo._rows.dependencies import ignores_data
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.latent_rows import LatentRows, NotBroadcastError
from pyproelbo._rows.levels import Placed
from pyproelbo._rows.passes import bar, by_part
from pyproelbo._rows.plate import by_row, data_plate
from pyproelbo._rows.runs import Runs, Use, in_chunks
from pyproelbo._surgery.local_latents import labels
from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.terms import Latent
from pyproelbo._terms.traces import Plate, Program, Traces

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, eq=False, repr=False)
class Calibration(Result):
    r"""Where the true z of simulated data lie among the guide's draws.

    With z and x drawn from the model, and draws z_1, ..., z_S of q(z | x), the rank of z among
    them is uniform on 0, ..., S in each dimension, if q is the posterior (Talts et al. 2018;
    for variational posteriors Yao et al. 2018, "Yes, but did it work?", section 3.2). The
    converse does not hold: q(z | x) = p(z) for all x is calibrated as well. Nor do ranks of single
    dimensions see correlations that q lacks: those of log p(x, z) and of log p(x | z) do (Modrak et
    al. 2023, "Simulation-based calibration checking for Bayesian computation").

    Attributes:
        ranks: (rank + U) / (S + 1) with U uniform on [0, 1], (N, K): uniform on [0, 1] for a
            posterior that is right.
        dims: the labels of the K quantities: dimensions of latents, such as "z[0]", and then, where
            the simulation draws all latents, "log p(x, z)" and "log p(x | z)".
        p_value: of the Kolmogorov-Smirnov test of each dimension for uniformity, (K,).
        num_samples: S.
    """

    ranks: Tensor
    dims: tuple[str, ...]
    p_value: Tensor
    num_samples: int

    @property
    def bias(self) -> Tensor:
        """How many standard errors the mean rank lies above 1/2, (K,): q is too low where > 0."""
        return (self.ranks.mean(0) - 0.5) * (12 * len(self.ranks)) ** 0.5

    @property
    def spread(self) -> Tensor:
        """How many standard errors the ranks' variance lies above 1/12, (K,).

        Where it is positive true values lie too often in the tails: q is too narrow.
        """
        variance = (self.ranks - 0.5).square().mean(0)
        return (variance - 1 / 12) * (180 * len(self.ranks)) ** 0.5

    @property
    def notes(self) -> list[str]:
        """What stands out most, by dimension, at a level of 1% for all of them together."""
        found = []
        for d in (self.p_value < 0.01 / len(self.dims)).nonzero().flatten().tolist():
            bias, spread = float(self.bias[d]), float(self.spread[d])
            if self.dims[d] in _JOINT:
                found.append(
                    f"Ranks of {self.dims[d]} are not uniform: q as a whole is wrong, as where it "
                    "has other correlations than the posterior."
                )
                continue
            if abs(bias) > abs(spread):
                word = "too low" if bias > 0 else "too high"
            else:
                word = "too narrow" if spread > 0 else "too wide"
            found.append(f"q of {self.dims[d]} is {word}.")
        return found

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dims "datum" and "latent_dim"."""
        import xarray

        units = {"p_value": "1", "bias": "standard errors", "spread": "standard errors"}
        values: dict[str, Any] = {
            name: ("latent_dim", getattr(self, name).numpy(), {"units": unit})
            for name, unit in units.items()
        }
        values["ranks"] = (("datum", "latent_dim"), self.ranks.numpy(), {"units": "1"})
        attributes = {"num_samples": self.num_samples}
        return xarray.Dataset(values, {"latent_dim": list(self.dims)}, attributes)

    def _table(self) -> Table:
        num, draws = f"{len(self.ranks):,}", f"{self.num_samples:,}"
        columns = (self.p_value.tolist(), self.bias.tolist(), self.spread.tolist())
        rows = [
            Row(dim, (Number(p), Number(bias, decimals=2), Number(spread, decimals=2)))
            for dim, p, bias, spread in zip(self.dims, *columns, strict=True)
        ]
        return Table(
            f"Calibration on {num} simulated data, draws: {draws} (bias and spread in standard "
            "errors)",
            rows,
            ("dimension", "p-value", "bias", "spread"),
        )


def calibration(
    model: Program,
    guide: Program,
    simulate: Callable[[], object],
    *,
    arguments: Arguments | None = None,
    num_samples: int = 200,
    plate: str | None = None,
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Where the true z of simulated data lie among the guide's draws (see :class:`Calibration`).

    Args:
        model, guide: Pyro programs, called with what ``simulate`` returns.
        simulate: a Pyro program that draws latents, at the same sites, and data for them, which
            it returns as model and guide take them: a tensor, or several in a tuple or a
            mapping. Of our models it is ``lambda: model(num=500)``. Every datum has its own draw
            of everything: a latent that all data share counts once.
        arguments: from what it returns to what the programs are called with, where that is
            something else.
        num_samples: S, draws of the guide for each datum.
        plate: the plate over the data, where the latents share several.
        chunk: draws that are made at once, as vectorised particles.
        seed: of the simulation and of the draws. The result does not depend on ``chunk``, for all
            draws that can be made by row.
        progress: whether to show a progress bar, on a terminal.

    What is finished is not lost: Ctrl-C returns the ranks among the draws that have been made, with
    an :class:`~pyproelbo.UnfinishedWarning`; an error has them as its attribute ``calibration``.

    Raises:
        ValueError: where guide and simulation have no latent in common, for a latent of no plate,
            for a guide that is not amortised, and for ``num_samples`` below 1.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> ppca = PPCA(num_latents=2, num_features=5)
    >>> result = calibration(ppca, Exact(ppca), lambda: ppca(num=400))
    >>> result.dims, result.notes
    (('z[0]', 'z[1]', 'log p(x, z)', 'log p(x | z)'), [])
    """
    check_counts(num_samples=num_samples)
    check_shared(plate, seed, arguments, chunk)
    with evaluating(model, guide, seed=seed):
        nodes: Any = poutine.trace(simulate).get_trace().nodes
        args, kwargs = called_with(nodes["_RETURN"]["value"], arguments)
        runs = Runs(model, guide, Batch(args, kwargs, 0, 0), seed)
        first = runs.first
        Sites.of(first).check_observed()
        latents = terms_of(first, "sampled").latents[0]
        if isinstance(poutine.unwrap(guide), AutoGuide):
            raise ValueError(_NOT_AMORTISED)
        truth = {
            key: nodes[latent.name]
            for key, latent in latents.items()
            if latent.name in nodes and latent.p is not None
        }
        if not truth:
            raise ValueError(
                f"simulate should draw latents at the guide's sites {sorted(latents)}, got "
                f"{[name for name, site in nodes.items() if site['type'] == 'sample']}"
            )
        data = data_plate({key: latents[key].plates for key in truth}, plate)
        of_rows = [latents[key] for key in truth]
        if ignores_data(guide, args, kwargs) and any(_differs(z, data.dim) for z in of_rows):
            raise ValueError(_NOT_AMORTISED)

        names = {key: latents[key].name for key in truth}
        whole = set(names.values()) == set(Sites.of(first).latents)
        true_density = _densities(_at(runs, names, truth), data) if whole else None

        def counted(before: _Counts | None, draws: range) -> _Counts:
            found = _Counts(draws.stop, dict(before.by_site) if before else {})
            for drawn in runs.traces(data.name, draws, Use.RANKS):
                for key, site in truth.items():
                    z, true = drawn.guide_sites[latents[key].name]["value"], site["value"]
                    z = z.reshape(-1, *true.shape)
                    counts = torch.stack([(z < true).sum(0), (z == true).sum(0)])
                    counts = counts.to(torch.get_default_dtype())
                    found.by_site[key] = found.by_site.get(key, 0) + counts
                if true_density is not None:
                    ranks = zip(_JOINT, _densities(drawn, data), true_density, strict=True)
                    for key, value, true in ranks:
                        counts = torch.stack([(value < true).sum(0), (value == true).sum(0)])
                        counts = counts.to(torch.get_default_dtype())
                        found.by_site[key] = found.by_site.get(key, 0) + counts
            return found

        def ranked(counts: _Counts, _: bool) -> Calibration:
            columns, dims = [], []
            for key, (below, ties) in counts.by_site.items():
                noise = Noise.of_site(key, (seed, Use.TIES), range(1), 0, None, None)
                u = below + noise.uniform(below, below.shape) * (ties + 1)
                if key in _JOINT:
                    columns.append(u.unsqueeze(1).double().cpu())
                    dims.append(key)
                    continue
                axis = u.dim() - len(latents[key].q.event_shape) + data.dim
                columns.append(u.movedim(axis, 0).reshape(data.size, -1).double().cpu())
                dims += labels(key, latents[key], data)
            return _calibration(torch.cat(columns, 1) / (counts.num + 1), dims, counts.num)

        parts = bar(list(in_chunks(num_samples, chunk, data.size)), "calibration", progress)
        return by_part(
            parts, counted, ranked, "calibration", lambda draws: f"{draws.stop} draws for each"
        )


_JOINT = ("log p(x, z)", "log p(x | z)")


def _at(runs: Runs, names: Mapping[str, str], truth: Mapping[str, Any]) -> Traces:
    """A run at the true latents."""
    values = {name: truth[key]["value"] for key, name in names.items()}
    with Placed({name: lambda _, value=value: value for name, value in values.items()}):
        return runs.run(1)


def _densities(traces: Traces, data: Plate) -> tuple[Tensor, Tensor]:
    """log p(x, z) and log p(x | z) of each datum, (S, N) each, in nats."""
    terms, num = terms_of(traces, "sampled"), traces.num_particles
    likelihood = by_row([*terms.log_likelihood.values(), *terms.factors.values()], num, data)
    joint = likelihood + by_row(terms.log_prior.values(), num, data)

    def rounded(value: Tensor) -> Tensor:  # what is equal up to rounding is a tie
        return value.expand(num, data.size).double().round(decimals=6)

    return rounded(joint), rounded(likelihood)


class _Counts(NamedTuple):
    """How many of the first ``num`` draws are below the true values, and equal to them.

    Both are stacked, (2, ...), by site.
    """

    num: int
    by_site: dict[str, Tensor]


def _calibration(ranks: Tensor, dims: list[str], num_samples: int) -> Calibration:
    p_value = [stats.kstest(u, "uniform").pvalue for u in ranks.mT.numpy()]
    return Calibration(ranks, tuple(dims), torch.tensor(p_value, device="cpu"), num_samples)


_NOT_AMORTISED = (
    "the guide's posterior is not computed from the data that it is called with, but that of the "
    "data which it was fitted to, as an AutoGuide's: calibration asks for those of other, "
    "simulated data. It is for amortised guides"
)


def _differs(latent: Latent, dim: int) -> bool:
    """Whether q differs from row to row."""
    rows = LatentRows(latent.value, latent.q, None, dim)
    try:
        log_q = rows.log_q_at(rows.values[:1])
    except (NotBroadcastError, ValueError):
        return False
    return not torch.allclose(log_q, log_q[:, :1].expand_as(log_q), rtol=1e-4, atol=1e-4)
