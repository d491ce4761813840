import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.losses import captured, of_module
from helpers.oracles import mean_and_stderr, rows
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch.autograd import gradcheck
from torch.distributions import MixtureSameFamily, constraints
from torch.func import functional_call

import pyproelbo as pe
from pyproelbo.datasets import Minibatches, digits
from pyproelbo.guides.vae import Diagonal, FullCovariance
from pyproelbo.models.vae import VAE, BernoulliLikelihood
from pyproelbo.priors import (
    AggregatePosterior,
    GaussianMixture,
    Mixture,
    MomentsOf,
    RandomInputs,
    RowsOf,
    StandardNormal,
    usage,
)

D, K, Z = 6, 5, 2  # features, components, latents
IMAGES = constraints.unit_interval


def images(num=20):
    return rows(num, D).sigmoid()


def make(prior="vamp", guide_type=Diagonal, num=20, size=None, **options):
    """A model with a prior, and the guide that it is made of."""
    guide = guide_type(Z, D, (4,), dataset_size=size)
    x = images(num)
    made = {
        "standard": lambda: StandardNormal(Z),
        "gaussian mixture": lambda: GaussianMixture(K, Z, **options),
        "vamp": lambda: pe.VampPrior(guide.posterior, K, RowsOf(x), constraint=IMAGES, **options),
        "aggregate": lambda: AggregatePosterior(guide.posterior, x),
    }
    model = VAE(Z, D, (4,), BernoulliLikelihood(), made[prior](), dataset_size=size)
    return model, guide, x.round()


PRIORS = ["standard", "gaussian mixture", "vamp", "aggregate"]
COMPONENTS = {
    "normal": lambda: dist.Normal(rows(K, 3), rows(K, 3).exp()).to_event(1),
    "a number": lambda: dist.Normal(rows(K), rows(K).exp()),
    "images": lambda: dist.Normal(rows(K, 3, 2), rows(K, 3, 2).exp()).to_event(2),
    "correlated": lambda: dist.MultivariateNormal(rows(K, 2), torch.eye(2) + 0.5),
    "positive": lambda: dist.Gamma(rows(K, 3).exp(), rows(K, 3).exp()).to_event(1),
    "counts": lambda: dist.Poisson(rows(K, 3).exp()).to_event(1),
    "log-normal": lambda: dist.LogNormal(rows(K, 3), 1.0).to_event(1),
}


# --- the mixture -------------------------------------------------------------------------------


def test_a_mixture_worked_by_hand():
    # (N(z; 0, I) + 3 N(z; (1, 1), 4 I)) / 4 at z = (1, 0), in two dimensions
    loc, scale = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    mixture = Mixture(dist.Normal(loc, scale).to_event(1), torch.tensor([0.25, 0.75]).log())
    first = math.exp(-0.5) / (2 * math.pi)
    second = math.exp(-0.5 * 1 / 4) / (2 * math.pi * 4)
    expected = math.log(0.25 * first + 0.75 * second)
    z = torch.tensor([1.0, 0.0])
    assert mixture.log_prob(z).item() == pytest.approx(expected, abs=1e-14)
    share = 0.25 * first / (0.25 * first + 0.75 * second)
    assert mixture.responsibilities(z)[0].item() == pytest.approx(share, abs=1e-14)
    torch.testing.assert_close(mixture.mean, torch.tensor([0.75, 0.75]))
    # E[z^2] - E[z]^2 of each: 0.25 * 1 + 0.75 * (4 + 1) - 0.75^2
    torch.testing.assert_close(mixture.variance, torch.full((2,), 4.0 - 0.5625))


@pytest.mark.parametrize("weights", ["equal", "own"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_mixture_against_torch(name, weights):
    components = COMPONENTS[name]()
    log_weights = None if weights == "equal" else rows(K).log_softmax(0)
    mixture = Mixture(components, log_weights)
    selector = torch.distributions.Categorical(logits=mixture.log_weights)
    theirs = MixtureSameFamily(selector, components)
    z = mixture.sample((4, 7))
    assert z.shape == (4, 7, *components.event_shape)
    assert mixture.has_rsample is False and not z.requires_grad
    torch.testing.assert_close(mixture.log_prob(z), theirs.log_prob(z))
    torch.testing.assert_close(mixture.mean, theirs.mean)
    torch.testing.assert_close(mixture.variance, theirs.variance)
    each = torch.stack([components.log_prob(z[i, j]) for i in range(4) for j in range(7)])
    r = (each + mixture.log_weights).softmax(-1).reshape(4, 7, K)
    torch.testing.assert_close(mixture.responsibilities(z), r)


@pytest.mark.parametrize("name", COMPONENTS)
def test_samples_have_the_mixtures_moments(name):
    mixture = Mixture(COMPONENTS[name](), rows(K).log_softmax(0))
    z = mixture.sample((20_000,))
    mean, stderr = mean_and_stderr(z)
    assert ((mean - mixture.mean).abs() < 4 * stderr).all()
    low, high = mixture.responsibilities(z).mean(0), mixture.log_weights.exp()
    stderr = mixture.responsibilities(z).std(0) / len(z) ** 0.5
    assert ((low - high).abs() < 4 * stderr).all()


@pytest.mark.parametrize("name", COMPONENTS)
def test_batches_of_a_mixture_are_the_same_mixture(name):
    mixture = Mixture(COMPONENTS[name]())
    wide = mixture.expand((3, 2)).expand((4, 3, 2))
    assert wide.batch_shape == (4, 3, 2) and wide.event_shape == mixture.event_shape
    z = wide.sample((5,))
    assert z.shape == (5, 4, 3, 2, *mixture.event_shape)
    torch.testing.assert_close(wide.log_prob(z), mixture.log_prob(z))
    one = mixture.sample()
    assert wide.log_prob(one).shape == wide.batch_shape
    assert wide.mean.shape == wide.shape()
    assert len(z.flatten(0, 3).unique(dim=0)) > 1


def test_samples_of_a_mixture_take_the_generator():
    mixture = Mixture(COMPONENTS["normal"]())
    pyro.set_rng_seed(3)
    first = mixture.sample((4,))
    pyro.set_rng_seed(3)
    assert mixture.sample((4,)).equal(first)


# --- priors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_takes_the_place_of_any_other(prior):
    model, guide, x = make(prior)
    p = model.prior()
    assert p.batch_shape == () and p.event_shape == (Z,)
    assert model(num=7).shape == (7, D)
    for kwargs in ({}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}):
        results = []
        for objective in (pe.BetaELBO, Trace_ELBO):
            both = torch.nn.ModuleList([model, guide])
            both.zero_grad()
            pyro.set_rng_seed(5)
            extra = {"kl": "sampled"} if objective is pe.BetaELBO else {}
            loss = objective(max_plate_nesting=1, **extra, **kwargs).loss_and_grads(model, guide, x)
            results.append([torch.tensor(loss), *(p.grad for p in both.parameters())])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prior", PRIORS[1:])
@pytest.mark.parametrize("guide_type", [Diagonal, FullCovariance])
def test_module_route_and_vectorised_loss_have_the_same_gradients(prior, guide_type):
    model, guide, x = make(prior, guide_type)
    objective = pe.BetaELBO(max_plate_nesting=1, num_particles=3)
    loss = objective(model, guide)
    pyro.set_rng_seed(5)
    loss(x).backward()
    expected = [p.grad.clone() for p in loss.parameters()]
    assert all(g.abs().max() > 0 for g in expected)
    loss.zero_grad()
    pyro.set_rng_seed(5)
    objective.loss_and_grads(model, guide, x)
    torch.testing.assert_close([p.grad for p in loss.parameters()], expected)


class Calls:
    """An encoder that counts how often it is asked."""

    def __init__(self, encoder):
        self.encoder, self.num = encoder, 0

    def __call__(self, u):
        self.num += 1
        return self.encoder(u)


class NotAdditive(pe.BetaELBO):
    additive = False


@pytest.mark.parametrize("objective", [pe.BetaELBO, NotAdditive])
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("retain_graph", [None, True])
def test_the_encoder_sees_the_pseudo_inputs_once_a_step(objective, vectorize, retain_graph):
    guide, x = Diagonal(Z, D, (4,)), images().round()
    encoder = Calls(guide.posterior)
    model = VAE(Z, D, (4,), BernoulliLikelihood(), pe.VampPrior(encoder, K, RowsOf(x)))
    options = {"num_particles": 4, "vectorize_particles": vectorize, "retain_graph": retain_graph}
    objective = objective(max_plate_nesting=1, **options)
    for step in range(1, 4):
        objective.loss_and_grads(model, guide, x)
        assert encoder.num == step + vectorize  # at the first one two draws at once are tried
    objective(model, guide)(x).backward()
    objective.loss(model, guide, x)
    assert encoder.num == 5 + vectorize
    pe.evidence(model, guide, x, num_samples=6, batch_size=3, chunk=1, progress=False)
    assert encoder.num == 7 + vectorize  # once more to see what a row is
    model(), model()
    assert encoder.num == 9 + vectorize


@pytest.mark.slow
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("particles", [1, 2])
def test_capture(prior, particles):
    """make_fx captures loss and gradients in one graph, equal to eager, without a wait."""
    model, guide, x = make(prior)
    module = pe.BetaELBO(max_plate_nesting=1, num_particles=particles)(model, guide)
    torch.testing.assert_close(captured(module, x), of_module(module, x), rtol=1e-12, atol=1e-12)


def test_parameters_are_registered_once():
    model, guide, _ = make(learned_weights=True)
    names = {name for name, _ in model.named_parameters() if not name.startswith("decoder")}
    assert names == {"prior.unconstrained", "prior.logits"}
    assert not {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}
    together, apart = copy.deepcopy((model, guide)), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in together[1].parameters():
            parameter.add_(1.0)
    z = rows(3, Z)
    assert not together[0].prior().log_prob(z).allclose(model.prior().log_prob(z))
    assert apart.prior().log_prob(z).equal(model.prior().log_prob(z))

    fresh_model, fresh_guide, _ = make(learned_weights=True)
    fresh_model.load_state_dict(model.state_dict())
    fresh_guide.load_state_dict(guide.state_dict())
    assert fresh_model.prior().log_prob(z).equal(model.prior().log_prob(z))


@pytest.mark.parametrize("prior", PRIORS[1:])
def test_svi_trains_prior_and_encoder(prior):
    options = {"learned_weights": True} if prior != "aggregate" else {}
    model, guide, x = make(prior, **options)
    before = copy.deepcopy([model.state_dict(), guide.state_dict()])
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pe.BetaELBO(max_plate_nesting=1))
    losses = [svi.step(x) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    for state, module in zip(before, (model, guide), strict=True):
        for name, value in module.state_dict().items():
            assert not value.equal(state[name]), name
    if prior == "vamp":
        u = model.prior.pseudo_inputs
        assert ((u > 0) & (u < 1)).all()


def test_functional_programs():
    """A prior in a plain function, with the encoder's parameters in Pyro's store."""
    x = rows(8, 3)

    def encode(u):
        w = pyro.param("w", lambda: rows(3, Z))
        return dist.Normal(u @ w, 1.0).to_event(1)

    prior = pe.VampPrior(encode, 4, MomentsOf(x))

    def guide():
        with pyro.plate("data", 8):
            pyro.sample("z", encode(x))

    def model():
        pyro.module("prior", prior)
        with pyro.plate("data", 8):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z @ torch.ones(Z, 3), 1.0).to_event(1), obs=x)

    before = prior.unconstrained.clone()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pe.BetaELBO(num_particles=2))
    losses = [svi.step() for _ in range(20)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert not prior.unconstrained.equal(before)
    assert not pyro.param("w").equal(rows(3, Z))


def test_nested_plates():
    """z for each of 4 x 3 cells, half of the outer rows: each cell counts with its own density."""
    x, encoder = rows(4, 3, D), Diagonal(Z, D)
    prior = pe.VampPrior(encoder.posterior, K, MomentsOf(x.flatten(0, 1)), learned_weights=True)

    class Nested(PyroModule):
        def __init__(self):
            super().__init__("nested")
            self.prior = prior

        def forward(self, guided=None):
            inner = pyro.plate("inner", 3, dim=-1)
            outer = pyro.plate("outer", 8, subsample=torch.arange(4), dim=-2)
            with outer, inner:
                return pyro.sample("z", self.prior() if guided is None else guided)

    model = Nested()
    for kwargs in ({}, {"num_particles": 5, "vectorize_particles": True}):
        objective = pe.BetaELBO(max_plate_nesting=2, **kwargs)
        terms = objective.terms(model, lambda: model(encoder.posterior(x)))
        particles = (5,) if kwargs else ()
        assert terms.log_prior["z"].shape == (*particles, 4, 3)
        z = terms.latents[0]["z"].value
        expected = 2.0 * MixtureSameFamily(  # the plate's scale, 8 / 4
            torch.distributions.Categorical(logits=prior.logits), prior().components
        ).log_prob(z).reshape(*particles, 4, 3)
        torch.testing.assert_close(terms.log_prior["z"], expected)
        q = 2.0 * encoder.posterior(x).log_prob(z).reshape(*particles, 4, 3)
        torch.testing.assert_close(terms.kl["z"], q - expected)


@pytest.mark.parametrize("guide_type", [Diagonal, FullCovariance])
def test_gradients_by_finite_differences(guide_type):
    guide, z = guide_type(Z, D, (4,)), rows(3, Z).requires_grad_()
    prior = pe.VampPrior(
        guide.posterior, K, RandomInputs((D,), 0.5, 0.1), constraint=IMAGES, learned_weights=True
    )
    both = torch.nn.ModuleDict({"prior": prior, "guide": guide})
    names, values = zip(*both.named_parameters(), strict=True)

    class LogProb(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.both = both

        def forward(self, z):
            return prior().log_prob(z)

    def log_prob(z, *values):
        state = {f"both.{n}": value for n, value in zip(names, values, strict=True)}
        return functional_call(LogProb(), state, (z,))

    assert gradcheck(log_prob, (z, *values))


# --- limits ------------------------------------------------------------------------------------


def test_one_component_is_the_posterior_of_one_input():
    guide = Diagonal(Z, D)
    prior = pe.VampPrior(guide.posterior, 1, RandomInputs((D,)), learned_weights=True)
    z = rows(7, Z)
    expected = guide.posterior(prior.pseudo_inputs[0]).log_prob(z)
    torch.testing.assert_close(prior().log_prob(z), expected)
    torch.testing.assert_close(prior().responsibilities(z), torch.ones(7, 1))


def test_all_data_as_pseudo_inputs_are_the_aggregate_posterior():
    guide, x, z = Diagonal(Z, D), rows(30, D), rows(7, Z)
    q = guide.posterior(x).base_dist
    expected = pe.log_aggregate_posterior(z, q.loc, q.scale)
    everything = pe.VampPrior(guide.posterior, 30, RowsOf(x))
    torch.testing.assert_close(everything().log_prob(z), expected)
    torch.testing.assert_close(AggregatePosterior(guide.posterior, x)().log_prob(z), expected)


def test_marginal_kl_falls_to_zero_as_the_inputs_become_all_data():
    """At the aggregate posterior log p(z) = log q(z): of KL only I(n; z) is left."""
    x = rows(40, D)
    guide = Diagonal(Z, D)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.mul_(3.0)
    results = []
    for k in (1, 4, 13, 40):
        prior = pe.VampPrior(guide.posterior, k, lambda num: x[:num])
        model = VAE(Z, D, prior=prior)
        results.append(pe.surgery(model, guide, x, num_samples=50, progress=False))
    marginal = [result.marginal_kl for result in results]
    assert marginal == sorted(marginal, reverse=True)
    assert marginal[0] > 1.0 and abs(marginal[-1]) < 1e-10
    for result in results:
        whole = result.mutual_information + result.marginal_kl
        assert result.average_kl == pytest.approx(whole, abs=1e-10)
        assert result.total_correlation is not None and result.dimension_wise_kl is None
        assert result.mutual_information == pytest.approx(
            results[0].mutual_information,
            abs=4 * (result.stderr["mutual_information"] + results[0].stderr["mutual_information"]),
        )


# --- pseudo-inputs -----------------------------------------------------------------------------


def test_inits():
    x = rows(50, D) * 3 + 1
    chosen = RowsOf(x)(50)
    assert chosen.sort(0).values.equal(x.sort(0).values)
    assert not chosen.equal(x)
    many = MomentsOf(x)(20_000)
    torch.testing.assert_close(many.mean(0), x.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(many.std(0), x.std(0, correction=0), atol=0.1, rtol=0)
    assert RandomInputs((2, 3, 4), 5.0, 0.0)(7).equal(torch.full((7, 2, 3, 4), 5.0))


def test_pseudo_inputs_of_black_and_white_images_can_move():
    u = pe.VampPrior(Diagonal(Z, D).posterior, 5, lambda n: images(n).round(), constraint=IMAGES)
    torch.testing.assert_close(u.pseudo_inputs, images(5).round().clamp(0.05, 0.95))
    (grad,) = torch.autograd.grad(u.pseudo_inputs.sum(), u.unconstrained)
    assert (grad > 0.04).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_components": 0}, "num_components should be a positive whole number, got 0"),
        ({"num_components": 2.0}, "num_components should be a positive whole number"),
        ({"init": lambda num: rows(num + 1, D)}, r"init should return 5 inputs, .* got \(6, 6\)"),
        ({"init": lambda num: rows(num, D) * torch.nan}, "init should return finite inputs"),
        ({"constraint": IMAGES}, "init should return finite inputs that satisfy"),
        (
            {"init": lambda num: torch.zeros(num, D), "constraint": constraints.nonnegative},
            "on the boundary of",
        ),
        ({"init": RowsOf(rows(4, D))}, "num_components=5 is more than the 4 data"),
    ],
)
def test_bad_vamp_priors(options, match):
    options = {"num_components": 5, "init": RandomInputs((D,))} | options
    with pytest.raises(ValueError, match=match):
        pe.VampPrior(Diagonal(Z, D).posterior, **options)


def test_bad_encoders():
    prior = pe.VampPrior(lambda u: dist.Normal(u, 1.0), 5, RandomInputs((D,)))
    with pytest.raises(ValueError, match=r"encoder should return .* batch shape \(5,\)"):
        prior()
    prior = pe.VampPrior(
        lambda u: dist.Normal(u * torch.nan, 1.0).to_event(1), 5, RowsOf(rows(5, 2))
    )
    with pyro.validation_enabled(False):
        p = prior()
    with pytest.raises(ValueError, match="loc should be finite"):
        p.log_prob(rows(3, 2))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: Mixture(dist.Normal(rows(2, 3), 1.0)),
            r"components should have batch shape \(K,\)",
        ),
        (
            lambda: Mixture(dist.Normal(rows(2), 1.0), rows(3)),
            "log_weights should have shape",
        ),
        (lambda: RowsOf(rows(0, 3)), "data should have at least one row"),
        (lambda: RowsOf(torch.ones(2, 3, dtype=torch.long)), "data should be of floating point"),
        (lambda: MomentsOf(rows(4, 3).log()), "data should be finite"),
        (lambda: AggregatePosterior(None, rows(0, 3)), "data should have at least one row"),
        (lambda: GaussianMixture(0, 3), "num_components should be a positive whole number"),
        (lambda: usage(GaussianMixture(2, 3), rows(4, 2)), r"codes should have shape \(N, 3\)"),
        (lambda: usage(GaussianMixture(2, 3), rows(0, 3)), "at least one row"),
        (lambda: usage(GaussianMixture(2, 3), rows(4, 3).log()), "codes should be finite"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# --- usage -------------------------------------------------------------------------------------


def spread(places):
    return Mixture(dist.Normal(torch.tensor(places).unsqueeze(1), 1.0).to_event(1))


def test_usage_of_components_far_apart():
    codes = torch.tensor([0.0, 0.0, 0.0, 100.0]).unsqueeze(1)
    result = usage(spread([0.0, 100.0, 200.0]), codes)
    torch.testing.assert_close(result.usage, torch.tensor([0.75, 0.25, 0.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert result.used == pytest.approx(math.exp(entropy))
    assert result.distinct == pytest.approx(math.exp(entropy))
    assert result.dead.tolist() == [False, False, True]
    torch.testing.assert_close(result.weights, torch.full((3,), 1 / 3))
    assert "1 of 3 components are dead" in str(result)


def test_usage_of_components_that_are_the_same():
    result = usage(spread([1.0] * 8), rows(50, 1))
    assert result.used == pytest.approx(8.0)
    assert result.distinct == pytest.approx(1.0)
    assert "collapsed" in str(result)


def test_usage_goes_by_blocks():
    mixture, codes = GaussianMixture(7, Z)(), rows(60, Z)
    whole = usage(mixture, codes)
    parts = usage(mixture, codes, max_elements=100)
    torch.testing.assert_close(parts.usage, whole.usage)
    assert parts.distinct == pytest.approx(whole.distinct)


def test_usage_of_a_fit():
    model, guide, x = make()
    result = usage(model.prior, pe.surgery(model, guide, x, progress=False).codes)
    assert result.num_codes == 20
    assert result.usage.sum().item() == pytest.approx(1.0)
    assert 1.0 <= result.distinct <= result.used <= K + 1e-9
    table = result.to_xarray()
    assert table.sizes == {"component": K}
    assert float(table.used) == result.used


# --- what it is for ----------------------------------------------------------------------------


def held_out_elbo(make_prior, x, held_out, seed, epochs=40):
    """Nats per held-out datum of a VAE after training with the prior ``make_prior(guide, x)``."""
    pyro.set_rng_seed(seed)
    guide = Diagonal(10, x.shape[1], (64,))
    model = VAE(10, x.shape[1], (64,), BernoulliLikelihood(), make_prior(guide, x))
    batches = Minibatches(x, 128, seed=seed)
    warm_up = pe.schedules.Linear(0.0, 1.0, steps=epochs * len(batches) // 3)
    loss = pe.BetaELBO(warm_up, max_plate_nesting=1)(model, guide)
    optimiser = torch.optim.Adam(loss.parameters(), lr=5e-3)
    with pyro.validation_enabled(False):
        for _ in range(epochs):
            for batch in batches:
                optimiser.zero_grad()
                (loss(batch) / len(batch)).backward()
                optimiser.step()
    elbo = pe.BetaELBO(max_plate_nesting=1, num_particles=10, vectorize_particles=True)
    return -elbo.loss(model, guide, held_out) / len(held_out)


def vamp(guide, x):
    return pe.VampPrior(guide.posterior, 50, RowsOf(x), constraint=IMAGES)


@pytest.mark.slow
def test_vamp_prior_beats_the_standard_prior_on_digits():
    torch.set_default_dtype(torch.float32)
    pixels = digits()[0].to(torch.get_default_device())
    x = (pixels >= 0.5).to(pixels)
    gains = []
    for seed in range(3):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
        train, held_out = x[order[400:]], x[order[:400]]
        standard = held_out_elbo(lambda guide, x: None, train, held_out, seed)
        gains.append(held_out_elbo(vamp, train, held_out, seed) - standard)
    mean, stderr = mean_and_stderr(torch.tensor(gains))
    assert mean > 3 * stderr and mean > 0.3
