"""Draws from the posterior by :func:`~pyproelbo.repair`."""

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
        ValueError: for anything but such a result, for fewer draws than requested, and for draws
            that would be corrected twice.
    """
    if repaired is None:
        return
    if not isinstance(repaired, Repair):
        raise ValueError(f"repaired should be a result of pe.repair, got {type(repaired)}")
    if corrected:
        raise ValueError(
            "repaired draws have equal weights, and need no correction: leave corrected= out"
        )
    if num_samples > repaired.num_samples:
        raise ValueError(
            f"num_samples should be at most the {repaired.num_samples:,} repaired draws, got "
            f"{num_samples:,}: take fewer, or more in pe.repair"
        )


def posterior_of(repaired: Repair, fit: GuideDraws, num_samples: int) -> LevelPosterior:
    """Its draws, by the guide's sites; with a warning where some have failed.

    Raises:
        ValueError: for draws from other programs, or for other data.
    """
    values = {}
    for name, (shape, axis) in fit.rows_of_drawn(repaired.plate).items():
        if name not in repaired.drawn:
            raise ValueError(
                f"repaired should be for the same guide, which draws {name!r}, but has draws of "
                f"{sorted(repaired.drawn)}"
            )
        value = repaired.drawn[name][:num_samples]
        value = value[:, 0] if axis is None else value.movedim(1, axis)
        if value.shape[1:] != shape:
            raise ValueError(
                f"repaired should be for the same data, but its draws of {name!r} have shape "
                f"{tuple(value.shape[1:])}, where the guide draws {tuple(shape)}"
            )
        values[name] = value
    khat, w = repaired.khat_after, repaired.of_globals
    if w is not None:
        khat = torch.cat([khat, w.khat_after])
    if w is not None and not w.passes.all():
        warn(
            "in pe.repair the global latents do not pass: no draws come from the posterior",
            CorrectionWarning,
        )
    elif (failed := float((~repaired.passes).double().mean())) > 0:
        warn(
            f"for {share(failed)} of the rows no method of pe.repair passes: their draws are not "
            "from the posterior",
            CorrectionWarning,
        )
    return LevelPosterior(values, float(khat.max()))
