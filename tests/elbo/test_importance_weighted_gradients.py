"""Gradients of bounds of several draws: against exact ones, and the phases of wake-sleep."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from helpers.losses import assert_same, initialised, loss_and_grads
from helpers.oracles import gradients, mean_and_stderr, rows
from helpers.several_draws import FORMS, MANY, NO_NOISE, OBJECTIVES, given_noise
from pyro import poutine

import pyproelbo as pe
from pyproelbo.guides import gmm as gmm_guides
from pyproelbo.guides import lgssm as lgssm_guides
from pyproelbo.guides.ppca import Exact, FullCovariance
from pyproelbo.models.gmm import GMM
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.ppca import PPCA


def nodes(n, dims):
    """A grid for expectations over ``dims`` independent N(0, 1): points (dims, M), weights (M,)."""
    offset = torch.arange(1.0, n).sqrt()
    points, vectors = torch.linalg.eigh(offset.diag(1) + offset.diag(-1))
    grid = torch.cartesian_prod(*[points] * dims).reshape(-1, dims)
    weights = torch.cartesian_prod(*[vectors[0].square()] * dims).reshape(-1, dims).prod(1)
    return grid.mT, weights


def one_level(noise, p):
    """q(z | x) beside a prior that has one of its parameters, as a VampPrior has."""
    Given, plate = given_noise(noise), pyro.plate("data", noise.shape[-1])

    def model():
        with plate:
            z = pyro.sample("z", dist.Normal(p["loc"].tanh(), p["prior"].exp()))
            pyro.sample("x", dist.Normal(p["w"] * z.sin() + z, 0.8), obs=torch.tensor(1.3))

    def guide():
        with plate:
            pyro.sample("z", Given(p["loc"], p["spread"].exp()))

    return model, guide


def of_a_draw(noise, p):
    """A latent that the guide makes of a draw, by a function that has a parameter."""
    Given, plate = given_noise(noise), pyro.plate("data", noise.shape[-1])

    def model():
        with plate:
            z = pyro.sample("z", dist.Normal(p["prior"], 1.0))
            pyro.sample("x", dist.Normal(p["w"] * z, 0.8), obs=torch.tensor(1.3))

    def guide():
        with plate:
            u = pyro.sample("u", Given(p["loc"], p["spread"].exp()), infer={"is_auxiliary": True})
            slope = 1 + 0.5 * p["w"] * (1 - u.tanh().square())
            pyro.sample("z", dist.Delta(u + 0.5 * p["w"] * u.tanh(), -slope.log()))

    return model, guide


def exact_gradients(program, objective, n=100):
    """The mean of the gradient over all noise of two draws.

    Each node of the quadrature is a row, with parameters of its own.
    """
    noise, weights = nodes(n, 2)
    start = {"loc": 0.4, "spread": -0.2, "prior": 0.1, "w": 0.6}
    p = {name: torch.full_like(weights, value).requires_grad_() for name, value in start.items()}
    loss = objective.differentiable_loss(*program(noise, p))
    each = torch.autograd.grad(-loss, list(p.values()))
    return torch.stack([(grad * weights).sum() for grad in each])


CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # of the quadrature


@pytest.mark.parametrize("program", [one_level, of_a_draw])
def test_means_of_gradients(program):
    """Those of the bounds agree; "path" is that of the bound plus that of wake-sleep."""
    for alpha in (0.0, 0.5, 1.0):
        expected = exact_gradients(program, pe.RenyiELBO(alpha, 2, **MANY))
        assert (expected.abs() > 1e-3).all()
        doubly = exact_gradients(program, pe.RenyiELBO(alpha, 2, "doubly_reparameterised", **MANY))
        torch.testing.assert_close(doubly, expected, **CLOSE)
        path = exact_gradients(program, pe.RenyiELBO(alpha, 2, "path", **MANY))
        if alpha == 1:
            torch.testing.assert_close(path, expected, **CLOSE)
        if alpha == 0:
            wake = exact_gradients(program, pe.ReweightedWakeSleepELBO(2, **MANY))
            doubly = exact_gradients(
                program, pe.ReweightedWakeSleepELBO(2, "doubly_reparameterised", **MANY)
            )
            torch.testing.assert_close(doubly, wake, **CLOSE)
            spread = slice(1, 2)  # of the guide alone
            torch.testing.assert_close(path[spread], (expected + wake)[spread], **CLOSE)
            torch.testing.assert_close(path[2:], expected[2:], **CLOSE)
            assert ((path - expected)[spread].abs() > 1e-2).all()


def gradient_draws(program, objective, start, num=30_000, seed=1):
    """Independent draws of the gradient: each row has its own copy of the parameters."""
    p = {n: torch.tensor(v).repeat(num, 1).requires_grad_() for n, v in start.items()}
    pyro.set_rng_seed(seed)
    loss = objective.differentiable_loss(*program(p, num))
    grads = torch.autograd.grad(-loss, list(p.values()))
    return torch.cat([grad.reshape(num, -1) for grad in grads], 1)


def two_levels(p, num):
    """q(z1 | z2, x) with parameters of both levels in both."""

    def model():
        with pyro.plate("data", num):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(p["w"][:, 0] * z2, 0.7))
            pyro.sample("x", dist.Normal(z1 + z2.sin(), 0.5), obs=torch.tensor(0.8))

    def guide():
        a, b, c = p["q"].unbind(-1)
        with pyro.plate("data", num):
            z2 = pyro.sample("z2", dist.Normal(a, b.exp()))
            pyro.sample("z1", dist.Normal(a + c * z2, (b + 0.3 * z2.tanh()).exp()))

    return model, guide


TWO_LEVELS = {"q": [0.3, -0.4, 0.5], "w": [0.6]}


@pytest.mark.parametrize("pair", [("standard", "doubly"), ("Renyi", "Renyi, doubly"),
                                  ("wake", "wake, doubly"), ("standard", "path")])  # fmt: skip
def test_draws_given_draws(pair):
    """Two levels: the same mean, by the same noise; of the bounds less variance in the guide."""
    K = 1 if "path" in pair else 3
    first, second = (
        gradient_draws(two_levels, OBJECTIVES[name](K, **MANY), TWO_LEVELS) for name in pair
    )
    difference, error = mean_and_stderr(first - second)
    assert (difference.abs() <= 4.5 * error + 1e-12).all()
    assert "wake" in pair or (second[:, :3].var(0) < first[:, :3].var(0)).all()
    assert (first.mean(0).abs() > 10 * error).all()  # else there would be nothing to compare


def categorical(p, num):
    """A discrete draw, one given it that has a gradient, and one given that."""

    def model():
        with pyro.plate("data", num):
            k = pyro.sample("k", dist.Categorical(p["w"].softmax(-1)))
            z = pyro.sample("z", dist.Normal(k - 1.0, 1.0))
            b = pyro.sample("b", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z + b, 0.7), obs=torch.tensor(0.9))

    def guide():
        with pyro.plate("data", num):
            k = pyro.sample("k", dist.Categorical(p["k"].softmax(-1)))
            z = pyro.sample("z", dist.Normal(p["q"][:, 0] + 0.5 * k, 0.8))
            pyro.sample("b", dist.Bernoulli((p["q"][:, 1] * z).sigmoid()))

    return model, guide


CATEGORICAL = {"k": [0.2, -0.3, 0.4], "q": [-0.2, 0.7], "w": [0.1, 0.3, -0.2]}


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_draws_without_a_gradient(K, alpha):
    """Against the gradient of the bound with all draws summed or integrated over."""
    objective = pe.RenyiELBO(alpha, K, **MANY)
    mean, error = mean_and_stderr(gradient_draws(categorical, objective, CATEGORICAL, 100_000))
    flat = {n: torch.tensor(v).requires_grad_() for n, v in CATEGORICAL.items()}
    exact = torch.autograd.grad(exact_bound(flat, K, alpha), list(flat.values()))
    assert ((mean - torch.cat(exact)).abs() < 4.5 * error).all() and (error < 0.02).all()


def exact_bound(p, K, alpha, n=20):
    """The mean over all draws of ``categorical``: a sum over k and b, a quadrature over z."""
    noise, weights = nodes(n, 1)
    k, b, e = (x.flatten() for x in torch.meshgrid(
        torch.arange(3.0), torch.arange(2.0), noise[0], indexing="ij"))  # fmt: skip
    z = p["q"][0] + 0.5 * k + 0.8 * e
    on = dist.Bernoulli((p["q"][1] * z).sigmoid()).log_prob(b)
    log_q = p["k"].log_softmax(-1)[k.long()] + on
    probability = log_q.exp() * weights.repeat(6)
    log_w = (
        p["w"].log_softmax(-1)[k.long()] + dist.Normal(k - 1.0, 1.0).log_prob(z)
        + dist.Bernoulli(0.4).log_prob(b) + dist.Normal(z + b, 0.7).log_prob(torch.tensor(0.9))
        - log_q - dist.Normal(0.0, 0.8).log_prob(0.8 * e)
    )  # fmt: skip
    w = ((1 - alpha) * log_w).exp()
    mean_w, joint = w, probability
    for i in range(2, K + 1):
        mean_w = (mean_w.unsqueeze(-1) * (i - 1) + w) / i
        joint = joint.unsqueeze(-1) * probability
    return (joint * mean_w.log()).sum() / (1 - alpha)


# --- where the gradient is known -----------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_no_noise_where_the_guide_is_the_posterior(form):
    """There the gradient of its parameters is zero at every draw; the standard one is not."""
    model, x = PPCA(2, 4), rows(6, 4)
    guide = FullCovariance.optimum(model)
    for name in OBJECTIVES:
        loss = OBJECTIVES[name](4, **FORMS[form]).differentiable_loss(model, guide, x)
        found = torch.cat([grad.flatten() for grad in gradients(loss, guide)])
        assert (found.abs().max() < 1e-10) == (name in NO_NOISE), name


@pytest.mark.parametrize("name", NO_NOISE)
def test_parameters_that_the_guide_has_from_the_model(name):
    """Where q is computed from the model's parameters, these count in p alone."""
    model, x = PPCA(2, 4), rows(6, 4)
    found = []
    for guide in (Exact(model), FullCovariance.optimum(model)):
        pyro.set_rng_seed(1)
        loss = OBJECTIVES[name](4, **MANY).differentiable_loss(model, guide, x)
        found.append(gradients(loss, model))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_chains(name):
    """Each step of the posterior is drawn given the one before; no noise there, either."""
    model = LGSSM(2, 3)
    copied = copy.deepcopy(model)  # has the guide's parameters
    x = model(num=3, num_steps=4).detach(), torch.tensor([4, 1, 3])
    loss = OBJECTIVES[name](3, **MANY).differentiable_loss(model, lgssm_guides.Exact(copied), *x)
    assert loss.item() == pytest.approx(-model.log_evidence(*x).sum().item())
    found = torch.cat([grad.flatten() for grad in gradients(loss, copied)])
    assert (found.abs().max() < 1e-10) == (name in NO_NOISE)


def test_no_draws_that_have_a_gradient():
    """Parameters that the guide passes on as latents belong to the target."""
    for program in ("parameters_only", "AutoDelta", "nothing_latent"):
        model, guide = initialised(programs.REPARAMETERISED[program])
        expected = loss_and_grads(pe.BetaELBO(kl="sampled"), model, guide)
        for make in OBJECTIVES.values():
            assert_same(loss_and_grads(make(3), model, guide), expected)


AUTO = ("AutoNormal", "AutoStructured", "AutoGaussian", "AutoNormalMessenger")


@pytest.mark.slow
@pytest.mark.parametrize("auto", AUTO)
def test_autoguides(auto):
    """Latents that Pyro derives from auxiliary draws: the same mean by the same noise."""
    model, guide = initialised(programs.AUTO[auto])
    differences = []
    for seed in range(25):
        (a, first), (b, second) = (
            loss_and_grads(OBJECTIVES[name](3), model, guide, seed)
            for name in ("standard", "doubly")
        )
        assert a == pytest.approx(b, rel=1e-12)
        differences.append(torch.cat([(first[n] - second[n]).flatten() for n in first]))
    mean, error = mean_and_stderr(torch.stack(differences))
    assert (mean.abs() <= 4.5 * error + 1e-12).all() and error.max() > 0


# --- wake-sleep --------------------------------------------------------------------------------


def test_wake_phases_by_hand():
    """Discrete latents: weights are of each datum, and neither they nor draws have a gradient."""
    model, x, K = GMM(3, 2, dataset_size=20), rows(5, 2), 4
    guide = gmm_guides.Softmax(3, 2, dataset_size=20)
    objective = pe.ReweightedWakeSleepELBO(K, **MANY)
    pyro.set_rng_seed(1)
    loss = objective.differentiable_loss(model, guide, x)
    pyro.set_rng_seed(1)
    z = poutine.trace(pyro.plate("draws", K, dim=-2)(guide)).get_trace(x).nodes["z"]["value"]
    log_p = model.logits.log_softmax(-1)[z] + model.decode(z).log_prob(x)
    log_q = guide.posterior(x).log_prob(z)
    weights = (log_p - log_q).softmax(0).detach()
    expected = -4 * (log_p - log_q).exp().mean(0).log().sum()
    assert loss.item() == pytest.approx(expected.item())
    surrogate = -4 * (weights * (log_p + log_q)).sum()
    for module in (model, guide):
        for ours, by_hand in zip(
            gradients(loss, module), gradients(surrogate, module), strict=True
        ):
            torch.testing.assert_close(ours, by_hand)


def test_what_cannot_be_adds_nothing():
    """A draw of density zero under the model has no weight, and no gradient."""
    logits = torch.zeros(2, requires_grad=True)

    def model():
        with pyro.plate("data", 50):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.factor("possible", torch.where(k == 1, 0.0, -math.inf))

    def guide():
        with pyro.plate("data", 50):
            pyro.sample("k", dist.Bernoulli(logits.softmax(0)[0]))

    for objective in (
        pe.ReweightedWakeSleepELBO(20, **MANY),
        pe.ImportanceWeightedELBO(20, **MANY),
    ):
        loss = objective.differentiable_loss(model, guide)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and grad.isfinite().all() and grad[0] < 0
