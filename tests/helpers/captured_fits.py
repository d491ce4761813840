"""A VAE with dropout and buffers, and fits of it that should be the same, captured or not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

import pyproelbo as pe
from pyproelbo.schedules import Linear

EAGER = pe.Capture(backend="eager")


def num_graphs(objective):
    return sum(len(known.graphs) for known in objective._captured._structures.values())


def runs_of(objective):
    """What runs each graph."""
    graphs = (g for known in objective._captured._structures.values() for g in known.graphs)
    return [runs for graph in graphs for runs in graph._runners.all]


def trained(make, objective, steps=6):
    """Losses and parameters of a few steps of SVI."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    model, guide = make()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
    losses = [svi.step() for _ in range(steps)]
    return torch.tensor(losses), {n: x.detach().clone() for n, x in pyro.get_param_store().items()}


def assert_trained_alike(ours, theirs):
    (losses, parameters), (expected_losses, expected) = ours, theirs
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    assert parameters.keys() == expected.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


class Model(nn.Module):
    """With dropout, and a buffer that is a mask of the data."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.register_buffer("weight", torch.ones(3))

    def forward(self, x, scale=1.0, extra=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(z) * self.weight
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


class Guide(nn.Module):
    """With batch normalisation, whose buffers move with each step."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4)
        )

    def forward(self, x, scale=1.0, extra=None):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


OBJECTIVES = {
    "beta": pe.BetaELBO,
    "annealed": lambda **kwargs: pe.BetaELBO(Linear(0.0, 1.0, 10), **kwargs),
    "capacity": lambda **kwargs: pe.CapacityELBO(0.5, gamma=3.0, **kwargs),
    "free bits": lambda **kwargs: pe.FreeBitsELBO(0.8, **kwargs),
    "surgery": lambda **kwargs: pe.SurgeryELBO(100, **kwargs),
    "total correlation": lambda **kwargs: pe.TotalCorrelationELBO(
        beta=Linear(1.0, 4.0, 10), dataset_size=100, **kwargs
    ),
    "importance weighted": lambda **kwargs: pe.ImportanceWeightedELBO(3, **kwargs),
    "doubly reparameterised": lambda **kwargs: pe.ImportanceWeightedELBO(
        3, gradient="doubly_reparameterised", **kwargs
    ),
    "Renyi": lambda **kwargs: pe.RenyiELBO(0.5, num_particles=3, **kwargs),
    "wake-sleep": lambda **kwargs: pe.ReweightedWakeSleepELBO(3, **kwargs),
}


def batch(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, generator=generator, device="cpu")
    return x.to(torch.get_default_device())


def new_module(objective):
    pyro.set_rng_seed(5)
    return objective(Model(), Guide())


def fit(module, batches, after=lambda module, step: None):
    """Losses of steps of Adam."""
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    pyro.set_rng_seed(7)
    losses = []
    for step, x in enumerate(batches):
        loss = module(*x) if isinstance(x, tuple) else module(x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
        after(module, step)
    return torch.stack(losses)


def assert_same_modules(ours, theirs):
    for (name, value), expected in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10, msg=name)


def assert_fit_alike(make, batches, after=lambda module, step: None, compile=EAGER):
    """Fit a captured module and an eager one; return the former's objective."""
    ours, theirs = new_module(make(compile=compile)), new_module(make())
    torch.testing.assert_close(
        fit(ours, batches, after), fit(theirs, batches, after), rtol=1e-10, atol=1e-10
    )
    assert_same_modules(ours, theirs)
    assert ours.elbo.step == theirs.elbo.step == len(batches)
    assert ours.elbo.last_terms.elbo.item() == pytest.approx(theirs.elbo.last_terms.elbo.item())
    return ours.elbo
