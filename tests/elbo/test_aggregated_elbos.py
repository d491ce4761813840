"""SurgeryELBO and TotalCorrelationELBO: what they train and what they report."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from helpers.aggregates import assert_adds_up, discrete, nested
from helpers.losses import PARTICLES, initialised, loss_and_grads, of_module
from helpers.oracles import log_weight, rows
from helpers.vae import Guide, Model
from pyro import poutine

import pyproelbo as pe
from pyproelbo.guides.ppca import FullCovariance
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vae import VAE

# programs with latents for each datum, and the names of these where there are others
LOCAL = {
    "local_normal": None,
    "subsampled": "z",
    "reparameterised": None,
    "full_covariance": ["z", "y"],
    "huge_plate": None,
    "AutoNormal": "p",
    "AutoNormalMessenger": "p",
    "list": "p",
}


def assert_bits(ours, theirs):
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys() != set()
    for name, grad in theirs[1].items():
        assert torch.equal(ours[1][name], grad), name


def vae(size=None):
    torch.manual_seed(3)
    return VAE(3, 5, hidden=(8,), dataset_size=size), Diagonal(3, 5, hidden=(8,), dataset_size=size)


def ppca(size=None):
    torch.manual_seed(3)
    return PPCA(3, 5, dataset_size=size), FullCovariance(3, 5, dataset_size=size)


def assert_trains_the_elbo(make, name, particles):
    model, guide = initialised(programs.REPARAMETERISED[name])
    for kl in ("auto", "sampled"):
        kwargs = {"kl": kl, **particles}
        objective = make(site=LOCAL[name], **kwargs)
        ours = loss_and_grads(objective, model, guide)
        assert_bits(ours, loss_and_grads(pe.BetaELBO(1.0, **kwargs), model, guide))
        assert_adds_up(objective.last_surgery)


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("name", LOCAL)
def test_surgery_trains_the_elbo(name, particles):
    """Loss and gradients of BetaELBO(1.0), to the last bit."""
    assert_trains_the_elbo(partial(pe.SurgeryELBO, None), name, PARTICLES[particles])


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("name", LOCAL)
def test_total_correlation_with_equal_weights_is_the_elbo(name, particles):
    """The parts add up to the KL, in value and gradient, to the last bit."""
    assert_trains_the_elbo(pe.TotalCorrelationELBO, name, PARTICLES[particles])


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("make", [vae, ppca])
def test_modules_train_the_elbo(make, particles):
    model, guide = make(size=40)
    x, kwargs = rows(6, 5), {"kl": "sampled", **PARTICLES[particles]}
    expected = of_module(pe.BetaELBO(1.0, **kwargs)(model, guide), x)
    for objective in (pe.SurgeryELBO(40, **kwargs), pe.TotalCorrelationELBO(**kwargs)):
        loss, grads = of_module(objective(model, guide), x)
        assert torch.equal(loss, expected[0])
        assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True))
        assert_adds_up(objective.last_surgery)


def by_hand(model, guide, x, size, estimator, eps):
    """The six parts per datum of a VAE with a diagonal Normal guide, pair by pair."""
    base, num = guide.posterior(x).base_dist, len(x)
    loc, scale = q = base.loc, base.scale
    parts = []
    for e in eps:
        z = loc + scale * e
        own = dist.Normal(loc, scale).log_prob(z).sum(-1)
        weights = torch.tensor(
            [[log_weight(estimator, i, j, num, size) for j in range(num)] for i in range(num)]
        )
        pairs = [[dist.Normal(m, s).log_prob(v) for m, s in zip(*q, strict=True)] for v in z]
        pairs = torch.stack([torch.stack(row) for row in pairs])  # i, j, dimension
        joint = (weights + pairs.sum(-1)).logsumexp(1)
        by_dim = (weights[..., None] + pairs).logsumexp(1).sum(-1)
        prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        reconstruction = model.decode(z).log_prob(x)
        parts.append(
            torch.stack(
                [
                    reconstruction,
                    own - prior,
                    own - joint,
                    joint - prior,
                    joint - by_dim,
                    by_dim - prior,
                ]
            ).mean(-1)
        )
    return torch.stack(parts).mean(0)


def noise_of(particles, num):
    """The noise that the guide's Normal draws at seed 1."""
    torch.manual_seed(1)
    if particles == "vectorised":
        return torch.normal(torch.zeros(3, num, 3), torch.ones(3, num, 3))
    count = 3 if particles == "looped" else 1
    return [torch.normal(torch.zeros(num, 3), torch.ones(num, 3)) for _ in range(count)]


@pytest.mark.parametrize("estimator", ["stratified", "weighted"])
@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("size", [None, 40])
def test_by_hand(size, particles, estimator):
    """Loss, gradients and last_surgery with all weights different; in both ways to train."""
    model, guide = vae(size)
    x, num = rows(6, 5), 6
    full = size or num
    eps = noise_of(particles, num)
    kwargs = {"estimator": estimator, **PARTICLES[particles]}
    objective = pe.TotalCorrelationELBO(0.3, 4.0, 0.7, size, **kwargs)
    loss, grads = of_module(objective(model, guide), x)

    parts = by_hand(model, guide, x, full, estimator, eps)
    weights = torch.tensor([1.0, 0.0, -0.3, 0.0, -4.0, -0.7])
    expected = -full * (weights * parts).sum()
    torch.testing.assert_close(loss, expected.detach())
    parameters = [*model.parameters(), *guide.parameters()]
    for ours, theirs in zip(grads, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.stack(objective.last_surgery), parts.detach())

    for other in (pe.SurgeryELBO(size, **kwargs), pe.TotalCorrelationELBO(1, 2, 3, size, **kwargs)):
        pyro.set_rng_seed(1)
        other.loss_and_grads(model, guide, x)
        torch.testing.assert_close(torch.stack(other.last_surgery), parts.detach())


def test_the_whole_data_as_one_batch():
    """Then the weights are all 1/N, and the estimates those of the exact surgery."""
    model, guide = vae()
    x = rows(60, 5)
    exact = pe.surgery(model, guide, x, num_samples=100, seed=0, progress=False)
    kwargs = {"num_particles": 100, "vectorize_particles": True, "max_plate_nesting": 1}
    objective = pe.SurgeryELBO(None, **kwargs)
    ours = objective.surgery(objective.terms(model, guide, x))
    assert objective.last_surgery is None
    for name, value in ours._asdict().items():
        assert value.item() == pytest.approx(float(getattr(exact, name)), abs=0.05), name
    assert exact.mutual_information > 0.05


def test_closed_form_kl_under_the_weights():
    """kl="auto": gamma weighs the closed form, the other two the rest of their weight."""
    model, guide = vae()
    x = rows(6, 5)
    objective = pe.TotalCorrelationELBO(0.3, 4.0, 0.7, 40, kl="auto")
    loss, _ = of_module(objective(model, guide), x)
    terms, surgery = objective.last_terms, objective.last_surgery
    assert terms.analytic == {"z"}
    rest = -0.4 * surgery.mutual_information + 3.3 * surgery.total_correlation
    expected = terms.reconstruction - 0.7 * terms.shrinkage - 6 * rest
    torch.testing.assert_close(loss, -expected)


def test_latents_that_are_not_chosen_keep_their_kl():
    model, guide = initialised(programs.subsampled)
    objective = pe.TotalCorrelationELBO(2.0, 3.0, 4.0, site=["z"])
    loss, _ = loss_and_grads(objective, model, guide)
    terms, surgery = objective.last_terms, objective.last_surgery
    torch.testing.assert_close(terms.kl["z"].sum() / 6, surgery.average_kl)
    torch.testing.assert_close(terms.reconstruction / 6, surgery.reconstruction)
    weighted = 2 * surgery.mutual_information + 4 * surgery.dimension_wise_kl  # one dimension
    expected = terms.reconstruction - terms.kl["m"] - 6 * weighted
    assert loss == pytest.approx(-expected.item(), rel=1e-12)


@pytest.mark.parametrize("particles", PARTICLES)
def test_inner_plates_are_dimensions(particles):
    """The same as one vector of 7 dimensions for each datum in one plate."""
    model, guide = initialised(nested)
    objective = pe.TotalCorrelationELBO(0.3, 4.0, 0.7, plate="data", **PARTICLES[particles])
    loss, _ = loss_and_grads(objective, model, guide)
    terms, surgery = objective.last_terms, objective.last_surgery
    assert_adds_up(surgery)

    torch.manual_seed(1)
    count = 3 if particles != "one" else 1
    pyro.set_rng_seed(1)
    trained = list(pe.BetaELBO(**PARTICLES[particles])._particles(model, guide, (), {}))
    loc = torch.cat([programs.real("loc", 4, 1), programs.real("lz", 4, 3, 2).flatten(1)], 1)
    scale = torch.cat(
        [programs.positive("scale", 4, 1), programs.positive("sz", 4, 3, 2).flatten(1)], 1
    )
    found = []
    for part in trained:
        y, z = (part.latents[0][name].value for name in "yz")
        y, z = y.reshape(-1, 4, 1), z.reshape(-1, 4, 6)
        for v in torch.cat([y, z], -1):
            each = dist.Normal(loc, scale).log_prob(v[:, None])
            weights = torch.full((4, 4), math.log(11 / 36)).fill_diagonal_(-math.log(12))
            joint = (each.sum(-1) + weights).logsumexp(1)
            by_dim = (each + weights[..., None]).logsumexp(1).sum(-1)
            own = dist.Normal(loc, scale).log_prob(v).sum(-1)
            found.append(torch.stack([(own - joint).mean(), (joint - by_dim).mean()]))
    assert len(found) == count
    information, correlation = torch.stack(found).mean(0).detach()
    torch.testing.assert_close(surgery.mutual_information, information)
    torch.testing.assert_close(surgery.total_correlation, correlation)
    torch.testing.assert_close(surgery.average_kl, terms.shrinkage / 12)
    expected = terms.reconstruction - 12 * (
        0.3 * information + 4.0 * correlation + 0.7 * surgery.dimension_wise_kl
    )
    assert loss == pytest.approx(-expected.item(), rel=1e-9)


def test_auxiliary_latents():
    """AutoNormal samples logit p: the information is that of p, and no prior is at hand."""
    model, guide = initialised(programs.REPARAMETERISED["AutoNormal"])
    guide.locs.p, guide.scales.p = 2.0 * programs.noise(4), (programs.noise(4) / 2).exp()
    objective = pe.SurgeryELBO(None, site="p")
    loss_and_grads(objective, model, guide)
    terms, surgery = objective.last_terms, objective.last_surgery
    torch.testing.assert_close(surgery.average_kl, terms.kl["p"].mean())
    pyro.set_rng_seed(1)
    z = poutine.trace(guide).get_trace().nodes["p_unconstrained"]["value"]
    q = dist.Normal(guide.locs.p, guide.scales.p)
    log_q = q.log_prob(z[:, None]).logsumexp(1) - math.log(4)
    expected = (q.log_prob(z) - log_q).mean().detach()
    torch.testing.assert_close(surgery.mutual_information, expected)


def test_surgery_where_not_all_is_known():
    model, guide = initialised(discrete)
    objective = pe.SurgeryELBO(9)
    loss_and_grads(objective, model, guide)
    surgery = objective.last_surgery
    assert surgery.total_correlation is None
    assert surgery.dimension_wise_kl is None
    torch.testing.assert_close(surgery.average_kl, surgery.mutual_information + surgery.marginal_kl)
    objective = pe.SurgeryELBO(9, site="b", num_particles=2)
    loss_and_grads(objective, model, guide)
    assert_adds_up(objective.last_surgery)
    assert objective.last_surgery.total_correlation == 0


def test_last_surgery_is_of_training_alone():
    module, x = pe.SurgeryELBO(40)(Model(), Guide()), rows(6, 3)
    objective = module.elbo
    terms = objective.terms(module.model, module.guide, x)
    objective.loss(module.model, module.guide, x)
    with torch.no_grad():
        module(x)
    assert objective.last_surgery is None
    evaluated = objective.surgery(terms)
    assert_adds_up(evaluated)
    assert objective.last_surgery is None
    module(x)
    assert_adds_up(objective.last_surgery)
    before = objective.last_surgery
    with torch.inference_mode():
        module(x)
    objective.loss(module.model, module.guide, x)
    assert objective.last_surgery is before
