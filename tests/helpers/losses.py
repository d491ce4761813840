"""Losses and their gradients at a seed: of objectives with programs, of modules, and captured."""

import pyro
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import pyproelbo as pe

EXACT = {"rtol": 1e-10, "atol": 1e-10}
PARTICLES = {
    "one": {},
    "looped": {"num_particles": 3},
    "vectorised": {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2},
}


def initialised(program):
    """Model and guide with their parameters made."""
    model, guide = program()
    pe.BetaELBO().loss(model, guide)
    return model, guide


def loss_and_grads(elbo, model, guide, seed=1):
    """The loss and every parameter's gradient at a seed."""
    parameters = pyro.get_param_store()._params
    for parameter in parameters.values():
        parameter.grad = None
    pyro.set_rng_seed(seed)
    loss = elbo.loss_and_grads(model, guide)
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
    return loss, {name: grad.clone() for name, grad in grads.items()}


def assert_same(ours, theirs):
    """Two results of ``loss_and_grads`` have the same numbers, for the same parameters."""
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), **EXACT)
    assert ours[1].keys() == theirs[1].keys() != set()
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, msg=lambda m, n=name: f"{n}: {m}", **EXACT)


def of_module(module, *args, seed=1, **kwargs):
    """The loss of an objective as a module, and the gradient of each of its parameters."""
    pyro.set_rng_seed(seed)
    module.zero_grad()
    loss = module(*args, **kwargs)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in module.parameters()]


def captured(module, *args, seed=1, also=None, **kwargs):
    """As ``of_module``, by one graph that make_fx has captured and that reads no tensor's value.

    And what also() is after the loss, where it is given.
    """
    names = [name for name, _ in module.named_parameters()]

    def step(parameters, args, kwargs):
        swapped = dict(zip(names, parameters, strict=True))
        loss = torch.func.functional_call(module, swapped, args, kwargs)
        grads = torch.autograd.grad(loss, parameters)
        return (loss, grads) if also is None else (loss, grads, also())

    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    with pyro.validation_enabled(False):
        graph = make_fx(step)(parameters, args, kwargs)
    assert not any("_local_scalar_dense" in str(node.target) for node in graph.graph.nodes)
    pyro.set_rng_seed(seed)
    return graph(parameters, args, kwargs)
