"""A compiled loop is the same loop: values, gradients, random numbers, for steps of all kinds."""

import shutil
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyproelbo as pe
from pyproelbo.guides.dmm import Smoothing
from pyproelbo.models.dmm import DMM
from pyproelbo.sequences import Autoregressive, MarkovChain, loops
from pyproelbo.sequences.loops import CompileWarning, compiled, plain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
]

B, H, D = 5, 6, 3
CHUNK = 3  # steps in a compiled call: fewer than in use, for graphs that are made sooner


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    loops._off.clear()
    yield
    loops._compiler.cache_clear()


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs that are made; they run without a C++ compiler."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    chunk = torch.compile(plain, fullgraph=True, backend=counter)
    monkeypatch.setattr(loops, "CHUNK", CHUNK)
    monkeypatch.setattr(loops, "_compiler", lambda device: chunk)
    monkeypatch.setattr(loops._compiler, "cache_clear", lambda: None, raising=False)
    return counter


class Chain(nn.Module):
    """z_t ~ N(f(z_{t-1}, h_t), s(.)), as the guide of a deep Markov model."""

    def __init__(self):
        super().__init__()
        self.z0 = nn.Parameter(torch.randn(D))
        self.cell, self.out = nn.Linear(D, H), nn.Linear(H, 2 * D)

    def forward(self, h, mean=0.0):
        def step(carry, x):
            loc, raw = self.out(torch.tanh(self.cell(carry[0])) + x[0]).chunk(2, -1)
            q = dist.Normal(loc + mean, nn.functional.softplus(raw)).to_event(1)
            z = q.rsample()
            return (z,), (z, q.base_dist.loc, q.base_dist.scale)

        return step, (self.z0.expand(h.shape[1], -1),), (h,)


def loss_and_grads(loop, chain, h, **kwargs):
    torch.manual_seed(1)
    (last,), (z, loc, scale) = loop(*chain(h, **kwargs))
    loss = last.exp().sum() + z.square().sum() + loc.sin().sum() + scale.log().sum()
    inputs = [v for v in (h, *chain.parameters(), *kwargs.values()) if v.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("num_steps", [1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 2])
def test_values_gradients_and_seeds(graphs, num_steps):
    chain, h = Chain(), torch.randn(num_steps, B, H, requires_grad=True)
    mean = torch.randn(B, D, requires_grad=True)  # what the step closes over has gradients too
    expected = loss_and_grads(plain, chain, h, mean=mean)
    torch.testing.assert_close(
        loss_and_grads(compiled, chain, h, mean=mean), expected, rtol=1e-12, atol=1e-12
    )
    assert graphs.frame_count == (num_steps > CHUNK)


def test_one_graph_for_any_number_of_steps(graphs):
    chain = Chain()
    for num_steps in (20, 40, 33, 129):
        h = torch.randn(num_steps, B, H, requires_grad=True)
        expected, found = (loss_and_grads(loop, chain, h) for loop in (plain, compiled))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert graphs.frame_count == 1


def test_one_graph_for_all_training_steps_and_instances(graphs):
    for _ in range(4):
        chain, h = Chain(), torch.randn(2 * CHUNK, B, H, requires_grad=True)
        for _ in range(3):
            expected, found = (loss_and_grads(loop, chain, h) for loop in (plain, compiled))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert graphs.frame_count == 1


def test_without_gradients(graphs):
    chain, h = Chain(), torch.randn(3 * CHUNK, B, H)
    drawn = []
    for loop in (plain, compiled):
        torch.manual_seed(1)
        with torch.no_grad():
            drawn.append(loop(*chain(h)))
    torch.testing.assert_close(*drawn, rtol=1e-12, atol=1e-12)
    assert not drawn[1][0][0].requires_grad and graphs.frame_count == 1


def test_a_carry_that_starts_without_gradient(graphs):
    chain, h = Chain(), torch.randn(3 * CHUNK, B, H)
    chain.z0.requires_grad_(False)
    expected, found = (loss_and_grads(loop, chain, h) for loop in (plain, compiled))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert graphs.frame_count == 1


def test_capture_by_make_fx(graphs):
    chain, h = Chain(), torch.randn(2 * CHUNK, B, H, requires_grad=True)

    def step(h):
        return loss_and_grads(compiled, chain, h)

    torch.manual_seed(1)
    expected = step(h)
    with pyro.validation_enabled(False):
        graph = make_fx(step)(h)
    torch.manual_seed(1)
    torch.testing.assert_close(graph(h), expected, rtol=1e-12, atol=1e-12)


def test_inside_of_another_compile(graphs):
    chain, h = Chain(), torch.randn(2 * CHUNK, B, H, requires_grad=True)
    step = torch.compile(
        lambda h: compiled(*chain(h))[1][0].square().sum(),
        backend="aot_eager",
        fullgraph=True,
    )
    grads = []
    for f in (step, lambda h: plain(*chain(h))[1][0].square().sum()):
        torch.manual_seed(1)
        with pyro.validation_enabled(False):
            grads.append(torch.autograd.grad(f(h), [h, *chain.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_no_compiler():
    """One warning, then the plain loop, with the numbers that it has."""
    chain, h = Chain(), torch.randn(3 * CHUNK, B, H, requires_grad=True)
    expected = loss_and_grads(plain, chain, h)
    missing = {"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}
    with torch._inductor.config.patch(missing):
        with pytest.warns(CompileWarning, match="No working C\\+\\+ compiler") as caught:
            found = loss_and_grads(compiled, chain, h)
        assert len([w for w in caught if w.category is CompileWarning]) == 1
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = loss_and_grads(compiled, chain, h)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_step_that_cannot_be_compiled(graphs):
    """Its values are looked at in Python: one warning that says what it was."""

    def step(carry, x):
        return (carry[0] + x[0] * (1.0 if x[0].sum().item() > 0 else 2.0),), x

    h, carry = torch.randn(3 * CHUNK, B, H), (torch.zeros(B, H),)
    with pytest.warns(CompileWarning, match="data-dependent"):
        found = compiled(step, carry, (h,))
    torch.testing.assert_close(found, plain(step, carry, (h,)), rtol=0, atol=0)


def test_errors_of_the_step_are_its_own(graphs):
    def step(carry, x):
        if x[0].shape != (B, H):
            raise ValueError("x")
        return (carry[0].reshape(7),), x  # no such shape

    h = torch.randn(3 * CHUNK, B, H)
    with pytest.raises(RuntimeError, match=r"shape '\[7\]' is invalid"):
        compiled(step, (torch.zeros(3),), (h,))
    assert not loops._off


def walk(loop):
    """A chain with inputs, as a guide makes one in each step of a training."""
    torch.manual_seed(0)
    net = nn.Linear(D + H, 2 * D)
    h = torch.randn(B, 3 * CHUNK, H)

    def transition(z, h):
        loc, raw = net(torch.cat([z, h], -1)).chunk(2, -1)
        return dist.Normal(loc, raw.exp()).to_event(1)

    first = dist.Normal(torch.zeros(D), 1.0).to_event(1)
    return MarkovChain(first, transition, inputs=h, loop=loop), list(net.parameters())


def recurrent(loop):
    torch.manual_seed(0)
    cell, net = nn.GRUCell(D, H), nn.Linear(H, D)
    chain = Autoregressive(
        torch.zeros(B, H),
        lambda s: dist.Normal(net(s), 1.0).to_event(1),
        lambda s, z: cell(z, s),
        num_steps=3 * CHUNK,
        loop=loop,
    )
    return chain, [*cell.parameters(), *net.parameters()]


@pytest.mark.parametrize("make", [walk, recurrent])
def test_chains(graphs, make):
    """Samples, densities and gradients; one graph for chains made anew."""
    results = []
    for loop in (plain, compiled, compiled):
        chain, parameters = make(loop)
        for batch_shape in ((B,), (2, B)):
            torch.manual_seed(1)
            z = chain.expand(batch_shape)()
            value = chain.expand(batch_shape).log_prob(z).sum() + z.square().sum()
            results.append((z, *torch.autograd.grad(value, parameters)))
    for found in results[2:4], results[4:]:
        torch.testing.assert_close(found, results[:2], rtol=1e-10, atol=1e-10)
    assert graphs.frame_count == 2 and not loops._off  # one for each number of batch dims


def test_in_captured_steps(graphs):
    """The loop is called as it is by the graph of a training step, and by the steps beside it."""
    x, losses = (torch.randn(4, 3 * CHUNK, D) > 0).double(), []
    for compile, loop in ((pe.Capture(backend="eager"), compiled), (False, plain)):
        torch.manual_seed(0)
        model, guide = DMM(2, D, hidden=(H,), transition=H), Smoothing(2, D, hidden=H)
        guide.loop = loop
        loss = pe.SequentialELBO(compile=compile)(model, guide)
        adam = torch.optim.Adam(loss.parameters(), lr=0.01)
        for _ in range(5):
            adam.zero_grad()
            losses.append(loss(x))
            losses[-1].backward()
            adam.step()
    torch.testing.assert_close(losses[:5], losses[5:], rtol=1e-10, atol=1e-10)
    assert not loops._off


def test_validation_is_left_on(graphs):
    """torch.compile switches it off, for good."""
    chain, h = Chain(), torch.randn(2 * CHUNK, B, H)
    compiled(*chain(h))
    assert graphs.frame_count == 1 and dist.is_validation_enabled()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_with_inductor():
    chain, h = Chain(), torch.randn(3 * CHUNK + 2, B, H, requires_grad=True)
    expected, found = (loss_and_grads(loop, chain, h) for loop in (plain, compiled))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not loops._off
