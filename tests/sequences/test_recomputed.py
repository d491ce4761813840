"""A loop whose steps are made twice: the same numbers, and fewer of them kept."""

import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from pyro.infer import SVI

import pyproelbo as pe
from pyproelbo.guides.dmm import Smoothing
from pyproelbo.models.dmm import DMM
from pyproelbo.sequences.loops import plain, recomputed

B, D = 5, 3


def chain(inputs, net, mean, kept=None):
    """z_t ~ N(f(z_{t-1}) + u_t + mean, 1)."""

    def step(carry, u):
        hidden = net(carry[0]).tanh()
        if kept is not None:
            kept.append(weakref.ref(hidden))
        q = dist.Normal(hidden.sin() + u[0] + mean, 0.5).to_event(1)
        z = q.rsample()
        return (z,), (z, q.base_dist.loc)

    return step, (inputs.new_zeros(B, D),), (inputs,)


@pytest.mark.parametrize("num_steps", [1, 2, 9, 10, 57])
def test_values_gradients_second_ones_and_seeds(num_steps):
    net, mean = torch.nn.Linear(D, D), rows(B, D).requires_grad_()
    inputs = rows(num_steps, B, D).requires_grad_()
    leaves = [inputs, mean, *net.parameters()]

    def found(loop):
        torch.manual_seed(1)
        (last,), (z, loc) = loop(*chain(inputs, net, mean))
        loss = last.exp().sum() + z.square().sum() + loc.sin().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return loss, *first, *second, torch.rand(())

    torch.testing.assert_close(found(recomputed), found(plain))


def test_most_is_not_kept():
    net, inputs, alive = torch.nn.Linear(D, D), rows(100, B, D), {}
    for loop in (plain, recomputed):
        kept = []
        (last,), _ = loop(*chain(inputs, net, rows(B, D), kept))
        alive[loop] = sum(hidden() is not None for hidden in kept)
        last.sum().backward()
    assert alive == {plain: 100, recomputed: 0}


@pytest.mark.parametrize("compile", [False, pe.Capture(backend="eager")], ids=["eager", "captured"])
def test_a_deep_markov_model_trains_as_with_the_plain_loop(compile):
    def losses(loop, compile):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = DMM(2, D, hidden=(4,), transition=4)
        guide = Smoothing(2, D, hidden=4, loop=loop)
        optim = pyro.optim.Adam({"lr": 0.01})
        svi = SVI(model, guide, optim, pe.BetaELBO(compile=compile))
        x = (rows(B, 12, D) > 0).to(torch.get_default_dtype())
        return torch.tensor([svi.step(x) for _ in range(8)])

    with warnings.catch_warnings():
        warnings.simplefilter("error", pe.CaptureWarning)
        found = losses(recomputed, compile)
    torch.testing.assert_close(found, losses(plain, False))
