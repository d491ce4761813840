"""The particle filter's bound: against Kalman, the ELBO, and the importance-weighted bound."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.losses import assert_same, loss_and_grads
from helpers.oracles import mean_and_stderr, rows
from pyro import poutine
from pyro.infer import SVI

import pyproelbo as pe
from pyproelbo.elbo.smc import _ancestors
from pyproelbo.guides import dmm, lgssm, vrnn
from pyproelbo.models.dmm import DMM
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.vrnn import VRNN
from pyproelbo.sequences import (
    Autoregressive,
    Emission,
    IndependentSteps,
    LinearGaussianChain,
    MarkovChain,
)

B, T = 3, 6


def sequences(model):
    torch.manual_seed(1)
    return model(num=B, num_steps=T).detach(), torch.tensor([6, 2, 4])


def linear(size=None):
    torch.manual_seed(0)
    model = LGSSM(2, 3, dataset_size=size)
    return model, lgssm.ExactFilter(model)


def as_autoregressive(model):
    """The same LGSSM, written with a state that remembers z_{t-1} and whether there is one."""

    def step(s):
        z, started = s.split([2, 1], -1)
        prior, first = model.prior(1).steps(torch.zeros(1, 2)), started == 0
        rest = dist.MultivariateNormal(z @ model.F.mT, model.Q)
        loc = torch.where(first, prior.loc[0], rest.loc)
        L = torch.where(first.unsqueeze(-1), prior.scale_tril[0], rest.scale_tril)
        return dist.MultivariateNormal(loc, scale_tril=L)

    def advance(s, z):
        return torch.cat([z, torch.ones_like(s[..., :1])], -1)

    def program(x, lengths):
        data = model.read(x, lengths)
        with pyro.plate("data", len(x)):
            prior = Autoregressive(torch.zeros(3), step, advance, x.shape[1], mask=data.own)
            z = pyro.sample("z", prior)
            emission = Emission(
                lambda z, s: model.decode(z), z, states_of=prior, mask=data.observed
            )
            pyro.sample("x", emission, obs=x)

    return program


@pytest.mark.slow
@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("resample_below", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", ["Markov", "autoregressive"])
def test_no_bias(form, resample_below, particles):
    """The mean of the estimates is Kalman's evidence, with lengths."""
    model, guide = linear()
    x, lengths = sequences(model)
    truth = model.log_evidence(x, lengths).detach()
    program = model if form == "Markov" else as_autoregressive(model)
    objective = pe.ParticleFilterELBO(particles, resample_below)
    n = 3000
    result = objective.filter(program, guide, x.repeat(n, 1, 1), lengths.repeat(n))
    log_z = result.log_evidence.reshape(n, B)
    mean, error = mean_and_stderr((log_z - truth).exp())
    assert ((mean - 1).abs() < 4 * error).all() and (error < 0.2).all()
    assert (log_z.mean(0) < truth).all()


@pytest.mark.parametrize("form", ["Markov", "autoregressive"])
def test_resampling_lowers_the_variance_where_sequences_are_long(form):
    """By a factor of 3 to 5 in 100 steps: that of log p(x), of 200 filters."""
    model, guide = linear()
    torch.manual_seed(1)
    x = model(num=1, num_steps=100).detach().repeat(200, 1, 1)
    lengths = torch.full((200,), 100)
    program = model if form == "Markov" else as_autoregressive(model)
    always, never = (
        pe.ParticleFilterELBO(20, below).filter(program, guide, x, lengths).log_evidence.var()
        for below in (1.0, 0.0)
    )
    assert always < never / 2, (always, never)


def test_tightens_with_particles():
    model, guide = linear()
    x, lengths = sequences(model)
    x, lengths = x.repeat(300, 1, 1), lengths.repeat(300)
    gaps = [
        (model.log_evidence(x, lengths) - pe.ParticleFilterELBO(k).filter(
            model, guide, x, lengths).log_evidence).mean().item()
        for k in (1, 4, 16, 64)
    ]  # fmt: skip
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] > 0


PAIRS = {
    "LGSSM": lambda: (LGSSM(2, 3), lgssm.Filtering(2, 3)),
    "DMM": lambda: (DMM(2, 3, (4,), 5), dmm.Smoothing(2, 3, 4)),
    "DMM, mean field": lambda: (DMM(2, 3, (4,), 5), dmm.MeanField(2, 3, 4)),
    "VRNN": lambda: (lambda model: (model, vrnn.Filtering(model, 4)))(VRNN(2, 3, 4, (5,))),
    "scaled": lambda: (LGSSM(2, 3, dataset_size=30), lgssm.Filtering(2, 3, dataset_size=30)),
}


def pair(name):
    torch.manual_seed(0)
    model, guide = PAIRS[name]()
    x = (rows(B, T, 3) > 0).to(torch.get_default_dtype())
    return model, guide, (x, torch.tensor([6, 2, 4]))


def gradients(objective, model, guide, args):
    pyro.set_rng_seed(3)
    loss = objective.differentiable_loss(model, guide, *args)
    names, parameters = zip(*(p for m in (model, guide) for p in m.named_parameters()), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), {
        f"{i} {n}": torch.zeros(()) if g is None else g
        for i, (n, g) in enumerate(zip(names, grads, strict=True))
    }


@pytest.fixture
def _step_by_step(monkeypatch):
    """Linear chains are drawn as particles are."""
    monkeypatch.setattr(LinearGaussianChain, "_draw", MarkovChain._draw)


@pytest.mark.usefixtures("_step_by_step")
@pytest.mark.parametrize("name", PAIRS)
def test_one_particle_is_the_elbo(name):
    """Value and gradient at the same seed."""
    model, guide, args = pair(name)
    ours = gradients(pe.ParticleFilterELBO(1), model, guide, args)
    if name == "DMM, mean field":  # drawn in another order
        assert math.isfinite(ours[0])
        return
    elbo = pe.SequentialELBO(kl="sampled", max_plate_nesting=1)
    assert_same(ours, gradients(elbo, model, guide, args))


@pytest.mark.usefixtures("_step_by_step")
@pytest.mark.parametrize("name", [name for name in PAIRS if name != "DMM, mean field"])
def test_without_resampling_it_is_the_importance_weighted_bound(name):
    model, guide, args = pair(name)
    K, scale = 4, 10.0 if name == "scaled" else 1.0
    pyro.set_rng_seed(3)
    elbo = pe.SequentialELBO(
        kl="sampled", max_plate_nesting=1, num_particles=K, vectorize_particles=True
    )
    terms = elbo.terms(model, guide, *args)
    log_weights = (terms.reconstruction_by_time - terms.kl_by_time).sum(0) / scale
    expected = (log_weights.logsumexp(0) - math.log(K)).sum() * scale
    loss, _ = gradients(pe.ParticleFilterELBO(K, 0.0), model, guide, args)
    assert loss == pytest.approx(-expected.item(), rel=1e-10)


@pytest.mark.parametrize(("gradient", "resample_below"), [
    ("unbiased", 0.5), ("unbiased", 1.0), ("biased", 1.0),
])  # fmt: skip
def test_gradient_of_the_evidence_has_no_bias(gradient, resample_below):
    """The mean of grad Z = Z grad log Z is grad p(x), with lengths; "biased" has another."""
    model, guide = linear()
    x, lengths = sequences(model)
    truth, n = model.log_evidence(x, lengths), 600
    parameters = [p for p in model.parameters() if p.requires_grad]

    def flat(value):
        grads = torch.autograd.grad(value, parameters)
        return torch.cat([grad.flatten() for grad in grads])

    objective = pe.ParticleFilterELBO(4, resample_below, gradient)
    exact, draws = flat(truth.sum()), []
    many = x.repeat(n, 1, 1), lengths.repeat(n)
    for seed in range(20):
        pyro.set_rng_seed(seed)
        terms = training_terms(objective, model, guide, many)
        log_z = terms.log_evidence["z"].reshape(n, B)
        weight = (log_z - truth).exp().detach()
        draws.append(flat((weight * log_z).sum() / n))
    mean, error = mean_and_stderr(torch.stack(draws))
    off = (mean - exact).abs()
    assert error.max() < 0.05
    assert (off <= 4 * error + 1e-12).all() if gradient == "unbiased" else (off > 8 * error).any()


def training_terms(objective, model, guide, args):
    (terms,) = objective._particles(model, guide, args, {})
    return terms


def test_gradient_with_more_particles():
    """It comes near that of log p(x) if "unbiased" alone; both have one value."""
    model, _ = linear()
    torch.manual_seed(1)
    x = model(num=1, num_steps=12).detach()
    guide = lgssm.ExactFilter(copy.deepcopy(model))  # so that the gradient is the model's alone
    (exact,) = torch.autograd.grad(model.log_evidence(x).sum(), model.F)
    error, losses = {}, {}
    for gradient in ("biased", "unbiased"):
        for num in (4, 128):
            pyro.set_rng_seed(0)
            objective = pe.ParticleFilterELBO(num, gradient=gradient)
            n = 25_600 // num
            loss = objective.differentiable_loss(model, guide, x.repeat(n, 1, 1)) / n
            (grad,) = torch.autograd.grad(-loss, model.F)
            error[gradient, num], losses[gradient, num] = (grad - exact).norm(), loss.item()
    assert losses["biased", 4] == losses["unbiased", 4]
    assert losses["biased", 128] == losses["unbiased", 128]
    assert error["unbiased", 128] < error["biased", 128] / 3
    assert error["unbiased", 128] < error["unbiased", 4] / 3


def test_nothing_resampled_has_one_gradient():
    model, guide, args = pair("LGSSM")
    for particles, resample_below in [(1, 0.5), (4, 0.0)]:
        ours = pe.ParticleFilterELBO(particles, resample_below, "unbiased")
        theirs = pe.ParticleFilterELBO(particles, resample_below)
        assert_same(gradients(ours, model, guide, args), gradients(theirs, model, guide, args))


def test_exact_guide_has_no_gap():
    model, _ = linear()
    x, lengths = sequences(model)
    guide, truth = lgssm.Exact(model), model.log_evidence(x, lengths)
    result = pe.ParticleFilterELBO(5, 0.0).filter(model, guide, x, lengths)
    torch.testing.assert_close(result.log_evidence, truth)
    torch.testing.assert_close(result.effective_sample_size[-1], torch.full((B,), 5.0))


def test_what_the_steps_add():
    model, guide = linear()
    x, lengths = sequences(model)
    x[1, 2:] = torch.nan  # padding
    result = pe.ParticleFilterELBO(7).filter(model, guide, x, lengths)
    torch.testing.assert_close(result.log_evidence_by_time.sum(0), result.log_evidence)
    sizes = result.effective_sample_size
    assert sizes.shape == (T, B) and (sizes >= 1 - 1e-9).all() and (sizes <= 7 + 1e-9).all()
    past = torch.arange(T)[:, None] >= lengths
    assert not result.log_evidence_by_time[past].abs().gt(1e-12).any()
    objective = pe.ParticleFilterELBO(7)
    objective.differentiable_loss(model, guide, x, lengths).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert objective.step == 1
    terms = objective.last_terms
    assert terms.elbo == terms.log_evidence["z"].sum() and not terms.elbo.requires_grad
    assert terms.factor == terms.reconstruction == terms.shrinkage == 0 and not terms.factors


def test_systematic_resampling():
    """Each particle has K w descendants on average, and never one more or less than that."""
    weights = torch.tensor([[0.5, 0.1, 0.15, 0.25], [0.0, 0.0, 1.0, 0.0]]).mT
    poor = torch.tensor([True, True])
    counts = torch.stack([
        torch.stack([_ancestors(weights.log(), poor)[:, i].bincount(minlength=4) for i in (0, 1)])
        for _ in range(2000)
    ]).double()  # fmt: skip
    expected = 4 * weights.mT
    assert ((counts - expected).abs() < 1).all()
    mean, error = mean_and_stderr(counts)
    assert ((mean - expected).abs() <= 4 * error).all()
    kept = _ancestors(weights.log(), torch.tensor([False, True]))
    assert kept[:, 0].tolist() == [0, 1, 2, 3] and kept[:, 1].tolist() == [2] * 4


def hidden_markov():
    logits = torch.tensor([[1.0, -1.0], [-0.5, 1.5]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", MarkovChain(
                dist.OneHotCategorical(logits=torch.zeros(2)),
                lambda z: dist.OneHotCategorical(logits=z @ logits), 3,
            ))  # fmt: skip
            pyro.sample("x", Emission(lambda z: dist.Normal(z[..., 0], 0.5), z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            logits = torch.stack([x, -x], -1)
            pyro.sample("z", IndependentSteps(dist.OneHotCategorical(logits=logits)))

    return model, guide, logits


def test_discrete_steps():
    """No bias either; but no gradient."""
    model, guide, logits = hidden_markov()
    x = rows(1, 3)
    states = torch.cartesian_prod(*[torch.arange(2)] * 3)
    z = torch.nn.functional.one_hot(states).to(x)
    log_p = -math.log(2) + (z[:, :-1] @ logits.log_softmax(-1) * z[:, 1:]).sum((1, 2))
    truth = (log_p + dist.Normal(z[..., 0], 0.5).log_prob(x).sum(-1)).logsumexp(0)
    result = pe.ParticleFilterELBO(4).filter(model, guide, x.repeat(20_000, 1))
    mean, error = mean_and_stderr((result.log_evidence - truth).exp())
    assert (mean - 1).abs() < 4 * error and error < 0.02
    with pytest.raises(ValueError, match="cannot be reparameterised"):
        pe.ParticleFilterELBO(4).differentiable_loss(model, guide, x)


def test_beliefs_of_a_model_with_actions():
    """Means and covariances of the weighted particles are Kalman's, and their weights sum to 1."""
    torch.manual_seed(0)
    model, K, runs = LGSSM(2, 3, num_inputs=1), 1000, 100
    u = torch.randn(1, T, 1)
    x = model(inputs=u).detach()
    exact = model.filter(x, inputs=u)
    x, u = x.expand(runs, -1, -1), u.expand(runs, -1, -1)
    args, kwargs = (model, lgssm.ExactFilter(model), x), {"inputs": u}
    z, weights = pe.ParticleFilterELBO(K).beliefs(*args, **kwargs)
    assert z.shape == (T, K, runs, 2) and weights.shape == (T, K, runs)
    assert not weights.requires_grad
    torch.testing.assert_close(weights.sum(1), torch.ones(T, runs))
    mean, error = mean_and_stderr((weights.unsqueeze(-1) * z).sum(1).movedim(1, 0))
    assert ((mean - exact.loc[0]).abs() < 4 * error).all() and (error < 0.01).all()
    off = z - exact.loc[0, :, None, None]
    squares = (weights[..., None, None] * off[..., None] * off.unsqueeze(-2)).sum(1)
    covariance, error = mean_and_stderr(squares.movedim(1, 0))
    assert ((covariance - exact.covariance[0]).abs() < 4 * error).all()
    assert pe.ParticleFilterELBO(K).filter(*args, **kwargs).beliefs is None


def test_beliefs_of_discrete_states():
    """Of each state its probability given the past and the present, by the forward algorithm."""
    model, guide, logits = hidden_markov()
    x, runs = rows(1, 3), 400
    z, weights = pe.ParticleFilterELBO(200).beliefs(model, guide, x.expand(runs, -1))
    found, error = mean_and_stderr((weights.unsqueeze(-1) * z).sum(1).movedim(1, 0))
    likelihood = dist.Normal(torch.tensor([1.0, 0.0]), 0.5).log_prob(x[0].unsqueeze(-1)).exp()
    belief, exact = torch.full((2,), 0.5), []
    for t in range(3):
        belief = belief if t == 0 else belief @ logits.softmax(-1)
        belief = belief * likelihood[t]
        belief = belief / belief.sum()
        exact.append(belief)
    assert ((found - torch.stack(exact)).abs() < 4 * error + 1e-12).all() and error.max() < 0.01


def test_trains_in_svi():
    model, _ = linear()
    x, lengths = sequences(model)
    guide = lgssm.Filtering(2, 3)
    objective = pe.ParticleFilterELBO(4, max_plate_nesting=1)
    svi = SVI(lambda *args: poutine.block(model, hide_types=["param"])(*args), guide,
              pyro.optim.Adam({"lr": 0.05}), objective)  # fmt: skip
    losses = [svi.step(x, lengths) for _ in range(80)]
    assert sum(losses[-10:]) < sum(losses[:10]) and objective.step == 80


def test_bad_input():
    model, guide, args = pair("LGSSM")
    x = args[0]

    def plain(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Normal(torch.zeros(T, 2), 1.0).to_event(2))
            pyro.sample("x", IndependentSteps(dist.Normal(z, 1.0).to_event(1)), obs=x[..., :2])

    def not_emitted(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", model.prior(T))
            pyro.sample("x", IndependentSteps(model.decode(z)), obs=x)

    def two(x):
        with pyro.plate("data", B):
            pyro.sample("z", model.prior(T))
            pyro.sample("w", model.prior(T))

    def outer_mask(x):
        with poutine.mask(mask=torch.tensor([True, False, True])):
            model(x)

    for kwargs, message in [
        ({"particles": 0}, "particles should be a positive"),
        ({"resample_below": 1.5}, "resample_below should be from 0 to 1"),
        ({"num_particles": 3}, "called particles here"),
        ({"gradient": "reinforce"}, "gradient should be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            pe.ParticleFilterELBO(**kwargs)
    for programs, message in [
        ((plain, guide), "should be a whole sequence"),
        ((not_emitted, guide), r"should have the distribution Emission\(emit, z\)"),
        ((two, two), "takes one latent site"),
        ((outer_mask, guide), "masked from outside"),
        ((poutine.scale(model, scale=2.0), guide), "the plates and the scale"),
    ]:
        with pytest.raises(ValueError, match=message):
            pe.ParticleFilterELBO(2).loss(*programs, x)


def test_neither_looks_at_values():
    """As an nn.Module it waits for no device, whatever is resampled."""
    model, guide, args = pair("LGSSM")
    objective = pe.ParticleFilterELBO(3)
    loss, grads = loss_and_grads(objective, lambda: model(*args), lambda: guide(*args))
    assert math.isfinite(loss) and grads
