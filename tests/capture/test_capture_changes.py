"""What changes between captured steps: each change makes another graph, or is refused by name.

The law is that losses and parameters are those of eager steps, whatever is changed.
"""

import warnings
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize, prune

import pyproelbo as pe
from pyproelbo._backend.unregistered import Unregistered
from pyproelbo.guides.ppca import Diagonal, Exact
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vae import VAE

pytestmark = pytest.mark.slow

EAGER = pe.Capture(backend="eager")
NUM_STEPS, FIRST, SECOND = 10, 4, 7


def doubled(x):
    return 2.0 * x


class Scaled:
    """An object that is no module, with numbers and a layer."""

    def __init__(self, layer):
        self.layer, self.factor, self.calls = layer, 1.0, 0

    def __call__(self, x):
        return self.factor * self.layer(x)


class Model(PyroModule):
    """With layers, and more besides, in all the ways in which a module may hold them."""

    slope = 1.0

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
        self.blocks = nn.ModuleList([nn.Linear(3, 3)])
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 3)})
        self.unregistered = [nn.Linear(3, 3).requires_grad_(False)]
        self.object = Scaled(nn.Linear(3, 3).requires_grad_(False))
        self.hidden = Unregistered(nn.Sequential(nn.Linear(3, 3).requires_grad_(False)))
        self.config, self.options = {"shift": 0.0}, SimpleNamespace(shift=0.0)
        self.rates = {"gain": 1.0}
        self.function = torch.tanh
        self.register_buffer("weight", torch.ones(3))
        self.offset = nn.Parameter(torch.zeros(3))
        self.scale, self.unused = 1.0, []
        self.prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def shifted(self, x):
        return x + self.config["shift"] + self.options.shift

    @torch.no_grad()
    def gain(self):
        return self.rates["gain"]

    def forward(self, x):
        self.object.calls = 0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior)
            self.last = loc = self.decoder(z)
            for block in self.blocks:
                loc = block(loc)
            loc = self.function(self.heads["a"](loc)) + self.unregistered[0](loc)
            loc = self.slope * self.object(loc) * self.weight + self.offset
            loc = loc + self.gain() * self.hidden.module(loc)
            pyro.sample("x", dist.Normal(self.shifted(loc), self.scale).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))

    def forward(self, x):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Halved(nn.Module):
    def forward(self, w):
        return 0.5 * w


def layer(*shape):
    """The same one, whenever it is asked for."""
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(*shape)
    with torch.no_grad():
        for p in linear.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return linear


def swap_data(m, step):
    m.decoder[0].weight.data = m.decoder[0].weight.data.flip(0).clone()


def transpose_data(m):
    m.blocks[0].weight.data = m.blocks[0].weight.data.t()


def with_hook(register):
    """Registered at the first change, and taken off at the second."""

    def change(m, step):
        if step == FIRST:
            m.handle = register(m)
        else:
            m.handle.remove()

    return change


def twice(m, args, out):
    return 2.0 * out


def double_gradient(p):
    p.grad.mul_(2.0)


def global_hook(name):
    return getattr(nn_module, f"register_module_{name}")


def at_first(function):
    return lambda m, step: function(m) if step == FIRST else None


SEEN = {
    "freeze": lambda m, step: m.decoder.requires_grad_(step == SECOND),
    "freeze an entry": at_first(lambda m: m.decoder[2].bias.requires_grad_(False)),
    "freeze all of the model": lambda m, step: m.requires_grad_(step == SECOND),
    "layer": at_first(lambda m: setattr(m, "decoder", nn.Sequential(layer(2, 3), nn.ReLU()))),
    "layer by index": at_first(lambda m: m.decoder.__setitem__(1, nn.Softplus())),
    "list of modules": at_first(lambda m: m.blocks.__setitem__(0, layer(3, 3))),
    "longer list of modules": at_first(lambda m: m.blocks.append(layer(3, 3))),
    "shorter list of modules": at_first(lambda m: m.blocks.__delitem__(0)),
    "dict of modules": at_first(lambda m: m.heads.update({"a": layer(3, 3)})),
    "plain list": at_first(lambda m: m.unregistered.__setitem__(0, layer(3, 3))),
    "layer of an object": at_first(lambda m: setattr(m.object, "layer", layer(3, 3))),
    "unregistered module": at_first(lambda m: setattr(m.hidden, "module", layer(3, 3))),
    "layer of an unregistered module": at_first(
        lambda m: m.hidden.module.__setitem__(0, layer(3, 3))
    ),
    "dict that a decorated method reads": at_first(lambda m: m.rates.update(gain=2.0)),
    "number of an object": at_first(lambda m: setattr(m.object, "factor", 2.0)),
    "dict": at_first(lambda m: m.config.update(shift=1.0)),
    "namespace": at_first(lambda m: setattr(m.options, "shift", 1.0)),
    "function": at_first(lambda m: setattr(m, "function", torch.relu)),
    "own function": at_first(lambda m: setattr(m, "function", doubled)),
    "method": at_first(lambda m: setattr(m, "shifted", doubled)),
    "forward": at_first(lambda m: setattr(m.decoder[1], "forward", doubled)),
    "number": at_first(lambda m: setattr(m, "scale", 2.0)),
    "number of the class": lambda m, step: setattr(Model, "slope", 2.0 if step == FIRST else 1.0),
    "number that hides the class's": at_first(lambda m: setattr(m, "slope", 2.0)),
    "parameter": at_first(lambda m: setattr(m.blocks[0], "bias", nn.Parameter(torch.ones(3)))),
    "no parameter": at_first(lambda m: setattr(m.blocks[0], "bias", None)),
    "buffer": at_first(lambda m: setattr(m, "weight", 2.0 * torch.ones(3))),
    "shape of a buffer": at_first(lambda m: setattr(m, "weight", 2.0 * torch.ones(1, 3))),
    "dtype of a buffer": at_first(lambda m: setattr(m.weight, "data", 2.0 * m.weight.float())),
    "distribution": at_first(
        lambda m: setattr(m, "prior", dist.Normal(torch.ones(2), 1.0).to_event(1))
    ),
    "parameters of a distribution": at_first(
        lambda m: setattr(m.prior.base_dist, "loc", torch.ones(2))
    ),
    "assigned state": at_first(
        lambda m: m.load_state_dict({k: 0.5 * v for k, v in m.state_dict().items()}, assign=True)
    ),
    "data": swap_data,
    "shape of data": at_first(lambda m: setattr(m.weight, "data", 2.0 * torch.ones(1))),
    "transposed data": at_first(
        lambda m: m.blocks[0].weight.__setattr__("data", m.blocks[0].weight.data.t())
    ),
    "parametrization": at_first(
        lambda m: parametrize.register_parametrization(m.decoder[0], "weight", Halved())
    ),
    "weight norm": at_first(lambda m: parametrizations.weight_norm(m.blocks[0])),
    "orthogonal": at_first(lambda m: parametrizations.orthogonal(m.blocks[0])),
    "weight norm by a hook": at_first(lambda m: nn.utils.weight_norm(m.blocks[0])),
    "pruning": at_first(lambda m: prune.ln_structured(m.blocks[0], "weight", 0.4, 2, 0)),
    "mode": lambda m, step: m.train(step == SECOND),
    "nothing of the step": lambda m, step: m.unused.append(step),
}
REFUSED = {
    "forward hook": (with_hook(lambda m: m.decoder[0].register_forward_hook(twice)), "twice"),
    "forward hook with keywords": (
        with_hook(
            lambda m: m.decoder[0].register_forward_hook(
                lambda m, args, kwargs, out: 2.0 * out, with_kwargs=True
            )
        ),
        "a Linear has the forward hook",
    ),
    "forward pre-hook": (
        with_hook(lambda m: m.decoder.register_forward_pre_hook(lambda m, args: 2.0 * args[0])),
        "a Sequential has the forward pre-hook",
    ),
    "backward hook": (
        with_hook(
            lambda m: m.decoder[2].register_full_backward_hook(
                lambda m, back, out: (2.0 * back[0],)
            )
        ),
        "backward hook",
    ),
    "backward pre-hook": (
        with_hook(
            lambda m: m.decoder[2].register_full_backward_pre_hook(lambda m, out: (2.0 * out[0],))
        ),
        "backward pre-hook",
    ),
    "global forward hook": (
        with_hook(lambda m: global_hook("forward_hook")(lambda m, args, out: None)),
        "global forward hook",
    ),
    "global forward pre-hook": (
        with_hook(lambda m: global_hook("forward_pre_hook")(lambda m, args: None)),
        "global forward pre-hook",
    ),
    "global backward hook": (
        with_hook(lambda m: global_hook("full_backward_hook")(lambda m, back, out: None)),
        "global backward hook",
    ),
    "hook of a parameter": (
        with_hook(lambda m: m.decoder[0].weight.register_hook(lambda g: 2.0 * g)),
        "weight has a hook",
    ),
    "hook of a parameter's .grad": (
        with_hook(lambda m: m.offset.register_post_accumulate_grad_hook(double_gradient)),
        "Model.offset has a hook",
    ),
}


def by_svi(model, guide, objective):
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(model, guide, optim, objective)
    return svi.step


def as_module(model, guide, objective):
    module = objective(model, guide)
    optim = torch.optim.Adam(module.parameters(), lr=0.01)

    def step(x):
        optim.zero_grad()
        loss = module(x)
        loss.backward()
        optim.step()
        return loss.item()

    return step


def trained(make, train, change, compile):
    """Losses and parameters, where ``change`` is made before two of the steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, changed = make()
    x = torch.randn(6, 3)
    step = train(model, guide, pe.BetaELBO(compile=compile))
    losses = []
    for i in range(NUM_STEPS):
        if i in (FIRST, SECOND):
            change(changed, i)
        pyro.set_rng_seed(i)
        losses.append(step(x))
    return torch.tensor(losses), [p.detach().clone() for p in changed.parameters()]


def assert_trained_alike(make, train, change):
    (losses, parameters), (expected, theirs) = (
        trained(make, train, change, compile) for compile in (EAGER, False)
    )
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parameters, theirs, rtol=1e-12, atol=1e-12)


def modules():
    model, guide = Model(), Guide()
    return model, guide, model


@pytest.fixture(autouse=True)
def _warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", pe.CaptureWarning)
        warnings.filterwarnings("ignore", message=".*was not registered in the param store")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


TRAIN = {"SVI": by_svi, "module": as_module}


ALSO_AS_MODULE = ["freeze", "freeze all of the model", "layer", "parameter", "data", "mode"]


@pytest.mark.parametrize(
    ("name", "train"),
    [*((name, "SVI") for name in SEEN), *((name, "module") for name in ALSO_AS_MODULE)],
)
def test_a_change_makes_another_graph(name, train):
    assert_trained_alike(modules, TRAIN[train], SEEN[name])


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("name", REFUSED)
def test_a_hook_is_refused(name, train):
    change, match = REFUSED[name]
    with pytest.warns(pe.CaptureWarning, match=match):
        assert_trained_alike(modules, TRAIN[train], change)


SHIFT = 0.0
LAYERS = {"head": nn.ReLU()}


def functions():
    """Programs that are no modules, with what they close over and what stands in their file."""
    globals().update(SHIFT=0.0)
    LAYERS["head"] = nn.ReLU()
    decoder, blocks, scale = nn.Linear(2, 3), nn.ModuleList([nn.Linear(3, 3)]), 1.0
    offsets = [0.0, 0.0]
    held = SimpleNamespace(model=nn.ModuleList([decoder, blocks]))

    def model(x):
        pyro.module("decoder", decoder)
        pyro.module("blocks", blocks)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = blocks[0](decoder(z)) * scale * model.factor + offsets[0] + SHIFT
            pyro.sample("x", dist.Normal(LAYERS["head"](loc), 1.0).to_event(1), obs=x)

    def guide(x):
        log_scale = pyro.param("log_scale", lambda: torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), log_scale.exp()).to_event(1))

    def rescale(value):
        nonlocal scale
        scale = value

    model.factor = 1.0
    held.rescale, held.offsets, held.blocks, held.model_function = rescale, offsets, blocks, model
    held.parameters = held.model.parameters
    return model, guide, held


FUNCTIONS = {
    "closure": lambda held, step: held.rescale(float(step)),
    "list": at_first(lambda held: held.offsets.__setitem__(0, 1.0)),
    "list of modules": at_first(lambda held: held.blocks.__setitem__(0, nn.Identity())),
    "attribute": at_first(lambda held: setattr(held.model_function, "factor", 2.0)),
    "file": lambda held, step: globals().update(SHIFT=float(step)),
    "dict of the file": at_first(lambda held: LAYERS.update(head=nn.Tanh())),
    "parameter": lambda held, step: (
        pyro.get_param_store()._params["log_scale"].requires_grad_(step == SECOND)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_functions_name_is_seen(name):
    assert_trained_alike(functions, by_svi, FUNCTIONS[name])


def test_what_only_has_the_name_of_an_attribute_is_not_of_the_step():
    """A global variable ``mean``, where the program asks a distribution for its mean."""

    def model(x):
        d = dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0)
        pyro.sample("x", dist.Normal(d.mean, 1.0).expand([2, 3]).to_event(2), obs=x)

    def guide(x):
        pass

    objective = pe.BetaELBO(compile=EAGER)
    for i in range(6):
        globals()["mean"] = i
        objective.loss_and_grads(model, guide, torch.ones(2, 3))
    del globals()["mean"]
    assert sum(len(known.graphs) for known in objective._captured._structures.values()) == 1


FACTOR = 1.0


class Weighed(pe.TermsELBO):
    def objective(self, terms):
        return FACTOR * terms.elbo - sum(self.weights(terms).values()) * terms.shrinkage


def test_objectives_and_densities_are_seen():
    """Their methods, which only libraries call, and new schedules."""

    class Odd(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) * FACTOR

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", Odd(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    def run(make, compile):
        pyro.clear_param_store()
        objective, found = make(compile=compile), []
        for i in range(9):
            globals()["FACTOR"] = 1.0 + (i > 3)
            if i == 6:
                objective.schedules["more"] = pe.schedules.Constant(0.5)
            pyro.set_rng_seed(i)
            found.append(objective.loss_and_grads(model, guide))
        return found

    for make in (pe.BetaELBO, Weighed):
        assert run(make, EAGER) == pytest.approx(run(make, False), rel=1e-12)


class WithHead(PPCA):
    """Its posterior goes through a layer, which is made of no parameter."""

    def __init__(self):
        super().__init__(2, 3)
        self.head = nn.ModuleList([nn.Identity()])

    def posterior(self, x):
        return super().posterior(self.head[0](x))


def exact():
    """A guide that is exact for another model than the one it is trained with."""
    other = WithHead().requires_grad_(False)
    return PPCA(2, 3), Exact(other), other.head


def vamp():
    """A prior of an encoder that is not the guide's."""
    encoder = Diagonal(2, 3)
    encoder.loc = nn.Sequential(nn.Linear(3, 2), nn.Identity())
    encoder.requires_grad_(False)
    prior = pe.VampPrior(encoder.posterior, 4, pe.priors.RandomInputs((3,)))
    return VAE(2, 3, prior=prior), Diagonal(2, 3), encoder.loc


def aggregate():
    encoder = Diagonal(2, 3)
    encoder.loc = nn.Sequential(nn.Linear(3, 2), nn.Identity())
    encoder.requires_grad_(False)
    prior = pe.priors.AggregatePosterior(encoder.posterior, torch.randn(5, 3))
    return VAE(2, 3, prior=prior), Diagonal(2, 3), encoder.loc


@pytest.mark.parametrize("make", [exact, vamp, aggregate])
def test_layers_of_hidden_modules_are_seen(make):
    change = at_first(lambda layers: layers.__setitem__(-1, nn.Tanh()))
    assert_trained_alike(make, by_svi, change)
