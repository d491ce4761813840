"""What a report is given that it cannot take: one ValueError, which names the argument."""

import inspect
import math

import numpy as np
import pytest
from helpers.conjugate import guide_of, model
from helpers.oracles import rows

import pyproelbo as pe

REPORTS = (
    "evidence",
    "psis",
    "moments",
    "fisher_divergence",
    "decompositions",
    "inference_gap",
    "repair",
    "check",
    "surgery",
)
OTHERS = (0, -1, 1.5, "no such", math.nan, [], (), {}, True, np.int64(3), object(), b"x", 1e30)


guide = guide_of(0.7)


@pytest.mark.parametrize("name", REPORTS)
def test_each_argument_of_each_report(name):
    """Each gives a result, where the value is one that it takes, or the ValueError."""
    report, x = getattr(pe, name), rows(6)
    few = {"steps": 1, "num_samples": 25, "progress": False}
    known = inspect.signature(report).parameters
    few = {key: value for key, value in few.items() if key in known}
    for argument in [n for n in known if n not in ("model", "guide", "progress")]:
        for value in OTHERS:
            given = {"data": x, **few, argument: value}
            try:
                report(model, guide, given.pop("data"), **given)
            except ValueError as error:
                assert str(error), (argument, value)


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("argument, value", [
    ("seed", -1), ("seed", 1.5), ("seed", True), ("num_samples", True), ("batch_size", 2.0),
    ("plate", 3), ("arguments", "x"),
])  # fmt: skip
def test_the_argument_is_named(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument} should be a"):
        getattr(pe, name)(model, guide, rows(6), progress=False, **{argument: value})


def test_programs_that_need_arguments():
    with pytest.raises(ValueError, match="these do not run without"):
        pe.evidence(model, guide, None)
    with pytest.raises(ValueError, match="method should be one of"):
        pe.evidence(model, guide, rows(6), method=None)
    for report in (pe.decompositions, pe.inference_gap):
        with pytest.raises(ValueError, match=r"evidence should be a result of pe\.evidence"):
            report(model, guide, rows(6), evidence=[0.0] * 6)
