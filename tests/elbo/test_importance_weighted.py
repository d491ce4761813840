"""Bounds of several draws: their values by hand, plates, and as objectives."""

import copy
import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import conjugate, programs
from helpers.draws import Drawn, Kept
from helpers.losses import PARTICLES, assert_same, captured, initialised, loss_and_grads, of_module
from helpers.oracles import mean_and_stderr, rows
from helpers.several_draws import FORMS, MANY, NO_NOISE, OBJECTIVES, given_noise
from helpers.vae import Guide, Model
from pyro import poutine
from pyro.distributions.testing.rejection_gamma import RejectionGamma
from pyro.infer import SVI, RenyiELBO, config_enumerate

import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.guides.vae import Diagonal as VAEGuide
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vae import VAE


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
    """At the draws of the report, which makes them in its own way."""
    (model, guide), x, kept = ppca(20), rows(5, 4), Kept()
    result = pe.evidence(model, kept(guide), x, num_samples=40, chunk=40, seed=2)
    z = iter(kept.draws[-1].reshape(40, 5, 2))
    bound = pe.ImportanceWeightedELBO(40, max_plate_nesting=1)
    loss = bound.loss(model, Drawn(lambda q: next(z))(guide), x)
    assert next(z, None) is None
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


# --- plates --------------------------------------------------------------------------------------


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


# --- as objectives -----------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
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
        with pytest.raises(ValueError, match="the draws of site 'k' are not, or only in part"):
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
