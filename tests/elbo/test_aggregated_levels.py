"""SurgeryELBO of latents that the guide draws given each other."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from helpers.aggregates import assert_adds_up, nested
from helpers.losses import PARTICLES, captured, initialised, loss_and_grads, of_module
from helpers.oracles import log_weight, rows
from torch import nn

import pyproelbo as pe
from pyproelbo.elbo import minibatch
from pyproelbo.guides import hvae as hvae_guides
from pyproelbo.models.hvae import HVAE


def hvae(size=None):
    torch.manual_seed(3)
    options = {"hidden": (8,), "dataset_size": size, "log_scale": (-3.0, 1.0)}
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


@pytest.mark.slow
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
        with pytest.raises(ValueError, match="at its own x differs from before"):
            objective.loss_and_grads(model, guide, rows(6, 5))
