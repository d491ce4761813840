"""A graph and what it is compiled to: which of them makes a step, and when."""

import time
import warnings

import pytest
import torch
from helpers.graphs import graph_of
from torch import nn
from torch.fx import GraphModule

import pyproelbo as pe
from pyproelbo._backend import rng
from pyproelbo._backend.packed_graph import packed, unpacked
from pyproelbo.capture.compared import check
from pyproelbo.capture.graph import Computed
from pyproelbo.capture.runs import Runs

X = [torch.ones(3)]


class Function:
    """Draws a number, adds it, and counts."""

    def __init__(self, factor=1.0, seconds=0.0):
        self.factor, self.seconds, self.calls = factor, seconds, 0

    def __call__(self, x):
        self.calls += 1
        time.sleep(self.seconds)
        return [self.factor * (x.sum() + torch.randn(()))]


def made(function, tensors):
    (loss,) = function(*tensors)
    return Computed(loss, [], [])


def runs(function, compiling, left_to_others=0.0):
    def tried(run, tensors):
        with rng.put_aside():
            return made(run, tensors)

    def checked(compiled, tensors):
        check(tried(compiled, tensors), tried(function, tensors), 0.0)
        return left_to_others

    return Runs(function, compiling, made, checked, "inductor")


def losses(steps, num=30):
    torch.manual_seed(1)
    return [steps(X).loss.item() for _ in range(num)]


@pytest.fixture
def _never_slower(monkeypatch):
    """However long a busy machine takes."""
    monkeypatch.setattr("pyproelbo.capture.runs._SLOWER", float("inf"))


@pytest.mark.usefixtures("_never_slower")
def test_the_compiled_function_takes_over_and_no_number_shows_it():
    graph, compiled, when = Function(), Function(), iter([None] * 10 + [True])
    run = runs(graph, lambda: next(when) and compiled)
    found = losses(run.step)
    assert found == losses(lambda tensors: made(Function(), tensors))
    assert run.function is compiled
    # once for the check; five turns each; the ten before, and what was left
    assert (graph.calls, compiled.calls) == (1 + 10 + 5, 1 + 5 + 10)


def test_without_a_compiler():
    graph = Function()
    assert losses(runs(graph, None).step) == losses(lambda tensors: made(Function(), tensors))
    assert graph.calls == 30


def fails():
    raise RuntimeError("no compiler\nat all")


BAD = {
    "failed on it: no compiler$": fails,
    "failed on it: its graph does not compute": lambda: Function(2.0),
    "makes it slower: .* ms in place of": lambda: Function(seconds=0.005),
}


@pytest.mark.parametrize("words", BAD)
def test_what_does_not_serve_leaves_the_graph(words):
    graph = Function()
    run = runs(graph, BAD[words])
    with pytest.warns(pe.CaptureWarning, match=words) as caught:
        found = losses(run.step)
    assert len(caught) == 1 and "runs uncompiled, since 'inductor'" in str(caught[0].message)
    assert run.function is graph
    assert found == losses(lambda tensors: made(Function(), tensors))


def test_what_the_graph_leaves_to_others_counts_as_its_time():
    compiled = Function(seconds=0.005)
    run = runs(Function(), lambda: compiled, left_to_others=10.0)
    losses(run.step)
    assert run.function is compiled


@pytest.mark.usefixtures("_never_slower")
def test_an_interrupt_within_the_check_loses_nothing():
    calls = iter([KeyboardInterrupt, None])

    class Interrupted(Function):
        def __call__(self, x):
            if error := next(calls, None):
                raise error
            return super().__call__(x)

    run = runs(Function(), lambda compiled=Interrupted(): compiled)  # noqa: B008
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        run.step(X)
    assert torch.equal(torch.get_rng_state(), state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert losses(run.step) == losses(lambda tensors: made(Function(), tensors))


def draws(x):
    """Random numbers without a tensor among their arguments; a constant; several results."""
    noise = torch.randn(3, dtype=x.dtype) + torch.arange(3) + torch.tensor([0.5, 1.5, 2.5])
    left, right = torch.cat([x * noise, x]).split(3)
    return [left.exp(), (right * float("inf")).to(torch.float32), torch.zeros(3).uniform_(1, 2)]


def test_packed_graphs_compute_what_they_did():
    graph = graph_of(draws, *X)
    nodes, held = packed(graph)
    again = unpacked(nodes)
    assert isinstance(again, GraphModule) and not list(nn.Module.named_buffers(again))
    for _ in range(2):  # and draw anew
        torch.manual_seed(int(held[0].numel()))
        expected = graph(2 * X[0])
        torch.manual_seed(int(held[0].numel()))
        for ours, theirs in zip(again(2 * X[0], *held), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.equal(again(X[0], *held)[0], again(X[0], *held)[0])
