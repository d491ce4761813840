"""What cannot be captured runs eagerly, and says why."""

import itertools

import numpy as np
import pyro
import pytest
import torch
from helpers.captured_fits import (
    EAGER,
    assert_same_modules,
    batch,
    fit,
    new_module,
    num_graphs,
)
from torch import nn

import pyproelbo as pe


def refused(change, match, steps=6, svi=False):
    """A program that is changed, and then runs eagerly with one warning and the same numbers."""

    def run(compile):
        module = new_module(pe.BetaELBO(compile=compile))
        change(module)
        pyro.set_rng_seed(7)
        return torch.stack([module(batch(6)).detach() for _ in range(steps)]), module.elbo

    with pytest.warns(pe.CaptureWarning, match=match) as caught:
        ours, objective = run(EAGER)
    assert len(caught) == 1
    assert num_graphs(objective) == 0
    torch.testing.assert_close(ours, run(False)[0])


def decoder_of(function):
    def change(module):
        decoder = module.model.decoder
        module.model.decoder = Wrapped(decoder, function)

    return change


class Wrapped(nn.Module):
    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function
        self.calls, self.last = 0, torch.zeros(())

    def forward(self, z):
        return self.function(self, self.inner(z))


def branch(self, y):
    return y if y.sum() > 0 else 2.0 * y


def select(self, y):
    return y + y[y > 0].mean()


def count(self, y):
    self.calls += 1
    return y * self.calls


def remember(self, y):
    y = y + self.last
    self.last = y.mean().detach()
    return y


def numpy_noise(self, y):
    return y + np.random.rand()


def own_generator(self, y):
    return y + torch.randn((), generator=GENERATOR, device="cpu").to(y.device)


GENERATOR = torch.Generator(device="cpu")


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (branch, r"a number in a tensor is read.*at site.*|if y.sum\(\) > 0"),
        (select, r"makes a shape in test_uncaptured.py, line \d+: return y \+ y\[y > 0\]"),
        (count, "Wrapped.calls changes within the step"),
        (remember, "Wrapped.last changes within the step"),
        (numpy_noise, r"generator of Python or of NumPy.*, line \d+: return y \+ np.random.rand"),
        (own_generator, "generator other than torch's"),
    ],
)
def test_what_cannot_be_captured_runs_eagerly(function, match):
    def seeded(module):
        np.random.seed(0)
        GENERATOR.manual_seed(0)
        decoder_of(function)(module)

    refused(seeded, match)


def test_parameters_with_hooks_run_eagerly():
    def change(module):
        module.model.decoder[0].weight.register_hook(lambda grad: grad.clamp(-1, 1))

    refused(change, "has a hook")


def test_other_arguments_and_handlers_run_eagerly():
    module = new_module(pe.BetaELBO(compile=EAGER))
    with pytest.warns(pe.CaptureWarning, match="one of its arguments is a ndarray"):
        for _ in range(3):
            module(batch(6), extra=np.ones(3))
    with pytest.warns(pe.CaptureWarning, match="effect handler ScaleMessenger"):
        for _ in range(3):
            with pyro.poutine.scale(scale=2.0):
                module(batch(6))
    assert num_graphs(module.elbo) == 0


def test_what_changes_unseen_is_found_by_the_check():
    """A number that no module holds: the graph keeps it, and the first replay shows that."""
    numbers = itertools.count(1)

    def change(module):
        def scaled(self, y):
            return y * next(numbers)

        decoder_of(scaled)(module)

    module = new_module(pe.BetaELBO(compile=EAGER))
    change(module)
    with pytest.warns(pe.CaptureWarning, match="does not compute what the program does"):
        for _ in range(4):
            module(batch(6))
    assert num_graphs(module.elbo) == 0


class Unseen:
    """A number in a slot, where nothing looks for it."""

    __slots__ = ("number",)


def test_a_check_that_fails_leaves_no_trace():
    """What it has run is undone, random numbers and moving averages."""
    hidden = Unseen()

    def run(compile):
        hidden.number = 1.0
        module = new_module(pe.BetaELBO(compile=compile))
        decoder_of(lambda self, y: hidden.number * y)(module)

        def after(module, step):
            hidden.number = 1.0 + (step > 0)

        return fit(module, [batch(6)] * 6, after), module

    with pytest.warns(pe.CaptureWarning, match="does not compute what the program does"):
        ours, module = run(EAGER)
    theirs, expected = run(False)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert_same_modules(module, expected)


def test_options_are_checked():
    for wrong in ({"backend": "none"}, {"check": -1}, {"max_graphs": 0}, {"max_nodes": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            pe.Capture(**wrong)
    with pytest.raises(ValueError, match="compile should be"):
        pe.BetaELBO(compile="yes")
    assert pe.BetaELBO(compile={"max_autotune": True})._captured.options.options["max_autotune"]
