"""Steps that are compiled by another process while they are made."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from helpers.captured_fits import num_graphs, runs_of
from pyro.infer import SVI

import pyproelbo as pe
from pyproelbo._backend import compilation
from pyproelbo.sequences import MarkovChain

pytestmark = pytest.mark.slow
LONG = 300.0  # seconds, for machines that do much else


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where libraries lie, empty at first."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def _cached(folder, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))


def svi(compile):
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    objective = pe.BetaELBO(compile=compile)
    programs_ = programs.score_function()  # random numbers of several kinds
    return SVI(*programs_, pyro.optim.Adam({"lr": 0.01}), objective), objective


def steps_until_compiled(svi, objective):
    losses, start = [svi.step() for _ in range(3)], time.monotonic()
    while any(runs.is_compiling for runs in runs_of(objective)):
        assert time.monotonic() - start < LONG
        losses.append(svi.step())
        time.sleep(0.02)
    return losses + [svi.step() for _ in range(25)]


def assert_as_eager(losses):
    eager, _ = svi(False)
    expected = [eager.step() for _ in losses]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-9, atol=1e-9)


def test_losses_do_not_show_when_the_compiler_was_done(folder, monkeypatch):
    training, objective = svi(True)
    losses = steps_until_compiled(training, objective)
    assert num_graphs(objective) == 1
    assert_as_eager(losses)
    assert len(list(folder.glob("pyproelbo/*/step.so"))) == 1
    assert not list(folder.glob("pyproelbo/job-*"))

    def none(*args, **kwargs):
        raise AssertionError("it is there already")

    monkeypatch.setattr(compilation.subprocess, "Popen", none)
    training, objective = svi(True)
    losses = [training.step() for _ in range(3)]
    assert not runs_of(objective)[0].is_compiling
    assert_as_eager(losses + [training.step() for _ in range(20)])
    training, objective = svi(pe.Capture(background=False))
    assert_as_eager([training.step() for _ in range(20)])


SCRIPT = """
import os, signal, sys, time
import pyro, torch
import pyproelbo as pe
from pyproelbo._backend.compilation import _processes
from pyro.infer import SVI
import pyro.distributions as dist

def model():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(3) * {number})

svi = SVI(model, pyro.infer.autoguide.AutoNormal(model), pyro.optim.Adam({{"lr": 0.01}}),
          pe.BetaELBO(compile=True))
for _ in range(3):
    svi.step()
(process,) = _processes
print(process.pid, flush=True)
{end}
"""
ENDS = {
    "its end": "",
    "an error": "raise ValueError('of the program')",
    "an interrupt": "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
    "a termination": "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
    "a kill": "os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)",
    "the end of its objective": "del svi; import gc; gc.collect(); time.sleep(1)",
}


@pytest.mark.parametrize("number, end", list(enumerate(ENDS)))
def test_no_process_is_left_after(number, end, folder):
    gc.collect()  # objectives of other tests, whose compilers work in the same folder
    script = SCRIPT.format(number=number, end=ENDS[end])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout, done.stderr
    pid = int(done.stdout)
    start = time.monotonic()
    while is_running(pid) or list(folder.glob("pyproelbo/job-*")):
        assert time.monotonic() - start < 60
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())


def large_products():
    """In float32, of which a graph has oneDNN's products of matrices."""
    x, net = torch.randn(256, 256), torch.nn.Linear(256, 256)

    def model():
        with pyro.plate("data", 256):
            z = pyro.sample("z", dist.Normal(torch.zeros(256), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide():
        pyro.module("net", net)
        with pyro.plate("data", 256):
            pyro.sample("z", dist.Normal(net(x), 0.1).to_event(1))

    return model, guide


def sequences():
    """Sampled in a loop, which is one operation of the graph."""
    x = torch.randn(5, 7)

    def program(scale, is_model):
        with pyro.plate("data", 5):
            first, then = dist.Normal(0.0, scale), lambda z: dist.Normal(0.9 * z.tanh(), scale)
            z = pyro.sample("z", MarkovChain(first, then, num_steps=7))
            if is_model:
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    scale = torch.tensor(1.0)
    return (
        lambda: program(scale, True),
        lambda: program(pyro.param("scale", 0.5 * scale, dist.constraints.positive), False),
    )


@pytest.mark.parametrize("make, dtype", [(large_products, "float32"), (sequences, "float64")])
def test_operations_of_our_own(make, dtype):
    torch.set_default_dtype(getattr(torch, dtype))

    def losses(compile):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi = SVI(*make(), pyro.optim.Adam({"lr": 0.001}), pe.BetaELBO(compile=compile))
        return torch.tensor([svi.step() for _ in range(16)])

    torch.testing.assert_close(losses(pe.Capture(background=False)), losses(False))


@pytest.mark.parametrize("background", [True, False])
def test_without_a_compiler_the_graph_runs(background, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    options = {"cpp.cxx": (None, "/bin/false")}
    training, objective = svi(pe.Capture(background=background, options=options))
    with pytest.warns(pe.CaptureWarning, match="runs uncompiled, since 'inductor' failed on it"):
        losses = steps_until_compiled(training, objective)
    assert_as_eager(losses)


def test_many_graphs_wait_for_each_other(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compilation, "_AT_ONCE", 1)
    trainings = []
    for num in (2, 3, 4):
        training, objective = svi(pe.Capture(options={"cpp.min_chunk_size": num}))
        for _ in range(3):
            training.step()
        trainings.append(objective)
    running = [process for process in compilation._processes if process.poll() is None]
    assert len(running) == 1
    assert all(runs_of(objective)[0].is_compiling for objective in trainings)
    running[0].send_signal(signal.SIGKILL)
    running[0].wait()
