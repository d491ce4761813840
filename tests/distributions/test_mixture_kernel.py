"""Log densities of mixtures: equal to brute force, accurate in float32, small in memory."""

import math
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal
from torch.fx.experimental.proxy_tensor import make_fx

from pyproelbo._distributions import mixture_kernel as aggregate
from pyproelbo._distributions.mixture_kernel import (
    RunningLogSumExp,
    log_aggregate_marginals,
    log_aggregate_posterior,
)


def brute_posterior(z, loc, scale, log_weights=None):
    if log_weights is None:
        log_weights = loc.new_full((len(loc),), -math.log(len(loc)))
    e = Normal(loc, scale, validate_args=False).log_prob(z[..., None, :])
    return (e.sum(-1) + log_weights).logsumexp(-1)


def brute_marginals(z, loc, scale):
    e = Normal(loc, scale, validate_args=False).log_prob(z[..., None, :])
    return (e - math.log(len(loc))).logsumexp(-2)


PAIRS = {
    "posterior": (log_aggregate_posterior, brute_posterior),
    "marginals": (log_aggregate_marginals, brute_marginals),
}
both = pytest.mark.parametrize("ours, brute", PAIRS.values(), ids=PAIRS)


def mixture(n, d, m=(), shift=0.0, spread=1.0, dtype=None):
    """Points near the components, their means and scales."""
    loc = shift + spread * torch.randn(n, d)
    scale = torch.empty(n, d).uniform_(-2.0, 1.0).exp()
    which = torch.randint(n, m)
    z = loc[which] + scale[which] * torch.randn(*m, d)
    return tuple(x.to(dtype or x.dtype) for x in (z, loc, scale))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(1, 30),
    st.integers(1, 5),
    st.sampled_from([-1e4, 0.0, 3.0]),
    st.sampled_from([0.0, 1.0, 50.0]),
    st.one_of(st.none(), st.integers(1, 200)),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_equals_brute_force(m, n, d, shift, spread, chunk, weighted, seed):
    """For all shapes, and however the sum is cut."""
    torch.manual_seed(seed)
    z, loc, scale = mixture(n, d, tuple(m), shift, spread)
    log_weights = 3.0 * torch.randn(n) if weighted else None
    for found, expected in [
        (
            log_aggregate_posterior(z, loc, scale, log_weights, max_elements=chunk),
            brute_posterior(z, loc, scale, log_weights),
        ),
        (
            log_aggregate_marginals(z, loc, scale, max_elements=chunk),
            brute_marginals(z, loc, scale),
        ),
    ]:
        assert found.shape == expected.shape
        assert found.dtype == z.dtype
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)


def wide():
    """Means up to 1,000 scales from the centre, scales from 0.02 to 2."""
    scale = torch.empty(10_000, 40).uniform_(math.log(0.02), math.log(2.0)).exp()
    return torch.empty(10_000, 40).uniform_(-1000.0, 1000.0) * scale, scale


def clusters():
    """Two heaps, far apart, whose components overlap with each other."""
    scale = torch.empty(10_000, 40).uniform_(math.log(0.5), math.log(2.0)).exp()
    side = torch.tensor([-400.0, 400.0]).repeat(5_000)
    return side[:, None] + 0.3 * torch.randn(10_000, 40), scale


def identical():
    return torch.full((10_000, 40), 1000.0), torch.full((10_000, 40), 0.02)


def tiny():
    """Scales of 1e-4 where the means are of order 1."""
    return torch.randn(10_000, 40), torch.empty(10_000, 40).uniform_(0.5e-4, 2e-4)


def shifted():
    """Overlapping components, all of them far from 0."""
    return 300.0 + torch.randn(10_000, 40), torch.empty(10_000, 40).uniform_(0.1, 2.0)


@both
@pytest.mark.parametrize("case", [wide, clusters, identical, tiny, shifted])
def test_float32_is_accurate(case, ours, brute):
    """Within 1e-4 nats of what float64 finds for the same float32 numbers."""
    loc, scale = (x.float() for x in case())
    near, far = torch.arange(0, 10_000, 1_000), torch.arange(500, 10_000, 2_000)
    noise = torch.randn(15, 40, dtype=torch.float32)
    noise[10:] *= 30.0
    which = torch.cat([near, far])
    z = loc[which] + scale[which] * noise
    found = ours(z, loc, scale)
    assert found.dtype == torch.float32
    exact = torch.stack([brute(x.double(), loc.double(), scale.double()) for x in z])
    assert (found - exact)[:10].abs().max() < 1e-4
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=1e-4)


def test_one_component_is_its_normal():
    z, loc, scale = mixture(1, 3, (4, 2))
    expected = Normal(loc[0], scale[0]).log_prob(z)
    torch.testing.assert_close(log_aggregate_marginals(z, loc, scale), expected)
    torch.testing.assert_close(log_aggregate_posterior(z, loc, scale), expected.sum(-1))


def test_identical_components_are_one():
    z, loc, scale = mixture(1, 3, (4,))
    expected = Normal(loc[0], scale[0]).log_prob(z)
    loc, scale = loc.expand(1000, 3), scale.expand(1000, 3)
    torch.testing.assert_close(log_aggregate_marginals(z, loc, scale), expected)
    torch.testing.assert_close(log_aggregate_posterior(z, loc, scale), expected.sum(-1))


def test_far_components_leave_the_own_density():
    """log q(z) = log q(z | x_n) - log N where no other component reaches."""
    loc = 1e3 * torch.arange(7.0)[:, None].expand(7, 3)
    scale = torch.rand(7, 3) + 0.5
    z = loc + scale * torch.randn(7, 3)
    expected = Normal(loc, scale).log_prob(z)
    torch.testing.assert_close(
        log_aggregate_posterior(z, loc, scale), expected.sum(-1) - math.log(7)
    )
    torch.testing.assert_close(log_aggregate_marginals(z, loc, scale), expected - math.log(7))


def test_weights_are_taken_as_they_are():
    z, loc, scale = mixture(6, 2, (5,))
    plain = log_aggregate_posterior(z, loc, scale)
    twice = log_aggregate_posterior(z, loc, scale, torch.full((6,), math.log(2 / 6)))
    torch.testing.assert_close(twice, plain + math.log(2.0))
    log_weights = torch.tensor([0.0, 0.0, 0.0, -torch.inf, -torch.inf, -torch.inf])
    half = log_aggregate_posterior(z, loc, scale, log_weights)
    torch.testing.assert_close(half, log_aggregate_posterior(z, loc[:3], scale[:3]) + math.log(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_density_at_all(dtype):
    """A density of 0 is -inf, and so it is where there was no component with a weight."""
    z, loc, scale = mixture(6, 2, (5,), dtype=dtype)
    loc.requires_grad_()
    none = torch.full((6,), -torch.inf, dtype=dtype)
    found = log_aggregate_posterior(z, loc, scale, none, max_elements=4)
    assert (found == -torch.inf).all()
    (grad,) = torch.autograd.grad(found.sum(), loc)
    assert (grad.abs() < 1e-12).all()


@both
def test_nan_stays_in_its_row(ours, brute):
    z, loc, scale = mixture(6, 2, (5,))
    expected = ours(z, loc, scale)
    z[3] = torch.nan
    with pyro.validation_enabled(False):
        found = ours(z, loc, scale, max_elements=4)
        assert ours(z, loc.where(loc == loc[1], torch.nan), scale).isnan().all()
    assert found[3].isnan().all()
    torch.testing.assert_close(found[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])


@both
@pytest.mark.parametrize("chunk", [None, 7, 50])
def test_gradients_equal_brute_force(ours, brute, chunk):
    tensors = [x.requires_grad_() for x in mixture(11, 3, (2, 4), shift=5.0)]
    if ours is log_aggregate_posterior:
        tensors.append(torch.randn(11, requires_grad=True))
    weight = torch.randn(brute(*tensors).shape)
    found = torch.autograd.grad((weight * ours(*tensors, max_elements=chunk)).sum(), tensors)
    expected = torch.autograd.grad((weight * brute(*tensors)).sum(), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@both
def test_gradcheck(ours, brute):
    tensors = [x.requires_grad_() for x in mixture(5, 2, (3,))]
    if ours is log_aggregate_posterior:
        tensors.append(torch.randn(5, requires_grad=True))
    assert torch.autograd.gradcheck(lambda *x: ours(*x, max_elements=6), tensors)


@both
def test_gradients_of_some_arguments(ours, brute):
    """What needs no gradient gets none, and the others are as before."""
    values = mixture(7, 2, (3,))
    for k in range(3):
        tensors = [x.clone().requires_grad_(i == k) for i, x in enumerate(values)]
        (found,) = torch.autograd.grad(ours(*tensors).sum(), tensors[k])
        (expected,) = torch.autograd.grad(brute(*tensors).sum(), tensors[k])
        torch.testing.assert_close(found, expected)
    assert not ours(*values).requires_grad


@both
def test_float32_gradients(ours, brute):
    """Of means a thousand scales from the centre, to six digits of the largest."""
    tensors = [x.requires_grad_() for x in mixture(3_000, 5, (50,), 100.0, 300.0, torch.float32)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    found = torch.autograd.grad(ours(*tensors).sum(), tensors)
    expected = torch.autograd.grad(brute(*exact).sum(), exact)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 3e-6 * b.abs().max()


@both
def test_twice_differentiated_is_an_error(ours, brute):
    """Not a part of the answer, which is what once_differentiable would let pass."""
    z, loc, scale = (x.requires_grad_() for x in mixture(5, 2, (3,)))
    value = ours(z, loc, scale)
    (grad,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    for x in (z, loc, scale):
        with pytest.raises(RuntimeError, match="differentiated once, not twice"):
            torch.autograd.grad(grad.sum(), x, retain_graph=True)


@pytest.mark.slow
@both
@pytest.mark.parametrize("chunk", [None, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_capture(ours, brute, chunk, dtype):
    """make_fx captures value and gradients in one graph, equal to eager, without a wait."""
    tensors = [x.requires_grad_() for x in mixture(9, 3, (6,), dtype=dtype)]

    def step(*tensors):
        loss = ours(*tensors, max_elements=chunk).square().sum()
        return loss, *torch.autograd.grad(loss, tensors)

    expected = step(*tensors)
    with pyro.validation_enabled(False):
        graph = make_fx(step)(*tensors)
        functional = make_fx(torch.func.functionalize(graph))(*tensors)
    assert not any("_local_scalar_dense" in str(node.target) for node in graph.graph.nodes)
    others = [x.detach() + 0.1 for x in tensors]
    for inputs, results in [
        (tensors, expected),
        (others, step(*(x.requires_grad_() for x in others))),
    ]:
        for ours_, eager in zip(graph(*inputs), results, strict=True):
            assert torch.equal(ours_, eager)
        for ours_, eager in zip(functional(*inputs), results, strict=True):
            torch.testing.assert_close(ours_, eager)


@both
def test_leaves_the_world_as_it_was(ours, brute):
    """No argument is overwritten, no random number drawn, no setting changed."""
    tensors = [x.requires_grad_() for x in mixture(9, 3, (6,))]
    copies = [x.detach().clone() for x in tensors]

    def settings():
        return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()

    random, before = torch.get_rng_state(), settings()
    ours(*tensors, max_elements=20).sum().backward()
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), random)
    for x, copy in zip(tensors, copies, strict=True):
        assert torch.equal(x, copy)


def test_by_differences():
    """What stands in for the product where there is no float64."""
    tensors = [x.requires_grad_() for x in mixture(9, 3, (6,))]
    tensors.append(torch.randn(9, requires_grad=True))
    for chunk in (None, 1, 60):
        constant = -1.5 * math.log(2 * math.pi)
        found = aggregate._by_differences(*tensors, chunk) + constant
        expected = log_aggregate_posterior(*tensors)
        torch.testing.assert_close(found, expected)
        for a, b in zip(
            torch.autograd.grad(found.sum(), tensors),
            torch.autograd.grad(expected.sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


MEMORY = """
import sys, torch

torch.set_num_threads(2)
from pyproelbo._distributions import mixture_kernel as aggregate

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

def run(m):
    tensors = [torch.randn(m, 4), torch.randn(m, 4), torch.rand(m, 4) + 0.5]
    tensors = [x.requires_grad_() for x in tensors]
    getattr(aggregate, sys.argv[1])(*tensors).sum().backward()

run(100)
before = peak()
run(4000)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("name", ["log_aggregate_posterior", "log_aggregate_marginals"])
def test_memory_does_not_grow_with_pairs(name):
    """Forward and backward of 4,000 x 4,000 pairs, 122 MiB in float64, in a small part of it."""
    root = Path(aggregate.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, name], cwd=root, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 30.0


@both
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z, m, s: (z[:, :1], m, s), r"z should have shape \(..., 2\)"),
        (lambda z, m, s: (z.sum(), m, s), r"z should have shape \(..., 2\)"),
        (lambda z, m, s: (z, m[0], s), r"loc should have shape \(N, D\)"),
        (lambda z, m, s: (z, m[:0], s[:0]), "loc .* at least one component"),
        (lambda z, m, s: (z[:, :0], m[:, :0], s[:, :0]), "one dimension"),
        (lambda z, m, s: (z, m, s[0]), "scale should have loc's shape"),
        (lambda z, m, s: (z, m.float(), s), r"loc should have z's dtype .* call loc.to\(z\)"),
        (lambda z, m, s: (z, m, s.float()), r"scale should have z's dtype"),
        (lambda z, m, s: (z.half(), m.half(), s.half()), "z should be float32 or float64"),
        (lambda z, m, s: (z.long(), m, s), "z should be float32 or float64"),
        (lambda z, m, s: (z * torch.nan, m, s), "z should be finite"),
        (lambda z, m, s: (z, m / 0, s), "loc should be finite"),
        (lambda z, m, s: (z, m, s * torch.nan), "scale should be finite"),
        (lambda z, m, s: (z, m, s - s[0]), "scale should be positive"),
    ],
)
def test_errors_name_the_argument(ours, brute, change, message):
    with pytest.raises(ValueError, match=message):
        ours(*change(*mixture(4, 2, (3,))))


def test_errors_of_weights():
    z, loc, scale = mixture(4, 2, (3,))
    for log_weights, message in [
        (torch.zeros(3), r"log_weights should have shape \(4,\)"),
        (torch.zeros(4, 1), r"log_weights should have shape \(4,\)"),
        (torch.zeros(4).float(), "log_weights should have z's dtype"),
        (torch.full((4,), torch.inf), r"log_weights should be below \+inf"),
        (torch.full((4,), torch.nan), r"log_weights should be below \+inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            log_aggregate_posterior(z, loc, scale, log_weights)


def test_values_are_checked_under_validation_alone():
    """A check of values waits for the device."""
    z, loc, scale = mixture(4, 2, (3,))
    with pyro.validation_enabled(False):
        assert log_aggregate_posterior(z, loc, 0 * scale).isnan().all()


@given(
    st.integers(1, 4),
    st.integers(1, 12),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 5),
    st.sampled_from([(torch.float32, torch.float32), (torch.float32, torch.float64)]),
    st.sampled_from([1.0, 1e3]),
    st.integers(0, 2**16),
)
@settings(deadline=None)
def test_running_sum(m, n, rest, step, dtypes, spread, seed):
    """Equal to the sum at once, whatever comes first, also where all or some of it is -inf."""
    torch.manual_seed(seed)
    like, block = dtypes
    e = spread * torch.randn(m, n, *rest, dtype=block)
    e[torch.rand(e.shape) < 0.3] = -torch.inf
    e[0] = -torch.inf
    state = RunningLogSumExp((m, *rest), torch.zeros((), dtype=like))
    assert (state.value == -torch.inf).all()
    for rows in (slice(0, m // 2), slice(m // 2, m)):
        for i in range(0, n, step):
            state.update(rows, e[rows, i : i + step].clone())
    assert state.value.shape == (m, *rest)
    assert state.value.dtype == torch.float64
    torch.testing.assert_close(state.value, e.double().logsumexp(1), rtol=1e-6, atol=1e-6)


def test_running_sum_of_many_keeps_its_digits():
    """Ten million ones, in float32: each block adds less than float32 resolves."""
    like = torch.zeros((), dtype=torch.float32)
    state = RunningLogSumExp((1,), like)
    state.update(slice(0, 1), like.new_full((1, 1), 20.0))
    for _ in range(1000):
        state.update(slice(0, 1), like.new_zeros(1, 10))
    expected = math.log(math.exp(20.0) + 1e4)
    assert abs(state.value.item() - expected) < 1e-9
