import pytest
import torch
from helpers.oracles import gmm_elbo, gmm_evidence, gmm_log_joint, gradients, mean_and_stderr, rows
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyproelbo import BetaELBO
from pyproelbo.guides.gmm import Exact, Softmax
from pyproelbo.models.gmm import GMM


def at_random(num_components=3, num_features=2, dataset_size=None):
    model = GMM(num_components, num_features, dataset_size)
    with torch.no_grad():
        model.logits.normal_()
        model.log_scale.normal_(0.0, 0.3)
    return model


def empty(x):
    """A guide that samples nothing, since the model sums z out."""


def exact_elbo(model, guide, x):
    return gmm_elbo(model, x, guide.posterior(x).probs)


@pytest.mark.parametrize("num_features", [1, 2])
def test_evidence_and_posterior(num_features):
    model, x = at_random(num_features=num_features), rows(5, num_features)
    evidence = gmm_evidence(model, x)
    torch.testing.assert_close(model.log_evidence(x), evidence)
    torch.testing.assert_close(
        model.posterior(x).probs, (gmm_log_joint(model, x) - evidence[:, None]).exp()
    )


def test_evidence_of_any_batch():
    model, x = at_random(), rows(2, 3, 2)
    assert model.log_evidence(x).shape == model.posterior(x).batch_shape == (2, 3)
    torch.testing.assert_close(model.log_evidence(x)[1], model.log_evidence(x[1]))


def test_simulation():
    model = at_random(2, 1)
    x = model(num=20_000)
    mean, stderr = mean_and_stderr(x)
    assert (mean - model.weights @ model.loc).abs() < 5 * stderr


# --- z sampled ---------------------------------------------------------------------------------


def test_exact_guide_gives_the_evidence_at_every_sample():
    model, x = at_random(), rows(5, 2)
    terms = BetaELBO(kl="sampled", num_particles=3).terms(model, Exact(model), x)
    elbo = terms.log_likelihood["x"] - terms.kl["z"]
    assert (elbo - gmm_evidence(model, x)).abs().max() < 1e-8


def test_score_function_gradients_are_right_on_average():
    model, guide, x = at_random(), Softmax(3, 2), rows(5, 2)
    module = BetaELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=2)(model, guide)
    draws = [gradients(-module(x), module) for _ in range(300)]
    exact = gradients(exact_elbo(model, guide, x).sum(), module)
    for gradient, expected in zip(zip(*draws, strict=True), exact, strict=True):
        mean, stderr = mean_and_stderr(torch.stack(gradient))
        assert ((mean - expected).abs() < 5 * stderr + 1e-12).all()
        assert stderr.max() < 0.2


# --- z enumerated by the guide -----------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_enumerated_by_the_guide(hidden):
    model, guide, x = at_random(), Softmax(3, 2, hidden), rows(5, 2)
    objective = BetaELBO()
    terms = objective.terms(model, enumerated := config_enumerate(guide), x)
    expected = exact_elbo(model, guide, x)
    torch.testing.assert_close(terms.log_likelihood["x"] - terms.kl["z"], expected)

    loss = objective.differentiable_loss(model, enumerated, x)
    for module in (model, guide):
        torch.testing.assert_close(
            gradients(-loss, module), gradients(expected.sum(), module), rtol=1e-9, atol=1e-9
        )


def test_exact_guide_enumerated_gives_the_evidence_and_its_gradient():
    model, x = at_random(), rows(5, 2)
    loss = BetaELBO().differentiable_loss(model, config_enumerate(Exact(model)), x)
    evidence = gmm_evidence(model, x).sum()
    torch.testing.assert_close(-loss, evidence)
    torch.testing.assert_close(gradients(-loss, model), gradients(evidence, model))


def test_linear_guide_holds_the_posterior_of_components_of_one_scale():
    model, x = GMM(3, 2), rows(5, 2)
    guide = Softmax(3, 2)
    with torch.no_grad():
        guide.encoder[0].weight.copy_(model.loc)
        guide.encoder[0].bias.copy_(-model.loc.square().sum(-1) / 2)
    torch.testing.assert_close(guide.posterior(x).probs, model.posterior(x).probs)


# --- z enumerated by the model -----------------------------------------------------------------


def test_enumerated_by_the_model_is_the_evidence():
    model, x = at_random(), rows(5, 2)
    objective = BetaELBO()
    terms = objective.terms(config_enumerate(model), empty, x)
    evidence = gmm_evidence(model, x)
    torch.testing.assert_close(terms.log_likelihood["x"], evidence)
    assert not terms.kl

    loss = objective.differentiable_loss(config_enumerate(model), empty, x)
    torch.testing.assert_close(gradients(-loss, model), gradients(evidence.sum(), model))


# --- a part of the data ------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["guide", "model"])
def test_size_scales_a_batch_to_the_whole(by):
    model, x = at_random(dataset_size=15), rows(5, 2)
    programs = {
        "guide": (model, config_enumerate(Exact(model))),
        "model": (config_enumerate(model), empty),
    }
    elbo = BetaELBO().terms(*programs[by], x).elbo
    torch.testing.assert_close(elbo, 3 * gmm_evidence(model, x).sum())
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(*programs[by], x)
    assert loss == pytest.approx(-elbo.item())
