"""Programs of many kinds, captured: the numbers of eager steps, or a word that names the line."""

import argparse
import dataclasses
import functools
import time
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample, pyro_method
from torch import nn
from torch.nn import functional

import pyproelbo as pe

pytestmark = pytest.mark.slow

EAGER = pe.Capture(backend="eager")


def num_graphs(objective):
    return sum(len(known.graphs) for known in objective._captured._structures.values())


def losses(make, calls, compile, **kwargs):
    """Of steps of SVI, each with the arguments of a call."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    model, guide = make()
    objective = pe.BetaELBO(compile=compile, **kwargs)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
    return torch.tensor([svi.step(*args) for args in calls]), objective


def assert_captured(make, calls=((),) * 5, compile=EAGER, graphs=1, **kwargs):
    ours, objective = losses(make, calls, compile, **kwargs)
    theirs, _ = losses(make, calls, False, **kwargs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert num_graphs(objective) == graphs
    return objective


def with_latent(d, auto=AutoNormal):
    def model():
        z = pyro.sample("z", d())
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(1.0))

    return lambda: (model, auto(model))


LATENTS = {
    "Dirichlet": lambda: dist.Dirichlet(torch.ones(3)),
    "LKJCholesky": lambda: dist.LKJCholesky(3, torch.tensor(1.0)),
    "LKJ": lambda: dist.LKJ(3, torch.tensor(2.0)),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    "checked by itself": lambda: dist.Normal(torch.zeros(3), 1.0, validate_args=True).to_event(1),
}


@pytest.mark.parametrize("name", LATENTS)
def test_latents_with_constraints(name):
    assert_captured(with_latent(LATENTS[name]))
    assert_captured(with_latent(LATENTS[name], AutoMultivariateNormal))


class Regression(PyroModule):
    """With priors that are made once, and so check their values always."""

    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](2, 1)
        self.net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.net.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x):
        loc = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=x[:, 0])


def test_distributions_that_are_kept_check_their_values():
    x = torch.randn(5, 2)

    def make():
        model = Regression()
        return model, AutoNormal(model)

    assert_captured(make, [(x,)] * 5)

    def outside(is_wrong):
        kept = dist.Uniform(0.0, 1.0).expand([2])
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", kept.to_event(1), obs=torch.tensor([0.5, 0.5 + is_wrong]))

    svi = SVI(outside, AutoNormal(outside), pyro.optim.Adam({}), pe.BetaELBO(compile=EAGER))
    svi.step(False)
    with pytest.raises(ValueError, match="within the support"):
        svi.step(True)


def classes(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        row = functional.one_hot(y, 3).to(z.dtype)
        k = pyro.sample("k", dist.OneHotCategorical(torch.ones(3)), infer={"is_auxiliary": True})
        pyro.sample("x", dist.Normal((row + k) @ z, 1.0), obs=y.to(z.dtype))


def classes_guide(y):
    loc = pyro.param("loc", torch.zeros(3))
    pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("k", dist.OneHotCategorical(torch.ones(3)))


@pytest.mark.parametrize("compile", [EAGER, True])
def test_one_hot(compile):
    """Also of classes that the capture has not met; those out of bounds raise an error."""
    calls = [(torch.tensor(y),) for y in ([0, 0, 1], [0, 0, 1], [2, 1, 0], [2, 2, 2])]
    make = lambda: (classes, classes_guide)  # noqa: E731
    assert_captured(make, calls, compile)
    _, objective = losses(make, calls, compile)
    for wrong in (3, -1):
        with pytest.raises(Exception, match=r"bounds|out of range"):
            objective.loss_and_grads(classes, classes_guide, torch.tensor([0, 1, wrong]))


def test_masks_that_are_constant():
    mask = [True, False, True]

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        matrix = z.new_zeros(3, 3)
        matrix[torch.arange(3) < torch.arange(3).unsqueeze(-1)] = z
        first = z[torch.tensor(mask)]
        pyro.sample("x", dist.Normal(matrix.sum() + first.sum(), 1.0), obs=torch.tensor(1.0))

    assert_captured(lambda: (model, AutoNormal(model)))


def test_numbers_taken_by_numpy_are_found():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = abs(float(z.detach().numpy())) + 1.0
        pyro.sample("x", dist.Normal(z, scale), obs=torch.tensor(1.0))

    with pytest.warns(pe.CaptureWarning, match=r"is read.*scale = abs\(float"):
        assert_captured(lambda: (model, AutoNormal(model)), graphs=0)


class Odd(dist.Normal):
    """A density that looks at a number."""

    def log_prob(self, value):
        return super().log_prob(value) * (2.0 if torch.is_nonzero(value.sum() > 0) else 1.0)


def test_densities_that_look_at_numbers_are_named_with_their_site():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("odd", Odd(z, 1.0), obs=z)

    with pytest.warns(pe.CaptureWarning, match=r"at site 'odd' in .*, line \d+: return super"):
        assert_captured(lambda: (model, AutoNormal(model)), graphs=0)

    def another():
        pyro.sample("angle", dist.Stable(1.5, 0.0))

    with pytest.warns(pe.CaptureWarning, match=r"'angle' in .*, line \d+: pyro.sample\(.angle"):
        assert_captured(lambda: (another, AutoNormal(another)), graphs=0)


def labelled(net):
    def model(x, y=None):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            if y is not None:
                pyro.sample("y", dist.Categorical(logits=net(x)), obs=y)

    return model, lambda x, y=None: None


def test_steps_without_a_site():
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    for calls in ([(x, y), (x,)] * 4, [(x,)] * 4):
        ours, eager = (
            losses(lambda: labelled(nn.Linear(4, 3)), calls, compile) for compile in (EAGER, False)
        )
        torch.testing.assert_close(ours[0], eager[0], rtol=1e-12, atol=1e-12)
        assert ours[1].step == eager[1].step


class Nested(PyroModule):
    """Computes its loss within its own call, in which samples are kept."""

    def __init__(self, loss, is_bayesian):
        super().__init__()
        self.w = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1)) if is_bayesian else 1.0
        self.loc, self.loss = nn.Parameter(torch.tensor(2.0)), loss
        self.is_bayesian = is_bayesian

    def model(self, x):
        pyro.sample("v", dist.Normal(0.0, 1.0))
        return self.w * x

    def guide(self, x):
        pyro.sample("v", dist.Normal(self.loc, 1.0))
        if self.is_bayesian:
            pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def forward(self, x):
        return self.loss.differentiable_loss(self.model, self.guide, x)

    @pyro_method
    def by_method(self, x):
        return self.forward(x)


@pytest.mark.parametrize("method", ["forward", "by_method"])
@pytest.mark.parametrize("is_bayesian", [True, False])
def test_within_the_call_of_a_module(is_bayesian, method):
    """Samples that are kept until the call returns are made once, and no step loses a site."""

    def run(compile):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        module = Nested(pe.BetaELBO(kl="sampled", compile=compile), is_bayesian)
        call = module if method == "forward" else module.by_method
        found = []
        for _ in range(4):
            loss = call(torch.ones(2))
            loss.backward()
            found.append(loss.item())
            assert set(module.loss.last_terms.log_prior) == {"v", *(["w"] * is_bayesian)}
        return [*found, module.loc.grad.item()], module.loss

    if is_bayesian:
        with pytest.warns(pe.CaptureWarning, match="Nested, which keeps its samples of w"):
            ours = run(EAGER)
    else:
        ours = run(EAGER)
    assert ours[0] == pytest.approx(run(False)[0])
    assert num_graphs(ours[1]) == (not is_bayesian)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_each_particle_makes_its_own_samples(num_particles):
    """Within a call of a module, which would keep those of the first for all."""
    module = Nested(pe.BetaELBO(kl="sampled", num_particles=num_particles), is_bayesian=True)
    module(torch.ones(2))
    w = module.loss.last_terms.log_prior["w"].reshape(-1)
    assert len(w) == num_particles == len(w.unique()) and (w < 0.0).all()


@dataclasses.dataclass
class Config:
    scale: float
    name: str = "a"


CONFIGS = {
    "argparse": argparse.Namespace,
    "types": types.SimpleNamespace,
    "dataclass": Config,
    "dict": dict,
}


def configured(x, config):
    scale = config["scale"] if isinstance(config, dict) else config.scale
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, scale), obs=x)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_as_arguments_and_bound(name):
    make, x = CONFIGS[name], torch.arange(4.0)
    calls = [(x, make(scale=1.0 + (i > 3))) for i in range(7)]
    guide = lambda x, config: pyro.sample(  # noqa: E731
        "z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0)
    )
    assert_captured(lambda: (configured, guide), calls, graphs=2)

    def run(compile):
        config = make(scale=1.0)
        model = functools.partial(configured, config=config)
        svi_losses, objective = [], pe.BetaELBO(compile=compile)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(model, lambda x: guide(x, None), pyro.optim.Adam({}), objective)
        for i in range(7):
            if i == 3 and name == "dict":
                config["scale"] = 2.0
            elif i == 3:
                config.scale = 2.0
            svi_losses.append(svi.step(x))
        return svi_losses

    assert run(EAGER) == pytest.approx(run(False))


def test_objects_as_arguments_are_refused_with_the_cure():
    x = torch.arange(4.0)
    objective = pe.BetaELBO(compile=EAGER)
    with pytest.warns(pe.CaptureWarning, match=r"is a partial.*functools\.partial\(model, "):
        for _ in range(3):
            objective.loss_and_grads(
                lambda x, f: pyro.sample("x", dist.Normal(0.0, f(1.0)), obs=x[0]),
                lambda x, f: None,
                x,
                functools.partial(pow, 2.0),
            )


@pytest.mark.parametrize("compile", [EAGER, True])
def test_autocast_is_part_of_a_graph(compile):
    """On, off, and in another dtype; gradients are not taken under it, as torch recommends."""
    encoder, decoder = nn.Linear(6, 4), nn.Linear(2, 6)
    encoder, decoder = encoder.float(), decoder.float()
    x = torch.randn(16, 6, dtype=torch.float32)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z).float(), 1.0).to_event(1), obs=x)

    def guide(x):
        loc, log_scale = encoder(x).float().chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def run(compile):
        objective = pe.BetaELBO(compile=compile)
        pyro.set_rng_seed(0)
        found, gradients = [], []
        for i in range(9):
            decoder.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=i < 3 or i > 5):
                loss = objective.differentiable_loss(model, guide, x)
            loss.backward()
            found.append(loss.detach())
            gradients.append(decoder.weight.grad.clone())
        return torch.stack(found), torch.stack(gradients), objective

    (ours, our_gradients, objective), (theirs, gradients, _) = run(compile), run(False)
    near = 1e-6 if compile is EAGER else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=near, atol=near)
    torch.testing.assert_close(
        our_gradients, gradients, rtol=near, atol=near * gradients.abs().max().item()
    )
    assert num_graphs(objective) == 2
    with (
        pytest.warns(pe.CaptureWarning, match="float16"),
        torch.autocast("cpu", dtype=torch.float16),
    ):
        for _ in range(2):
            objective.differentiable_loss(model, guide, x)


def test_graphs_outside_of_the_step_are_kept():
    """Of an argument and of a closure, with and without retain_graph."""

    def run(compile):
        pyro.set_rng_seed(0)
        net = nn.Linear(3, 3)
        x = torch.ones(2, 3)
        y = net(x).sin()
        objective = pe.BetaELBO(compile=compile, retain_graph=True)

        def argument(y):
            pyro.sample("x", dist.Normal(net(y), 1.0).to_event(2), obs=x)

        def closure():
            pyro.sample("x", dist.Normal(net(y), 1.0).to_event(2), obs=x)

        def guide(*args):
            pass

        for _ in range(4):
            objective.loss_and_grads(argument, guide, y)
            objective.differentiable_loss(argument, guide, y).backward(retain_graph=True)
            objective.loss_and_grads(closure, guide)
        y.sum().backward()
        return net.weight.grad, objective

    with pytest.warns(pe.CaptureWarning, match="it reads y, which.*pass it as an argument"):
        ours, _ = run(EAGER)
    theirs, _ = run(False)
    torch.testing.assert_close(ours, theirs)


def test_compiled_steps_that_are_slower_run_uncompiled():
    calls = []

    def slow(graph, inputs):
        def run(*tensors):
            calls.append(len(calls))
            time.sleep(0.2)
            return graph(*tensors)

        return run

    make = with_latent(LATENTS["Dirichlet"])
    with pytest.warns(pe.CaptureWarning, match="makes it slower"):
        assert_captured(make, ((),) * 20, pe.Capture(backend=slow))
    assert len(calls) == 6  # a check, and turns


def test_anomalies_are_looked_for_eagerly():
    make = with_latent(LATENTS["Dirichlet"])
    with (
        pytest.warns(pe.CaptureWarning, match="detect_anomaly"),
        torch.autograd.detect_anomaly(check_nan=True),
    ):
        assert_captured(make, graphs=0)


def weighted(x, kl_weight=1.0):
    """As scvi-tools write it: the weight of the KL is an argument of both programs."""
    with (
        pyro.plate("data", 20, subsample_size=len(x)),
        pyro.poutine.scale(scale=0.5 * kl_weight),
    ):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(2), obs=x)


def weighted_guide(x, kl_weight=1.0):
    loc = pyro.param("loc", torch.zeros(2))
    with (
        pyro.plate("data", 20, subsample_size=len(x)),
        pyro.poutine.scale(scale=0.5 * kl_weight),
    ):
        pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


def test_arithmetic_of_numbers_leaves_them_as_they_are():
    """In place where they are tensors, each program still has its own."""

    def model(w, v):
        w *= 2.0
        w = 1.0 + (3.0 - w) ** 2 / v
        u = w
        u -= 0.5
        z = pyro.sample("z", dist.Normal(0.0, w))
        pyro.sample("x", dist.Normal(z * u, abs(v)), obs=torch.tensor(1.0))

    def guide(w, v):
        w *= 2.0
        w += 1.0
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), w / v))

    assert_captured(lambda: (model, guide), [(1.0 + i / 7, 2.0 + i / 3) for i in range(8)])


@pytest.mark.parametrize("compile", [EAGER, True])
def test_weights_as_arguments_that_change(compile):
    """By epoch and by step: the KL stays in closed form, as for the number itself."""
    x = torch.randn(5, 2)
    by_step = [(x, (i + 1) / 10) for i in range(10)]
    by_epoch = [(x, (i // 4 + 1) / 10) for i in range(12)]

    def make():
        return weighted, weighted_guide

    objective = assert_captured(make, by_step, compile)
    assert objective.last_terms.analytic == {"z"}
    if compile is EAGER:
        assert_captured(make, by_epoch, graphs=2)


def test_gradients_within_a_program():
    """By a leaf that the step makes itself, which is none of its parameters."""

    def make():
        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(1.0))

        def guide():
            loc = pyro.param("loc", torch.tensor(0.2))
            at = torch.zeros(()).requires_grad_()
            log_joint = dist.Normal(0.0, 1.0).log_prob(loc + at)
            log_joint = log_joint + dist.Normal(loc + at, 0.5).log_prob(torch.tensor(1.0))
            (slope,) = torch.autograd.grad(log_joint, at, create_graph=True)
            pyro.sample("z", dist.Normal(loc + 0.1 * slope, 0.4))

        return model, guide

    assert_captured(make)
    assert_captured(make, num_particles=3)
