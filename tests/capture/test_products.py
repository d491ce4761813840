"""Captured graphs with large products of matrices by oneDNN compute what they did."""

import pytest
import torch
from helpers.graphs import graph_of

from pyproelbo._backend.products import with_fast_products

pytestmark = pytest.mark.skipif(
    "AVX" not in torch.backends.cpu.get_cpu_capability()
    or not torch.backends.mkldnn.is_available(),
    reason="there is no oneDNN for x86",
)
N = 256


@pytest.fixture(autouse=True)
def _single_precision_on_the_cpu():
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


def num_products(function, *inputs):
    """How many are by oneDNN; asserted is that their values and gradients are torch's."""

    def with_gradients(*inputs):
        value = function(*inputs)
        return [value, *torch.autograd.grad(value.square().sum(), inputs)]

    inputs = [x.requires_grad_() for x in inputs]
    graph = graph_of(with_gradients, *inputs)
    fast = with_fast_products(graph)
    for ours, theirs in zip(fast(*inputs), graph(*inputs), strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    return sum("product" in str(node.target) for node in fast.graph.nodes)


def test_linear_layers():
    x, weight, bias = torch.randn(N, N), torch.randn(N + 1, N), torch.randn(N + 1)
    assert num_products(torch.nn.functional.linear, x, weight, bias) == 3
    assert num_products(torch.nn.functional.linear, x, weight) == 3


@pytest.mark.parametrize("shape", [(N, N), (1, N), (N, 1), (1,), ()])
def test_what_is_added(shape):
    matrices = torch.randn(N, N), torch.randn(N, N)
    assert num_products(torch.addmm, torch.randn(shape), *matrices) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left(dtype):
    x, weight = torch.randn(N, N, dtype=dtype), torch.randn(N, N, dtype=dtype)
    graph = graph_of(torch.mm, x, weight)
    assert all("product" not in str(n.target) for n in with_fast_products(graph).graph.nodes)


def test_small_and_scaled_products_are_left():
    assert num_products(torch.mm, torch.randn(8, 8), torch.randn(8, 8)) == 0
    # the copy of a transposed matrix takes as long as what is saved
    assert num_products(lambda x, y: x.t() @ y, torch.randn(32, 784), torch.randn(32, 64)) <= 2
    scaled = graph_of(lambda x: torch.addmm(x, x, x, alpha=2.0), torch.randn(N, N))
    assert all("product" not in str(n.target) for n in with_fast_products(scaled).graph.nodes)


def test_torch_switches_it_off():
    graph = graph_of(torch.mm, torch.randn(N, N), torch.randn(N, N))
    with torch.backends.mkldnn.flags(enabled=False):
        assert with_fast_products(graph) is graph
    assert with_fast_products(graph) is not graph
