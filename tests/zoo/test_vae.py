import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import gradients, mean_and_stderr, ppca_evidence, rows
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import nn
from torch.distributions import kl_divergence
from torch.nn import functional as F

from pyproelbo import BetaELBO
from pyproelbo.guides import ppca as linear_guides
from pyproelbo.guides.vae import Diagonal, FullCovariance
from pyproelbo.models.nets import gated_mlp, mlp
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vae import VAE, BernoulliLikelihood, GaussianLikelihood

GUIDES = [Diagonal, FullCovariance]
LIKELIHOODS = [BernoulliLikelihood, GaussianLikelihood]


def data_for(likelihood):
    x = rows(6, 4)
    return (x > 0).to(x) if likelihood is BernoulliLikelihood else x


def spread(guide):
    """Make a guide's covariance depend on x, and be far from diagonal where it can."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.mul_(2.0)
    return guide


# --- the parts ---------------------------------------------------------------------------------


def test_bernoulli_likelihood():
    logits, x = rows(6, 4), data_for(BernoulliLikelihood)
    likelihood = BernoulliLikelihood()(logits)
    expected = -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
    torch.testing.assert_close(likelihood.log_prob(x), expected)


@pytest.mark.parametrize("scale", [0.5, [0.5, 1.0, 2.0, 3.0]])
def test_gaussian_likelihood(scale):
    loc, x = rows(6, 4), rows(2, 6, 4)[1]
    scale = torch.as_tensor(scale, dtype=x.dtype)
    part = GaussianLikelihood(scale)
    torch.testing.assert_close(part.scale, scale)
    nll = F.gaussian_nll_loss(loc, x, (scale**2).expand(6, 4), full=True, reduction="none")
    torch.testing.assert_close(part(loc).log_prob(x), -nll.sum(-1))


def test_gaussian_likelihood_of_no_scale():
    with pytest.raises(ValueError, match=r"scale should be positive, got 0\.0"):
        GaussianLikelihood(0.0)


def test_likelihood_and_prior_may_be_anything_that_returns_a_distribution():
    class Prior(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.ones(2))

        def forward(self):
            return dist.Normal(self.loc, 2.0).to_event(1)

    model = VAE(2, 4, likelihood=lambda loc: dist.Laplace(loc, 1.0).to_event(1), prior=Prior())
    guide, x = Diagonal(2, 4), rows(6, 4)
    objective = BetaELBO()
    terms = objective.terms(model, guide, x)
    expected = kl_divergence(guide.posterior(x), model.prior())
    torch.testing.assert_close(terms.kl["z"], expected)
    objective.loss_and_grads(model, guide, x)
    assert model.prior.loc.grad is not None


@pytest.mark.parametrize("guide", GUIDES)
def test_posterior_by_hand(guide):
    guide = spread(guide(2, 4, hidden=(3,)))
    x = rows(6, 4)
    first, second = guide.encoder[0], guide.encoder[2]
    output = F.silu(x @ first.weight.mT + first.bias) @ second.weight.mT + second.bias
    q = guide.posterior(x)
    torch.testing.assert_close(q.mean, output[:, :2])
    if isinstance(guide, Diagonal):
        torch.testing.assert_close(q.stddev, output[:, 2:].exp())
    else:
        a, b, c = output[:, 2:].unbind(-1)
        L = torch.stack([a.exp(), torch.zeros_like(a), b, c.exp()], -1).reshape(-1, 2, 2)
        torch.testing.assert_close(q.scale_tril, L)


@pytest.mark.parametrize("guide", GUIDES)
def test_posterior_of_any_batch(guide):
    guide, x = guide(2, 4, hidden=(3,)), rows(2, 3, 4)
    q = guide.posterior(x)
    assert q.batch_shape == (2, 3) and q.event_shape == (2,)
    torch.testing.assert_close(q.mean[1], guide.posterior(x[1]).mean)


def test_model_and_guide_take_the_same_widths():
    model, guide = VAE(2, 9, hidden=(3, 5)), Diagonal(2, 9, hidden=(3, 5))
    assert [m.out_features for m in model.decoder if isinstance(m, nn.Linear)] == [3, 5, 9]
    assert [m.out_features for m in guide.encoder if isinstance(m, nn.Linear)] == [5, 3, 4]


def test_gated_nets_by_hand():
    net, x = gated_mlp(4, (3,), 2), rows(6, 4)
    (W, V), (b, c) = net[0].weight.split(3), net[0].bias.split(3)
    h = (x @ W.mT + b) * (x @ V.mT + c).sigmoid()
    torch.testing.assert_close(net(x), h @ net[2].weight.mT + net[2].bias)


def test_model_and_guide_of_gated_nets():
    model, guide = VAE(2, 9, (3, 5), net=gated_mlp), Diagonal(2, 9, (3, 5), net=gated_mlp)
    assert [m.out_features for m in model.decoder if isinstance(m, nn.Linear)] == [6, 10, 9]
    assert [m.out_features for m in guide.encoder if isinstance(m, nn.Linear)] == [10, 6, 4]


@pytest.mark.parametrize("net", [mlp, gated_mlp])
def test_nets_without_an_output_end_in_their_last_hidden_layer(net):
    torch.manual_seed(0)
    whole = net(4, (3, 5), 2)
    torch.manual_seed(0)
    h = net(4, (3, 5), None)(rows(6, 4))
    assert h.shape == (6, 5)
    assert torch.equal(whole[-1](h), whole(rows(6, 4)))
    assert torch.equal(net(4, (), None)(rows(6, 4)), rows(6, 4))
    with pytest.raises(ValueError, match="width 1 of the net should be a positive whole number"):
        net(4, (0,), 2)


def test_a_scale_within_limits():
    free, x = spread(Diagonal(2, 4, (3,))), 3 * rows(6, 4)
    bounded = Diagonal(2, 4, (3,), log_scale=(-0.3, 0.2))
    bounded.load_state_dict(free.state_dict())
    log_scale = free.posterior(x).stddev.log()
    assert log_scale.min() < -0.3 and log_scale.max() > 0.2
    torch.testing.assert_close(bounded.posterior(x).stddev.log(), log_scale.clamp(-0.3, 0.2))
    torch.testing.assert_close(bounded.posterior(x).mean, free.posterior(x).mean)
    with pytest.raises(ValueError, match="log_scale should be the least and the greatest"):
        Diagonal(2, 4, log_scale=(1.0, -3.0))


# --- the ELBO ----------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("guide", GUIDES)
def test_against_pyros_own_elbo(guide, likelihood, particles):
    model = VAE(2, 4, hidden=(5,), likelihood=likelihood())
    guide, x = spread(guide(2, 4, hidden=(5,))), data_for(likelihood)
    options = {
        "num_particles": particles,
        "vectorize_particles": particles > 1,
        "max_plate_nesting": 1 + (particles > 1),
    }
    found = []
    for objective in (Trace_ELBO(**options), BetaELBO(kl="sampled", **options)):
        torch.manual_seed(3)
        module = nn.ModuleList([model, guide])
        loss = objective.differentiable_loss(model, guide, x)
        found.append([loss, *gradients(loss, module)])
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("guide", GUIDES)
def test_kl_is_in_closed_form(guide):
    model, guide, x = VAE(2, 4), spread(guide(2, 4)), rows(6, 4)
    analytic = BetaELBO(kl="analytic").terms(model, guide, x).kl["z"]
    objective = BetaELBO(kl="sampled", num_particles=4000, vectorize_particles=True)
    mean, stderr = mean_and_stderr(objective.terms(model, guide, x).kl["z"])
    assert ((mean - analytic).abs() < 5 * stderr).all()


def test_linear_vae_is_ppca():
    x = rows(30, 4) @ rows(4, 4)
    ppca = PPCA.optimum(x, 2)
    vae = VAE(2, 4, likelihood=GaussianLikelihood(ppca.sigma.item()))
    exact, guide = linear_guides.FullCovariance.optimum(ppca), FullCovariance(2, 4)
    with torch.no_grad():
        vae.decoder[0].weight.copy_(ppca.W)
        vae.decoder[0].bias.copy_(ppca.mu)
        guide.encoder[0].weight.zero_()[:2] = exact.loc.weight
        guide.encoder[0].bias.copy_(torch.cat([exact.loc.bias, exact.raw]))
    terms = BetaELBO(kl="sampled").terms(vae, guide, x)
    elbo = terms.log_likelihood["x"] - terms.kl["z"]
    assert (elbo - ppca_evidence(ppca, x)).abs().max() < 1e-8


def test_svi_trains_a_vae():
    x = (rows(64, 2) @ rows(2, 8) > 0).to(rows(1))
    model = VAE(2, 8, hidden=(16,), likelihood=BernoulliLikelihood())
    objective = BetaELBO()
    svi = SVI(model, Diagonal(2, 8, hidden=(16,)), ClippedAdam({"lr": 0.02}), objective)
    losses = [svi.step(x) for _ in range(150)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_an_empty_batch_is_an_error():
    with pytest.raises(ValueError, match="x should have at least one row"):
        BetaELBO().loss(VAE(2, 4), Diagonal(2, 4), torch.empty(0, 4))
