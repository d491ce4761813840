"""What compiled steps compute in place of torch's softplus and logarithm of the sigmoid."""

import pytest
import torch
from torch.nn import functional

from pyproelbo._backend import decompositions, inductor, products

TINY = 1e-43  # a few of the least numbers that there are
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-8, -1e-8, 20.0, 20.1, -104.0, 88.8, 3e38, -3e38]


def numbers(*, unit=False):
    """Of all sizes, and those at which functions turn."""
    powers = torch.logspace(-45, 0 if unit else 3, 400_001, dtype=torch.float64)
    if unit:
        return torch.cat([powers, torch.linspace(0, 1, 400_001, dtype=torch.float64)]).float()
    special = torch.tensor([*SPECIAL, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    return torch.cat([powers, -powers, special]).float()


def units(ours, exact):
    """The error in units of the last place of float32."""
    rounded = exact.float()
    following = torch.nextafter(rounded.abs(), torch.tensor(torch.inf))
    return ((ours.double() - exact).abs() / (following - rounded.abs()).double()).max()


@pytest.fixture(autouse=True)
def _single_precision_on_the_cpu():
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


def test_the_series_is_right_to_three_units_in_the_last_place():
    z = numbers(unit=True)
    assert units(decompositions.log1p_of_unit(z), torch.log1p(z.double())) < 3


@pytest.mark.parametrize(("beta", "threshold"), [(1.0, 20.0), (1.0, 5.0), (0.3, 20.0), (7.0, 2.0)])
def test_softplus(beta, threshold):
    x = numbers()
    ours = decompositions.softplus(x, beta, threshold)
    exact = functional.softplus(x.double(), beta, threshold)
    is_finite = exact.float().isfinite()
    # the argument of the exponential is rounded, too, which torch's own is as well
    near = torch.finfo(torch.float32).eps * (4 + (beta * x).abs().clamp(max=104))
    error = (ours.double() - exact).abs() - near * exact.abs()
    assert float(error[is_finite].max()) <= TINY
    assert torch.equal(ours[~is_finite].nan_to_num(7.0), exact.float()[~is_finite].nan_to_num(7.0))


def test_log_sigmoid():
    x = numbers()
    ours, z = decompositions.log_sigmoid_forward(x)
    exact = functional.logsigmoid(x.double())
    is_finite = exact.float().isfinite()
    near = torch.finfo(torch.float32).eps * (4 + x.abs().clamp(max=104))
    error = (ours.double() - exact).abs() - near * exact.abs()
    assert float(error[is_finite].max()) <= TINY
    assert torch.equal(ours[~is_finite].nan_to_num(7.0), exact.float()[~is_finite].nan_to_num(7.0))
    torch.testing.assert_close(z, torch.exp(-x.abs()), equal_nan=True)


def test_others_are_torchs():
    known = {
        torch.ops.aten.softplus.default: lambda x, *args: "torch",
        torch.ops.aten.log_sigmoid_forward.default: lambda x: "torch",
    }
    for decomposition in decompositions.own(known).values():
        assert isinstance(decomposition(torch.ones(2))[0], torch.Tensor)
        assert decomposition(torch.ones(2, dtype=torch.float64)) == "torch"
        assert decomposition(torch.ones(2, device="meta")) == "torch"
    assert decompositions.own({}) == {}


@pytest.mark.slow
def test_compiled_steps_have_them_and_nothing_else_does():
    from torch._inductor import decomposition, lowering

    before = dict(decomposition.decompositions)
    logits, y = 5 * torch.randn(40, 30), torch.rand(40, 30).round()

    def function(logits, y):
        loss = functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
        return [loss, functional.softplus(logits)]

    def as_graph(*inputs):
        return torch.fx.experimental.proxy_tensor.make_fx(function)(*inputs)

    compiled = inductor.compiled(as_graph(logits, y), [logits, y], {})
    for ours, theirs in zip(compiled([logits, y]), function(logits, y), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert before == decomposition.decompositions
    assert products.OPERATION not in lowering.lowerings
