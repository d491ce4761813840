"""Surgeries by several jobs, each over some of the posteriors, add up to one."""

import re
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from helpers import conjugate
from helpers.conjugate import Hierarchy
from helpers.executors import Inline
from helpers.oracles import rows
from helpers.stopping import Stopping
from helpers.surgery_programs import PRIORS, correlated, gamma, normal, programs, standard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import pyproelbo as pe

N = 23
BATCH = 5
OPTIONS = {"batch_size": BATCH, "seed": 3, "progress": False}


def conditional():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.3 * x[:, 0], 0.8))
            pyro.sample("b", dist.Normal(0.4 * (a + x[:, 1]), 0.7))

    return model, guide


def of(q):
    return programs(q, PRIORS.get(q, standard))


def hierarchy():
    of = Hierarchy.of(N)
    return of.model, of.guide(factor=1.3)


KINDS = {
    "normal": (lambda: of(normal), {}),
    "two draws": (lambda: of(normal), {"num_samples": 2}),
    "correlated": (lambda: of(correlated), {}),
    "marginals by dimension": (lambda: of(gamma), {}),
    "all pairs": (conditional, {"site": ("a", "b")}),
    "given": (conditional, {"site": "b", "given": "a"}),
    "global latents": (hierarchy, {"site": "z", "num_nested": 3}),
}


def data(name):
    return Hierarchy.of(N).x if name == "global latents" else rows(N, 4)


@pytest.fixture(scope="module")
def wholes():
    torch.set_default_dtype(torch.float64)
    found = {}
    for name, (make, options) in KINDS.items():
        found[name] = pe.surgery(*make(), data(name), **OPTIONS | options)
    return found


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=4, deadline=None)
@given(cuts=st.sets(st.integers(1, N - 1), max_size=3), order=st.randoms())
def test_parts_in_any_order_add_up_to_one_process(name, wholes, cuts, order):
    (make, options), x = KINDS[name], data(name)
    borders = [0, *sorted(cuts), N]
    parts = [
        pe.surgery_part(*make(), x, range(start, stop), **OPTIONS | options)
        for start, stop in pairwise(borders)
    ]
    assert [part.rows for part in parts] == [range(a, b) for a, b in pairwise(borders)]
    order.shuffle(parts)
    whole = pe.merge(parts)
    found = whole.surgery()
    expected = wholes[name]
    assert whole.rows == range(N)
    xarray.testing.assert_allclose(found.to_xarray(), expected.to_xarray(), rtol=1e-9, atol=1e-12)
    assert torch.equal(found.codes, expected.codes) and found.num_globals == expected.num_globals


@pytest.mark.parametrize("q", [normal, gamma])
def test_at_the_draws_of_some_data(q, tmp_path):
    model, guide = of(q)
    x = rows(300, 4)
    options = {"max_pairs": 120 * 300, "progress": False}
    expected = pe.surgery(model, guide, x, **options)
    for i, part in enumerate((range(200, 300), range(200))):
        pe.surgery_part(model, guide, x, part, **options).save(tmp_path / f"{i}.npz")
    found = pe.merge(map(pe.load_result, tmp_path.iterdir())).surgery()
    assert found.num_points == expected.num_points == 120
    xarray.testing.assert_allclose(found.to_xarray(), expected.to_xarray(), rtol=1e-9)
    assert str(found) == str(expected)


@pytest.mark.parametrize("name", KINDS)
def test_from_workers_and_files(name, wholes, tmp_path):
    (make, options), x = KINDS[name], data(name)
    options = OPTIONS | options
    first = pe.surgery_part(*make(), x, range(9), executor=Inline(), **options)
    first.save(tmp_path / "first.npz")
    second = pe.surgery_part(*make(), x, range(9, N), **options)
    found = (second + pe.load_result(tmp_path / "first.npz")).surgery()
    xarray.testing.assert_allclose(
        found.to_xarray(), wholes[name].to_xarray(), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype, tmp_path):
    model, _ = of(normal)
    x = rows(N, 4).float()

    def low(x):
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z", dist.Normal(x[:, :2].to(dtype), torch.ones((), dtype=dtype)).to_event(1)
            )

    expected = pe.surgery(model, low, x, **OPTIONS)
    for i, part in enumerate((range(9), range(9, N))):
        pe.surgery_part(model, low, x, part, **OPTIONS).save(tmp_path / f"{i}.npz")
    found = pe.merge(pe.load_result(tmp_path / f"{i}.npz") for i in range(2)).surgery()
    assert found.codes.dtype == expected.codes.dtype == dtype
    assert found.mutual_information == pytest.approx(expected.mutual_information, abs=1e-5)


def test_what_is_interrupted_is_no_loss(wholes):
    """After Ctrl-C, the rest of the rows remain to be done; after an error too."""
    (model, guide), x = of(gamma), rows(N, 4)
    counting = Stopping(guide, at=0)
    pe.surgery_part(model, counting, x, range(2, N), **OPTIONS)
    first = pe.surgery_part(model, Stopping(guide, 0), x, range(2), **OPTIONS)
    seen = set()
    for at in range(1, counting.calls + 1):
        try:
            with pytest.warns(pe.UnfinishedWarning, match="the surgery_part covers only the first"):
                part = pe.surgery_part(model, Stopping(guide, at), x, range(2, N), **OPTIONS)
        except KeyboardInterrupt:
            continue
        seen.add(part.rows)
        left = range(part.rows.stop, N)
        rest = pe.surgery_part(model, Stopping(guide, 0), x, left, **OPTIONS)
        found = pe.merge([rest, part, first]).surgery()
        expected = wholes["marginals by dimension"]
        xarray.testing.assert_allclose(found.to_xarray(), expected.to_xarray(), rtol=1e-9)
    assert seen == {range(2, 5), range(2, 10), range(2, 15), range(2, 20)}


def test_incomplete_parts_and_their_words():
    model, guide = of(normal)
    x = rows(N, 4)
    part = pe.surgery_part(model, guide, x, range(4, 9), **OPTIONS)
    with pytest.raises(ValueError, match=r"posteriors of 18 of 23 data are missing.*row 0: pe\.m"):
        part.surgery()
    assert "4 to 8 of 23" in str(part) and "pe.merge" in part.notes[0]
    after = pe.surgery_part(model, guide, x, range(11, N), **OPTIONS)
    with pytest.raises(ValueError, match="rows 9 to 10 are missing"):
        part + after
    with pytest.raises(ValueError, match="rows 4 to 8 are in two results"):
        part + part
    whole = part.to_xarray()
    assert whole.attrs == {"num_data": N, "start": 4, "stop": 9}


@pytest.mark.parametrize(
    ("other", "options", "what"),
    [
        ({}, {"seed": 4}, "same seed"),
        ({}, {"num_samples": 2}, "same num_samples"),
        ({"x": lambda: rows(N, 4).flip(0)}, {}, r"same draws.*a loader that shuffles"),
        ({"x": lambda: rows(N + 1, 4)}, {}, "same num_data"),
        ({"guide": of(correlated)[1]}, {}, "same latents"),
    ],
    ids=["seed", "draws", "order", "more data", "guide"],
)
def test_parts_of_something_else(other, options, what):
    model, guide = of(normal)
    first = pe.surgery_part(model, guide, rows(N, 4), range(9), **OPTIONS)
    guide, x = other.get("guide", guide), other.get("x", lambda: rows(N, 4))()
    second = pe.surgery_part(model, guide, x, range(9, N), **OPTIONS | options)
    with pytest.raises(ValueError, match=what):
        first + second


def test_other_numbers_of_global_draws():
    (make, options), x = KINDS["global latents"], data("global latents")
    options = OPTIONS | options
    first = pe.surgery_part(*make(), x, range(9), **options)
    second = pe.surgery_part(*make(), x, range(9, N), **options | {"num_nested": 2})
    with pytest.raises(ValueError, match="same num_globals, got 3 and 2"):
        first + second
    assert re.search(r"draws of the global latents +3\n", str(first))


def test_a_loader_that_shuffles():
    """Each job has other draws: refused, as one sum over two orders would be wrong."""
    model, guide = of(normal)
    parts = []
    for part in (range(9), range(9, N)):
        order = torch.Generator().manual_seed(part.start)
        loader = DataLoader(TensorDataset(rows(N, 4)), BATCH, shuffle=True, generator=order)
        parts.append(pe.surgery_part(model, guide, loader, part, seed=3, progress=False))
    with pytest.raises(ValueError, match="same draws"):
        pe.merge(parts)


@pytest.mark.parametrize("part", [range(0), range(-1, 3), range(0, 6, 2), slice(0, 3), (0, 3), 7])
def test_wrong_rows(part):
    with pytest.raises(ValueError, match="rows should be a range of row numbers"):
        pe.surgery_part(*of(normal), rows(N, 4), part, **OPTIONS)


def test_rows_beyond_the_data():
    with pytest.raises(ValueError, match="rows should be among those of the 23 data"):
        pe.surgery_part(*of(normal), rows(N, 4), range(20, 24), **OPTIONS)


def test_a_check_from_parts(tmp_path):
    model, guide, x = conjugate.model, conjugate.guide_of(0.6), rows(40)
    options = {"num_samples": 200, "progress": False}
    parts, surgeries = [], []
    for i, rows_of in enumerate((range(25, 40), range(25))):
        shard = pe.Shard(x[rows_of], rows_of.start)
        pe.check(model, guide, shard, **options).save(tmp_path / f"{i}.npz")
        part = pe.load_result(tmp_path / f"{i}.npz")
        assert part.surgery is None and "surgery_part" in part.skipped and part.rows == rows_of
        parts.append(part)
        surgeries.append(pe.surgery_part(model, guide, x, rows_of, progress=False))
    surgery = pe.merge(surgeries).surgery()
    found, expected = pe.merge(parts).with_surgery(surgery), pe.check(model, guide, x, **options)
    assert str(found) == str(expected) and found.skipped == expected.skipped == ""
    assert pe.merge(parts).rows == expected.rows == range(40)
    with pytest.raises(ValueError, match="surgery should be of the 15 data of the check"):
        parts[0].with_surgery(surgery)
    one, square = torch.ones(1), torch.eye(1)
    response = pe.LinearResponse(("z",), one, one, one, square, square, 10, 0.0, 0.0, 0.0)
    other = pe.check(model, guide, pe.Shard(x[:25]), linear_response=response, **options)
    with pytest.raises(ValueError, match="same linear_response"):
        parts[0] + other
