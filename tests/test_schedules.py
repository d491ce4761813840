"""Schedules: ends, bounds, products, complaints."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyproelbo.schedules import Constant, Cosine, Cyclical, Linear, Piecewise, Sigmoid, as_schedule

REAL = st.floats(-10, 10)
STEPS = st.integers(1, 10_000)
RAMPS = [Linear, Cosine, Sigmoid]


@pytest.mark.parametrize("ramp", RAMPS)
@given(start=REAL, end=REAL, steps=STEPS, step=st.integers(0, 20_000))
def test_ramps_reach_both_ends_and_stay_between(ramp, start, end, steps, step):
    schedule = ramp(start, end, steps)
    assert schedule(0) == pytest.approx(start)
    assert schedule(steps) == schedule(10 * steps) == pytest.approx(end)
    low, high = sorted((start, end))
    assert low - 1e-9 <= schedule(step) <= high + 1e-9
    direction = 1 if end >= start else -1
    assert direction * (schedule(step + 1) - schedule(step)) >= -1e-9


@given(period=st.integers(1, 100), cycles=st.integers(1, 5), step=st.integers(0, 1000))
def test_cyclical_repeats_until_it_settles(period, cycles, step):
    forever = Cyclical(0.0, 1.0, period)
    assert forever(step) == forever(step + period)
    assert forever.settled() is None
    settled = Cyclical(0.0, 1.0, period, cycles=cycles)
    assert settled.settled() == cycles * period
    assert settled(step) == (1.0 if step >= cycles * period else forever(step))


def test_cyclical_rises_then_holds():
    schedule = Cyclical(0.0, 1.0, period=10, ramp=0.5)
    assert [schedule(s) for s in (0, 1, 5, 9, 10)] == [0.0, 0.2, 1.0, 1.0, 0.0]


def test_piecewise():
    schedule = Piecewise((10, 20), (0.0, 0.5, 1.0))
    assert [schedule(s) for s in (0, 9, 10, 19, 20, 99)] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert schedule.settled() == 20
    assert Piecewise((), (3.0,))(0) == 3.0


@given(a=REAL, step=st.integers(0, 50))
def test_products(a, step):
    product = a * Linear(0.0, 1.0, 10) * Cosine(1.0, 0.0, 30)
    assert product(step) == pytest.approx(
        a * Linear(0.0, 1.0, 10)(step) * Cosine(1.0, 0.0, 30)(step)
    )
    assert product.settled() == 30
    assert (Linear(0.0, 1.0, 10) * Cyclical(0.0, 1.0, 5)).settled() is None


def test_values():
    """They are values: equal, hashable, printable, picklable, frozen."""
    schedule = Linear(0.0, 1.0, 10) * 2.0
    assert schedule == Linear(0.0, 1.0, 10) * 2.0 == pickle.loads(pickle.dumps(schedule))
    assert len({schedule, copy.deepcopy(schedule)}) == 1
    assert repr(Linear(0.0, 1.0, 10)) == "Linear(start=0.0, end=1.0, steps=10)"
    with pytest.raises(AttributeError):
        Constant(1.0).value = 2.0
    assert as_schedule(2) == Constant(2.0)
    assert as_schedule(schedule) is schedule


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Linear(0.0, 1.0, 0), "steps"),
        (lambda: Linear(0.0, 1.0, -3), "steps"),
        (lambda: Linear(0.0, 1.0, 2.5), "steps"),
        (lambda: Cosine(float("nan"), 1.0, 3), "start"),
        (lambda: Sigmoid(0.0, 1.0, 3, sharpness=0.0), "sharpness"),
        (lambda: Cyclical(0.0, 1.0, 0), "period"),
        (lambda: Cyclical(0.0, 1.0, 5, ramp=0.0), "ramp"),
        (lambda: Cyclical(0.0, 1.0, 5, cycles=0), "cycles"),
        (lambda: Piecewise((3, 2), (1.0, 2.0, 3.0)), "boundaries"),
        (lambda: Piecewise((3,), (1.0,)), "values"),
        (lambda: Constant(float("inf")), "value"),
        (lambda: as_schedule("linear", "beta"), "beta should be a number or a schedule"),
    ],
)
def test_complaints(make, message):
    with pytest.raises(ValueError, match=message):
        make()
