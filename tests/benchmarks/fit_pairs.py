"""What ``fit.py`` and ``fit_models.py`` share: a fit of ``pe.fit`` beside Adam at several rates."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

Work = TypeVar("Work")

NEAR = 0.1  # nats; per datum, where the ELBO is


class Best(NamedTuple):
    """Of Adam at several rates the best.

    Attributes:
        elbo, rate, seconds: of the best rate.
        seconds_of_all: of all rates together.
    """

    elbo: float
    rate: float
    seconds: float
    seconds_of_all: float

    @classmethod
    def of(cls, rates: Sequence[float], elbo_at: Callable[[float], float]) -> "Best":
        """Of fits at some rates, each of which returns its ELBO."""
        found, seconds = {}, {}
        for rate in rates:
            start = time.monotonic()
            found[rate] = elbo_at(rate)
            seconds[rate] = time.monotonic() - start
        best = max(found, key=lambda rate: found[rate])
        return cls(found[best], best, seconds[best], sum(seconds.values()))


class Pair(NamedTuple):
    """Two fits of one thing.

    Attributes:
        of: what is fitted, by the names of columns.
        reason, elbo, stderr, seconds, steps: of ``pe.fit``.
        adam: the best of Adam's.
    """

    of: Mapping[str, str | int]
    reason: str
    elbo: float
    stderr: float
    seconds: float
    steps: int
    adam: Best

    @property
    def is_near(self) -> bool:
        """Whether the ELBO is not far below the best, or within the error."""
        return self.adam.elbo - self.elbo < NEAR + 2 * self.stderr

    def row(self) -> dict[str, object]:
        """What is written of it."""
        own = self._asdict()
        del own["of"], own["adam"]
        names = ("best", "rate", "seconds_of_one", "seconds_of_all")
        return {**self.of, **own, **dict(zip(names, self.adam, strict=True))}


def parser() -> argparse.ArgumentParser:
    """With the options of both scripts."""
    found = argparse.ArgumentParser()
    found.add_argument("--processes", type=int, default=2)
    found.add_argument("--out", type=Path)
    return found


def pairs_of(
    pair: Callable[[Work], Pair], work: Iterable[Work], processes: int, out: Path | None
) -> list[Pair]:
    """All of them, written one by one."""
    pairs: list[Pair] = []
    with get_context("spawn").Pool(processes) as pool:
        for each in pool.imap(pair, work, chunksize=1):
            pairs.append(each)
            if out is not None:
                out.write_text(json.dumps([p.row() for p in pairs], indent=1))
    return pairs


def table(
    pairs: list[Pair], heads: tuple[str, ...], cells: Callable[[Pair], Iterable[str]]
) -> None:
    """Print what stands in the columns before the times, and these."""
    print("| " + " | ".join((*heads, "s", "s of one", "s of all")) + " |")
    print("|" + "---|" * (len(heads) + 3))
    for p in pairs:
        times = [f"{s:.0f}" for s in (p.seconds, p.adam.seconds, p.adam.seconds_of_all)]
        print("| " + " | ".join([*cells(p), *times]) + " |")


def near(pairs: list[Pair]) -> str:
    """How many are near the best, in words."""
    return f"within {NEAR} nats of the best: {sum(p.is_near for p in pairs)} of {len(pairs)}"


def false(pairs: list[Pair]) -> str:
    """How many of those that say that they have converged are not, in words."""
    ended = [p for p in pairs if p.reason == "converged"]
    return f'"converged" that is false: {sum(not p.is_near for p in ended)} of {len(ended)}'
