"""Draws of the posterior that :func:`~pyproelbo.repair` has made."""

import torch

from pyproelbo._arviz.by_level import LevelPosterior
from pyproelbo._arviz.corrected import CorrectionWarning
from pyproelbo._arviz.fit import GuideDraws
from pyproelbo._evidence.repair_result import Repair
from pyproelbo._messages.warn import warn
from pyproelbo._results.numbers import share


def check_repaired(repaired: object, num_samples: int, corrected: bool) -> None:
    """
    Raises:
        ValueError: for what is no such result, for fewer draws than are asked for, and for draws
            that should be corrected twice.
    """
    if repaired is None:
        return
    if not isinstance(repaired, Repair):
        raise ValueError(f"repaired should be what pe.repair returns, got {type(repaired)}")
    if corrected:
        raise ValueError(
            "repaired draws have equal weights, and need no correction: leave corrected= out"
        )
    if num_samples > repaired.num_samples:
        raise ValueError(
            f"num_samples should be at most the {repaired.num_samples:,} draws that are repaired, "
            f"got {num_samples:,}: take fewer, or more in pe.repair"
        )


def posterior_of(repaired: Repair, fit: GuideDraws, num_samples: int) -> LevelPosterior:
    """Its draws, as the guide's sites have them; where some have failed, with a warning.

    Raises:
        ValueError: for draws of other programs, or of other data.
    """
    values = {}
    for name, (shape, axis) in fit.rows_of_drawn(repaired.plate).items():
        if name not in repaired.drawn:
            raise ValueError(
                f"repaired should be of the same guide, which draws {name!r}, but has draws of "
                f"{sorted(repaired.drawn)}"
            )
        value = repaired.drawn[name][:num_samples]
        value = value[:, 0] if axis is None else value.movedim(1, axis)
        if value.shape[1:] != shape:
            raise ValueError(
                f"repaired should be of the same data, but its draws of {name!r} have shape "
                f"{tuple(value.shape[1:])}, where the guide draws {tuple(shape)}"
            )
        values[name] = value
    khat, w = repaired.khat_after, repaired.of_globals
    if w is not None:
        khat = torch.cat([khat, w.khat_after])
    if w is not None and not w.passes.all():
        warn(
            "by pe.repair the global latents do not pass: no draws are of the posterior",
            CorrectionWarning,
        )
    elif (failed := float((~repaired.passes).double().mean())) > 0:
        warn(
            f"for {share(failed)} of the rows no way of pe.repair passes: their draws are not of "
            "the posterior",
            CorrectionWarning,
        )
    return LevelPosterior(values, float(khat.max()))
