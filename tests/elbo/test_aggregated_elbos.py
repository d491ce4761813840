"""SurgeryELBO and TotalCorrelationELBO: what they train, what they report, what they refuse."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from helpers.losses import PARTICLES, captured, initialised, loss_and_grads, of_module
from helpers.oracles import log_weight, rows
from helpers.vae import Guide, Model
from pyro import poutine
from pyro.distributions.testing import fakes
from pyro.infer.autoguide import AutoRegressiveMessenger
from torch import nn

import pyproelbo as pe
from pyproelbo.elbo import minibatch
from pyproelbo.guides import hvae as hvae_guides
from pyproelbo.guides.ppca import FullCovariance
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.hvae import HVAE
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vae import VAE
from pyproelbo.schedules import Linear

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


def assert_adds_up(surgery):
    assert all(value.dim() == 0 and not value.requires_grad for value in surgery)
    close = torch.testing.assert_close
    close(surgery.average_kl, surgery.mutual_information + surgery.marginal_kl)
    close(surgery.marginal_kl, surgery.total_correlation + surgery.dimension_wise_kl)


def vae(size=None):
    torch.manual_seed(3)
    return VAE(3, 5, hidden=(8,), size=size), Diagonal(3, 5, hidden=(8,), size=size)


def ppca(size=None):
    torch.manual_seed(3)
    return PPCA(3, 5, size=size), FullCovariance(3, 5, size=size)


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


def nested(guide_of_y=None):
    """Two latents for each of 4 of 12 data, one in an inner plate of 3 with 2 dims."""

    def data():
        return pyro.plate("data", 12, subsample_size=4, dim=-2)

    def model():
        with data():
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(y[..., None], torch.ones(2)).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=programs.noise(4, 3))

    def guide():
        loc, scale = programs.real("loc", 4, 1), programs.positive("scale", 4, 1)
        with data():
            y = pyro.sample("y", dist.Normal(loc, scale))
            with pyro.plate("inner", 3, dim=-1):
                loc, scale = programs.real("lz", 4, 3, 2), programs.positive("sz", 4, 3, 2)
                loc = loc if guide_of_y is None else guide_of_y(loc, y[..., None])
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


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


def discrete():
    """A latent of each datum that cannot be reparameterised, and one of unknown marginals."""
    probs = programs.noise(4).sigmoid()

    def model():
        with pyro.plate("data", 4):
            b = pyro.sample("b", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + b, 1.0), obs=programs.noise(4))

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("b", dist.Bernoulli(probs))
            mixed = dist.Categorical(torch.ones(4, 2) / 2)
            normals = dist.Normal(programs.real("l", 4, 2, 2), 1.0).to_event(1)
            pyro.sample("z", dist.MixtureSameFamily(mixed, normals))

    return model, guide


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


# --- latents that the guide draws given each other ----------------------------------------------


def hvae(size=None):
    torch.manual_seed(3)
    options = {"hidden": (8,), "size": size, "log_scale": (-3.0, 1.0)}
    return HVAE((3, 2), 5, **options), hvae_guides.Diagonal((3, 2), 5, **options)


def joint_by_hand(log_q, samples, estimator, size):
    """I(n; z) of one particle, from log_q(i, j), the density of z_i at x_j."""
    num = len(samples)
    pairs = torch.stack([torch.stack([log_q(i, j) for j in range(num)]) for i in range(num)])
    weights = torch.tensor(
        [[log_weight(estimator, i, j, num, size) for j in range(num)] for i in range(num)]
    )
    return (pairs.diagonal() - (weights + pairs).logsumexp(1)).mean()


@pytest.mark.parametrize("estimator", ["stratified", "weighted"])
@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("at_once", [2**16, 7])
def test_two_levels_jointly(at_once, particles, estimator, monkeypatch):
    """The ELBO is trained to the last bit; information pair by pair, in blocks or at once."""
    monkeypatch.setattr(minibatch, "_PAIRS", at_once)
    model, guide = hvae(40)
    x, kwargs = rows(6, 5), PARTICLES[particles]
    objective = pe.SurgeryELBO(40, estimator=estimator, **kwargs)
    objective.loss(model, guide, x)
    loss, grads = of_module(objective(model, guide), x)
    state, surgery = torch.get_rng_state(), objective.last_surgery
    expected = of_module(pe.BetaELBO(1.0, **kwargs)(model, guide), x)
    assert torch.equal(loss, expected[0]) and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True))

    pyro.set_rng_seed(1)
    found = []
    for terms in pe.BetaELBO(**kwargs)._particles(model, guide, (x,), {}):
        latents = terms.latents[0]
        z2, z1 = (latents[name].value.reshape(-1, 6, k) for name, k in (("z2", 2), ("z1", 3)))
        for a, b in zip(z2, z1, strict=True):

            def log_q(i, j, a=a, b=b):
                q1 = guide.conditional_posterior(x[j], a[i])
                return guide.posterior(x[j]).log_prob(a[i]) + q1.log_prob(b[i])

            found.append(joint_by_hand(log_q, a, estimator, 40))
    torch.testing.assert_close(surgery.mutual_information, torch.stack(found).mean().detach())
    terms = objective.last_terms
    torch.testing.assert_close(surgery.marginal_kl, surgery.average_kl - surgery.mutual_information)
    assert surgery.total_correlation is None and surgery.dimension_wise_kl is None
    sampled = pe.BetaELBO(1.0, kl="sampled", **kwargs)
    of_module(sampled(model, guide), x)
    torch.testing.assert_close(surgery.average_kl, sampled.last_terms.shrinkage / 40)
    torch.testing.assert_close(surgery.reconstruction, terms.reconstruction / 40)


def test_the_upper_level_alone():
    """It depends on x alone: as any latent, its total correlation too."""
    model, guide = hvae()
    x = rows(6, 5)
    for objective in (
        pe.SurgeryELBO(40, site="z2"),
        pe.TotalCorrelationELBO(1, 2, 3, 40, site="z2"),
    ):
        objective.loss_and_grads(model, guide, x)
        assert_adds_up(objective.last_surgery)
    for objective in (pe.SurgeryELBO(40, site="z1"), pe.TotalCorrelationELBO(site="z1")):
        with pytest.raises(ValueError, match=r"'z1' given its sample of \['z2'\].*given=\.\.\."):
            objective.loss_and_grads(model, guide, x)
    with pytest.raises(ValueError, match=r"q\(z_d . x\) of its dimensions is not known"):
        pe.TotalCorrelationELBO().loss_and_grads(model, guide, x)


def test_two_levels_of_the_whole_data_as_one_batch():
    model, guide = hvae()
    x = rows(40, 5)
    exact = pe.surgery(model, guide, x, num_samples=100, progress=False)
    kwargs = {"num_particles": 100, "vectorize_particles": True, "max_plate_nesting": 1}
    objective = pe.SurgeryELBO(None, **kwargs)
    terms = objective.terms(model, guide, x)
    with pytest.raises(ValueError, match=r"call surgery\(terms, guide, ...\)"):
        objective.surgery(terms)
    ours = objective.surgery(terms, guide, x)
    for name in ("mutual_information", "marginal_kl", "average_kl", "reconstruction"):
        assert getattr(ours, name).item() == pytest.approx(getattr(exact, name), abs=0.05), name
    assert exact.mutual_information > 0.05


def test_one_latent_given_another_in_inner_plates():
    model, guide = initialised(lambda: nested(lambda loc, y: loc + y))
    objective = pe.SurgeryELBO(None, plate="data")
    loss_and_grads(objective, model, guide)
    latents = pe.BetaELBO()
    pyro.set_rng_seed(1)
    latents = next(iter(latents._particles(model, guide, (), {}))).latents[0]
    y, z = latents["y"].value, latents["z"].value
    q_y = dist.Normal(programs.real("loc", 4, 1), programs.positive("scale", 4, 1))
    lz, sz = programs.real("lz", 4, 3, 2), programs.positive("sz", 4, 3, 2)

    def log_q(i, j):
        log_q_z = dist.Normal(lz[j] + y[i], sz[j]).log_prob(z[i]).sum()
        return q_y.log_prob(y[i])[j, 0] + log_q_z

    information = joint_by_hand(log_q, y, "stratified", 12)
    torch.testing.assert_close(objective.last_surgery.mutual_information, information.detach())


@pytest.mark.parametrize("particles", [{}, {"num_particles": 3}])
def test_capture_of_two_levels(particles):
    model, guide = hvae()
    module, x = pe.SurgeryELBO(40, **particles)(model, guide), rows(6, 5)
    loss, grads = of_module(module, x)
    surgery = module.elbo.last_surgery
    captured_loss, found, captured_surgery = captured(
        module, x, also=lambda: [value for value in module.elbo.last_surgery if value is not None]
    )
    assert torch.equal(captured_loss, loss)
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))
    assert torch.equal(captured_surgery[2], surgery.mutual_information)


class Levels(nn.Module):
    """A guide of two levels, of which the second is what a test makes of x and z2."""

    def __init__(self, second, size=None):
        super().__init__()
        self.norm, self.second, self.size = nn.BatchNorm1d(5), second, size

    def forward(self, x):
        with pyro.plate("data", len(x)):
            x = self.norm(x)
            z2 = pyro.sample("z2", dist.Normal(x[:, :2], 0.5).to_event(1))
            pyro.sample("z1", dist.Normal(self.second(x, z2), 0.5).to_event(1))


def test_running_means_stay_as_a_step_leaves_them():
    model, _ = hvae()
    x = rows(6, 5)
    guides = [Levels(lambda x, z2: x[:, :3] + z2[..., :1]) for _ in range(2)]
    for objective, guide in zip((pe.SurgeryELBO(40), pe.BetaELBO()), guides, strict=True):
        for _ in range(2):
            objective.loss_and_grads(model, guide, x)
    for ours, theirs in zip(*(guide.buffers() for guide in guides), strict=True):
        assert torch.equal(ours, theirs)


SECONDS = {
    "no broadcasting": lambda x, z2: torch.cat([x, z2], -1)[:, 3:6],
    "a mean over the batch": lambda x, z2: x[:, :3] + z2.mean(0)[..., :1],
    "dropout": lambda x, z2: nn.functional.dropout(x[:, :3] + z2[..., :1]),
}


@pytest.mark.parametrize("why", SECONDS)
def test_guides_that_are_no_function_of_one_datums_z(why):
    model, _ = hvae()
    objective, guide = pe.SurgeryELBO(40), Levels(SECONDS[why])
    for _ in range(2):  # a refused guide stays refused
        with pytest.raises(ValueError, match="does not give the density that it gave before"):
            objective.loss_and_grads(model, guide, rows(6, 5))


def test_schedules_and_positions():
    objective = pe.TotalCorrelationELBO(1.0, Linear(1.0, 5.0, 4), 1.0, 40, "weighted")
    assert objective.dataset_size == 40
    assert objective.estimator == "weighted"
    module, x = objective(Model(), Guide()), rows(6, 3)
    for step in range(3):
        pyro.set_rng_seed(1)
        loss = module(x)
        loss.backward()
        terms, surgery = objective.last_terms, objective.last_surgery
        expected = terms.elbo - 6 * step * surgery.total_correlation  # Linear: 1 + step
        torch.testing.assert_close(loss.detach(), -expected)
    assert objective.step == 3


OBJECTIVES = {
    "surgery": lambda **kwargs: pe.SurgeryELBO(40, **kwargs),
    "total correlation": lambda **kwargs: pe.TotalCorrelationELBO(0.5, 3.0, 2.0, 40, **kwargs),
}


@pytest.mark.parametrize("particles", [{}, {"num_particles": 3}])
@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_capture(name, in_blocks, particles, monkeypatch):
    """One graph of loss, gradients and surgery, which equals eager and reads no value."""
    if in_blocks:
        defaults = ("stratified", 40, None)
        monkeypatch.setattr(minibatch.log_densities, "__defaults__", defaults)
    model, guide, x = Model(), Guide(), rows(6, 3)
    module = OBJECTIVES[name](**particles)(model, guide)
    loss, grads = of_module(module, x)
    surgery = module.elbo.last_surgery
    captured_loss, found, captured_surgery = captured(
        module, x, also=lambda: tuple(module.elbo.last_surgery)
    )
    assert torch.equal(captured_loss, loss)
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(captured_surgery, surgery, strict=True))


def test_independence_is_asked_once_for_each_guide():
    calls = []
    model, guide = initialised(programs.local_normal)
    counted = lambda: calls.append(1) or guide()  # noqa: E731
    objective = pe.SurgeryELBO(None)
    objective.loss_and_grads(model, counted)
    first = len(calls)
    objective.loss_and_grads(model, counted)
    assert first > 2
    assert len(calls) == first + 1


def test_the_check_leaves_running_means_alone():
    class Normalised(Guide):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return super().forward(self.norm(x))

    torch.manual_seed(0)
    guide, x = Normalised(), rows(6, 3)
    other = copy.deepcopy(guide)
    pe.BetaELBO().loss_and_grads(Model(), guide, x)
    pe.SurgeryELBO(40).loss_and_grads(Model(), other, x)
    for ours, theirs in zip(other.buffers(), guide.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_and_copies():
    module, x = pe.SurgeryELBO(40)(Model(), Guide()), rows(6, 3)
    module(x).backward()
    assert set(module.elbo.state_dict()) == {"_extra_state"}
    copied = copy.deepcopy(module)
    assert torch.equal(of_module(copied, x)[0], of_module(module, x)[0])
    assert copied.elbo.last_surgery == module.elbo.last_surgery


def test_float32():
    torch.set_default_dtype(torch.float32)
    for make in OBJECTIVES.values():
        module = make()(Model(), Guide())
        loss = module(rows(6, 3))
        assert {v.dtype for v in (loss, *module.elbo.last_surgery)} == {torch.float32}


def test_training_lowers_the_total_correlation():
    """Two dimensions that the data correlate, a decoder that cannot mix them."""
    mix = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.4, 0.0]])
    x = 3 * rows(200, 2) @ mix
    found = {}
    for beta in (1.0, 10.0):
        torch.manual_seed(0)
        module = pe.TotalCorrelationELBO(beta=beta, dataset_size=200)(Model(), Guide())
        decoder = module.model.decoder.requires_grad_(False)
        decoder.weight.copy_(3 * torch.eye(3, 2))
        optimizer = torch.optim.Adam(module.guide.parameters(), lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            module(x[torch.randperm(200)[:50]]).backward()
            optimizer.step()
        objective = pe.SurgeryELBO(None, num_particles=5)
        objective(module.model, module.guide)(x)
        found[beta] = objective.last_surgery.total_correlation.item()
    assert found[1.0] > 0.5
    assert found[10.0] < found[1.0] / 3


def test_complaints_of_constructors():
    for make, message in [
        (lambda: pe.SurgeryELBO(1), "dataset_size should be a whole number of at least 2"),
        (lambda: pe.SurgeryELBO(60.5), "dataset_size should be a whole number of at least 2"),
        (lambda: pe.SurgeryELBO(60, estimator="exact"), "estimator should be one of"),
        (lambda: pe.TotalCorrelationELBO(estimator="mss"), "estimator should be one of"),
        (lambda: pe.TotalCorrelationELBO(-1.0), "alpha should not be negative"),
        (lambda: pe.TotalCorrelationELBO(beta=-1.0), "beta should not be negative"),
        (lambda: pe.TotalCorrelationELBO(gamma=-1.0), "gamma should not be negative"),
        (lambda: pe.SurgeryELBO(60, kl="exact"), "kl should be"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


REFUSED = {
    "of no plate": ("nested_plates", "a", {}, "site 'a' is in no plate"),
    "all, one of no plate": ("subsampled", None, {}, "site 'm' is in no plate"),
    "of several plates": ("nested_plates", "c", {}, r"in plates \['inner', 'outer'\]: name the"),
    "of another plate": ("nested_plates", "b", {"plate": "inner"}, r"plates \['outer'\], not in"),
    "of plates apart": ("sequential", None, {}, "site 'z_0' is in no plate"),
    "given another": ("nested_plates", "b", {}, r"draws 'b' given its sample of \['a'\]"),
    "masked": ("imputed", "x_unobserved", {}, "site 'x_unobserved' is masked"),
    "masked and scaled": ("scaled_and_masked", "z", {}, "site 'z' is masked"),
    "fixed": ("parameters_only", "y", {}, "not that of one sample"),
    "joint": ("AutoMultivariateNormal", "p", {}, "is in no plate"),
    "joint, by its own name": (
        "AutoMultivariateNormal",
        "_AutoMultivariateNormal_latent",
        {},
        "is in no plate",
    ),
    "unknown": ("local_normal", "zz", {}, r"names 'zz', but the latent sites are \['z'\]"),
    "nothing": ("nothing_latent", None, {}, "there is no latent site"),
    "another size": ("subsampled", "z", {"dataset_size": 7}, "its 3 rows stand for 6"),
    "too small a size": ("local_normal", "z", {"dataset_size": 4}, "less than the 5 data"),
    "enumerated": ("guide_enumerated_and_sampled", "z", {}, "latents that are enumerated"),
}


@pytest.mark.filterwarnings("ignore:.*possibly invalid dependency")
@pytest.mark.parametrize("why", REFUSED)
def test_refused(why):
    name, site, kwargs, message = REFUSED[why]
    model, guide = initialised((programs.REPARAMETERISED | programs.ENUMERATED)[name])
    kwargs = {"dataset_size": None, "max_plate_nesting": 2, **kwargs}
    for objective in (
        pe.SurgeryELBO(site=site, **kwargs),
        pe.TotalCorrelationELBO(site=site, **kwargs),
    ):
        for _ in range(2):  # a refused guide stays refused
            with pytest.raises(ValueError, match=message):
                objective.loss_and_grads(model, guide)


def one_latent(q, p=None, scale=1.0, model_scale=1.0, num=4, plates=("data",)):
    """A latent of q, with scales of its own."""

    def program(d, scale):
        with pyro.plate("data", num), poutine.scale(scale=scale):
            return pyro.sample("z", d)

    return lambda: program(p or dist.Normal(0.0, 1.0), model_scale), lambda: program(q, scale)


def test_refused_scales_masks_and_short_batches():
    q = dist.Normal(programs.noise(4), 1.0)
    one = dist.Normal(programs.noise(1), 1.0)
    mask = torch.tensor([True, False, True, True])
    for kwargs, message in [
        ({"q": q, "scale": 3.0}, "has its density scaled by 3.0, where plate 'data' gives 1.0"),
        ({"q": q, "model_scale": 3.0}, "has its density scaled by 3.0"),
        ({"q": q, "scale": torch.tensor(3.0)}, "has its density scaled by 3.0"),
        ({"q": q.mask(mask)}, "site 'z' is masked"),
        ({"q": q, "p": dist.Normal(0.0, 1.0).expand([4]).mask(mask)}, "site 'z' is masked"),
        ({"q": one, "num": 1}, "a batch of 1"),
    ]:
        model, guide = one_latent(**kwargs)
        with pytest.raises(ValueError, match=message):
            pe.SurgeryELBO(40, kl="sampled").loss_and_grads(model, guide)


def test_a_scale_of_one_may_be_a_tensor():
    q = dist.Normal(programs.noise(4), 1.0)
    losses = []
    for scale in (1.0, torch.tensor(1.0), torch.ones(1)):
        pyro.set_rng_seed(0)
        model, guide = one_latent(q, scale=scale)
        losses.append(pe.SurgeryELBO(40, kl="sampled").loss_and_grads(model, guide))
    assert losses[1:] == pytest.approx(losses[:1] * 2)


def test_refused_by_total_correlation_alone():
    fake = fakes.NonreparameterizedNormal(programs.noise(4), 1.0)
    with pytest.raises(ValueError, match="NonreparameterizedNormal of site 'z' cannot be"):
        pe.TotalCorrelationELBO(dataset_size=40).loss(*one_latent(fake))
    with pytest.raises(ValueError, match="cannot be reparameterised"):
        pe.TotalCorrelationELBO(site="b").loss(*initialised(discrete))

    flow = dist.TransformedDistribution(
        dist.Normal(torch.zeros(4, 2), 1.0).to_event(1),
        [dist.transforms.LowerCholeskyAffine(torch.zeros(2), torch.eye(2) + 0.5)],
    )
    model, guide = one_latent(flow, dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"the marginals of the guide's distributions of \['z'\]"):
        pe.TotalCorrelationELBO(dataset_size=40).loss(model, guide)
    pe.SurgeryELBO(40).loss_and_grads(model, guide)


def test_refused_messenger():
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=programs.noise(4))

    guide = AutoRegressiveMessenger(model)
    with pytest.raises(ValueError, match=r"draws 'z' given its sample of \['m'\]"):
        pe.SurgeryELBO(40, site="z").loss_and_grads(model, guide)


def test_refused_given_a_latent_of_the_same_datum():
    model, guide = initialised(lambda: nested(lambda loc, y: loc + y))
    with pytest.raises(ValueError, match=r"draws 'z' given its sample of \['y'\]"):
        pe.TotalCorrelationELBO(plate="data").loss(model, guide)
    objective = pe.TotalCorrelationELBO(site="y")
    objective.loss_and_grads(model, guide)
    assert_adds_up(objective.last_surgery)
