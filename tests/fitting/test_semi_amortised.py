"""Posteriors that a guide improves before it draws: where they end, and what goes through them."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured_fits import EAGER, num_graphs
from helpers.oracles import rows
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormalMessenger
from torch import nn

import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.models.ppca import PPCA


def data():
    return rows(40, 3)


class Regression(nn.Module):
    """x ~ N(z W, 0.5^2), z ~ N(0, I), of rows that a plate may draw."""

    def __init__(self, size=None, mask=None):
        super().__init__()
        self.W = nn.Parameter(torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.8, -1.0]]))
        self.size, self.mask = size, mask

    def forward(self, x, index=None):
        pyro.module("regression", self)
        size = len(x) if self.size is None else self.size
        with pyro.plate("data", size, subsample=index), _masked(self.mask):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.W, 0.5).to_event(1), obs=x)

    def posterior(self, x):
        precision = torch.eye(2) + 4 * self.W @ self.W.T
        return torch.linalg.solve(precision, 4 * self.W @ x.T).T, precision


def _masked(mask):
    return poutine.mask(mask=True if mask is None else mask)


class Encoder(nn.Module):
    """Far from the posterior: of a mean that is too small, and too wide."""

    def __init__(self, size=None, mask=None, full=False):
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.size, self.mask, self.full = size, mask, full

    def forward(self, x, index=None):
        pyro.module("encoder", self)
        size = len(x) if self.size is None else self.size
        with pyro.plate("data", size, subsample=index), _masked(self.mask):
            loc, scale = self.net(x), torch.full((2,), 0.9)
            if self.full:
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale.diag()))
            else:
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def posterior_of(guide, *args):
    trace = poutine.trace(guide).get_trace(*args)
    return trace.nodes["z"]["fn"]


@pytest.mark.parametrize("full", [False, True], ids=["mean field", "full rank"])
def test_they_end_at_the_best_of_their_family(full):
    model = Regression()
    mean, precision = model.posterior(data())
    kwargs = {"num_steps": 25, "rate": 0.4, "num_samples": 30}
    with torch.no_grad():
        q = posterior_of(pe.SemiAmortised(model, Encoder(full=full), **kwargs), data())
    error = q.mean - mean  # of each row, by its own draws
    assert error.abs().max() < 0.15
    assert (error.mean(0).abs() < 4 * error.std(0) / len(data()) ** 0.5 + 0.01).all()
    best = precision.inverse() if full else precision.diagonal().reciprocal().diag()
    found = q.covariance_matrix if full else torch.diag_embed(q.variance)
    assert (found.mean(0) - best).abs().max() < 0.02


def test_gradients_go_through_the_steps():
    model, encoder = Regression(), Encoder()
    guide = pe.SemiAmortised(model, encoder, num_steps=3)
    objective = pe.BetaELBO()
    parameters = [model.W, encoder.net.weight]

    def loss():
        pyro.set_rng_seed(5)
        return objective.differentiable_loss(model, guide, data())

    found = torch.autograd.grad(loss(), parameters)
    for value, gradient in zip(parameters, found, strict=True):
        direction, eps = rows(*value.shape), 1e-6
        with torch.no_grad():
            value += eps * direction
            up = loss()
            value -= 2 * eps * direction
            down = loss()
            value += eps * direction
        slope = (up - down) / (2 * eps)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-6)


def test_no_steps_are_the_guide():
    model, encoder = Regression(), Encoder()
    results = []
    for guide in (encoder, pe.SemiAmortised(model, encoder, num_steps=0)):
        pyro.set_rng_seed(5)
        loss = pe.BetaELBO().differentiable_loss(model, guide, data())
        results.append((loss, *torch.autograd.grad(loss, [model.W, encoder.net.weight])))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_training_beats_the_encoder_alone():
    losses = []
    for steps in (0, 3):
        pyro.set_rng_seed(2)
        pyro.clear_param_store()
        model, encoder = PPCA(2, 3), Diagonal(2, 3)
        guide = pe.SemiAmortised(model, encoder, num_steps=steps) if steps else encoder
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), pe.BetaELBO())
        for _ in range(100):
            svi.step(data())
        losses.append(
            -pe.evidence(model, guide, data(), num_samples=50, progress=False).elbo.mean()
        )
    assert losses[1] < losses[0]


def test_captured_steps_are_the_eager_ones():
    losses = []
    for compile in (False, EAGER):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        model = Regression()
        guide = pe.SemiAmortised(model, Encoder(), num_steps=2)
        objective = pe.BetaELBO(compile=compile)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
        losses.append(torch.tensor([svi.step(data()) for _ in range(5)]))
    torch.testing.assert_close(*losses, rtol=1e-11, atol=1e-11)
    assert num_graphs(objective) == 1


class TestPlates:
    def test_a_subsample_is_the_same_in_all_runs(self):
        class Drawn(Encoder):
            def forward(self, x):
                pyro.module("encoder", self)
                with pyro.plate("data", len(x), subsample_size=5) as index:
                    z = dist.Normal(self.net(x[index]), 0.9).to_event(1)
                    pyro.sample("z", z)

        seen = []

        def model(x):
            with pyro.plate("data", len(x), subsample_size=5) as index:
                seen.append(index)
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[index, 0])

        guide = pe.SemiAmortised(model, Drawn(), num_steps=2)
        pe.BetaELBO().loss(model, guide, data())
        seen.clear()
        pe.BetaELBO().loss(model, guide, data())
        assert len(seen) == 3 and all(torch.equal(index, seen[0]) for index in seen)
        vectorised = pe.BetaELBO(num_particles=3, vectorize_particles=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pe.LoopedWarning)
            vectorised.loss(model, guide, data())

    def test_scales_change_no_posterior(self):
        index, x = torch.arange(8), data()[:8]
        encoder = Encoder()
        alone = pe.SemiAmortised(Regression(), encoder).eval()
        scaled_encoder = Encoder(size=800)
        scaled_encoder.load_state_dict(encoder.state_dict())
        scaled = pe.SemiAmortised(Regression(size=800), scaled_encoder).eval()
        ours, theirs = posterior_of(scaled, x, index), posterior_of(alone, x)
        torch.testing.assert_close(ours.mean, theirs.mean)
        torch.testing.assert_close(ours.variance, theirs.variance)

    def test_masked_rows_stay(self):
        mask = torch.arange(len(data())) < 10
        encoder = Encoder(mask=mask)
        q = posterior_of(pe.SemiAmortised(Regression(mask=mask), encoder), data())
        stays = (q.mean == posterior_of(encoder, data()).mean).all(-1)
        assert torch.equal(stays, ~mask)


@pytest.mark.parametrize("per", ["whole", "batches"])
def test_reports_give_each_row_its_own_noise(per):
    model = Regression()
    guide = pe.SemiAmortised(model, Encoder(), num_steps=2)
    kwargs = {"num_samples": 20, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pe.LoopedWarning)
        found = pe.evidence(
            model, guide, data(), batch_size=7 if per == "batches" else 40, **kwargs
        )
        expected = pe.evidence(model, guide, data(), batch_size=13, chunk=3, **kwargs)
    torch.testing.assert_close(found.elbo, expected.elbo, rtol=1e-10, atol=1e-10)
    exact = dist.MultivariateNormal(torch.zeros(3), model.W.T @ model.W + 0.25 * torch.eye(3))
    many = pe.evidence(model, guide, data(), num_samples=2000, progress=False)

    error = (many.log_evidence - exact.log_prob(data())).mean().abs()
    assert error < 4 * many.stderr.square().sum().sqrt() / len(data()) + 1e-4


def test_a_latent_given_another():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.2 * x, 1.0))
            pyro.sample("b", dist.Normal(0.2 * a + 0.1 * x, 1.0))

    x = data()[:, 0]
    improved = pe.SemiAmortised(model, guide, num_steps=15, rate=0.3, num_samples=5)
    exact = dist.Normal(0.0, 2.25**0.5).log_prob(x).mean()
    found = pe.evidence(model, improved, x, num_samples=100, progress=False)
    assert (found.elbo.mean() - exact).abs() < 0.02  # the slopes of the guide are right


def test_global_latents_stay():
    class Global(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            pyro.module("global", self)
            pyro.sample("m", dist.Normal(self.loc, 0.1))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.1 * x, 1.0))

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    improved = pe.SemiAmortised(model, Global())
    trace = poutine.trace(improved).get_trace(data()[:, 0])
    assert trace.nodes["m"]["fn"].mean == 0.3
    assert not torch.equal(trace.nodes["z"]["fn"].mean, 0.1 * data()[:, 0])


def test_latents_that_the_model_sums_out():
    def enumerated(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 2 * k, 0.5), obs=x)

    def summed(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            parts = dist.Normal(torch.stack([z, z + 2], -1), 0.5)
            weights = dist.Categorical(torch.tensor([0.7, 0.3]))
            pyro.sample("x", dist.MixtureSameFamily(weights, parts), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.2 * x, 0.7))

    losses = []
    for model in (enumerated, summed):
        improved = pe.SemiAmortised(model, guide, num_steps=4).eval()
        objective = pe.BetaELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
        pyro.set_rng_seed(1)
        losses.append(
            torch.tensor([objective.loss(model, improved, data()[:, 0]) for _ in range(3)])
        )
    torch.testing.assert_close(*losses)


def test_one_row():
    x = data()[:1]
    encoder = Encoder()
    q = posterior_of(pe.SemiAmortised(Regression(), encoder), x)
    assert not torch.equal(q.mean, encoder.net(x))


class TestWhatCannotBe:
    def test_arguments(self):
        model, encoder = Regression(), Encoder()
        for kwargs in ({"num_steps": -1}, {"rate": 0.0}, {"num_samples": 0}):
            with pytest.raises(ValueError, match=next(iter(kwargs))):
                pe.SemiAmortised(model, encoder, **kwargs)

    def test_messengers(self):
        with pytest.raises(ValueError, match="guide should be a function"):
            pe.SemiAmortised(Regression(), AutoNormalMessenger(Regression()))

    def test_nothing_of_the_data(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

        with pytest.raises(ValueError, match="nothing to improve"):
            pe.SemiAmortised(Regression(), guide)(data())

    def test_discrete_latents(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=x))

        with pytest.raises(ValueError, match="'z' has no reparameterised draws"):
            pe.SemiAmortised(lambda x: None, guide)(data()[:, 0])

    def test_families_without_parameters(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                d = dist.MixtureOfDiagNormals(
                    torch.stack([x, -x], 1), torch.ones(len(x), 2, 3), torch.zeros(len(x), 2)
                )
                pyro.sample("z", d)

        with pytest.raises(ValueError, match="'z'"):
            pe.SemiAmortised(PPCA(3, 3), guide)(data())
