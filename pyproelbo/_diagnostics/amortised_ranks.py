"""Ranks where each datum has its own latents, and the guide computes its posterior from it."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyproelbo._diagnostics.ranks import DISTANCE, Counts, Ranks, Reference, densities
from pyproelbo._rows.batches import Arguments, Batch
from pyproelbo._rows.batches import arguments as called_with
from pyproelbo._rows.dependencies import ignores_data
from pyproelbo._rows.executors import computed
from pyproelbo._rows.latent_rows import LatentRows, NotBroadcastError
from pyproelbo._rows.levels import Placed
from pyproelbo._rows.passes import bar, by_part
from pyproelbo._rows.plate import data_plate
from pyproelbo._rows.runs import Runs, Use, in_chunks
from pyproelbo._surgery.local_latents import labels
from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.terms import Latent
from pyproelbo._terms.traces import Program, Site, Traces

Result = TypeVar("Result")


def amortised_ranks(
    model: Program,
    guide: Program,
    simulate: Callable[[], object],
    arguments: Arguments | None,
    num_samples: int,
    plate: str | None,
    chunk: int | None,
    seed: int,
    executor: Executor | None,
    progress: bool,
    result: Callable[[Ranks], Result],
) -> Result:
    """``result`` of the ranks whose rows are the data of one simulation."""
    nodes: Any = poutine.trace(simulate).get_trace().nodes
    args, kwargs = called_with(nodes["_RETURN"]["value"], arguments)
    runs = Runs(model, guide, Batch(args, kwargs, 0, 0), seed)
    first = runs.first
    sites = Sites.of(first)
    sites.check_observed()
    latents = terms_of(first, "sampled").latents[0]
    if isinstance(poutine.unwrap(guide), AutoGuide):
        raise ValueError(_NOT_AMORTISED)
    truth = {
        key: nodes[latent.name]["value"]
        for key, latent in latents.items()
        if latent.name in nodes and latent.p is not None
    }
    check_in_common(truth, latents, nodes)
    latents = {key: latents[key] for key in truth}
    for key, latent in latents.items():
        if not latent.plates:
            raise ValueError(
                f"the latent {key!r} is in no plate: all simulated data share one value of it. "
                f"{REFIT}"
            )
    data = data_plate({key: latent.plates for key, latent in latents.items()}, plate)
    if ignores_data(guide, args, kwargs) and any(_differs(z, data.dim) for z in latents.values()):
        raise ValueError(_NOT_AMORTISED)

    def by_rows(key: str, value: Tensor) -> Tensor:
        """(S, N, K) for S draws, and (1, N, K) for one."""
        value, latent = value.reshape(-1, *truth[key].shape), latents[key]
        axis = value.dim() - len(latent.q.event_shape) + data.dim
        return value.movedim(axis, 1).reshape(len(value), data.size, -1)

    true = {key: by_rows(key, value)[0] for key, value in truth.items()}
    continuous = [
        torch.full(true[key].shape[1:], is_continuous(first.model_sites[latent.name]))
        for key, latent in latents.items()
    ]
    together = torch.cat([value.double() for value in true.values()], -1)
    reference = Reference.of(together, torch.cat(continuous).to(together.device))
    names = {latent.name for latent in latents.values()}
    is_whole = names == set(sites.latents)
    if is_whole:
        placed = {latents[key].name: value for key, value in truth.items()}
        at_truth = densities(at(runs, placed), data)
        true |= {name: value[0] for name, value in at_truth.items()}
    if reference is not None:
        true[DISTANCE] = reference.distance(together)

    def quantities(drawn: Traces) -> dict[str, Tensor]:
        found = {
            key: by_rows(key, drawn.guide_sites[latent.name]["value"])
            for key, latent in latents.items()
        }
        together = torch.cat([value.double() for value in found.values()], -1)
        if is_whole:
            found |= densities(drawn, data)
        if reference is not None:
            found[DISTANCE] = reference.distance(together)
        return found

    def of(draws: range) -> Counts:
        found = Counts()
        for drawn in runs.traces(data.name, draws, Use.RANKS):
            found = found.and_of(quantities(drawn), true)
        return found

    def counted(before: Counts | None, done: tuple[range, Counts]) -> Counts:
        return done[1] if before is None else before + done[1]

    dims = [label for key, latent in latents.items() for label in labels(key, latent, data)]
    dims += [key for key in true if key not in latents]

    def ranked(counts: Counts, _: bool) -> Result:
        return result(Ranks(counts.ranks(seed, Use.TIES), tuple(dims), counts.num))

    chunks = list(in_chunks(num_samples, chunk, data.size))
    parts = bar(computed(of, chunks, executor), "calibration", progress, len(chunks))
    return by_part(
        parts, counted, ranked, "calibration", lambda done: f"{done[0].stop} draws for each"
    )


def at(runs: Runs, values: Mapping[str, Tensor]) -> Traces:
    """A run at given latents."""
    with Placed({name: lambda _, value=value: value for name, value in values.items()}):
        return runs.run(1)


def check_in_common(truth: object, latents: Mapping[str, object], nodes: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: where guide and simulation have no latent in common.
    """
    if not truth:
        raise ValueError(
            f"simulate should draw latents at the guide's sites {sorted(latents)}, got "
            f"{[name for name, site in nodes.items() if site['type'] == 'sample']}"
        )


def is_continuous(site: Site) -> bool:
    """Whether a latent is continuous, which distances require."""
    try:
        return not site["fn"].support.is_discrete  # type: ignore[union-attr]
    except NotImplementedError:
        return site["value"].is_floating_point()


REFIT = "Give refit=pe.Refit(), which fits the guide to each of several simulations"
_NOT_AMORTISED = (
    "the guide does not compute its posterior from the data that it is called with: like an "
    "AutoGuide's, it belongs to the data of the fit, but calibration needs posteriors for other, "
    f"simulated data. {REFIT}"
)


def _differs(latent: Latent, dim: int) -> bool:
    """Whether q differs from row to row."""
    rows = LatentRows(latent.value, latent.q, None, dim)
    try:
        log_q = rows.log_q_at(rows.values[:1])
    except (NotBroadcastError, ValueError):
        return False
    return not torch.allclose(log_q, log_q[:, :1].expand_as(log_q), rtol=1e-4, atol=1e-4)
