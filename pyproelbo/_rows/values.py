"""The values of a model's latents by rows of the data, with a label for each dimension."""

from collections.abc import Container, Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

from pyproelbo._terms.roles import is_delta, is_drawn
from pyproelbo._terms.traces import Plate, Site, Traces


def latent_values(
    traces: Traces, plate: Plate | None, names: Container[str] | None = None
) -> tuple[tuple[str, ...], Tensor]:
    """The labels of latents, and their values (S, N, K) by the rows of a plate, on the CPU.

    Args:
        plate: None where all data are one row: (S, 1, K).
        names: of the latents; all by default.
    """
    labels: list[str] = []
    columns = []
    several = traces.num_particles > 1
    for name, site in traces.model_sites.items():
        is_latent = not site["is_observed"] and name in traces.guide_sites and not is_delta(site)
        if not is_latent or (names is not None and name not in names):
            continue
        value = site["value"].double().cpu()
        if plate is None:
            rows = value.unsqueeze(1 if several else 0)
        else:
            axis = value.dim() - site["fn"].event_dim + plate.dim
            rows = value.movedim(axis, 1 if several else 0)
        rows = rows if several else rows.unsqueeze(0)
        labels += labels_of(name, rows.shape[2:])
        columns.append(rows.reshape(*rows.shape[:2], -1))
    return tuple(labels), torch.cat(columns, -1)


def drawn_by_row(traces: Traces, first: Traces, plate: Plate | None) -> dict[str, Tensor]:
    """The model's latents, and the guide's other draws, by the rows of a plate: (S, N, ...).

    Args:
        first: a run of one draw.
        plate: None where all data are one row: (S, 1, ...).
    """
    found = {}
    names = [*latent_names(traces), *(n for n, s in traces.guide_sites.items() if is_drawn(s))]
    for name in dict.fromkeys(names):
        part = "model_sites" if name in traces.model_sites else "guide_sites"
        one = getattr(first, part)[name]
        value = getattr(traces, part)[name]["value"].detach()
        value = value.reshape(-1, *one["value"].shape)
        axis = row_axis(one, plate)
        found[name] = value.unsqueeze(1) if axis is None else value.movedim(axis, 1)
    return found


def latent_names(traces: Traces) -> list[str]:
    """The model's latents that are not functions of others."""
    sites = traces.model_sites.items()
    return [
        n for n, s in sites if not s["is_observed"] and n in traces.guide_sites and not is_delta(s)
    ]


def row_axis(site: Site, plate: Plate | None) -> int | None:
    """The dim of the plate in a site's value, counted from the right."""
    return None if plate is None else plate.dim - site["fn"].event_dim


def labels_of(name: str, shape: Iterable[int]) -> list[str]:
    """Labels of a value's elements, such as "z[0]"; of one row, where they are in rows."""
    return [name + label for label in _labels(_event(shape))]


def _event(shape: Iterable[int]) -> list[int]:
    """Without dims of one element at the left, which replace absent plates."""
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        sizes.pop(0)
    return sizes


def _labels(shape: list[int]) -> Iterator[str]:
    """ "" for a scalar, [0], [1], ... for a vector, [0,0], ... for a matrix."""
    if not shape:
        yield ""
        return
    for index in product(*map(range, shape)):
        yield f"[{','.join(map(str, index))}]"
