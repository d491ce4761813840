"""Parameters that no optimiser trains are named, and no others."""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.vae import Guide
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pyproelbo as pe


def test_no_parameters_warning():
    with pytest.warns(pe.NoParametersWarning):
        pe.BetaELBO()(lambda: None, lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pe.BetaELBO()(lambda: None, Guide())


class Told(Guide):
    def forward(self, x):
        pyro.module("guide", self)
        super().forward(x)


class Known(PyroModule, Guide):
    pass


def first_step(guide, tell, compile=False, seen=lambda guide: guide):
    """The warnings of SVI's first step with a model that may tell Pyro of its modules."""
    pyro.clear_param_store()
    decoder = nn.Linear(2, 3)
    prior = pe.VampPrior(
        lambda u: dist.Normal(guide.encoder(u)[..., :2], 1.0).to_event(1),
        4,
        pe.priors.RandomInputs((3,)),
    )

    def model(x):
        if tell:
            pyro.module("decoder", decoder)
            pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    objective = pe.BetaELBO(num_particles=2, compile=compile)
    svi = SVI(model, seen(guide), pyro.optim.Adam({"lr": 0.1}), objective)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi.step(torch.randn(5, 3))
    return [str(w.message) for w in caught if w.category is pe.UntrainedWarning]


@pytest.mark.parametrize("compile", [False, True])
def test_untrained_parameters_are_named(compile):
    (message,) = first_step(Guide(), tell=True, compile=compile)
    assert "parameters: Guide.encoder." in message and "of shape" not in message
    (message,) = first_step(Told(), tell=False, compile=compile)
    for shape in (3, 2), (3,), (4, 3):  # the decoder's weight and bias, the pseudo-inputs
        assert message.count(f"of shape {shape}") == 1
    assert "Told" not in message


def test_of_parameters_of_one_name_the_first_is_trained():
    class Decoder(PyroModule):  # its name is the guide's: ""
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(2, 3)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.encoder(z), 1.0).to_event(1), obs=x)

    pyro.clear_param_store()
    svi = SVI(Decoder(), Known(), pyro.optim.Adam({"lr": 0.1}), pe.BetaELBO())
    with pytest.warns(pe.UntrainedWarning, match=r"parameters: Decoder\.encoder"):
        svi.step(torch.randn(5, 3))


def test_no_untrained_warning():
    assert not first_step(Told(), tell=True)
    assert not first_step(Known(), tell=True)
    assert not first_step(Guide().requires_grad_(False), tell=True)
    hidden = partial(poutine.block, hide_types=["param"])  # so that SVI leaves it as it is
    assert not first_step(Known(), tell=True, seen=hidden)
    x, guide = torch.randn(5, 3), Guide()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's optimisers need not be told by Pyro
        pe.BetaELBO().loss_and_grads(lambda x: guide(x), guide, x)
    assert guide.encoder.weight.grad is not None


class Positive(PyroModule):
    """With one global latent, and a parameter that is positive."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(2.0), constraint=dist.constraints.positive)

    def forward(self, x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)


@pytest.mark.parametrize("compile", [False, pe.Capture(backend="eager")])
def test_parameters_local_to_modules_are_trained(compile):
    """No warning, one graph, and the numbers of parameters in the store."""
    losses = []
    for is_local in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with warnings.catch_warnings(), pyro.settings.context(module_local_params=is_local):
            warnings.simplefilter("error", UserWarning)
            model = Positive()
            guide, x = AutoNormal(model), torch.arange(5.0)
            objective = pe.BetaELBO(compile=compile)
            svi = SVI(model, guide, pe.SharedOptim(torch.optim.Adam, {"lr": 0.1}), objective)
            losses.append([svi.step(x) for _ in range(8)])
        assert model.scale.item() != 2.0 and guide.locs.z.item() != 0.0
    assert losses[0] == losses[1]
    if compile:
        assert [len(known.graphs) for known in objective._captured._structures.values()] == [1]


def train(module, optimiser, *args, steps=3):
    for _ in range(steps):
        optimiser.zero_grad()
        module(*args).backward()
        optimiser.step()


def late(caught):
    return [str(w.message) for w in caught if w.category is pe.UntrainedWarning]


@pytest.mark.parametrize("ask", ["module", "outer module", "parts"])
def test_parameters_made_after_the_optimiser_are_named(ask):
    model, x = Positive(), torch.arange(5.0)
    guide = AutoNormal(model)
    module = pe.BetaELBO()(model, guide)
    parameters = {
        "module": module.parameters,
        "outer module": nn.ModuleList([module]).parameters,
        "parts": lambda: [*model.parameters(), *guide.parameters()],
    }[ask]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimiser = torch.optim.Adam(parameters, 0.1)
        if ask == "outer module":
            with torch.no_grad():
                module(x)
        train(module, optimiser, x)
    (message,) = late(caught)
    assert "guide.locs.z_unconstrained, guide.scales.z_unconstrained" in message
    assert "model.scale" not in message and guide.locs.z.item() == 0.0


def test_parameters_made_before_the_optimiser_are_trained():
    model, x = Positive(), torch.arange(5.0)
    guide = AutoNormal(model)
    module = pe.BetaELBO()(model, guide)
    module(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module, torch.optim.Adam(module.parameters(), 0.1), x)
    assert not late(caught) and guide.locs.z.item() != 0.0


def test_parameters_of_what_the_module_does_not_hold_are_named():
    net, guide, x = nn.Linear(2, 3), Guide(), torch.randn(5, 3)

    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), scale).to_event(1), obs=x)

    def messages(parameters):
        pyro.clear_param_store()
        module = pe.BetaELBO()(model, guide)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(module, torch.optim.Adam([*module.parameters(), *parameters], 0.1), x)
        return late(caught)

    (message,) = messages([])
    assert "has not moved" in message and "scale" in message and "of shape (3, 2)" in message
    (message,) = messages(net.parameters())
    assert "has not moved scale" in message
    net.requires_grad_(False)
    (message,) = messages([])
    assert "of shape" not in message


def test_guides_of_models_without_arguments_are_made_with_the_module():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(3.0))

    before = torch.get_rng_state()
    guide = AutoNormal(model)
    module = pe.BetaELBO()(model, guide)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(list(module.parameters())) == 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module, torch.optim.Adam(module.parameters(), 0.1))
    assert not late(caught) and guide.locs.z.item() != 0.0
