"""Marginals by interpolation: within 1e-5 nats of brute force, whatever the components are."""

import contextlib
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pyro
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyproelbo._distributions import interpolated_marginals as interpolation
from pyproelbo._distributions.interpolated_marginals import interpolated_marginals
from pyproelbo._distributions.mixture_kernel import log_aggregate_marginals

ERROR = 1e-5  # nats
COSTS = ("_BY_COMPONENT", "_BY_POINT", "_BY_OCTAVE")


@pytest.fixture(autouse=True)
def _on_the_cpu(_clean):
    """Where it is done; elsewhere the exact kernel is."""
    torch.set_default_device("cpu")


@contextlib.contextmanager
def interpolating():
    """Also where it takes longer. The points that the exact kernel had, of all calls."""
    exact = mock.Mock(wraps=log_aggregate_marginals)
    names = {**dict.fromkeys(COSTS, 0), "log_aggregate_marginals": exact}
    with mock.patch.multiple(interpolation, **names):
        yield lambda: sum(call.args[0].numel() for call in exact.call_args_list)


def brute(z, loc, scale):
    """In float64, component by component."""
    z, loc, scale = (x.double() for x in (z, loc, scale))
    total = torch.full_like(z, -math.inf)
    constant = 0.5 * math.log(2 * math.pi) + math.log(len(loc))
    for m, s in zip(loc, scale, strict=True):
        total = torch.logaddexp(total, -0.5 * ((z - m) / s).square() - s.log() - constant)
    return total


def drawn(m, loc, scale):
    which = torch.randint(len(loc), (m,))
    return loc[which] + scale[which] * torch.randn(m, loc.shape[1])


def log_uniform(low, high, *shape):
    return torch.empty(shape).uniform_(math.log(low), math.log(high)).exp()


# the means and scales of N components, (N, 2)
CASES = {
    "a VAE's": lambda n: (torch.randn(n, 2), log_uniform(0.05, 1.0, n, 2)),
    "scales over six decades": lambda n: (torch.randn(n, 2), log_uniform(1e-4, 1e2, n, 2)),
    "two clusters": lambda n: (
        torch.tensor([-1e3, 1e3])[torch.randint(2, (n, 2))] + torch.randn(n, 2),
        log_uniform(0.01, 0.1, n, 2),
    ),
    "identical": lambda n: (torch.full((n, 2), 1e3), torch.full((n, 2), 0.02)),
    "isolated": lambda n: (1e3 * torch.randn(n, 2), torch.full((n, 2), 1e-3)),
    "one wide, others narrow": lambda n: (
        torch.randn(n, 2),
        torch.cat([torch.ones(1, 2), torch.full((n - 1, 2), 1e-6)]),
    ),
    "one narrow, others wide": lambda n: (
        torch.randn(n, 2),
        torch.cat([torch.full((1, 2), 1e-6), torch.ones(n - 1, 2)]),
    ),
    "far outliers": lambda n: (
        torch.randn(n, 2) / torch.rand(n, 2).square(),
        log_uniform(0.05, 1.0, n, 2),
    ),
    "scales at the ends of octaves": lambda n: (
        torch.randint(-9, 9, (n, 2)) / 8,
        6 * 2.0 ** -torch.randint(1, 9, (n, 2)),
    ),
}
cases = pytest.mark.parametrize("case", CASES)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_brute_force_where_there_are_draws(case, dtype):
    """And it is interpolated there, but for a few draws in tails."""
    loc, scale = (x.to(dtype) for x in CASES[case](2_000))
    z = drawn(3_000, loc.double(), scale.double()).to(dtype)
    with interpolating() as by_exact:
        found = interpolated_marginals(z, loc, scale)
    assert found.dtype == dtype
    assert (found - brute(z, loc, scale)).abs().max() < ERROR
    assert by_exact() < 0.01 * z.numel()


@cases
def test_equals_brute_force_far_away(case):
    """Between the components and beyond them, where densities underflow."""
    loc, scale = CASES[case](50)
    low, high = loc.amin(0) - 60 * scale.amax(0), loc.amax(0) + 60 * scale.amax(0)
    z = torch.cat([low + (high - low) * torch.rand(4_000, 2), drawn(50, loc, 30 * scale), loc])
    with interpolating() as by_exact:
        found = interpolated_marginals(z, loc, scale)
    torch.testing.assert_close(found, brute(z, loc, scale), rtol=1e-12, atol=ERROR)
    assert by_exact() > 0 or case == "scales over six decades"


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 3),
    st.floats(-6.0, 6.0),
    st.floats(0.0, 6.0),
    st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    st.sampled_from([0.0, -300.0, 1e6]),
    st.sampled_from([0.3, 1.0, 5.0, 20.0]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**16),
)
@example(1, 9, 1, 0.0, 0.0, 0.0, 0.0, 1.0, torch.float64, 0)
def test_equals_brute_force(m, n, d, scale, decades, spread, shift, tails, dtype, seed):
    """For all shapes, scales and places, with points that come twice and are means."""
    torch.manual_seed(seed)
    scales = 10.0 ** (scale - decades * torch.rand(n, d))
    loc = (shift + spread * scales.amax() * torch.randn(n, d)).to(dtype)
    scales = scales.to(dtype)
    z = torch.cat([drawn(m, loc.double(), tails * scales.double()).to(dtype), loc])
    z = torch.cat([z, z[:3]]).reshape(-1, 1, d)
    with interpolating():
        found = interpolated_marginals(z, loc, scales)
    expected = brute(z, loc, scales)
    assert found.shape == z.shape and found.dtype == dtype
    # of float32, what the exact kernel gives where it is called
    rounding = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=ERROR)


@pytest.mark.parametrize("scale", [0.75, 1.0, 1.499])
@pytest.mark.parametrize("place", [0.0, 0.3])
def test_the_bound_holds_and_is_near(scale, place):
    """Of one component in each part of its octave, by the error of the polynomials themselves."""
    loc, s = torch.tensor([place]), torch.tensor([scale])
    k = interpolation._octaves(loc, s)
    assert k == [-3]
    unit = 2.0 ** -k[0]
    (stretch,) = interpolation._stretches(loc * unit, s * unit)
    z = place + scale * torch.linspace(-8, 8, 2001)
    value, bound = stretch.at(z * unit)
    u = (z - place) / scale
    exact = (-0.5 * u.square()).exp() / (scale * unit * math.sqrt(2 * math.pi))
    cut = stretch.total * interpolation._CUT * interpolation._LEBESGUE
    error = (value - exact).abs()
    assert (error <= bound + cut).all()
    if scale == 0.75:
        assert error.max() > 1e-4 * bound.max()


def test_constants():
    """Those of the bound: Cramer's, Lebesgue's and the remainder's, by evaluation."""
    p = interpolation._ORDER
    t = torch.linspace(-0.5, 0.5, 1001)
    weights = torch.linalg.vander(t, N=p) @ interpolation._lagrange()
    assert weights.abs().sum(1).max() < interpolation._LEBESGUE
    nodes = torch.arange(p) - (p - 1) / 2
    torch.testing.assert_close(weights @ nodes**3, t**3)
    product = (t[:, None] - nodes).prod(1).abs().max().item() / math.factorial(p)
    u = np.linspace(-30, 30, 200_001)
    hermite = np.polynomial.hermite_e.hermeval(u, [0] * p + [1]) * np.exp(-(u**2) / 4)
    largest = product * np.abs(hermite).max() / interpolation._NODES**p
    assert 0.3 < largest / interpolation._REMAINDER <= 1.0


def test_a_long_grid_is_cut():
    """Where there are more nodes, or more groups of components, than are held at once."""
    loc = torch.cat([torch.arange(3000.0), 1e9 + 1e3 * torch.arange(500.0)])[:, None]
    scale = log_uniform(0.3, 3.0, len(loc), 1)
    z = torch.cat([drawn(2_000, loc, scale), loc - 30.0])
    expected = brute(z, loc, scale)
    for longest in (2_000, 20_000, interpolation._LONGEST):
        with interpolating(), mock.patch.object(interpolation, "_LONGEST", longest):
            found = interpolated_marginals(z, loc, scale)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=ERROR)


@pytest.mark.parametrize(
    "name, value",
    [("loc", torch.nan), ("loc", torch.inf), ("scale", torch.nan), ("scale", 0.0),
     ("scale", torch.inf), ("scale", -1.0), ("scale", 1e-200), ("loc", 1e30)],
)  # fmt: skip
def test_dimensions_of_odd_components_are_the_exact_kernels(name, value):
    loc, scale = CASES["a VAE's"](300)
    z = drawn(400, loc, scale)
    {"loc": loc, "scale": scale}[name][7, 1] = value
    with pyro.validation_enabled(False), interpolating() as by_exact:
        found = interpolated_marginals(z, loc, scale)
        expected = log_aggregate_marginals(z, loc, scale)
    assert by_exact() in range(len(z), len(z) + 10)
    assert torch.equal(found[:, 1].nan_to_num(), expected[:, 1].nan_to_num())
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=0.0, atol=ERROR)


def test_odd_points():
    """NaN stays NaN, and at infinity there is no density; others are what they are alone."""
    loc, scale = CASES["a VAE's"](300)
    z = drawn(400, loc, scale)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e300, -1e300])
    with pyro.validation_enabled(False), interpolating():
        found = interpolated_marginals(torch.cat([z, odd[:, None].expand(5, 2)]), loc, scale)
        expected = interpolated_marginals(z, loc, scale)
    assert torch.equal(found[:400], expected)
    assert found[400].isnan().all() and (found[401:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_are_the_exact_kernels(dtype):
    loc, scale = (x.to(dtype) for x in CASES["a VAE's"](300))
    z = drawn(400, loc, scale).to(dtype)
    for points in (z, z[:0], z[0]):
        found = interpolated_marginals(points, loc, scale)
        assert torch.equal(found, log_aggregate_marginals(points, loc, scale))


def test_dimensions_that_are_not_smooth_are_given_up():
    """Far tails in 40 dimensions: the exact kernel has all, after a few tries."""
    loc, scale = torch.zeros(4_000, 40), torch.ones(4_000, 40)
    z = 100.0 + torch.rand(2_000, 40)
    density = mock.Mock(wraps=interpolation._density)
    with mock.patch.object(interpolation, "_density", density):
        found = interpolated_marginals(z, loc, scale)
    assert 1 <= density.call_count <= 10
    torch.testing.assert_close(found, brute(z, loc[:1], scale[:1]))


def test_arguments_are_checked_and_left_as_they_were():
    loc, scale = CASES["a VAE's"](300)
    z = drawn(400, loc, scale)
    copies = [x.clone() for x in (z, loc, scale)]
    with interpolating():
        interpolated_marginals(z.requires_grad_(), loc, scale)
    for x, copy in zip((z, loc, scale), copies, strict=True):
        assert torch.equal(x, copy)
    for wrong, message in [
        ((z[:, :1], loc, scale), r"z should have shape \(..., 2\)"),
        ((z, loc, scale.float()), "scale should have z's dtype"),
        ((z, loc, -scale), "scale should be positive"),
        ((z, loc * torch.nan, scale), "loc should be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            interpolated_marginals(*wrong)


MEMORY = """
import torch

torch.set_num_threads(1)
from pyproelbo._distributions.interpolated_marginals import interpolated_marginals

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

def run(n, d, spread):
    loc, scale = spread * torch.randn(n, d), torch.rand(n, d) + 0.01
    interpolated_marginals(loc + scale * torch.randn(n, d), loc, scale)

run(5_000, 2, 1.0)
before = peak()
run(40_000, 2, 1.0)
run(40_000, 2, 1e6)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_pairs():
    """Of 40,000 data, whose pairs take 12 GiB and whose grids, where isolated, 70 MiB."""
    root = Path(interpolation.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 60.0
