"""Results on parts of the data add up to that on all of them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy
import torch
import xarray
from helpers import conjugate
from helpers.executors import Inline
from helpers.oracles import rows
from hypothesis import given, settings
from hypothesis import strategies as st

import pyproelbo as pe

N = 13
MODEL, GUIDE = conjugate.model, conjugate.guide_of(0.6)
FEW = {"num_samples": 30, "batch_size": 4, "seed": 5, "progress": False}
CALLS = {
    "evidence": FEW,
    "psis": FEW,
    "moments": FEW,
    "decompositions": FEW,
    "inference_gap": {**FEW, "steps": 3},
    "fisher_divergence": FEW,
}


def report(name, data, **options):
    return getattr(pe, name)(MODEL, GUIDE, data, **CALLS[name] | options)


@pytest.fixture(scope="module")
def wholes():
    torch.set_default_dtype(torch.float64)
    with pyro.validation_enabled():
        return {name: report(name, rows(N)) for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=5, deadline=None)
@given(cuts=st.sets(st.integers(1, N - 1), max_size=3), order=st.randoms())
def test_parts_in_any_order_add_up_to_one_process(name, wholes, cuts, order):
    x, borders = rows(N), [0, *sorted(cuts), N]
    parts = [report(name, pe.Shard(x[start:stop], start)) for start, stop in pairwise(borders)]
    assert [part.rows.start for part in parts] == borders[:-1]
    order.shuffle(parts)
    whole = pe.merge(parts)
    xarray.testing.assert_allclose(whole.to_xarray(), wholes[name].to_xarray(), rtol=1e-10)
    assert str(whole) == str(wholes[name]) and whole.rows == range(N)


def test_two_add_up_by_a_plus():
    x = rows(N)
    whole = report("evidence", pe.Shard(x[:5])) + report("evidence", pe.Shard(x[5:], start=5))
    assert torch.equal(whole.log_evidence, report("evidence", x).log_evidence)


def test_what_ctrl_c_has_left_and_the_rest(monkeypatch):
    x, left = rows(N), []

    def interrupts(x):
        if len(left) == 20:
            raise KeyboardInterrupt
        left.append(x)
        GUIDE(x)

    interrupts.__qualname__ = GUIDE.__qualname__
    with pytest.warns(pe.UnfinishedWarning):
        first = pe.evidence(MODEL, interrupts, x, **FEW | {"chunk": 3, "batch_size": 2})
    assert 0 < first.rows.stop < N
    start = first.rows.stop
    whole = first + report("evidence", pe.Shard(x[start:], start=start))
    expected = report("evidence", x)
    torch.testing.assert_close(whole.log_evidence, expected.log_evidence, rtol=1e-12, atol=0)


def test_evidence_that_is_given_is_of_the_part():
    x, exact = rows(N), torch.linspace(-2.0, -1.0, N)
    whole = report("decompositions", x, evidence=exact)
    parts = [
        report("decompositions", pe.Shard(x[part], part.start), evidence=exact[part])
        for part in (slice(0, 6), slice(6, N))
    ]
    xarray.testing.assert_allclose(pe.merge(parts).to_xarray(), whole.to_xarray(), rtol=1e-10)


def test_a_loader_as_a_shard():
    x = rows(N)
    loader = torch.utils.data.DataLoader(x[6:], batch_size=3)
    whole = report("psis", pe.Shard(x[:6])) + report("psis", pe.Shard(loader, start=6))
    expected = report("psis", x)
    torch.testing.assert_close(whole.khat, expected.khat)
    assert abs(whole.joint_khat - expected.joint_khat) < 1e-8


def far(x):
    """A guide that misses some of the posteriors, each in its own way."""
    with pyro.plate("data", len(x)):
        off = torch.where(x > 0.5, 3.0, torch.where(x < -0.5, -2.5, 0.1))
        pyro.sample("z", dist.Normal(x / 2 + off, 0.3))


REPAIR = {**FEW, "num_samples": 60, "steps": 10, "annealed": pe.Annealed(4, 2, num_pilot=5)}


def without_times(repair):
    return repair.to_xarray().drop_vars("cost")


def test_repairs_add_up():
    x = rows(N)
    whole = pe.repair(MODEL, far, x, **REPAIR)
    assert len({*whole.method.tolist()}) > 1
    parts = [pe.repair(MODEL, far, pe.Shard(x[i:j], i), **REPAIR) for i, j in ((0, 6), (6, N))]
    merged = pe.merge(parts)
    by_workers = pe.repair(MODEL, far, x, executor=Inline(), **REPAIR)
    for other in (merged, by_workers):
        xarray.testing.assert_allclose(without_times(other), without_times(whole), rtol=1e-8)
        assert other.rows == whole.rows == range(N)
        for name, value in whole.draws.items():
            torch.testing.assert_close(other.draws[name], value, rtol=1e-8, atol=1e-8)
        assert other.seconds.keys() == whole.seconds.keys() and other.notes == whole.notes


@pytest.mark.parametrize("refit", [None, pe.Refit(num=3, steps=2)])
def test_calibrations_of_several_seeds_are_of_more_simulations(refit, tmp_path):
    model, guide = conjugate.simulated(6)
    options = {"refit": refit, "num_samples": 30, "progress": False}
    parts = [pe.calibration(model, guide, model, seed=seed, **options) for seed in (2, 0, 1)]
    parts[0].save(tmp_path / "part.npz")
    whole = pe.merge([pe.load_result(tmp_path / "part.npz"), *parts[1:]])
    assert torch.equal(whole.ranks, torch.cat([parts[i].ranks for i in (1, 2, 0)]))
    expected = [scipy.stats.kstest(u, "uniform").pvalue for u in whole.ranks.mT.numpy()]
    assert whole.p_value.tolist() == expected and whole.rows is None
    assert whole.ended is None and "(" in str(whole)
    with pytest.raises(ValueError, match="different seeds, got 1 twice"):
        whole + parts[2]


# what is refused


def parts(**second):
    x = rows(N)
    options = {"data": pe.Shard(x[6:], start=6)} | second
    return [report("evidence", pe.Shard(x[:6])), report("evidence", **options)]


@pytest.mark.parametrize("second, what", [
    ({"seed": 6}, "same seed, got 5 and 6"),
    ({"num_samples": 31}, "same num_samples, got 30 and 31"),
    ({"data": pe.Shard(torch.zeros(3), start=5)}, "rows 5 to 5 are in two results"),
    ({"data": pe.Shard(torch.zeros(3), start=8)}, "rows 6 to 7 are missing"),
    ({"data": torch.zeros(3)}, "rows 0 to 2 are in two results"),
])  # fmt: skip
def test_parts_that_are_of_no_whole(second, what):
    with pytest.raises(ValueError, match=what):
        pe.merge(parts(**second))


def test_other_parameters():
    def guide(x):
        scale = pyro.param("scale", torch.tensor(0.7))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale))

    x = rows(N)
    guide(x)
    first = pe.evidence(MODEL, guide, pe.Shard(x[:6]), **FEW)
    pyro.get_param_store()["scale"] = torch.tensor(0.8)
    second = pe.evidence(MODEL, guide, pe.Shard(x[6:], start=6), **FEW)
    with pytest.raises(ValueError, match="same model and guide"):
        pe.merge([first, second])


def test_other_results_and_none():
    first, second = parts()
    tails = report("psis", pe.Shard(rows(N)[6:], start=6), num_samples=40)
    for results, what in (
        ([], "at least one"),
        ([first, tails], "of one report, got Evidence, Psis"),
        ([first, replace(second, per="datum")], "as its report has returned it"),
        ([3, 4], "of one report, got int"),
    ):
        with pytest.raises(ValueError, match=what):
            pe.merge(results)
    surgery = pe.surgery(MODEL, GUIDE, rows(N), progress=False)
    with pytest.raises(ValueError, match=r"no sum over rows.*surgery_part"):
        surgery + surgery


def test_a_surgery_of_all_data_takes_no_shard():
    with pytest.raises(ValueError, match=r"not a Shard.*surgery_part"):
        pe.surgery(MODEL, GUIDE, pe.Shard(rows(N)), progress=False)


def test_a_posterior_of_all_data_has_no_parts():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="they share one posterior"):
        pe.evidence(model, guide, pe.Shard(rows(N)), **FEW)
    with pytest.raises(ValueError, match="latents= are of all data"):
        latents = {"z": torch.zeros(N)}
        pe.evidence(MODEL, GUIDE, pe.Shard(rows(N)), method="annealed", latents=latents)
    for start in (-1, 1.5, True):
        with pytest.raises(ValueError, match="start should be"):
            pe.Shard(rows(N), start)


# files


@pytest.mark.parametrize("name", CALLS)
def test_parts_from_files_add_up(name, tmp_path, wholes):
    x = rows(N)
    for i, part in enumerate((slice(0, 7), slice(7, N))):
        report(name, pe.Shard(x[part], part.start)).save(tmp_path / f"{i}.npz")
    whole = pe.merge(map(pe.load_result, sorted(tmp_path.iterdir())))
    xarray.testing.assert_allclose(whole.to_xarray(), wholes[name].to_xarray(), rtol=1e-10)


def test_a_file_can_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch /tmp/evil",)

    path = tmp_path / "evil.npz"
    np.savez(path, result=np.array([Evil()], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        pe.load_result(path)
    for tree in ({"class": "fit", "fields": {}}, {"class": "BetaELBO", "fields": {}}, {"x": 1}, 3):
        np.savez(path, result=np.array(json.dumps(tree)))
        with pytest.raises(ValueError, match=r"no result|no file of a result"):
            pe.load_result(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError):
        pe.load_result(path)


def test_what_is_there_remains_where_writing_fails(tmp_path, monkeypatch):
    found, path = report("evidence", rows(N)), tmp_path / "part.npz"
    found.save(path)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space"):
        found.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_result_is_read_before_anything_else_is_imported(tmp_path):
    report("decompositions", rows(N)).save(tmp_path / "part.npz")
    script = (
        f"import pyproelbo as pe; print(pe.load_result({str(tmp_path / 'part.npz')!r}).num_data)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == str(N), done.stderr
