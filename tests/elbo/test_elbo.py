"""Objectives: their formulas, gradients, steps, state, capture and complaints."""

import copy
import io
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from helpers.losses import assert_same, captured, initialised, loss_and_grads, of_module
from helpers.vae import Guide, Model
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyproelbo as pe
from pyproelbo.schedules import Linear

OBJECTIVES = {
    "beta": lambda **kwargs: pe.BetaELBO(0.7, **kwargs),
    "beta by site": lambda **kwargs: pe.BetaELBO({"z": 0.7}, **kwargs),
    "annealed": lambda **kwargs: pe.BetaELBO(Linear(0.0, 1.0, 10), **kwargs),
    "capacity": lambda **kwargs: pe.CapacityELBO(0.5, gamma=3.0, **kwargs),
    "free bits": lambda **kwargs: pe.FreeBitsELBO(0.8, **kwargs),
}
NEUTRAL = {
    "beta": lambda **kwargs: pe.BetaELBO(**kwargs),
    "capacity": lambda **kwargs: pe.CapacityELBO(0.0, gamma=1.0, **kwargs),
    "free bits": lambda **kwargs: pe.FreeBitsELBO(0.0, **kwargs),
}


@pytest.mark.parametrize("particles", [{}, {"num_particles": 3}])
@pytest.mark.parametrize("neutral", NEUTRAL)
@pytest.mark.parametrize("name", ["local_normal", "nested_plates", "nothing_latent", "huge_plate"])
def test_neutral_knobs_give_the_elbo(name, neutral, particles):
    model, guide = initialised(programs.REPARAMETERISED[name])
    if neutral == "capacity" and name == "huge_plate":
        particles = {**particles, "kl": "auto"}
    ours = loss_and_grads(NEUTRAL[neutral](**particles), model, guide)
    assert_same(ours, loss_and_grads(pe.BetaELBO(1.0, **particles), model, guide))


def test_formulas_on_a_conjugate_model():
    """By hand: two data, KL(N(m, s) || N(0, 1)) each, expected log-likelihood in closed form."""
    x, m, s = torch.tensor([1.0, -2.0]), torch.tensor([0.3, -0.5]), torch.tensor([0.5, 0.8])

    def guide():
        with pyro.plate("data", 10, subsample_size=2):
            pyro.sample("z", dist.Normal(m, s))

    def model():
        with pyro.plate("data", 10, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    kl = 5 * (0.5 * (m**2 + s**2 - 1) - s.log())
    reconstruction = 5 * dist.Normal(0.0, 1.0).log_prob(x).sum()
    total, close = kl.sum(), {"rel": 1e-12}

    assert pe.BetaELBO(3.0).loss(model, guide) == pytest.approx(
        -(reconstruction - 3 * total).item(), **close
    )
    expected = reconstruction - 4.0 * 10 * (total / 10 - 0.9).abs()
    assert pe.CapacityELBO(0.9, gamma=4.0).loss(model, guide) == pytest.approx(
        -expected.item(), **close
    )
    for free in (0.1, 2.0):
        expected = reconstruction - 10 * max((total / 10).item(), free)
        assert pe.FreeBitsELBO(free).loss(model, guide) == pytest.approx(-expected.item(), **close)


def test_free_bits_have_no_gradient_below():
    model, guide = initialised(programs.local_normal)
    kl = pe.BetaELBO().terms(model, guide).shrinkage / 5
    _, free = loss_and_grads(pe.FreeBitsELBO(kl.item() + 0.1), model, guide)
    _, none = loss_and_grads(pe.BetaELBO(0.0), model, guide)
    _, paid = loss_and_grads(pe.FreeBitsELBO(kl.item() - 0.1), model, guide)
    _, full = loss_and_grads(pe.BetaELBO(1.0), model, guide)
    for name in free:
        torch.testing.assert_close(free[name], none[name])
        torch.testing.assert_close(paid[name], full[name])


def test_beta_zero_is_the_reconstruction():
    model, guide = initialised(programs.nested_plates)
    objective = pe.BetaELBO(0.0)
    loss, grads = loss_and_grads(objective, model, guide)
    assert loss == pytest.approx(-objective.last_terms.reconstruction.item(), rel=1e-12)
    assert not grads["sb"].any()  # of the prior alone


def test_the_true_elbo_is_reported_while_annealing():
    model, guide = initialised(programs.local_normal)
    objective = pe.BetaELBO(Linear(0.0, 1.0, 10))
    loss, _ = loss_and_grads(objective, model, guide)
    terms = objective.last_terms
    assert loss == pytest.approx(-terms.reconstruction.item())
    expected, _ = loss_and_grads(pe.BetaELBO(), model, guide)
    assert terms.elbo.item() == pytest.approx(-expected)
    assert not terms.elbo.requires_grad


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_betas_by_site(kl):
    """Sites that a mapping does not name keep beta = 1; schedules mix with numbers."""
    model, guide = initialised(programs.nested_plates)
    objective = pe.BetaELBO({"b": Linear(0.5, 1.0, 4), "c": 0.1}, kl=kl)
    loss, _ = loss_and_grads(objective, model, guide)
    terms = objective.last_terms
    kl = {site: value.sum().item() for site, value in terms.kl.items()}
    expected = terms.reconstruction.item() - kl["a"] - 0.5 * kl["b"] - 0.1 * kl["c"]
    assert loss == pytest.approx(-expected, rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_plain_modules_get_gradients(name):
    module = OBJECTIVES[name]()(Model(), Guide())
    x = programs.noise(5, 3)
    _, grads = of_module(module, x)
    assert all(grad.abs().sum() > 0 for grad in grads)
    objective, model, guide = OBJECTIVES[name](), module.model, module.guide
    module.zero_grad()
    pyro.set_rng_seed(1)
    objective.loss_and_grads(model, guide, x)  # no param site, gradients all the same
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("particles", [{}, {"num_particles": 3}])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_capture(name, particles):
    """make_fx captures loss and gradients in one graph that equals eager at the same seed."""
    model, guide, x = Model(), Guide(), programs.noise(5, 3)
    module = OBJECTIVES[name](**particles)(model, guide)
    loss, grads = of_module(module, x)
    module.elbo.step = 0
    captured_loss, found = captured(module, x)
    assert torch.equal(captured_loss, loss)
    for ours, eager in zip(found, grads, strict=True):
        assert torch.equal(ours, eager)


def test_swap_into_svi():
    """The same training as with Trace_ELBO at the same seed."""
    losses = {}
    for objective in (Trace_ELBO(), pe.BetaELBO(kl="sampled")):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        model, guide = programs.nested_plates()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), objective)
        losses[type(objective)] = [svi.step() for _ in range(20)]
        assert isinstance(losses[type(objective)][0], float)
    torch.testing.assert_close(*map(torch.tensor, losses.values()), rtol=1e-9, atol=1e-9)


def test_steps_count_backward_passes_alone():
    model, guide = initialised(programs.local_normal)
    objective = pe.BetaELBO(Linear(0.0, 1.0, 10), num_particles=3)
    objective.loss(model, guide)
    objective.terms(model, guide)
    objective.differentiable_loss(model, guide)
    assert objective.step == 0
    assert objective.last_terms is not None
    objective.loss_and_grads(model, guide)
    assert objective.step == 1
    objective.differentiable_loss(model, guide).backward()
    assert objective.step == 2
    module = objective(Model(), Guide())
    module(programs.noise(5, 3)).backward()
    with torch.no_grad():
        module(programs.noise(5, 3))
    assert objective.step == 3


@pytest.mark.parametrize("route", ["svi", "module"])
def test_resumed_annealing_equals_training_straight_through(route):
    def start():
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        torch.manual_seed(5)
        module = pe.BetaELBO(Linear(0.0, 1.0, 8))(Model(), Guide())
        if route == "svi":
            model, guide = programs.local_normal()
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), module.elbo)
            return module, svi, svi.step
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)

        def step():
            optimizer.zero_grad()
            loss = module(programs.noise(5, 3))
            loss.backward()
            optimizer.step()
            return loss.item()

        return module, optimizer, step

    def save(module, engine):
        optimizer = engine.optim.get_state() if route == "svi" else engine.state_dict()
        store = copy.deepcopy(pyro.get_param_store().get_state())
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        return file, copy.deepcopy(optimizer), store, torch.get_rng_state()

    _, _, step = start()
    straight = [step() for _ in range(12)]

    module, engine, step = start()
    first = [step() for _ in range(5)]
    file, optimizer, store, rng = save(module, engine)

    module, engine, step = start()
    module.load_state_dict(torch.load(file, weights_only=True))
    assert module.elbo.step == 5
    if route == "svi":
        pyro.get_param_store().set_state(store)
        engine.optim.set_state(optimizer)
    else:
        engine.load_state_dict(optimizer)
    torch.set_rng_state(rng)
    assert first + [step() for _ in range(7)] == straight


def test_objective_alone_has_a_state():
    objective = pe.BetaELBO(Linear(0.0, 1.0, 8))
    objective.step = 3
    other = pe.BetaELBO(Linear(0.0, 1.0, 8))
    other.load_state_dict(objective.state_dict())
    assert other.step == 3


def test_gradients_accumulate():
    module = pe.BetaELBO()(Model(), Guide())
    x = programs.noise(5, 3)
    for _ in range(2):
        pyro.set_rng_seed(1)
        module.elbo.loss_and_grads(module.model, module.guide, x)
    twice = [p.grad.clone() for p in module.parameters()]
    _, once = of_module(module, x)
    for a, b in zip(twice, once, strict=True):
        torch.testing.assert_close(a, 2 * b)


def test_float32_stays_float32():
    torch.set_default_dtype(torch.float32)
    for make in OBJECTIVES.values():
        loss = make()(Model(), Guide())(programs.noise(5, 3).float())
        assert loss.dtype == torch.float32
    torch.set_default_dtype(torch.float64)


def test_complaints_of_constructors():
    for make, message in [
        (lambda: pe.BetaELBO(-1.0), "beta should not be negative"),
        (lambda: pe.BetaELBO({"z": -1.0}), r"beta\['z'\] should not be negative"),
        (lambda: pe.BetaELBO(float("nan")), "beta should be finite"),
        (lambda: pe.BetaELBO("much"), "beta should be a number or a schedule"),
        (lambda: pe.BetaELBO(kl="exact"), "kl should be"),
        (lambda: pe.BetaELBO(num_particles=0), "num_particles should be at least 1"),
        (lambda: pe.CapacityELBO(-1.0), "capacity should not be negative"),
        (lambda: pe.CapacityELBO(1.0, gamma=-1.0), "gamma should not be negative"),
        (lambda: pe.FreeBitsELBO(-0.5), "free_bits should not be negative"),
        (lambda: Linear(0.0, 1.0, 0), "steps should be a whole number of at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_complaints_of_sites():
    model, guide = initialised(programs.nested_plates)
    with pytest.raises(ValueError, match=r"beta names site 'zz', but the latent sites are \['a'"):
        pe.BetaELBO({"zz": 2.0}).loss(model, guide)
    with (
        pytest.raises(ValueError, match="the model samples 'c', but the guide has no such site"),
        pytest.warns(UserWarning, match="Found vars in model but not guide"),
    ):
        pe.BetaELBO().loss(model, pyro.poutine.block(guide, hide=["c"]))


def test_one_beta_for_a_joint_guide():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    joint = AutoMultivariateNormal(model)
    joint()
    key = "_AutoMultivariateNormal_latent"
    terms = pe.BetaELBO().terms(model, joint)
    assert terms.groups == {key: ("a", "b")}
    assert set(terms.log_q) == {key, "a", "b"}
    with pytest.raises(ValueError, match="share one KL"):
        pe.BetaELBO({"a": 2.0}).loss(model, joint)
    values = []
    for beta in (2.0, {"a": 2.0, "b": 2.0}, {key: 2.0}):
        pyro.set_rng_seed(0)
        values.append(pe.BetaELBO(beta).loss(model, joint))
    assert values[0] == values[1] == values[2]
    each = AutoNormal(model)
    each()
    assert pe.BetaELBO({"a": 2.0}).terms(model, each).groups == {"a": ("a",), "b": ("b",)}


def test_analytic_complains_where_it_cannot():
    for name, message in [
        ("other_order", "the guide samples after it"),
        ("scaled_and_masked", "scale or mask it differently"),
        ("factors", "derived from an auxiliary site"),
        ("parameters_only", "none is known that is valid for Delta"),
    ]:
        model, guide = initialised(programs.REPARAMETERISED[name])
        with pytest.raises(ValueError, match=message):
            pe.BetaELBO(kl="analytic").loss(model, guide)


WRONG = {
    "detached": lambda terms: terms.elbo.detach(),
    "number": lambda terms: terms.elbo.item(),
    "tuple": lambda terms: (terms.elbo, terms.shrinkage),
    "nothing": lambda terms: None,
    "vector": lambda terms: terms.kl["z"],
    "vector of one": lambda terms: terms.elbo.reshape(1),
    "other tensor": lambda terms: torch.tensor(float(terms.elbo)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_an_objective_returns_is_checked(name):
    class Wrong(pe.TermsELBO):
        def objective(self, terms):
            return WRONG[name](terms)

    model, guide, x = Model(), Guide(), torch.randn(5, 3)
    for step in (Wrong().loss_and_grads, Wrong().differentiable_loss):
        with pytest.raises(ValueError, match=r"Wrong\.objective (should return|returned)"):
            step(model, guide, x)
    if name not in ("detached", "other tensor"):
        with pytest.raises(ValueError, match=r"Wrong\.objective should return a scalar"):
            Wrong().loss(model, guide, x)
    frozen = pe.BetaELBO()
    frozen.loss_and_grads(model.requires_grad_(False), guide.requires_grad_(False), x)
    assert frozen.step == 0


IGNORED = {
    "tail_adaptive_beta": -0.5,
    "jit_options": {"check_trace": True},
    "ignore_jit_warnings": True,
    "strict_enumeration_warning": True,
}


class HalfTheKL(pe.TermsELBO):
    def objective(self, terms):
        return terms.reconstruction - 0.5 * terms.shrinkage


@pytest.mark.parametrize("name", IGNORED)
def test_options_of_pyro_that_do_nothing_are_named(name):
    for make in (pe.BetaELBO, partial(pe.RenyiELBO, 0.5, num_particles=3), HalfTheKL):
        with pytest.warns(pe.IgnoredOptionWarning, match=name):
            make(**{name: IGNORED[name]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pe.BetaELBO(
            tail_adaptive_beta=-1.0,
            jit_options=None,
            ignore_jit_warnings=False,
            strict_enumeration_warning=False,
            retain_graph=True,
            vectorize_particles=True,
            num_particles=2,
        )


def test_states_of_pyros_objectives():
    """They have no step: ours stays as it is. Theirs take ours but for the step."""
    ours, theirs = pe.BetaELBO()(Model(), Guide()), Trace_ELBO()(Model(), Guide())
    ours.elbo.step = 7
    ours.load_state_dict(theirs.state_dict())
    assert ours.elbo.step == 7
    torch.testing.assert_close(ours.model.decoder.weight, theirs.model.decoder.weight)
    keys = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert keys.unexpected_keys == ["elbo._extra_state"] and not keys.missing_keys
    for damaged in ({}, {"step": -1}, {"step": "3"}, {"step": True}, None, 3, torch.zeros(3)):
        state = {**ours.state_dict(), "elbo._extra_state": damaged}
        with pytest.raises(ValueError, match=r"BetaELBO should be \{'step': a whole number\}"):
            ours.load_state_dict(state)
    assert ours.elbo.step == 7


def test_non_finite_warning_names_the_site():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("bad", z * float("nan"))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(False):
        for evaluate in (pe.BetaELBO().loss, pe.BetaELBO().loss_and_grads):
            with pytest.warns(pe.NonFiniteWarning, match="factors of bad"):
                evaluate(model, guide)


def test_particles_after_the_first_call_and_deeper_models():
    shallow, deep = initialised(programs.local_normal), initialised(programs.nested_plates)
    objective = pe.BetaELBO(vectorize_particles=True)
    objective.loss(*shallow)
    objective.num_particles = 4
    assert objective.terms(*shallow).kl["z"].shape == (4, 5)
    with pytest.raises(ValueError, match="max_plate_nesting=1 was given or found"):
        objective.terms(*deep)
    with pytest.raises(ValueError, match="max_plate_nesting=1 was given or found"):
        pe.BetaELBO(max_plate_nesting=1).terms(*deep)


def test_programs_run_once():
    """No hidden run eats random numbers unless particles or enumeration need the nesting."""
    calls = []
    model, guide = initialised(programs.local_normal)
    counted = lambda: calls.append(1) or model()  # noqa: E731
    objective = pe.BetaELBO()
    objective.loss_and_grads(counted, guide)
    objective.loss_and_grads(counted, guide)
    assert len(calls) == 2


def test_own_objective():
    class OnlyEntropy(pe.TermsELBO):
        def objective(self, terms):
            return terms.energy + 2.0 * terms.entropy

    model, guide = initialised(programs.local_normal)
    objective = OnlyEntropy(kl="sampled")
    loss, _ = loss_and_grads(objective, model, guide)
    terms = objective.last_terms
    assert loss == pytest.approx(-(terms.energy + 2 * terms.entropy).item())
    with pytest.raises(TypeError, match="abstract"):
        pe.TermsELBO()


def test_looped_particles_free_their_graphs_where_the_objective_is_additive():
    """Gradients and terms are those of all particles at once; graphs alive at a time: one."""
    model, guide = initialised(programs.nested_plates)
    alive, most = [], []

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            alive.append(1)
            most.append(len(alive))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.pop()
            return grad

    class Together(pe.BetaELBO):
        additive = False

    def watched():
        pyro.factor("watch", 0.0 * Kept.apply(pyro.param("la")))
        model()

    apart = pe.BetaELBO(0.5, num_particles=4)
    ours = loss_and_grads(apart, watched, guide)
    assert max(most) == 1
    assert apart.step == 1
    most.clear()
    together = Together(0.5, num_particles=4)
    assert_same(ours, loss_and_grads(together, watched, guide))
    assert max(most) == 4
    for site, kl in together.last_terms.kl.items():
        torch.testing.assert_close(apart.last_terms.kl[site], kl)
    assert apart.last_terms.num_particles == 4


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_in_inference_mode_leaves_training_alone(name):
    module, x = OBJECTIVES[name]()(Model(), Guide()), programs.noise(5, 3)
    with torch.inference_mode():
        module(x)
        module.elbo.loss(module.model, module.guide, x)
    assert module.elbo.step == 0
    _, grads = of_module(module, x)
    assert all(grad.isfinite().all() for grad in grads)


def test_a_wrong_shape_under_particles_is_called_that():
    def program(obs=None):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0), obs=obs)

    objective = pe.BetaELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ValueError, match="Shape mismatch inside plate"):
        objective.loss(program, program)
