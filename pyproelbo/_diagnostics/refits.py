"""Ranks where a row is a simulation, to which the guide is fitted."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import torch
from pyro import poutine
from torch import Tensor

from pyproelbo._backend import rng
from pyproelbo._diagnostics.amortised_ranks import at, check_in_common, is_continuous
from pyproelbo._diagnostics.ranks import DENSITIES, DISTANCE, Counts, Ranks, Reference, densities
from pyproelbo._evidence.trained_guide import parameters_of, trained, trained_by
from pyproelbo._messages.arguments import check_counts, check_function, check_positive
from pyproelbo._messages.endings import noting
from pyproelbo._rows.batches import Arguments, Batch
from pyproelbo._rows.batches import arguments as called_with
from pyproelbo._rows.executors import computed
from pyproelbo._rows.passes import bar, by_part
from pyproelbo._rows.report_data import Unit
from pyproelbo._rows.runs import Runs, Use, in_chunks
from pyproelbo._rows.values import latent_values
from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.traces import Program, Site, Traces

Result = TypeVar("Result")

ALL = 100  # elements of latents, each ranked if there are no more; otherwise so many of each latent
IN_PLATES = 10  # the first elements, where it is in a plate


@dataclass(frozen=True)
class Refit:
    """How :func:`~pyproelbo.calibration` fits a guide to simulated data, again and again.

    The guide's parameters start from their current values, maximise the ELBO by Adam, with a
    learning rate that falls to 0, and are reset before the next simulation. The cost is ``num``
    times ``steps`` gradients of ``num_particles`` draws: for a hierarchical program with eight
    groups and an AutoNormal, 1,000 steps take 7 s on one thread.

    Attributes:
        num: the number of simulations.
        steps: the steps of Adam for each.
        lr: its initial learning rate.
        num_particles: draws in each step.
        fit: a function that fits the guide in place in another way, instead of the three settings
            above. It is called with the arguments of model and guide, and should make a new
            optimiser each time. The parameters of the guide, those in Pyro's store and the buffers
            of its modules are reset after each simulation, those of the model at once. If it calls
            :func:`~pyproelbo.fit`, the result records which fits have converged
            (``Calibration.is_converged``).

    Raises:
        ValueError: for ``num`` below 2 and other numbers that are not positive; for ``fit``
            together with ``steps``, ``lr`` or ``num_particles``.

    >>> Refit(steps=500).num
    100
    """

    num: int = 100
    steps: int = 1000
    lr: float = 0.01
    num_particles: int = 10
    fit: Callable[..., object] | None = None

    def __post_init__(self) -> None:
        check_counts(2, num=self.num)
        check_counts(steps=self.steps, num_particles=self.num_particles)
        check_positive(lr=self.lr)
        check_function(fit=self.fit)
        of_adam = [f for f in fields(self) if f.name in ("steps", "lr", "num_particles")]
        given = [f.name for f in of_adam if getattr(self, f.name) != f.default]
        if self.fit is not None and given:
            raise ValueError(
                f"fit replaces the steps of Adam, got {', '.join(given)} as well: give one or the "
                "other"
            )

    @contextmanager
    def fitted(
        self, model: Program, guide: Program, batch: Batch, parameters: list[Tensor], seed: int
    ) -> Iterator[str | None]:
        """Within it the guide is fitted to a batch; gives why the fit stopped, where known."""
        if (own := self.fit) is not None:
            ended = list[str]()

            def fit(*args: object, **kwargs: object) -> None:
                with noting(ended):
                    own(*args, **kwargs)
                if "interrupted" in ended:  # which ``pe.fit`` takes as its own end
                    raise KeyboardInterrupt

            rng.begin(seed)
            with trained_by(fit, model, guide, batch):
                yield ended[-1] if ended else None
            return
        unit, options = Unit("data set"), (self.steps, self.num_particles, self.lr)
        with trained(model, guide, batch, unit, parameters, *options, seed):
            yield None


class _Row(NamedTuple):
    """What is kept from a simulation.

    Attributes:
        ranks: (1, K).
        ended: why the last fit to it stopped; None where that is not known.
    """

    ranks: Tensor
    ended: str | None


class _Simulated(NamedTuple):
    """Latents, by site, and the arguments of model and guide for their data."""

    sites: Mapping[str, Any]
    batch: Batch


def refitted_ranks(
    model: Program,
    guide: Program,
    simulate: Callable[[], object],
    arguments: Arguments | None,
    refit: Refit,
    num_samples: int,
    chunk: int | None,
    seed: int,
    executor: Executor | None,
    progress: bool,
    result: Callable[[Ranks], Result],
) -> Result:
    """``result`` of the ranks whose rows are simulations."""

    def simulated(n: int) -> _Simulated:
        rng.begin(rng.seed_of(seed, Use.SIMULATIONS, n))
        nodes: Any = poutine.trace(simulate).get_trace().nodes
        args, kwargs = called_with(nodes["_RETURN"]["value"], arguments)
        return _Simulated(nodes, Batch(args, kwargs, 0, 1))

    nodes, batch = simulated(0)
    first = Runs(model, guide, batch, seed).first
    sites = Sites.of(first)
    sites.check_observed()
    latents = {
        name: site
        for name, site in sites.latents.items()
        if not is_delta(site) and name in nodes and nodes[name]["type"] == "sample"
    }
    check_in_common(latents, sites.latents, nodes)
    is_whole = set(latents) == set(sites.latents)
    parameters = parameters_of(guide, model, batch)
    if not parameters and refit.fit is None:
        raise ValueError(
            "refit fits the parameters of the guide, but it has none: leave refit out for a guide "
            "that computes its posterior from the data, or fit it by a function, "
            "pe.Refit(fit=...)"
        )

    def truth(nodes: Mapping[str, Any]) -> Tensor:
        """The values of latents, (1, K)."""
        values = {name: nodes[name]["value"] for name in latents}
        _check_sizes(values, latents)
        return torch.cat([v.detach().double().cpu().flatten() for v in values.values()])[None]

    # the draws of another would do as well, if simulate did not repeat them at a given seed
    truths = torch.cat([truth(simulated(n).sites) for n in range(refit.num)])
    reference = Reference.of(truths, _of_elements(latents, is_continuous))
    ranked_elements = _ranked(latents)
    rows = 1 if first.num_rows is None else max(1, first.num_rows)

    def row_of(n: int) -> _Row:
        """The row of one simulation."""
        (nodes, batch), own_seed = simulated(n), rng.seed_of(seed, Use.FIT, n)
        z = truth(nodes)

        def quantities(z: Tensor, drawn: Traces | None) -> dict[str, Tensor]:
            found = {"latents": z[..., ranked_elements]}
            if drawn is not None:
                found |= {name: v.cpu() for name, v in densities(drawn, None).items()}
            if reference is not None:
                found[DISTANCE] = reference.row(n).distance(z)
            return found

        with refit.fitted(model, guide, batch, parameters, own_seed) as ended:
            runs = Runs(model, guide, batch, own_seed)
            placed = {name: nodes[name]["value"] for name in latents}
            at_truth = at(runs, placed) if is_whole else None
            true = {name: v.reshape(1, -1) for name, v in quantities(z, at_truth).items()}
            counts = Counts()
            for draws in in_chunks(num_samples, chunk, rows):
                for drawn in runs.traces(None, draws, Use.RANKS):
                    values = latent_values(drawn, None, latents)[1]
                    found = quantities(values, drawn if is_whole else None)
                    counts = counts.and_of(found, true)
        return _Row(counts.ranks(own_seed, Use.TIES), ended)

    labels = latent_values(first, None, latents)[0]
    dims = tuple(labels[k] for k in ranked_elements.tolist())
    dims += tuple(DENSITIES if is_whole else ())
    dims += () if reference is None else (DISTANCE,)

    def of_next(before: list[_Row] | None, done: tuple[int, _Row]) -> list[_Row]:
        return [*(before or []), done[1]]

    def ranked(rows: list[_Row], _: bool) -> Result:
        values, ended = zip(*rows, strict=True)
        is_known = any(reason is not None for reason in ended)
        return result(Ranks(torch.cat(values), dims, num_samples, ended if is_known else None))

    parts = bar(computed(row_of, range(refit.num), executor), "calibration", progress, refit.num)
    return by_part(parts, of_next, ranked, "calibration", lambda done: f"{done[0] + 1} simulations")


def _ranked(latents: Mapping[str, Site]) -> Tensor:
    """Which of all elements are ranked: those of a plate are alike, and some stand for all."""
    kept, start = list[Tensor](), 0
    is_small = sum(site["value"].numel() for site in latents.values()) <= ALL
    for site in latents.values():
        num = site["value"].numel()
        most = num if is_small else IN_PLATES if site["plates"] else ALL
        kept.append(torch.arange(start, start + min(num, most), device="cpu"))
        start += num
    return torch.cat(kept)


def _of_elements(latents: Mapping[str, Site], of: Callable[[Site], bool]) -> Tensor:
    """A property of each latent, for each of its elements."""
    sites = latents.values()
    return torch.tensor([x for s in sites for x in [of(s)] * s["value"].numel()], device="cpu")


def _check_sizes(values: Mapping[str, Tensor], latents: Mapping[str, Site]) -> None:
    """
    Raises:
        ValueError: for a latent that simulate draws with another shape than the guide.
    """
    for name, value in values.items():
        expected = latents[name]["value"]
        if value.shape != expected.shape:
            raise ValueError(
                f"simulate should draw {name!r} with the shape that it has in the guide, "
                f"{tuple(expected.shape)}, got {tuple(value.shape)}: every simulation should have "
                "as many data as model and guide are made for"
            )
