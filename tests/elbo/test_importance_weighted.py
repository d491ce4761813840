"""Bounds of several draws: their values by hand, their gradients against exact ones, plates."""

import copy
import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import conjugate, programs
from helpers.losses import PARTICLES, assert_same, captured, initialised, loss_and_grads, of_module
from helpers.oracles import gradients, mean_and_stderr, rows
from helpers.vae import Guide, Model
from pyro import poutine
from pyro.distributions.testing.rejection_gamma import RejectionGamma
from pyro.infer import SVI, RenyiELBO, config_enumerate

import pyproelbo as pe
from pyproelbo.guides import gmm as gmm_guides
from pyproelbo.guides import lgssm as lgssm_guides
from pyproelbo.guides.ppca import Diagonal, Exact, FullCovariance
from pyproelbo.guides.vae import Diagonal as VAEGuide
from pyproelbo.models.gmm import GMM
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vae import VAE

FORMS = {
    "looped": {"max_plate_nesting": 1},
    "vectorised": {"vectorize_particles": True, "max_plate_nesting": 1},
}
MANY = FORMS["vectorised"]
OBJECTIVES = {
    "standard": lambda k, **kw: pe.ImportanceWeightedELBO(k, **kw),
    "path": lambda k, **kw: pe.ImportanceWeightedELBO(k, "path", **kw),
    "doubly": lambda k, **kw: pe.ImportanceWeightedELBO(k, "doubly_reparameterised", **kw),
    "Renyi": lambda k, **kw: pe.RenyiELBO(0.5, k, **kw),
    "Renyi, doubly": lambda k, **kw: pe.RenyiELBO(0.5, k, "doubly_reparameterised", **kw),
    "wake": lambda k, **kw: pe.ReweightedWakeSleepELBO(k, **kw),
    "wake, doubly": lambda k, **kw: pe.ReweightedWakeSleepELBO(k, "doubly_reparameterised", **kw),
}


def log_mean_exp(x):
    return x.exp().mean(0).log()


def ppca(size=None):
    model = PPCA(2, 4, size)
    return model, Diagonal.optimum(model)


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [None, 30])
def test_values_by_hand(size, form):
    """The logarithm is of the mean of the unscaled weights of each datum; the sum is scaled."""
    (model, guide), x = ppca(size), rows(6, 4)
    objective = pe.ImportanceWeightedELBO(5, **FORMS[form])
    pyro.set_rng_seed(1)
    terms = objective.terms(model, guide, x)
    scale = 1 if size is None else 5
    log_w = (terms.log_likelihood["x"] + terms.log_prior["z"] - terms.log_q["z"]) / scale
    assert log_w.shape == (5, 6)
    for name, expected in [
        ("standard", log_mean_exp(log_w)),
        ("doubly", log_mean_exp(log_w)),
        ("wake", log_mean_exp(log_w)),
        ("Renyi", 2 * log_mean_exp(log_w / 2)),
    ]:
        objective = OBJECTIVES[name](5, **FORMS[form])
        pyro.set_rng_seed(1)
        loss = objective.differentiable_loss(model, guide, x)
        assert loss.item() == pytest.approx(-scale * expected.sum().item(), rel=1e-12)
        assert objective.last_terms.elbo.item() == pytest.approx(
            scale * log_w.mean(0).sum().item(), rel=1e-12
        )


PROGRAMS = [
    "local_normal", "nested_plates", "factors", "other_order", "imputed", "reparameterised",
    "parameters_only", "nothing_latent", "sequential", "full_covariance", "huge_plate",
    *programs.AUTO,
]  # fmt: skip


@pytest.mark.parametrize(
    ("program", "name"),
    [("local_normal", "Renyi"), *((program, "standard") for program in PROGRAMS)],
)
def test_one_draw_is_the_elbo(program, name):
    """Value and gradient, with global latents and without, whatever the guide is."""
    model, guide = initialised(programs.REPARAMETERISED[program])
    elbo = loss_and_grads(pe.BetaELBO(kl="sampled"), model, guide)
    assert_same(loss_and_grads(OBJECTIVES[name](1), model, guide), elbo)


def test_equals_the_evidence():
    (model, guide), x = ppca(20), rows(5, 4)
    result = pe.evidence(model, guide, x, num_samples=40, chunk=40, seed=2)
    torch.manual_seed(2)
    loss = pe.ImportanceWeightedELBO(40, vectorize_particles=True).loss(model, guide, x)
    assert loss == pytest.approx(-4 * result.log_evidence.sum().item(), rel=1e-12)


def test_rises_to_the_evidence():
    (model, guide), x = ppca(), rows(1, 4)
    truth, n, means = model.log_evidence(x).item(), 4000, []
    for k in (1, 5, 25, 200):
        objective = pe.ImportanceWeightedELBO(k, **MANY)
        terms = objective.terms(model, guide, x.expand(n, 4))
        log_w = terms.log_likelihood["x"] + terms.log_prior["z"] - terms.log_q["z"]
        bound = log_mean_exp(log_w.reshape(k, n))
        assert objective.objective(terms).item() == pytest.approx(bound.sum().item())
        mean, error = mean_and_stderr(bound)
        means.append(mean.item())
        assert mean < truth + 4 * error
    assert means == sorted(means) and truth - means[0] > 20 * (truth - means[-1])
    assert abs(means[-1] - truth) < 4 * error + bound.var() / 2  # the bias is half the variance


def test_renyi_between_its_limits():
    """Falling in alpha at any draws; 0 is the importance-weighted bound, 1 the ELBO."""
    (model, guide), x = ppca(), rows(5, 4)

    def value(objective):
        return loss_and_grads(objective, lambda: model(x), lambda: guide(x))[0]

    losses = [value(pe.RenyiELBO(alpha, 6, **MANY)) for alpha in (-2.0, 0.0, 0.5, 1.0, 2.0, 30.0)]
    assert losses == sorted(losses)
    assert losses[1] == value(pe.ImportanceWeightedELBO(6, **MANY))
    elbo = value(pe.BetaELBO(kl="sampled", num_particles=6, **MANY))
    assert losses[3] == pytest.approx(elbo, rel=1e-12)
    near = value(pe.RenyiELBO(1 - 1e-7, 6, **MANY))
    assert near == pytest.approx(elbo, rel=1e-5)


@pytest.mark.parametrize("particles", ["looped", "vectorised"])
@pytest.mark.parametrize("alpha", [0.0, 0.7, -1.0])
@pytest.mark.parametrize("program", ["local_normal", "nested_plates", "AutoMultivariateNormal"])
def test_equals_pyros_bound_without_subsampling(program, alpha, particles):
    """With a latent for each datum, and with one of all data."""
    model, guide = initialised(programs.REPARAMETERISED[program])
    kwargs = PARTICLES[particles]
    ours = loss_and_grads(pe.RenyiELBO(alpha, **kwargs), model, guide)
    assert_same(ours, loss_and_grads(RenyiELBO(alpha, **kwargs), model, guide))


# --- plates ------------------------------------------------------------------------------------


def given_noise(noise):
    """A Normal whose draws are loc + scale * noise, for noise of the shape of all draws."""

    class Given(dist.Normal):
        def rsample(self, sample_shape=()):
            assert not sample_shape
            return self.loc + self.scale * noise

    return Given


@pytest.mark.parametrize("name", OBJECTIVES)
def test_subsamples_have_no_bias(name):
    """The mean over all subsamples, the noise of each datum fixed, is the bound of all data."""
    N, K = 5, 3
    x, noise = rows(N), rows(K, N)
    w, q = torch.tensor(0.7, requires_grad=True), torch.tensor(0.4, requires_grad=True)

    def value_and_gradient(index):
        Given = given_noise(noise[:, index])
        plate = pyro.plate("data", N, subsample=index, dim=-1)

        def model():
            with plate:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(w * z, 1.0), obs=x[index])

        def guide():
            with plate:
                pyro.sample("z", Given(q * x[index], (q - 1).exp()))

        loss = OBJECTIVES[name](K, **MANY).differentiable_loss(model, guide)
        return torch.stack([loss, *torch.autograd.grad(loss, (w, q))]).detach()

    every = value_and_gradient(torch.arange(N))
    subsets = itertools.combinations(range(N), 2)
    parts = [value_and_gradient(torch.tensor(subset)) for subset in subsets]
    torch.testing.assert_close(torch.stack(parts).mean(0), every)


def test_a_bound_where_pyro_has_none():
    """With N / B inside of the logarithm the value is far above log p(x)."""
    x = rows(8)
    truth = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x).sum().item()

    def program(size, observed):
        def run(index):
            with pyro.plate("data", 8, subsample=index):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                if observed:
                    pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

        return run

    def mean_of(objective, size):
        pair = program(size, True), program(size, False)
        draws = [-objective.loss(*pair, torch.randperm(8)[:size]) for _ in range(200)]
        return mean_and_stderr(torch.tensor(draws))

    ours, theirs = pe.ImportanceWeightedELBO(16, **MANY), RenyiELBO(0.0, 16, **MANY)
    (part, error), (whole, its_error) = mean_of(ours, 2), mean_of(ours, 8)
    assert abs(part - whole) < 4 * math.hypot(error, its_error) and whole < truth
    assert mean_of(theirs, 2)[0] > truth + 4


def test_looped_draws_see_one_subsample():
    """With the posterior as guide each weight is p(x_n): those of one datum, or the sum is none."""
    x = rows(6)

    def model():
        with pyro.plate("data", 6, subsample_size=2) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide():
        with pyro.plate("data", 6, subsample_size=2) as i:
            pyro.sample("z", dist.Normal(x[i] / 2, math.sqrt(0.5)))

    log_p = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)
    possible = torch.stack([3 * log_p[list(i)].sum() for i in itertools.combinations(range(6), 2)])
    seen = set()
    for kwargs in (*FORMS.values(), {}):
        objective = pe.ImportanceWeightedELBO(4, **kwargs)
        for _ in range(10):
            distance, which = (possible + objective.loss(model, guide)).abs().min(0)
            assert distance < 1e-10
            seen.add(which.item())
    assert len(seen) > 3


def test_inner_plates_belong_to_their_datum():
    """Several latents and a mask: the weight of a datum has all that is in its row."""
    model, guide = (partial(conjugate.groups, rows(3, 2), q) for q in (0, 1))
    objective = pe.ImportanceWeightedELBO(7, vectorize_particles=True, max_plate_nesting=2)
    pyro.set_rng_seed(1)
    terms = objective.terms(model, guide)
    rest = terms.log_likelihood["x"] + terms.log_prior["z"] - terms.log_q["z"]
    log_w = (terms.log_prior["c"] - terms.log_q["c"]).squeeze(-1) + rest.sum(-1)
    pyro.set_rng_seed(1)
    loss = objective.loss(model, guide)
    assert loss == pytest.approx(-log_mean_exp(log_w).sum().item(), rel=1e-12)


def test_a_plate_is_named_where_several_are_around_all():
    def program(q):
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.3 * q, 1.0 + q))
            if not q:
                pyro.sample("x", dist.Normal(z, 1.0), obs=rows(3, 2))

    pair, options = (lambda: program(0), lambda: program(1)), {"vectorize_particles": True}
    with pytest.raises(ValueError, match=r"plates \['columns', 'rows'\]: name the one"):
        pe.ImportanceWeightedELBO(3).loss(*pair)
    for plate, dim in (("rows", -1), ("columns", -2)):
        objective = pe.ImportanceWeightedELBO(3, plate=plate, max_plate_nesting=2, **options)
        pyro.set_rng_seed(1)
        terms = objective.terms(*pair)
        log_w = terms.log_likelihood["x"] + terms.log_prior["z"] - terms.log_q["z"]
        pyro.set_rng_seed(1)
        expected = -log_mean_exp(log_w.sum(dim)).sum().item()
        assert objective.loss(*pair) == pytest.approx(expected, rel=1e-12)


def test_a_latent_summed_out_by_the_model():
    """The weights are of what is left: z beside a mixture that the model enumerates."""
    x, K = rows(4), 6

    def model(enumerated=True):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if enumerated:
                infer = {"enumerate": "parallel"}
                k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer=infer)
                pyro.sample("x", dist.Normal(z + 2.0 * k, 1.0), obs=x)
            else:
                parts = dist.Normal(torch.stack([z, z + 2.0], -1), 1.0)
                mixture = dist.Categorical(torch.tensor([0.3, 0.7]))
                pyro.sample("x", dist.MixtureSameFamily(mixture, parts), obs=x)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(pyro.param("q", torch.tensor(0.2)), 1.5))

    guide()
    objective = pe.ImportanceWeightedELBO(K, **MANY)
    ours = loss_and_grads(objective, model, guide)
    assert_same(ours, loss_and_grads(objective, lambda: model(False), guide))


# --- gradients ---------------------------------------------------------------------------------


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


# --- where the gradient is known ---------------------------------------------------------------

NO_NOISE = ("path", "doubly", "Renyi, doubly", "wake, doubly")


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
    model, x, K = GMM(3, 2, size=20), rows(5, 2), 4
    guide = gmm_guides.Softmax(3, 2, size=20)
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


# --- as objectives -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"), [("doubly", "looped"), *((name, "vectorised") for name in OBJECTIVES)]
)
def test_capture(name, form):
    """Loss and gradients in one graph that equals eager at the same seed, without a host sync."""
    module, x = OBJECTIVES[name](3, **FORMS[form])(Model(), Guide()), programs.noise(5, 3)
    loss, grads = of_module(module, x)
    captured_loss, found = captured(module, x)
    assert torch.equal(captured_loss, loss)
    for ours, eager in zip(found, grads, strict=True):
        assert torch.equal(ours, eager) and eager.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_prior_of_the_guides_own_encoder(name, form):
    """SVI's step and the module's have one gradient, of pseudo-inputs and of encoder."""
    x = rows(8, 5)
    guide = VAEGuide(2, 5, (4,))
    prior = pe.VampPrior(guide.posterior, 3, pe.priors.RowsOf(x))
    model = VAE(2, 5, (4,), prior=prior)
    objective, found = OBJECTIVES[name](3, **FORMS[form]), []
    for backward in (
        lambda: objective.loss_and_grads(model, guide, x),
        lambda: objective(model, guide)(x).backward(),
    ):
        pyro.set_rng_seed(1)
        objective.zero_grad()
        for module in (model, guide):
            module.zero_grad()
        backward()
        found.append([p.grad.clone() for m in (model, guide) for p in m.parameters()])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
        assert expected.any()
    assert objective.step == 2


@pytest.mark.parametrize("name", OBJECTIVES)
def test_trains_in_svi(name):
    model, guide = PPCA(1, 3), Diagonal(1, 3)
    torch.manual_seed(0)
    x = PPCA(1, 3)(num=50).detach()
    objective = OBJECTIVES[name](5, **MANY)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), objective)
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 30 and objective.step == 60
    elbo = objective.last_terms.elbo
    assert not elbo.requires_grad and elbo < -losses[-1]
    objective.loss(model, guide, x)
    assert objective.step == 60


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_stays_float32(name):
    torch.set_default_dtype(torch.float32)
    module = OBJECTIVES[name](3)(Model(), Guide())
    torch.set_default_dtype(torch.float64)
    assert module(programs.noise(5, 3).float()).dtype == torch.float32


def test_bad_input():
    def discrete(x, q=False):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))
            if not q:
                pyro.sample("x", dist.Normal(k, 1.0), obs=x[:, 0])

    def of_all_data(x, q=False):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            if not q:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def pair(program):
        return program, lambda x: program(x, True)

    (model, guide), x = ppca(), rows(4, 4)
    for make, message in [
        (lambda: pe.ImportanceWeightedELBO(3, "best"), "gradient should be one of"),
        (lambda: pe.ReweightedWakeSleepELBO(3, "path"), "gradient should be one of"),
        (lambda: pe.ReweightedWakeSleepELBO(1), "num_particles should be at least 2"),
        (lambda: pe.ImportanceWeightedELBO(0), "num_particles should be at least 1"),
        (lambda: pe.RenyiELBO(math.inf, 3), "alpha should be a finite number"),
        (lambda: pe.RenyiELBO(math.nan, 3), "alpha should be a finite number"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    enumerated = config_enumerate(lambda x: discrete(x, True))
    scaled = poutine.scale(model, scale=2.0)
    for programs_, kwargs, message in [
        (pair(of_all_data), {}, "site 'x' has its density scaled by 5.0, but no plate"),
        (pair(of_all_data), {"plate": "data"}, "site 'm' is in no plate"),
        ((discrete, enumerated), {}, "enumerates"),
        ((scaled, guide), {}, r"scaled by 2.0, where plate 'data' gives 1.0"),
        ((model, guide), {"plate": "rows"}, "not in 'rows'"),
    ]:
        for name in ("standard", "wake"):
            with pytest.raises(ValueError, match=message):
                OBJECTIVES[name](3, **kwargs).loss(*programs_, x)
    for name in NO_NOISE:
        with pytest.raises(ValueError, match="the draws of site 'k' are no differentiable"):
            OBJECTIVES[name](3).differentiable_loss(*pair(discrete), x)

    def rejected(x, q=False):
        with pyro.plate("data", len(x)):
            concentration = pyro.param("c", torch.tensor(2.0)) if q else torch.tensor(2.0)
            pyro.sample("r", RejectionGamma(concentration, torch.tensor(1.0)))

    for name in ("standard", "doubly"):
        with pytest.raises(ValueError, match=r"in part.*use ReweightedWakeSleepELBO$"):
            OBJECTIVES[name](3).differentiable_loss(*pair(rejected), x)
    OBJECTIVES["wake"](3).differentiable_loss(*pair(rejected), x).backward()


def test_copies_after_a_step():
    (model, guide), x = ppca(), rows(4, 4)
    for make in OBJECTIVES.values():
        objective = make(3)
        objective.differentiable_loss(model, guide, x).backward()
        copied = copy.deepcopy(objective)
        assert copied.step == 1 and math.isfinite(copied.loss_and_grads(model, guide, x))
