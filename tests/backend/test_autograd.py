"""Walks through graphs of autograd, and graphs so deep that they must not go by recursion."""

import subprocess
import sys

import pytest
from helpers.oracles import rows

from pyproelbo._backend.autograd import Walk, some_leaves_of


def test_all_leaves_and_each_node_before_those_that_follow():
    a, b, c = (rows(3).requires_grad_() for _ in range(3))
    shared = a * b
    outputs = [(shared.exp() + shared * b).sum(), b.sin()]
    walk = Walk.of(outputs)
    for found in (walk.leaves, some_leaves_of(outputs)):
        assert {id(x) for x in found} == {id(a), id(b)} and len(found) == 2 and c is not found
    place = {node: i for i, node in enumerate(walk.nodes)}
    for node, i in place.items():
        assert all(place[after] > i for after, _ in node.next_functions if after is not None)
    del outputs, place
    walk.end()
    assert not walk.nodes


DEEP = """
import torch
from pyproelbo._backend.autograd import Walk, some_leaves_of
x = torch.ones(1, requires_grad=True)
for whole in (True, False):
    y = x
    for _ in range(100_000):
        y = y * 1.0
    walk = Walk.of([y]) if whole else None
    assert whole or some_leaves_of([y]) == []
    del y
    if walk is not None:
        assert [z is x for z in walk.leaves] == [True]
        walk.end()
"""
RECURRENT = """
import pyro, torch, warnings
import pyro.distributions as dist
import pyproelbo as pe
from pyproelbo.capture import graph
from pyproelbo.sequences import opaque
from pyro.infer import SVI
graph._MOST = 10**6  # operations: as deep a step as its memory allows
warnings.simplefilter("error", pe.CaptureWarning)
net, y = torch.nn.GRU(1, 1), torch.zeros(6000, 1)

def model():
    pyro.sample("z", dist.Normal(0.0, 1.0))

def guide():
    pyro.module("net", net)
    (h,) = opaque(lambda y: net(y)[:1], y)
    pyro.sample("z", dist.Normal(h[-1, 0], 1.0))

objective = pe.BetaELBO(compile=pe.Capture(backend="eager"))
svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
for _ in range(2):  # the second is captured
    svi.step()
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [DEEP, RECURRENT], ids=["deep", "recurrent"])
def test_deep_graphs_do_not_overflow_the_stack(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
