"""Graphs by inductor and by CUDA: random numbers, losses, backends that fail."""

from contextlib import contextmanager

import pyro
import pytest
import torch
from helpers import programs
from helpers.captured_fits import (
    OBJECTIVES,
    assert_fit_alike,
    assert_trained_alike,
    batch,
    num_graphs,
    trained,
)
from pyro.infer import SVI

import pyproelbo as pe
from pyproelbo.capture import LazyLoss
from pyproelbo.capture.cuda import CudaGraph

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["annealed", "surgery"])
def test_compiled_by_inductor(name):
    objective = assert_fit_alike(
        OBJECTIVES[name],
        [batch(6, seed=i) for i in range(16)],
        compile=pe.Capture(background=False),
    )
    assert num_graphs(objective) == 1


def test_random_numbers_keep_their_order_when_compiled():
    """Sites of several kinds, of which inductor would move some."""
    objective = pe.BetaELBO(compile=pe.Capture(background=False))
    ours = trained(programs.score_function, objective, steps=16)
    assert num_graphs(objective) == 1
    assert_trained_alike(ours, trained(programs.score_function, pe.BetaELBO(), steps=16))


def test_a_backend_that_fails_leaves_the_graph():
    def backend(graph, inputs):
        raise RuntimeError("no compiler\nat all")

    def wrong(graph, inputs):
        return lambda *tensors: [2.0 * x for x in graph(*tensors)]

    for function, reason in ((backend, "no compiler$"), (wrong, "does not compute")):
        with pytest.warns(pe.CaptureWarning, match=f"runs uncompiled.*{reason}"):
            objective = assert_fit_alike(
                pe.BetaELBO, [batch(6)] * 5, compile=pe.Capture(backend=function)
            )
        assert num_graphs(objective) == 1
    large = pe.Capture(backend=backend, max_nodes=10)
    with pytest.warns(pe.CaptureWarning, match="runs uncompiled, since max_nodes is 10"):
        assert num_graphs(assert_fit_alike(pe.BetaELBO, [batch(6)] * 5, compile=large)) == 1


def test_lazy_losses():
    """SVI hands them on as they are; their numbers are those of eager steps."""
    lazy = pe.BetaELBO(compile=pe.Capture(backend="eager", lazy_loss=True))
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    svi = SVI(*programs.local_normal(), pyro.optim.Adam({"lr": 0.01}), lazy)
    losses = [svi.step() for _ in range(6)]
    assert isinstance(losses[0], float) and isinstance(losses[-1], LazyLoss)
    assert type(sum(losses)) is torch.Tensor
    expected, _ = trained(programs.local_normal, pe.BetaELBO())
    torch.testing.assert_close(torch.tensor([float(x) for x in losses]), expected)


class Recorded:
    """Stands for torch.cuda where there is no GPU: a graph that replays by running again."""

    def __init__(self):
        self.replays = 0

    def __call__(self):
        return self

    Stream = current_stream = CUDAGraph = __call__

    def wait_stream(self, other):
        pass

    @contextmanager
    def stream(self, stream):
        yield

    graph = stream

    def replay(self):
        self.replays += 1
        for output, x in zip(self.outputs, self.run(), strict=True):
            output.copy_(x)


def test_cuda_graph_reads_arguments_and_parameters_where_it_was_recorded(monkeypatch):
    """All but the recording itself, which needs a GPU."""
    recorded = Recorded()
    monkeypatch.setattr("pyproelbo.capture.cuda.cuda", recorded)

    def run(x, weight):
        return [x * weight, x + weight]

    x, weight = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
    graph = CudaGraph(run, [x], [weight])
    recorded.outputs, recorded.run = graph._outputs, lambda: run(*graph._places, weight)
    first = graph(torch.tensor([5.0, 6.0]), weight)
    weight.fill_(10.0)
    second = graph(torch.tensor([7.0, 8.0]), weight)
    assert [y.tolist() for y in first] == [[15.0, 18.0], [8.0, 9.0]]
    assert [y.tolist() for y in second] == [[70.0, 80.0], [17.0, 18.0]]
    assert recorded.replays == 2
    graph._passing = range(1, 2)
    third, fourth = (graph(torch.tensor([y, y]), weight) for y in (1.0, 2.0))
    assert [y.tolist() for y in third] == [[10.0, 10.0], [12.0, 12.0]]  # as after the fourth
    assert [y.tolist() for y in fourth] == [[20.0, 20.0], [12.0, 12.0]]
    recorded.replays = 2
    moved = graph(x, torch.tensor(2.0))
    assert [y.tolist() for y in moved] == [[2.0, 4.0], [3.0, 4.0]]
    assert recorded.replays == 2
