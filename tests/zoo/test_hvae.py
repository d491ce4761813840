"""The VAE of two levels: its parts by hand, its ELBO level by level, and its surgery."""

import pytest
import torch
from helpers.oracles import gradients, mean_and_stderr, rows
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyproelbo as pe
from pyproelbo.guides.hvae import Diagonal
from pyproelbo.models.hvae import HVAE
from pyproelbo.models.nets import Joined, gated_mlp, mlp
from pyproelbo.models.vae import BernoulliLikelihood
from pyproelbo.priors import AggregatePosterior, RandomInputs

SIZES = (3, 2), 4
NETS = {
    "linear": {},
    "mlp": {"hidden": (5,)},
    "gated": {"hidden": (5, 6), "net": gated_mlp, "log_scale": (-3.0, 1.0)},
}


def pair(nets="mlp", prior="standard", num=6):
    """Model and guide with much to learn, their data, and both as one module."""
    x = rows(num, 4)
    torch.manual_seed(0)
    guide = Diagonal(*SIZES, **NETS[nets])
    model = HVAE(*SIZES, **NETS[nets], prior=PRIORS[prior](guide, x))
    with torch.no_grad():
        for parameter in [*model.prior_net.parameters(), *guide.parameters()]:
            parameter.mul_(1.5)
    return model, guide, x, nn.ModuleList([model, guide])


PRIORS = {
    "standard": lambda guide, x: None,
    "vamp": lambda guide, x: pe.VampPrior(guide.posterior, 7, RandomInputs((4,))),
    "all data": lambda guide, x: AggregatePosterior(guide.posterior, x),
}


def by_hand(model, guide, x, *eps):
    """Reconstruction, log q - log p of z2 and of z1, and the KL of z1 in closed form: (B,) each."""
    q2 = guide.posterior(x)
    z2 = q2.mean + q2.stddev * eps[0]
    q1, p1 = guide.conditional_posterior(x, z2), model.conditional_prior(z2)
    z1 = q1.mean + q1.stddev * eps[1]
    reconstruction = model.decode(z1, z2).log_prob(x)
    sampled2 = q2.log_prob(z2) - model.prior().log_prob(z2)
    sampled1 = q1.log_prob(z1) - p1.log_prob(z1)
    return reconstruction, sampled2, sampled1, kl_divergence(q1, p1)


def noise(num=6, seed=1):
    """What the guide's normals draw at a seed, z2 first."""
    torch.manual_seed(seed)
    return [torch.normal(torch.zeros(num, k), torch.ones(num, k)) for k in (2, 3)]


# --- the parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [mlp, gated_mlp])
def test_a_net_of_two_inputs(net):
    joined = Joined((4, 2), (5, 3), 7, net)
    x, z = rows(6, 4), rows(2, 6, 2)
    both = torch.cat([joined.own[0](x).expand(2, 6, 5), joined.own[1](z)], -1)
    torch.testing.assert_close(joined(x, z), joined.joint(both))
    wide = [m for m in joined.joint if isinstance(m, nn.Linear)]
    assert wide[0].in_features == 10 and wide[-1].out_features == 7


def test_a_linear_net_of_two_inputs():
    joined, x, z = Joined((4, 2), (), 7), rows(6, 4), rows(6, 2)
    (linear,) = joined.joint
    torch.testing.assert_close(joined(x, z), linear(torch.cat([x, z], -1)))


def test_the_sizes_of_the_paper():
    """Tomczak & Welling's HVAE: for MNIST, with 300 gated units a layer and 40 latents a level."""
    options = {"hidden": (300, 300), "net": gated_mlp, "log_scale": (-3.0, 1.0)}
    model = HVAE((40, 40), 784, likelihood=BernoulliLikelihood(), **options)
    guide = Diagonal((40, 40), 784, **options)

    def gated(n, m):
        return 2 * (n + 1) * m

    def linear(n, m):
        return (n + 1) * m

    decoder = 2 * gated(40, 300) + gated(600, 300) + linear(300, 784)
    prior = gated(40, 300) + gated(300, 300) + 2 * linear(300, 40)
    q2 = gated(784, 300) + gated(300, 300) + 2 * linear(300, 40)
    q1 = gated(784, 300) + gated(40, 300) + gated(600, 300) + 2 * linear(300, 40)
    assert sum(p.numel() for p in model.parameters()) == decoder + prior
    assert sum(p.numel() for p in guide.parameters()) == q2 + q1


def test_model_and_guide_of_different_widths():
    model, guide = HVAE(*SIZES, hidden=(5, 7)), Diagonal(*SIZES, hidden=(5, 7))
    assert [layer[0].out_features for layer in model.decoder.own] == [5, 5]
    assert [layer[0].out_features for layer in guide.encoder1.own] == [7, 7]
    assert guide.encoder2[0].out_features == 7


# --- the ELBO ----------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("nets", NETS)
@pytest.mark.parametrize("prior", ["standard", "vamp"])
def test_against_pyros_own_elbo(prior, nets, particles):
    model, guide, x, module = pair(nets, prior)
    options = {
        "num_particles": particles,
        "vectorize_particles": particles > 1,
        "max_plate_nesting": 1 + (particles > 1),
    }
    found = []
    for objective in (Trace_ELBO(**options), pe.BetaELBO(kl="sampled", **options)):
        torch.manual_seed(3)
        loss = objective.differentiable_loss(model, guide, x)
        found.append([loss, *gradients(loss, module)])
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("prior", ["standard", "vamp"])
def test_a_beta_for_each_level(prior):
    """Loss and gradients by hand; the KL is in closed form but against a mixture."""
    model, guide, x, module = pair("gated", prior)
    reconstruction, sampled2, _, kl1 = by_hand(model, guide, x, *noise())
    kl2 = sampled2 if prior == "vamp" else kl_divergence(guide.posterior(x), model.prior())
    expected = -(reconstruction - 0.3 * kl1 - 4.0 * kl2).sum()

    objective = pe.BetaELBO(beta={"z1": 0.3, "z2": 4.0}, max_plate_nesting=1)
    torch.manual_seed(1)
    loss = objective.differentiable_loss(model, guide, x)
    assert objective.last_terms.analytic == ({"z1"} if prior == "vamp" else {"z1", "z2"})
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, module), gradients(expected, module))
    for name, kl in {"z1": kl1, "z2": kl2}.items():
        torch.testing.assert_close(objective.last_terms.kl[name], kl.detach())


def test_the_closed_form_of_the_lower_level_is_valid():
    """Given the sample of z2, on average over it: the same as log q - log p."""
    model, guide, x, _ = pair("gated")
    options = {"num_particles": 4000, "vectorize_particles": True, "max_plate_nesting": 1}
    objectives = [pe.BetaELBO(kl=kl, **options) for kl in ("auto", "sampled")]
    kls = [objective.terms(model, guide, x).kl["z1"] for objective in objectives]
    (mean, error), (other, other_error) = map(mean_and_stderr, kls)
    assert ((mean - other).abs() < 4 * (error.square() + other_error.square()).sqrt()).all()


def test_the_encoder_of_the_upper_level_is_that_of_the_prior():
    model, guide, *_ = pair("mlp", "vamp")
    components = model.prior().components
    torch.testing.assert_close(components.mean, guide.posterior(model.prior.pseudo_inputs).mean)
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in guide.parameters())
    assert model(num=9).shape == (9, 4)


# --- surgery -----------------------------------------------------------------------------------

LEVELS = {"z2": {"site": "z2"}, "z1 given z2": {"site": "z1", "given": "z2"}, "both": {}}


@pytest.mark.parametrize("prior", PRIORS)
def test_surgery_of_either_level_and_of_both(prior):
    """The parts of both levels are those of z2 and of z1 given z2, exactly, whatever the prior."""
    model, guide, x, _ = pair("gated", prior, num=40)
    found = {name: pe.surgery(model, guide, x, num_samples=3, **LEVELS[name]) for name in LEVELS}
    upper, lower, both = found.values()
    for name in ("average_kl", "mutual_information", "marginal_kl"):
        total = getattr(upper, name) + getattr(lower, name)
        assert total == pytest.approx(getattr(both, name), abs=1e-9), name
        assert getattr(lower, name) > 0.05, name
    for s in found.values():
        assert s.elbo == pytest.approx(both.elbo, abs=1e-9)
        assert s.average_kl == pytest.approx(s.mutual_information + s.marginal_kl, abs=1e-9)
        parts = s.mutual_information + s.marginal_kl + s.other_kl
        assert s.elbo == pytest.approx(s.reconstruction - parts, abs=1e-9)
    assert upper.dims == ("z2[0]", "z2[1]") and upper.total_correlation is not None
    assert lower.dims == ("z1[0]", "z1[1]", "z1[2]") and lower.total_correlation is None
    if prior == "standard":
        assert upper.kl_per_dim.sum().item() == pytest.approx(upper.average_kl)
    if prior == "all data":  # p(z2) is then q(z2), and the average KL all information
        assert upper.marginal_kl == pytest.approx(0.0, abs=1e-9)


def test_the_marginal_kl_of_pseudo_inputs_that_are_the_data():
    model, guide, x, _ = pair("mlp", num=40)
    model.prior = pe.VampPrior(guide.posterior, len(x), lambda num: x)
    s = pe.surgery(model, guide, x, site="z2")
    assert s.mutual_information > 0.1
    assert s.marginal_kl == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("prior", ["standard", "vamp"])
@pytest.mark.parametrize("site", ["z2", None])
def test_surgery_while_it_trains(site, prior):
    model, guide, x, module = pair("gated", prior)
    objective = pe.SurgeryELBO(60, site=site)
    torch.manual_seed(1)
    loss = objective.differentiable_loss(model, guide, x)
    torch.manual_seed(1)
    expected = pe.BetaELBO().differentiable_loss(model, guide, x)
    assert torch.equal(loss, expected)
    ours, theirs = (gradients(value, module) for value in (loss, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    _, sampled2, sampled1, _ = by_hand(model, guide, x, *noise())
    surgery = objective.last_surgery
    kl = sampled2 if site else sampled2 + sampled1
    torch.testing.assert_close(surgery.average_kl, kl.mean().detach())
    torch.testing.assert_close(surgery.average_kl, surgery.mutual_information + surgery.marginal_kl)
    assert (surgery.total_correlation is None) == (site is None)


@pytest.mark.parametrize("prior", ["standard", "vamp"])
def test_training_lowers_the_loss(prior):
    x = (rows(64, 2) @ rows(2, 4) > 0).to(rows(1))
    model, guide, _, module = pair("gated", prior)
    model.likelihood = BernoulliLikelihood()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    objective, losses = pe.BetaELBO(max_plate_nesting=1), []
    for _ in range(100):
        optimizer.zero_grad()
        loss = objective.differentiable_loss(model, guide, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
