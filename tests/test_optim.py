"""SharedOptim: the updates of Pyro's optimisers, by one optimiser of torch."""

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from pyro.infer import SVI, Trace_ELBO
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.optimizer import register_optimizer_step_post_hook

import pyproelbo as pe

OPTIMISERS = {
    "Adam": (torch.optim.Adam, pyro.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.99)}),
    "AdamW": (torch.optim.AdamW, pyro.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
    "SGD": (torch.optim.SGD, pyro.optim.SGD, {"lr": 0.001, "momentum": 0.9}),
    "RMSprop": (torch.optim.RMSprop, pyro.optim.RMSprop, {"lr": 0.01}),
    "ClippedAdam": (
        pyro.optim.clipped_adam.ClippedAdam,
        pyro.optim.ClippedAdam,
        {"lr": 0.1, "clip_norm": 2.0},
    ),
}


def program(late=3):
    """Parameters of which one appears after ``late`` steps, and one is left out at times."""
    calls = {"guide": 0}

    def guide():
        calls["guide"] += 1
        loc = programs.real("loc", 2)
        if calls["guide"] > late:
            loc = loc + programs.real("late")
        if calls["guide"] % 3:
            loc = loc * programs.positive("sometimes")
        pyro.sample("z", dist.Normal(loc, programs.positive("scale", 2)).to_event(1))

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(), programs.positive("noise")), obs=torch.tensor(1.0))

    return model, guide


def trained(optim, steps=10, each=lambda optim: None):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(*program(), optim, Trace_ELBO())
    for _ in range(steps):
        svi.step()
        each(optim)
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_updates_are_those_of_pyro(name):
    ours, theirs, arguments = OPTIMISERS[name]
    assert_same(trained(pe.SharedOptim(ours, arguments)), trained(theirs(dict(arguments))))


def test_fused_where_torch_has_it():
    optim = pe.SharedOptim(torch.optim.Adam, {"lr": 0.1})
    trained(optim)
    (adam,) = optim._optimizers.values()
    assert adam.param_groups[0]["fused"]
    assert len(adam.param_groups[0]["params"]) == 5
    plain = pe.SharedOptim(torch.optim.Adam, {"lr": 0.1, "foreach": True})
    trained(plain)
    (adam,) = plain._optimizers.values()
    assert not adam.param_groups[0]["fused"]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_direct_updates_are_those_of_torch(name, monkeypatch):
    """Where each step is of the same parameters, all but the first few are direct."""
    constructor, _, arguments = OPTIMISERS[name]
    steps = []
    step = constructor.step
    monkeypatch.setattr(constructor, "step", lambda *args: (steps.append(1), step(*args))[1])

    def run(direct):
        steps.clear()
        torch.manual_seed(0)
        params = [torch.randn(n, requires_grad=True) for n in (3, 1, 5)]
        optim = pe.SharedOptim(constructor, arguments, scheduler=partial(ExponentialLR, gamma=0.9))
        if not direct:
            monkeypatch.setattr("pyproelbo._optim.Update.after", lambda _: None)
        for count in range(12):
            for p in params[: 2 if count == 6 else 3]:
                p.grad = torch.randn_like(p)
            optim(params)
            optim.step()
        return params, optim, len(steps)

    ours, optim, few = run(True)
    theirs, plain, many = run(False)
    rtol = 1e-14 if name == "SGD" else 0  # which SharedOptim makes without its fused form
    assert (few, many) == (3, 12)  # at the first, without one of them, and with it again
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=0)
    for one, other in zip(optim._optimizers.values(), plain._optimizers.values(), strict=True):
        for p, q in zip(ours, theirs, strict=True):
            for k, x in one.state[p].items():
                torch.testing.assert_close(x, other.state[q][k], rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16])
def test_parameters_of_other_kinds(dtype):
    """As complex ones, which no fused function takes."""

    def run(make):
        torch.manual_seed(0)
        p = torch.randn(3, dtype=dtype, requires_grad=True)
        optim = make(p)
        for _ in range(4):
            p.grad = torch.randn_like(p)
            optim()
        return p.detach()

    def shared(p):
        optim = pe.SharedOptim(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
        return lambda: optim([p])

    ours = run(shared)
    theirs = run(lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9).step)
    torch.testing.assert_close(ours, theirs)


def test_hooks_of_optimisers_are_called():
    calls = []
    hook = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    p = torch.ones(2, requires_grad=True)
    optim = pe.SharedOptim(torch.optim.Adam, {"lr": 0.1})
    for count in range(6):
        if count == 3:
            hook.remove()
        p.grad = torch.ones(2)
        optim([p])
    assert len(calls) == 3


def test_arguments_by_name():
    def arguments(name):
        return {"lr": 0.01 if name == "loc" else 0.1}

    optim = pe.SharedOptim(torch.optim.Adam, arguments)
    assert_same(trained(optim), trained(pyro.optim.Adam(arguments)))
    assert len(optim._optimizers) == 2


def test_schedulers():
    pyro_optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.8}
    )
    ours = pe.SharedOptim(
        torch.optim.Adam, {"lr": 0.1}, scheduler=partial(ExponentialLR, gamma=0.8)
    )
    step = lambda optim: optim.step()  # noqa: E731
    # Pyro's starts the schedule of a parameter when it appears, ours is that of all
    ours, theirs = trained(ours, 3, step), trained(pyro_optim, 3, step)
    assert_same(ours, theirs)


def test_clipping():
    """The norm is that of all gradients together; without, values are clipped one by one."""

    def clipped(clip_args):
        optim = pe.SharedOptim(torch.optim.SGD, {"lr": 1.0}, clip_args)
        params = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
        params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([-4.0])
        optim(params)
        assert all(p.grad is None for p in params)
        return [p.tolist() for p in params]

    assert clipped(None) == [[-3.0, 0.0], [4.0]]
    norm, value = clipped({"clip_norm": 1.0}), clipped({"clip_value": 2.0})
    assert norm == [[pytest.approx(-0.6, rel=1e-5), 0.0], [pytest.approx(0.8, rel=1e-5)]]
    assert value == [[-2.0, 0.0], [2.0]]
    with pytest.raises(ValueError, match="clip_norm and clip_value, got \\['norm'\\]"):
        pe.SharedOptim(torch.optim.SGD, {"lr": 1.0}, {"norm": 1.0})


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("first", ["ours", "Pyro's"])
def test_training_goes_on_from_a_state(first, scheduled, tmp_path):
    """Saved in the middle and loaded by a new optimiser, our own or after Pyro's."""
    schedule = partial(ExponentialLR, gamma=0.8) if scheduled else None

    def shared():
        return pe.SharedOptim(torch.optim.Adam, {"lr": 0.1}, scheduler=schedule)

    def pyros():
        if scheduled:
            optimizer = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.8}
            return pyro.optim.ExponentialLR(optimizer)
        return pyro.optim.Adam({"lr": 0.1})

    def run(restart):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = shared() if first == "ours" else pyros()
        model, guide = programs.local_normal()
        svi = SVI(model, guide, optim, Trace_ELBO())
        for i in range(8):
            if i == 4 and restart:
                optim.save(tmp_path / "state")
                optim = shared()
                optim.load(tmp_path / "state")
                svi = SVI(model, guide, optim, Trace_ELBO())
            svi.step()
            if scheduled:
                optim.step()
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}

    assert_same(run(restart=True), run(restart=False))


def test_a_state_is_taken_also_by_known_parameters():
    optim = pe.SharedOptim(torch.optim.Adam, {"lr": 0.1})
    trained(optim, 4)
    state = copy.deepcopy(optim.get_state())
    pyro.set_rng_seed(1)
    SVI(*program(0), optim, Trace_ELBO()).step()
    assert optim.get_state()["loc"]["state"][0]["step"] == 5
    optim.set_state(state)
    assert optim.get_state()["loc"]["state"][0]["step"] == 4


def test_a_state_without_names_is_refused():
    """With parameters local to modules the states of all would be one."""
    optim = pe.SharedOptim(torch.optim.Adam, {"lr": 0.1})
    with pyro.settings.context(module_local_params=True):
        guide = pyro.infer.autoguide.AutoNormal(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
        SVI(guide.model, guide, optim, pe.BetaELBO()).step()
        with pytest.raises(ValueError, match="has no name for a parameter"):
            optim.get_state()
