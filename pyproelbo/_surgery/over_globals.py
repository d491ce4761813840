"""Surgeries at several draws of the latents that all data share."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from pyproelbo._rows.batches import ReportData
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.report_data import batches_of, first_rows
from pyproelbo._surgery.drawing import Options
from pyproelbo._surgery.held_globals import Held, has_globals, held
from pyproelbo._surgery.points import num_points
from pyproelbo._surgery.result import SCALARS, VECTORS, Surgery
from pyproelbo._terms.traces import Program


def is_nested(model: Program, guide: Program, data: ReportData, options: Options) -> bool:
    """Whether chosen latents are of single data, and the guide draws global ones too."""
    if options.site is None or isinstance(poutine.unwrap(guide), GuideMessenger):
        return False
    first = first_rows(model, guide, data, options.batch_size, options.arguments)
    if first is None:
        return False
    with evaluating(model, guide, seed=options.seed):
        return has_globals(model, guide, first, options.plate)


class AtGlobals(NamedTuple):
    """Programs at draws of the global latents, one after another.

    Attributes:
        programs: model and guide at each.
        options: of the surgery at each.
    """

    programs: Iterable[Held]
    options: Options


def at_globals(
    model: Program, guide: Program, data: ReportData, num: int, options: Options
) -> AtGlobals:
    """``num`` draws of the global latents, given all data."""
    whole = next(iter(batches_of(model, guide, data, sys.maxsize, options.arguments)))
    each = options._replace(progress=False)
    if options.max_pairs is not None:
        num_points(options.max_pairs, whole.size, options.num_samples * num)  # are they enough?
        each = each._replace(max_pairs=options.max_pairs // num)
    return AtGlobals(held(model, guide, whole, options.plate, num, options.seed), each)


def mean_of(found: Sequence[tuple[Surgery, float]]) -> Surgery:
    """The mean of surgeries at several draws of the global latents, with their KL separate."""
    parts = [part for part, _ in found]
    kl = (
        torch.tensor([kl for _, kl in found], dtype=torch.float64, device="cpu") / parts[0].num_data
    )
    values, stderr = {}, {}
    for name in (*SCALARS, *VECTORS):
        of = [getattr(part, name) for part in parts]
        if name == "global_kl":
            continue
        if any(value is None for value in of):
            values[name] = None
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
