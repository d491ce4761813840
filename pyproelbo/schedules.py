r"""Weights that change with the training step.

A schedule is a function from the step (0, 1, 2, ...) to a float, written as a frozen dataclass: it
prints, compares, hashes and pickles. Schedules multiply:

>>> warm_up = Linear(0.0, 1.0, steps=4)
>>> [warm_up(step) for step in range(6)]
[0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
>>> (warm_up * 2.0)(2)
1.0
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass


class Schedule(ABC):
    """A float for every step."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The weight at a step, counted from 0."""

    @abstractmethod
    def settled(self) -> int | None:
        """The step from which the weight is constant, None if it never is."""

    def __mul__(self, other: "Schedule | float") -> "Schedule":
        return _Product(self, as_schedule(other))

    __rmul__ = __mul__


def as_schedule(weight: Schedule | float, name: str = "weight") -> Schedule:
    """A schedule unchanged; a number as a constant schedule.

    Raises:
        ValueError: if ``weight`` is neither, or is not finite; the message calls it ``name``.
    """
    if isinstance(weight, Schedule):
        return weight
    try:
        value = float(weight)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} should be a number or a schedule of pyproelbo.schedules, got {weight!r}"
        ) from None
    if not math.isfinite(value):
        raise ValueError(f"{name} should be finite, got {value}")
    return Constant(value)


def _check_steps(steps: int, name: str = "steps") -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name} should be a whole number of at least 1, got {steps!r}")


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} should be finite, got {value}")


@dataclass(frozen=True)
class Constant(Schedule):
    """The same ``value`` at every step."""

    value: float

    def __post_init__(self) -> None:
        _check_finite(value=self.value)

    def settled(self) -> int:
        """0: it never changes."""
        return 0

    def __call__(self, step: int) -> float:
        """``value``."""
        return self.value


@dataclass(frozen=True)
class _Ramp(Schedule):
    """start + (end - start) t(step / steps), with t from 0 to 1, then constant."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_finite(start=self.start, end=self.end)
        _check_steps(self.steps)

    @abstractmethod
    def _progress(self, t: float) -> float:
        """The fraction of the change completed at a fraction ``t`` of the steps."""

    def __call__(self, step: int) -> float:
        """(1 - t) start + t end, with t of :meth:`_progress` at step / steps, at most 1."""
        t = self._progress(min(step / self.steps, 1.0))
        return (1.0 - t) * self.start + t * self.end

    def settled(self) -> int:
        """``steps``, where ``end`` is reached."""
        return self.steps


@dataclass(frozen=True)
class Linear(_Ramp):
    """start + (end - start) t, with t = min(step / steps, 1) (Bowman et al. 2016's warm-up)."""

    def _progress(self, t: float) -> float:
        return t


@dataclass(frozen=True)
class Cosine(_Ramp):
    """start + (end - start) (1 - cos(pi t)) / 2, with t = min(step / steps, 1)."""

    def _progress(self, t: float) -> float:
        return (1.0 - math.cos(math.pi * t)) / 2.0


@dataclass(frozen=True)
class Sigmoid(_Ramp):
    """A logistic curve from ``start`` to ``end``, rescaled to reach both.

    start + (end - start) (s(t) - s(0)) / (s(1) - s(0)) with t = min(step / steps, 1) and
    s(t) = 1 / (1 + exp(-sharpness (t - 1/2))).
    """

    sharpness: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite(sharpness=self.sharpness)
        if self.sharpness <= 0:
            raise ValueError(f"sharpness should be positive, got {self.sharpness}")

    def _progress(self, t: float) -> float:
        # with tanh(x / 2) = 2 s(x) - 1 the rescaled curve is symmetric about 1/2
        x = self.sharpness * (t - 0.5)
        return (1.0 + math.tanh(x / 2.0) / math.tanh(self.sharpness / 4.0)) / 2.0


@dataclass(frozen=True)
class Cyclical(Schedule):
    """``start`` to ``end`` linearly, then held at ``end``, repeatedly (Fu et al. 2019).

    Each cycle lasts ``period`` steps; the first ``ramp`` of it (a fraction) rises. After ``cycles``
    cycles the weight stays at ``end``; with ``cycles=None`` it never settles.
    """

    start: float
    end: float
    period: int
    ramp: float = 0.5
    cycles: int | None = None

    def __post_init__(self) -> None:
        _check_finite(start=self.start, end=self.end, ramp=self.ramp)
        _check_steps(self.period, "period")
        if not 0.0 < self.ramp <= 1.0:
            raise ValueError(f"ramp should be a fraction in (0, 1], got {self.ramp}")
        if self.cycles is not None:
            _check_steps(self.cycles, "cycles")

    def settled(self) -> int | None:
        """``cycles * period``; None if cycles never end."""
        return None if self.cycles is None else self.cycles * self.period

    def __call__(self, step: int) -> float:
        """From ``start`` to ``end`` within a cycle, then ``end`` until its end."""
        if self.cycles is not None and step >= self.cycles * self.period:
            return self.end
        t = min((step % self.period) / (self.ramp * self.period), 1.0)
        return (1.0 - t) * self.start + t * self.end


@dataclass(frozen=True)
class Piecewise(Schedule):
    """``values[i]`` from step ``boundaries[i - 1]`` on, and ``values[0]`` before the first.

    >>> Piecewise(boundaries=(10, 20), values=(0.0, 0.5, 1.0))(10)
    0.5
    """

    boundaries: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        object.__setattr__(self, "values", tuple(self.values))
        for boundary in self.boundaries:
            _check_steps(boundary, "each of boundaries")
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"boundaries should increase, got {self.boundaries}")
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"values should have one entry more than boundaries ({len(self.boundaries)}), "
                f"got {len(self.values)}"
            )
        for value in self.values:
            _check_finite(values=value)

    def settled(self) -> int:
        """The last of ``boundaries``, 0 where there are none."""
        return self.boundaries[-1] if self.boundaries else 0

    def __call__(self, step: int) -> float:
        """The value of the interval that contains the step."""
        return self.values[bisect_right(self.boundaries, step)]


@dataclass(frozen=True)
class _Product(Schedule):
    left: Schedule
    right: Schedule

    def settled(self) -> int | None:
        """The later of both; None where one never settles."""
        left, right = self.left.settled(), self.right.settled()
        return None if left is None or right is None else max(left, right)

    def __call__(self, step: int) -> float:
        """The product of both weights."""
        return self.left(step) * self.right(step)
