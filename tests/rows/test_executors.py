"""Reports by the workers of an executor are those of one process."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from helpers import conjugate
from helpers.executors import Dying, Inline
from helpers.oracles import rows
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample

import pyproelbo as pe
from pyproelbo._backend import pools
from pyproelbo._rows import executors, workers
from pyproelbo._rows.evaluating import evaluating

N = 11
FEW = {"num_samples": 30, "batch_size": 4, "seed": 3, "progress": False}


def amortised():
    """Programs that no module has, with parameters in Pyro's store and in a module."""
    encoder = torch.nn.Linear(3, 2)

    def model(x):
        scale = pyro.param("scale", torch.tensor(0.8), dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([z, z[..., :1]], -1), scale).to_event(1), obs=x)

    def guide(x):
        net = pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.7).to_event(1))

    x = rows(N, 3)
    pe.BetaELBO().loss(model, guide, x)
    return model, guide, x


def with_modules():
    """A Bayesian regression as a PyroModule, and its AutoGuide."""
    model = Regression()
    guide = AutoNormal(model)
    x = rows(N, 2)
    pe.BetaELBO().loss(model, guide, x)
    return model, guide, x


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](1, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))

    def forward(self, x):
        mean = self.linear(x[..., :1])[..., 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=x[..., 1])


CALLS = {
    "evidence": FEW,
    "psis": FEW,
    "moments": FEW,
    "fisher_divergence": FEW,
    "decompositions": FEW,
    "inference_gap": {**FEW, "steps": 3},
    "surgery": {**FEW, "num_samples": 2},
    "check": FEW,
}


def values(result):
    """All numbers of a result, by name."""
    found = result.to_xarray()
    return found.to_dict() if isinstance(found, xarray.DataTree) else dict(found)


@pytest.mark.parametrize("programs", [amortised, with_modules])
@pytest.mark.parametrize("name", CALLS)
def test_a_report_is_that_of_one_process(name, programs):
    if name == "surgery" and programs is with_modules:
        pytest.skip("there are no latents of single data")
    model, guide, x = programs()
    report, state = getattr(pe, name), torch.get_rng_state()
    store = pyro.get_param_store().get_state()
    expected = report(model, guide, x, **CALLS[name])
    found = report(model, guide, x, executor=Inline(), **CALLS[name])
    assert str(found) == str(expected)
    for dataset, other in zip(_datasets(found), _datasets(expected), strict=True):
        xarray.testing.assert_allclose(dataset, other, rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    now = pyro.get_param_store().get_state()["params"]
    assert now.keys() == store["params"].keys()
    assert all(now[name] is value for name, value in store["params"].items())


def _datasets(result):
    found = result.to_xarray()
    groups = found.subtree if isinstance(found, xarray.DataTree) else [found]
    return [group.to_dataset() if hasattr(group, "to_dataset") else group for group in groups]


def conditional():
    """A latent that is drawn given another: q(z) is by runs of the guide."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.3 * x, 0.8))
            pyro.sample("b", dist.Normal(0.4 * (a + x), 0.7))

    return model, guide, rows(N)


@pytest.mark.parametrize(
    "options", [{}, {"site": "b", "given": "a"}, {"num_samples": 3}, {"batch_size": 4}]
)
def test_surgery_where_the_guide_runs_on_all_pairs(options):
    model, guide, x = conditional()
    options = {"progress": False, **options}
    expected = pe.surgery(model, guide, x, **options).to_xarray()
    found = pe.surgery(model, guide, x, executor=Inline(), **options).to_xarray()
    xarray.testing.assert_allclose(found, expected, rtol=1e-10)


def test_surgery_at_the_draws_of_some_data():
    model, guide, _ = amortised()
    x = rows(300, 3)
    options = {"max_pairs": 120 * 300, "progress": False}
    expected = pe.surgery(model, guide, x, **options).to_xarray()
    found = pe.surgery(model, guide, x, executor=Inline(), **options).to_xarray()
    xarray.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("refit", [None, pe.Refit(num=3, steps=4)])
def test_calibration(refit):
    model, guide = conjugate.simulated(5)
    options = {"refit": refit, "num_samples": 40, "chunk": 7, "progress": False}
    expected = pe.calibration(model, guide, model, **options)
    found = pe.calibration(model, guide, model, executor=Inline(), **options)
    assert torch.equal(found.ranks, expected.ranks)


# what is sent


def test_a_large_job_is_sent_to_each_worker_once():
    model, guide, x = amortised()
    table = torch.zeros(50_000)

    def large(x):
        with pyro.poutine.scale(scale=1.0 + table[0]):
            guide(x)

    pe.evidence(model, large, x, executor=(known := Inline()), **FEW | {"batch_size": 1})
    assert sum(size > 200_000 for size in known.sizes) == executors._FEW  # the first tasks
    expected = pe.evidence(model, large, x, **FEW)
    fresh = Inline(fresh=True)  # asks for the job each time
    found = pe.evidence(model, large, x, executor=fresh, **FEW | {"batch_size": 1})
    torch.testing.assert_close(found.log_evidence, expected.log_evidence, rtol=1e-12, atol=0)
    assert sum(size > 200_000 for size in fresh.sizes) == N


def test_programs_with_a_generator_draw_other_numbers_for_each_batch():
    seen, drawn = [], []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        drawn.append(torch.randn(()).item())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    options = {**FEW, "plate": "data", "executor": Pickled(seen)}
    pe.evidence(model, guide, rows(N), **options)
    assert len(seen) == 3
    for i, batch in enumerate(seen):
        assert batch and batch.isdisjoint(set().union(*seen[:i]))


class Pickled(Inline):
    """Leaves what a program has seen, which its copy has."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def submit(self, function, /, *args, **kwargs):
        future = super().submit(function, *args, **kwargs)
        (kept,) = workers._kept.values()
        guide = kept.job.setting.programs[1]
        copy = next(c.cell_contents for c in guide.__closure__ if isinstance(c.cell_contents, list))
        self.seen.append({*copy})
        copy.clear()
        return future


def test_a_batch_is_sent_without_the_other_data():
    model, guide, _ = amortised()
    x = rows(20_000, 3)
    pe.evidence(model, guide, x[:1000], executor=(known := Inline()), **FEW | {"batch_size": 100})
    assert max(known.sizes) < 50_000
    part = workers.compact({"x": x[:5], "n": 3, "all": (x,)})
    assert part["x"].untyped_storage().nbytes() == 5 * 3 * 8 and part["all"][0] is x


def test_threads_take_turns():
    model, guide, x = amortised()
    expected = pe.evidence(model, guide, x, **FEW)
    with ThreadPoolExecutor(3) as pool:
        found = pe.evidence(model, guide, x, executor=pool, **FEW)
    assert torch.equal(found.log_evidence, expected.log_evidence)


def test_settings_of_this_process_hold_in_the_workers():
    seen = []

    def of(batch):
        seen.append((torch.get_default_dtype(), pyro.settings.get("module_local_params")))
        return torch.is_grad_enabled(), pyro.param("p").item()

    pyro.param("p", torch.tensor(2.0))
    with pyro.settings.context(module_local_params=True), pe._rows.evaluating.evaluating(of):
        job = workers.packed(workers.Job.here(of, 1))
    pyro.get_param_store()["p"] = torch.tensor(5.0)
    torch.set_default_dtype(torch.float32)
    workers._kept.clear()
    done = workers.unpacked(workers.run("key", job, workers.packed(None), 0))
    assert done.value == (False, 2.0) and pyro.param("p").item() == 5.0
    assert torch.get_default_dtype() == torch.float32
    assert not pyro.settings.get("module_local_params")


def test_warnings_of_workers_are_given_once():
    def model(x):
        with pyro.plate("data", len(x)):
            warnings.warn("from a worker", UserWarning, stacklevel=1)
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pe.evidence(model, guide, rows(N), executor=Inline(), plate="data", **FEW)
    assert sum("from a worker" in str(w.message) for w in caught) == 1


# what goes wrong


@pytest.mark.parametrize("executor", [3, "processes", ThreadPoolExecutor])
def test_what_is_no_executor(executor):
    model, guide, x = amortised()
    with pytest.raises(ValueError, match="executor should be"):
        pe.evidence(model, guide, x, executor=executor)


def test_levels_are_not_rows():
    model, guide, x = amortised()
    with pytest.raises(ValueError, match="executor= computes rows"):
        pe.evidence(model, guide, x, executor=Inline(), level="local")


def test_programs_that_cannot_be_sent(monkeypatch):
    monkeypatch.setattr(workers, "_pickle", lambda: pickle)
    model, guide, x = amortised()
    with pytest.raises(ValueError, match=r"cannot send.*pip install pyproelbo\[scale\]"):
        pe.evidence(model, guide, x, executor=Inline(), **FEW)


def test_an_error_of_a_program_keeps_what_is_finished():
    model, guide, x = amortised()

    def fails(x):
        if (x[:, 0] > 50).any():
            raise KeyError("this datum")
        guide(x)

    x[9] = 60.0
    with pytest.raises(KeyError, match="this datum") as caught:
        pe.evidence(model, fails, x, executor=Inline(), **FEW)
    expected = pe.evidence(model, guide, x[:8], **FEW)
    assert torch.equal(caught.value.evidence.log_evidence, expected.log_evidence)


def test_a_pool_that_breaks_for_good_keeps_what_is_finished(monkeypatch):
    monkeypatch.setattr(executors, "_FEW", 1)
    monkeypatch.setattr(executors, "_EACH", 1)
    model, guide, x = amortised()
    with pytest.raises(BrokenProcessPool) as caught:
        pe.evidence(model, guide, x, executor=Dying(at=2), **FEW)
    assert any("workers died" in note for note in caught.value.__notes__)
    assert len(caught.value.evidence.log_evidence) == 8


@pytest.mark.slow
def test_processes_of_which_one_is_killed(tmp_path):
    model, guide, x = amortised()
    file = tmp_path / "killed"

    def kills(x):
        if (x[:, 0] == x_9).any() and not os.path.exists(file):
            file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        guide(x)

    x_9 = x[9, 0]
    expected = pe.evidence(model, guide, x, **FEW)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(2, context) as pool,
        pytest.warns(pe.LostWorkerWarning, match="computed again"),
    ):
        found = pe.evidence(model, kills, x, executor=pool, **FEW)
    assert torch.equal(found.log_evidence, expected.log_evidence)


def test_each_worker_of_a_cluster_has_tasks():
    """Also those that join later."""
    there, executor = dict.fromkeys(range(100), 1), Inline()
    executor._client = SimpleNamespace(nthreads=lambda: there)
    with evaluating(seed=0), pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors, "_COUNTED", 0.0)
        results = executors.computed(abs, range(4000), executor)
        assert next(results) == (0, 0) and len(executor.sizes) >= 100
        assert next(results) == (1, 1) and len(executor.sizes) > 400
        there |= dict.fromkeys(range(300), 1)
        assert next(results) == (2, 2) and len(executor.sizes) > 1200
        assert len(list(results)) == 3997 and len(executor.sizes) == 4000


@pytest.mark.slow
def test_workers_of_dask():
    distributed = pytest.importorskip("distributed")
    model, guide, x = amortised()
    expected = pe.decompositions(model, guide, x, **FEW)
    options = {"n_workers": 2, "threads_per_worker": 2, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        executor = client.get_executor()
        assert pools.workers_of_cluster(executor) == 2
        found = pe.decompositions(model, guide, x, executor=executor, **FEW)
    xarray.testing.assert_allclose(found.to_xarray(), expected.to_xarray(), rtol=1e-10)


INTERRUPTED = """
import multiprocessing, os, signal, sys, threading, time
from concurrent.futures import ProcessPoolExecutor
import pyro, pyro.distributions as dist, torch
import pyproelbo as pe

def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

def guide(x):
    if float(x[0]) >= 8:
        time.sleep(0.3)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))

if __name__ == "__main__":
    x = torch.arange(40.0)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(abs, range(4)))
        pe.evidence(model, guide, x[:4], executor=pool, progress=False)
        threading.Timer(2, lambda: os.killpg(0, signal.SIGINT)).start()
        found = pe.evidence(
            model, guide, x, num_samples=10, batch_size=4, plate="data", executor=pool,
            progress=False,
        )
    print(len(found.log_evidence))
"""


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, start_new_session=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert 8 <= int(done.stdout) < 40 and int(done.stdout) % 4 == 0
    assert "interrupted: the evidence covers only the first" in done.stderr
