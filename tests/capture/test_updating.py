"""Graphs that end with the update of the parameters make the steps of SharedOptim."""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from helpers.captured_fits import num_graphs, runs_of
from pyro import poutine
from pyro.infer import SVI
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.optimizer import register_optimizer_step_post_hook

import pyproelbo as pe
from pyproelbo._backend.rules import Step, rule_of
from pyproelbo.capture.captured import Captured
from pyproelbo.capture.updating import WithUpdate

OPTIMISERS = {
    "Adam": (torch.optim.Adam, {"lr": 0.02}),
    "Adam, all arguments": (
        torch.optim.Adam,
        {"lr": 0.02, "betas": (0.0, 0.9), "eps": 1e-3, "weight_decay": 0.2},
    ),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "betas": (0.7, 0.99), "weight_decay": 0.3}),
    "SGD": (torch.optim.SGD, {"lr": 0.002}),
    "SGD, momentum": (
        torch.optim.SGD,
        {"lr": 0.001, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.2},
    ),
    "SGD, Nesterov": (torch.optim.SGD, {"lr": 0.001, "momentum": 0.9, "nesterov": True}),
}
ADAM = OPTIMISERS["Adam"]


@pytest.fixture
def _uncompiled(monkeypatch):
    """What inductor compiles stands for itself."""
    monkeypatch.setattr(pe.Capture, "compiling", lambda self, graph, *_: lambda: graph)


pytestmark = pytest.mark.usefixtures("_uncompiled")


class Program:
    """A VAE with batch normalisation, of data that are NaN at some steps."""

    def __init__(self, nan=()):
        torch.manual_seed(0)
        self.decoder = nn.Linear(2, 3)
        self.encoder = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
        generator = torch.Generator(device=torch.get_default_device()).manual_seed(1)
        self.batches = [torch.randn(6, 3, generator=generator) for _ in range(40)]
        for step in nan:
            self.batches[step][0, 0] = torch.nan

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            x_ = dist.Normal(self.decoder(z), programs.positive("noise"), validate_args=False)
            pyro.sample("x", x_.to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x.nan_to_num()).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def adam():
    return pe.SharedOptim(*ADAM)


class Fit:
    """Steps of SVI, captured or not."""

    def __init__(self, compile, optim=adam, program=Program, engine=SVI):
        pyro.clear_param_store()
        self.program = program()
        self.objective = pe.BetaELBO(compile=compile)
        self.optim = optim()
        self.svi = engine(self.program.model, self.program.guide, self.optim, self.objective)
        self.losses = []
        pyro.set_rng_seed(3)

    def steps(self, num):
        for x in self.program.batches[len(self.losses) : len(self.losses) + num]:
            self.losses.append(self.svi.step(x))

    @property
    def has_updated(self):
        """Whether graphs make the updates."""
        runs = [run for run in runs_of(self.objective) if isinstance(run.function, WithUpdate)]
        return len(runs) == 1

    @property
    def results(self):
        parameters = {n: x.detach().clone() for n, x in pyro.get_param_store().items()}
        modules = self.program.encoder, self.program.decoder
        buffers = [x.clone() for module in modules for x in module.buffers()]
        return torch.tensor(self.losses), parameters, buffers, self.objective.step


def assert_as_eager(run, updates=True, rtol=1e-9, **arguments):
    """``run`` of a captured fit, and of an eager one; the former is returned."""
    results = []
    for compile in (True, False):
        fit = Fit(compile, **arguments)
        run(fit)
        if compile:
            ours = fit
            assert num_graphs(fit.objective) == 1
            assert fit.has_updated == updates
        results.append(fit.results)
    torch.testing.assert_close(*results, rtol=rtol, atol=1e-12, equal_nan=True)
    return ours


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
def test_rules_are_those_of_torch(name, dtype, maximize):
    make, arguments = OPTIMISERS[name]
    torch.manual_seed(0)
    params = [torch.randn(n, dtype=dtype, requires_grad=True) for n in (3, 1, 5)]
    optimizer = make(params, **arguments, maximize=maximize, fused=True)
    ours, inputs = [p.detach().clone() for p in params], None
    for step in range(7):
        gradients = [torch.randn_like(p) for p in params]
        if step:
            rule = rule_of(optimizer)
            states = rule.states([optimizer.state[p] for p in params])
            inputs = [x.clone() for x in rule.inputs(states)] if inputs is None else inputs
            rate = torch.tensor(arguments["lr"], dtype=torch.float64)
            changes = rule.changes(Step(ours, gradients, inputs, rate, dtype))
            for x, new in [(x, new.clone()) for x, new in changes]:
                x.copy_(new)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        if not step:
            ours = [p.detach().clone() for p in params]
        torch.testing.assert_close(ours, [p.detach() for p in params])
    torch.testing.assert_close(inputs, rule.inputs(states))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps_are_those_of_shared_optim(name):
    optim = partial(pe.SharedOptim, *OPTIMISERS[name])
    fit = assert_as_eager(lambda fit: fit.steps(20), optim=optim)
    assert all(p.grad is None for p in fit.program.encoder.parameters())
    assert float(fit.objective.last_terms.elbo) == pytest.approx(-fit.losses[-1])


def test_schedulers_and_settings_that_change():
    def run(fit):
        for _ in range(15):
            fit.steps(1)
            fit.optim.step()

    optim = lambda: pe.SharedOptim(*ADAM, scheduler=partial(ExponentialLR, gamma=0.8))  # noqa: E731
    assert_as_eager(run, optim=optim)

    def betas(fit):
        run = fit.steps
        run(12)
        (optimizer,) = fit.optim._optimizers.values()
        optimizer.param_groups[0]["betas"] = (0.5, 0.8)
        run(8)

    fit = assert_as_eager(betas)
    assert len(runs_of(fit.objective)) == 2  # the other one leaves the update to the optimiser


def test_states_are_live():
    """Saved in the middle, and loaded by the same optimiser and by another one."""

    def run(fit, to_another):
        fit.steps(12)
        state = fit.optim.get_state()
        counts = {float(x["state"][0]["step"]) for x in state.values()}
        assert counts == {12.0}
        optim = adam() if to_another else fit.optim
        if not to_another:
            fit.steps(3)
        optim.set_state(state)
        fit.svi = SVI(fit.program.model, fit.program.guide, optim, fit.objective)
        fit.steps(15)

    for to_another in (False, True):
        assert_as_eager(partial(run, to_another=to_another))


def test_gradients_that_are_there_are_added_to():
    def run(fit):
        fit.steps(10)
        for _ in range(2):
            fit.objective.loss_and_grads(fit.program.model, fit.program.guide, torch.ones(6, 3))
        assert all(p.grad is not None for p in fit.program.encoder.parameters())
        fit.steps(10)

    assert_as_eager(run)


@pytest.mark.parametrize("is_error", [False, True])
def test_losses_that_are_not_finite(is_error):
    """They do what they do to eager steps: the update is made after the warning, if at all."""
    seen = []

    def run(fit):
        fit.steps(14)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if is_error else "ignore", pe.NonFiniteWarning)
            try:
                fit.steps(1)
            except pe.NonFiniteWarning:
                fit.losses.append(0.0)
                for p in pyro.get_param_store()._params.values():
                    assert p.grad is not None
                    p.grad = None
        seen.append(bool(pyro.param("noise").isnan().any()))
        assert all(p.grad is None for p in pyro.get_param_store()._params.values())
        fit.steps(5 if is_error else 0)

    assert_as_eager(run, program=lambda: Program(nan=[14]))
    assert seen == [not is_error] * 2


def test_the_first_compiled_step_has_a_loss_that_is_not_finite(monkeypatch):
    """Which cannot be compared, and leaves that to the next one."""
    calls, found, checked = iter([None] * 4), [], Captured._checked
    monkeypatch.setattr(pe.Capture, "compiling", lambda self, graph, *_: lambda: next(calls, graph))

    def seen(*args):
        found.append(checked(*args))
        return found[-1]

    monkeypatch.setattr(Captured, "_checked", seen)

    class Infinite(Program):
        """Whose loss is infinite for some data, with finite gradients."""

        def model(self, x):
            super().model(x.clamp(-9, 9))
            pyro.factor("infinite", -(x.detach().amax() - 1e9).clamp(min=0.0) * 1e300 * 1e300)

    def program():
        program = Infinite()
        program.batches[4][0, 0] = 1e10
        return program

    def run(fit):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pe.NonFiniteWarning)
            fit.steps(20)
        assert fit.losses[4] == float("inf")

    assert_as_eager(run, program=program)
    assert [seconds is None for seconds in found] == [True, False]


def test_hooks_and_what_has_more_to_do_leave_it_to_the_optimiser():
    calls = []

    def hooked(fit):
        fit.steps(12)
        hook = register_optimizer_step_post_hook(lambda *_: calls.append(1))
        try:
            fit.steps(3)
        finally:
            hook.remove()
        fit.steps(5)

    assert_as_eager(hooked)
    assert len(calls) == 6

    class Own(pe.SharedOptim):
        def __call__(self, params):
            super().__call__(params)

    def by_name(name):
        return {"lr": 0.01 if name == "noise" else 0.1}

    for optim in (
        lambda: Own(*ADAM),
        lambda: pe.SharedOptim(*ADAM, clip_args={"clip_norm": 1.0}),
        lambda: pe.SharedOptim(torch.optim.Adam, by_name),
        lambda: pe.SharedOptim(torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
        lambda: pe.SharedOptim(torch.optim.RMSprop, {"lr": 0.01}),
        lambda: pyro.optim.Adam({"lr": 0.1}),
    ):
        assert_as_eager(lambda fit: fit.steps(15), updates=False, optim=optim)


def test_steps_that_are_not_pyros():
    class Doubled(SVI):
        """Whose gradients are twice the objective's."""

        def __init__(self, *args):
            super().__init__(*args)
            inner = self.loss_and_grads

            def doubled(*args):
                loss = inner(*args)
                for p in pyro.get_param_store()._params.values():
                    p.grad = 2.0 * p.grad
                return loss

            self.loss_and_grads = doubled

    class Twice(SVI):
        def step(self, *args):
            super().step(*args)
            return super().step(*args)

    sgd = lambda: pe.SharedOptim(torch.optim.SGD, {"lr": 0.001})  # noqa: E731
    assert_as_eager(lambda fit: fit.steps(15), updates=False, engine=Doubled, optim=sgd)
    assert_as_eager(lambda fit: fit.steps(15), engine=Twice, optim=sgd)


def test_what_shares_memory_with_parameters():
    class Tied(Program):
        """Whose data are a parameter, from outside its graph."""

        def __init__(self):
            super().__init__()
            self.data = nn.Parameter(torch.ones(6, 3))
            self.batches = [self.data.detach()] * 40

        def model(self, x):
            pyro.param("data", self.data)
            super().model(x + self.data)

    class Overlapping(Program):
        def __init__(self):
            super().__init__()
            whole = torch.randn(6, 3)
            self.one, self.two = (nn.Parameter(x) for x in (whole[:4], whole[2:]))

        def model(self, x):
            one, two = pyro.param("one", self.one), pyro.param("two", self.two)
            super().model(x + torch.cat([one, two[:2]]))

    class Closed(Program):
        """That reads a parameter's memory as a constant."""

        def __init__(self):
            super().__init__()
            self.constant = self.decoder.weight.detach()

        def model(self, x):
            super().model(x + self.constant.sum())

    for program in (Tied, Overlapping, Closed):
        assert_as_eager(lambda fit: fit.steps(15), updates=False, program=program)


def test_parameters_whose_memory_is_another_one(monkeypatch):
    """As that of the arguments, from some step on: the compiler does not know of it."""

    def made(*args):
        raise AssertionError("the graph makes the update")

    class Moved(Program):
        def __init__(self):
            super().__init__()
            self.data = nn.Parameter(torch.ones(6, 3))

        def model(self, x):
            pyro.param("data", self.data)
            super().model(x + self.data)

    def run(fit):
        fit.steps(14)
        assert fit.objective._captured is None or fit.has_updated
        fit.program.data.data = fit.program.data.data.clone()
        with monkeypatch.context() as patch:
            patch.setattr(WithUpdate, "__call__", made)
            for _ in range(5):
                fit.losses.append(fit.svi.step(fit.program.data.detach()))

    assert_as_eager(run, program=Moved)


def test_sparse_arguments_that_nothing_uses():
    class Sparse(Program):
        def model(self, x, _):
            super().model(x)

        def guide(self, x, _):
            super().guide(x)

    def run(fit):
        other = torch.eye(3).to_sparse()
        for x in fit.program.batches[:15]:
            fit.losses.append(fit.svi.step(x, other))

    assert_as_eager(run, updates=False, program=Sparse)


def test_opaque_functions_may_read_parameters_at_any_time():
    class Opaque(Program):
        def model(self, x):
            weight = self.decoder.weight
            (y,) = pe.sequences.opaque(lambda x: [x * weight.detach().sum()], x)
            super().model(y)

    assert_as_eager(lambda fit: fit.steps(15), updates=False, program=Opaque)


def test_backward_passes_after_an_update_are_refused():
    fit = Fit(True)
    fit.steps(14)
    loss = fit.program.decoder.weight.square().sum()
    fit.steps(1)
    assert fit.has_updated
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_handlers_around_steps_see_their_parameters():
    fit = Fit(True)
    fit.steps(15)
    assert fit.has_updated
    with poutine.trace(param_only=True) as seen:
        fit.steps(1)
    assert set(seen.trace.nodes) == set(pyro.get_param_store())
    assert all(
        site["value"].unconstrained() is pyro.get_param_store()._params[name]
        for name, site in seen.trace.nodes.items()
    )


def test_lazy_losses():
    fit = Fit(pe.Capture(lazy_loss=True), program=lambda: Program(nan=[18]))
    fit.steps(20)
    assert fit.has_updated and pyro.param("noise").isnan().any()  # as nobody has looked
    assert torch.tensor(list(map(float, fit.losses)))[:18].isfinite().all()


def test_wrong_updates_are_found(monkeypatch):
    changes = type(rule_of(torch.optim.Adam([torch.ones(1)], fused=True))).changes
    wrong = lambda self, *args: changes(self._replace(beta1=0.5), *args)  # noqa: E731
    monkeypatch.setattr("pyproelbo._backend.rules.AdamRule.changes", wrong)
    with pytest.warns(pe.CaptureWarning, match="does not make the update of the optimiser"):
        assert_as_eager(lambda fit: fit.steps(15), updates=False)


def test_graphs_do_not_depend_on_the_order_in_which_optimisers_have_parameters(monkeypatch):
    codes = set()
    compiling = pe.Capture.compiling

    def seen(self, graph, *args):
        codes.add(graph.code)
        return compiling(self, graph, *args)

    monkeypatch.setattr(pe.Capture, "compiling", seen)
    for order in (sorted, partial(sorted, reverse=True)):

        class Ordered(SVI):
            def __init__(self, model, guide, optim, loss, order=order):
                super().__init__(model, guide, optim, loss)
                by = lambda p: tuple(p.shape)  # noqa: E731
                optim._add = lambda params, add=optim._add: add(order(params, key=by))

        fit = Fit(True, engine=Ordered)
        fit.steps(15)
        assert fit.has_updated
    assert len(codes) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    zip(OPTIMISERS, 3 * [torch.float32, torch.float64], strict=True),
    ids=OPTIMISERS,
)
def test_compiled_by_inductor(name, dtype, monkeypatch):
    monkeypatch.undo()
    torch.set_default_dtype(dtype)
    compile = pe.Capture(background=False)
    results = []
    for how in (compile, False):
        fit = Fit(how, optim=lambda: pe.SharedOptim(*OPTIMISERS[name]))
        fit.steps(25)
        assert not how or fit.has_updated
        results.append(fit.results)
    near = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(*results, rtol=near, atol=near)
