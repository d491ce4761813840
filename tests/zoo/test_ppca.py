import pytest
import torch
from helpers.oracles import (
    gradients,
    mean_and_stderr,
    ppca_elbo,
    ppca_evidence,
    ppca_posterior,
    rows,
)
from pyro import poutine
from sklearn.datasets import load_digits
from torch.distributions import MultivariateNormal, kl_divergence

from pyproelbo import BetaELBO
from pyproelbo.guides.ppca import Diagonal, Exact, FullCovariance
from pyproelbo.models.ppca import PPCA


def digits():
    return torch.as_tensor(load_digits().data / 16, dtype=torch.get_default_dtype()).to(
        torch.get_default_device()
    )


def at_random(num_latents=3, num_features=5):
    """A PPCA whose loadings are not orthogonal, and whose mean and noise are nothing special."""
    model = PPCA(num_latents, num_features)
    with torch.no_grad():
        model.W.add_(0.5)
        model.mu.normal_()
        model.log_sigma.fill_(-0.7)
    return model


def covariance(q):
    return q.covariance_matrix if isinstance(q, MultivariateNormal) else q.variance.diag_embed()


def per_datum(terms):
    return terms.log_likelihood["x"] - terms.kl["z"]


# --- the model ---------------------------------------------------------------------------------

DIGITS = {  # k: sigma^2, log-likelihood and average KL per datum, for digits / 16
    2: (0.05412, 0.0057, 2.5137),
    5: (0.03620, 8.9076, 6.4814),
    10: (0.02275, 17.4519, 12.7961),
    20: (0.01127, 27.2773, 25.4383),
}


@pytest.mark.parametrize("num_latents", DIGITS)
def test_optimum_of_the_digits(num_latents):
    x = digits()
    model = PPCA.optimum(x, num_latents)
    prior = MultivariateNormal(torch.zeros(num_latents), torch.eye(num_latents))
    average_kl = kl_divergence(model.posterior(x), prior).mean()
    variance, log_likelihood, average = DIGITS[num_latents]
    assert model.sigma.square().item() == pytest.approx(variance, abs=5.1e-6)
    assert model.log_evidence(x).mean().item() == pytest.approx(log_likelihood, abs=5.1e-5)
    assert average_kl.item() == pytest.approx(average, abs=5.1e-5)


def test_optimum_is_stationary():
    model = PPCA.optimum(x := rows(200, 6) @ rows(6, 6) + 1.0, 2)
    for gradient in gradients(model.log_evidence(x).mean(), model):
        assert gradient.abs().max() < 1e-10


def test_optimum_keeps_the_dtype_of_the_data():
    model = PPCA.optimum(digits().float(), 20)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_evidence_in_single_precision():
    x = digits()
    exact = PPCA.optimum(x, 20).log_evidence(x)
    single = PPCA.optimum(x, 20).float().log_evidence(x.float())
    assert (single - exact).abs().max() < 1e-3  # of up to 50 nats


@pytest.mark.parametrize("shape", [(4, 5), (5,), (2, 3, 5)])
def test_evidence_and_posterior_against_dense_algebra(shape):
    model, x = at_random(), rows(*shape)
    posterior, dense = model.posterior(x), ppca_posterior(model, x)
    torch.testing.assert_close(model.log_evidence(x), ppca_evidence(model, x))
    torch.testing.assert_close(posterior.mean, dense.mean)
    torch.testing.assert_close(
        posterior.covariance_matrix, dense.covariance_matrix.expand(*shape[:-1], 3, 3)
    )


def test_more_latents_than_features():
    model, x = at_random(num_latents=4, num_features=2), rows(3, 2)
    torch.testing.assert_close(model.log_evidence(x), ppca_evidence(model, x))


def test_simulation():
    model = at_random(2, 3)
    x = model(num=40_000).detach()
    expected = (model.W @ model.W.mT + model.sigma**2 * torch.eye(3)).detach()
    variance = expected.diagonal()
    stderr = ((expected**2 + variance[:, None] * variance) / len(x)).sqrt()  # Wishart
    assert ((x.mT.cov() - expected).abs() < 5 * stderr).all()
    assert ((x.mean(0) - model.mu).abs() < 5 * (variance / len(x)).sqrt()).all()


@pytest.mark.parametrize("num_latents", [0, 5, 6])
def test_optimum_says_how_many_latents_it_can_have(num_latents):
    with pytest.raises(ValueError, match=f"num_latents={num_latents} should be at least 1"):
        PPCA.optimum(rows(9, 5), num_latents)


def test_optimum_says_that_there_is_none():
    with pytest.raises(ValueError, match="no more than num_latents=2 directions"):
        PPCA.optimum(rows(9, 2) @ rows(2, 5), 2)


# --- the exact guide ---------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [False, True])
def test_exact_guide_gives_the_evidence_at_every_sample(vectorize):
    model, x = at_random(), rows(4, 5)
    objective = BetaELBO(kl="sampled", num_particles=3, vectorize_particles=vectorize)
    elbo = per_datum(objective.terms(model, Exact(model), x))
    assert elbo.shape == (3, 4)
    assert (elbo - model.log_evidence(x)).abs().max() < 1e-8


def test_exact_guide_gives_the_gradient_of_the_evidence_at_every_sample():
    # log p(x, z) - log q(z | x) is log p(x) at all parameters and all z
    model, x = at_random(), rows(4, 5)
    loss = BetaELBO(kl="sampled").differentiable_loss(model, Exact(model), x)
    expected = gradients(ppca_evidence(model, x).sum(), model)
    for gradient, exact in zip(gradients(-loss, model), expected, strict=True):
        assert (gradient - exact).abs().max() < 1e-8


def test_exact_guide_with_the_closed_form_kl_gives_the_evidence_on_average():
    model, x = at_random(), rows(4, 5)
    objective = BetaELBO(kl="analytic", num_particles=4000, vectorize_particles=True)
    mean, stderr = mean_and_stderr(per_datum(objective.terms(model, Exact(model), x)))
    assert (mean - model.log_evidence(x)).abs().max() < 5 * stderr.max()
    assert stderr.max() < 0.1


def test_gradient_at_a_fixed_exact_posterior_is_that_of_the_evidence():
    # Fisher's identity: the gap is at its minimum, so that q's own dependence adds nothing
    model, x = at_random(), rows(4, 5)
    q = model.posterior(x)
    elbo = ppca_elbo(model, x, q.mean.detach(), q.covariance_matrix.detach())
    torch.testing.assert_close(elbo, model.log_evidence(x))
    expected = gradients(model.log_evidence(x).sum(), model)
    torch.testing.assert_close(gradients(elbo.sum(), model), expected)


def test_exact_guide_follows_the_model_and_owns_nothing():
    model = at_random()
    guide = Exact(model)
    assert not list(guide.parameters()) and not guide.state_dict()
    with torch.no_grad():
        model.W.mul_(2.0)
    x = rows(4, 5)
    torch.testing.assert_close(guide.posterior(x).mean, ppca_posterior(model, x).mean)
    module = BetaELBO()(model, guide)
    assert len(list(module.parameters())) == len(list(model.parameters()))
    assert sorted(k for k in module.state_dict() if "elbo" not in k) == [
        "model.W",
        "model.log_sigma",
        "model.mu",
    ]


# --- the linear guides -------------------------------------------------------------------------


def gap(model, guide, x):
    q = guide.posterior(x)
    return ppca_evidence(model, x) - ppca_elbo(model, x, q.mean, covariance(q))


def test_gap_of_the_best_diagonal_guide():
    model, x = at_random(), rows(4, 5)
    guide = Diagonal.optimum(model)
    precision = ppca_posterior(model, x[0]).precision_matrix
    expected = (precision.diagonal().log().sum() - precision.logdet()) / 2
    assert expected > 0.1
    torch.testing.assert_close(gap(model, guide, x), expected.expand(4))
    for gradient in gradients(gap(model, guide, x).sum(), guide):
        assert gradient.abs().max() < 1e-10  # no better one near by


def test_diagonal_guide_closes_the_gap_where_loadings_are_orthogonal():
    x = digits()
    model = PPCA.optimum(x, 10)
    assert gap(model, Diagonal.optimum(model), x).abs().max() < 1e-8


def test_elbo_of_the_diagonal_guide_is_the_evidence_less_its_gap():
    model, x = at_random(), rows(4, 5)
    objective = BetaELBO(num_particles=4000, vectorize_particles=True)
    terms = objective.terms(model, guide := Diagonal.optimum(model), x)
    assert terms.analytic == {"z"}
    mean, stderr = mean_and_stderr(per_datum(terms))
    expected = model.log_evidence(x) - gap(model, guide, x)
    assert ((mean - expected).abs() < 5 * stderr).all()


def test_full_covariance_closes_the_gap():
    model, x = at_random(), rows(4, 5)
    guide = FullCovariance.optimum(model)
    assert gap(model, guide, x).abs().max() < 1e-10
    elbo = per_datum(BetaELBO(kl="sampled").terms(model, guide, x))
    assert (elbo - model.log_evidence(x)).abs().max() < 1e-8
    assert not {p.data_ptr() for p in guide.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }


def test_full_covariance_learns_the_posterior():
    model, x = at_random(2, 4), rows(16, 4)
    guide = FullCovariance(2, 4)
    start = gap(model, guide, x).max()
    objective = BetaELBO(kl="sampled", num_particles=16, vectorize_particles=True)
    module = objective(model.requires_grad_(False), guide)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.985)
    for _ in range(400):
        optimiser.zero_grad()
        module(x).backward()
        optimiser.step()
        schedule.step()
    assert gap(model, guide, x).max() < 1e-3 * start


# --- a part of the data ------------------------------------------------------------------------


def test_size_scales_a_batch_to_the_whole():
    whole, x = at_random(), rows(6, 5)
    part = PPCA(3, 5, dataset_size=6)
    part.load_state_dict(whole.state_dict())
    objective = BetaELBO(kl="sampled")
    batches = [objective.terms(part, Exact(part), batch).elbo for batch in x.split(2)]
    assert torch.stack(batches).mean() == pytest.approx(whole.log_evidence(x).sum().item())
    terms = BetaELBO().terms(part, Diagonal(3, 5, dataset_size=6), x[:2])
    assert terms.analytic == {"z"} and terms.num_data == 6


def test_size_draws_no_random_numbers():
    model, x = PPCA(3, 5, dataset_size=100), rows(6, 5)
    state = torch.get_rng_state()
    poutine.condition(model, {"z": rows(6, 3)})(x)
    assert torch.equal(torch.get_rng_state(), state)
