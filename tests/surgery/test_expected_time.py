"""The warning of a surgery that takes long, while its first pairs are summed."""

import re
import warnings

import pytest
import torch
from helpers.conjugate import Hierarchy
from helpers.oracles import rows
from helpers.surgery_programs import correlated, flow, normal, programs

import pyproelbo as pe
from pyproelbo._messages.durations import duration
from pyproelbo._surgery import expected_time, guide_aggregate
from pyproelbo._surgery.expected_time import Pairs, forewarned
from pyproelbo._surgery.guide_aggregate import DataPart

N, RATE = 1000, 1e6  # pairs a second


def parts(num_draws, size, at_once):
    """Of N data in parts of ``size``, at so many draws at once."""
    for start in range(0, N, size):
        sizes = [len(draws) for draws in torch.arange(num_draws).split(at_once)]
        yield DataPart(start + size, ((slice(0), torch.zeros(n, 1, 1), None) for n in sizes))


class Slow:
    """What goes through blocks, as fast as ``RATE`` by its own clock; the first takes a minute."""

    def __init__(self):
        self.time, self.warned_at = 0.0, None

    def go_through(self, found, size):
        sizes = []
        for part in found:
            for _, block, _ in part.blocks:
                self.time += len(block) * size / RATE if sizes else 60.0
                sizes.append(len(block))
        return sizes


@pytest.mark.parametrize("size, at_once", [(100, 125), (20, 1250), (5, 40)])
@pytest.mark.parametrize("num_samples, num_runs", [(1, 1), (1, 10), (5, 1)])
def test_how_long_it_takes_and_what_takes_less(size, at_once, num_samples, num_runs, monkeypatch):
    slow = Slow()
    monkeypatch.setattr(expected_time, "perf_counter", lambda: slow.time)
    monkeypatch.setattr(expected_time, "LONG", 1.0)
    monkeypatch.setattr(expected_time, "_SUGGESTED", 0.55 * num_runs)
    monkeypatch.setattr(expected_time, "_TIMED", 0.1)
    num_draws = 1200 if num_samples == 1 else 5000
    pairs = Pairs(num_draws, N, num_samples, num_runs)
    with pytest.warns(pe.LongRunWarning) as caught:
        sizes = slow.go_through(forewarned(parts(num_draws, size, at_once), pairs), size)
    assert sum(sizes) == num_draws * N // size  # all of them came through
    (text,) = (str(warning.message) for warning in caught)
    seconds = num_draws * N * num_runs / RATE
    assert f"all pairs of 1,000 data, which takes about {duration(seconds)} here" in text
    suggested = int(re.search(r"max_pairs=([\d_]+)", text).group(1).replace("_", ""))
    least, extra = 100 * N * num_samples * num_runs, num_draws / (N * num_samples)
    assert suggested == max(least, 4 * 10**5 * num_runs if num_samples == 1 else 5 * 10**5)
    assert f"about {duration(suggested * extra / RATE)}" in text
    assert f"draws of {suggested // (N * num_samples * num_runs)} data" in text


def test_what_is_not_long_is_not_told():
    slow = Slow()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patched:
        warnings.simplefilter("error")
        patched.setattr(expected_time, "perf_counter", lambda: slow.time)
        slow.go_through(forewarned(parts(1250, 10, 50), Pairs(1250, N, 1, 1)), 10)


def told(*programs, **options):
    """How many warnings a surgery gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pe.surgery(*programs, progress=False, **options)
    return sum(warning.category is pe.LongRunWarning for warning in caught)


@pytest.mark.parametrize("q", [normal, correlated, flow])
def test_a_surgery_of_all_pairs_tells_once(q, monkeypatch):
    """At the line of the user; with pairs that are few enough it tells nothing."""
    monkeypatch.setattr(expected_time, "LONG", 0.0)
    monkeypatch.setattr(expected_time, "_TIMED", 0.0)
    x, pair = rows(2100, 4), programs(q)
    with pytest.warns(pe.LongRunWarning, match="max_pairs=") as caught:
        pe.surgery(*pair, x, batch_size=1000, progress=False)
    assert [warning.filename for warning in caught] == [__file__]
    assert told(*pair, x, max_pairs=100 * 2100) == 0
    monkeypatch.setattr(expected_time, "LONG", 600.0)
    assert told(*pair, x) == 0


def test_nested_surgeries_are_counted_together(monkeypatch):
    monkeypatch.setattr(expected_time, "LONG", 0.0)
    monkeypatch.setattr(expected_time, "_TIMED", 0.0)
    monkeypatch.setattr(guide_aggregate, "_SLAB", 16)
    of, told_of = Hierarchy.of(40), []
    monkeypatch.setattr(expected_time, "_tell", lambda rate, pairs: told_of.append(pairs.num_runs))
    pe.surgery(of.model, of.guide(), of.x, site="z", num_nested=3, batch_size=10, progress=False)
    assert told_of == [3, 0, 0]


@pytest.mark.parametrize("seconds, words", [
    (0.2, "1 seconds"), (119.0, "119 seconds"), (121.0, "2 minutes"), (7300.0, "2 hours"),
    (3e5, "3 days"),
])  # fmt: skip
def test_durations(seconds, words):
    assert duration(seconds) == words
