"""Importance weights by level: global latents, and those of each datum given them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.conjugate import Hierarchy
from pyro.infer import autoguide

import pyproelbo as pe

QUIET = {"progress": False}


def hierarchy(num, wider=1.2):
    """A guide that is too wide at each level.

    Returns:
        Model and guide, the data, q(mu) and log p(x).
    """
    of = Hierarchy.of(num)
    guide = of.guide(factor=wider, local_factor=wider)
    return of.model, guide, of.x, of.of_mu(factor=wider), of.log_evidence


@pytest.mark.parametrize("num", [10, 200])
def test_global_weights_are_not_ruined_by_the_number_of_data(num):
    model, guide, x, _, truth = hierarchy(num)
    found = pe.evidence(model, guide, x, level="global", num_samples=500, **QUIET)
    assert abs(found.log_evidence.item() - truth.item()) < 4 * found.stderr.item()
    assert found.effective_sample_size.item() > 200
    weights = pe.psis(model, guide, x, level="global", num_samples=500, **QUIET)
    assert weights.khat.item() < 0.5 and weights.level == "global" and weights.per == "data set"
    joint = pe.psis(model, guide, x, level="joint", num_samples=500, **QUIET)
    assert pe.psis(model, guide, x, num_samples=500, **QUIET).khat == joint.khat
    if num == 200:
        assert joint.khat.item() > 0.7 and joint.effective_sample_size.item() < 50


def test_global_weights_are_unbiased():
    """For any number of local draws: the mean of many estimates, each of two."""
    model, guide, x, _, truth = hierarchy(5, wider=1.5)
    found = [
        pe.evidence(model, guide, x, level="global", num_samples=200, num_nested=2, seed=s, **QUIET)
        for s in range(30)
    ]
    ratio = torch.cat([(e.log_evidence - truth).exp() for e in found])
    error = ratio.std().item() / 30**0.5
    assert error < 0.05
    assert abs(ratio.mean().item() - 1) < 4 * error


def test_each_datum_given_the_global_latents():
    model, guide, x, q, _ = hierarchy(12)
    options = {"level": "local", "num_samples": 300, "num_nested": 80, **QUIET}
    found = pe.evidence(model, guide, x, **options)
    truth = dist.Normal(q.loc, 1.25**0.5).log_prob(x) - 0.5 * q.variance / 1.25
    assert ((found.log_evidence - truth).abs() < 5 * found.stderr).all()
    gap = 0.5 * (1.2**2 - 1) - math.log(1.2)  # KL of q to the posterior
    assert found.log_evidence.sub(found.elbo).mean().item() == pytest.approx(gap, abs=0.01)
    weights = pe.psis(model, guide, x, **options)
    assert weights.per == "datum" and weights.num_globals == 80 and (weights.khat < 0.5).all()
    assert "given 80 draws of the global latents" in str(weights)
    assert torch.allclose(weights.log_evidence, found.log_evidence, atol=0.02)


def test_one_bad_datum_is_found():
    model, _, x, _, _ = hierarchy(12)

    def narrow(x):
        mu = pyro.sample("mu", dist.Normal(0.7, 0.3))
        with pyro.plate("data", len(x)):
            scale = torch.where(torch.arange(len(x)) == 3, 0.1, 0.5)
            pyro.sample("z", dist.Normal((mu + 4 * x) / 5, scale))

    weights = pe.psis(model, narrow, x, level="local", **QUIET)
    bad = (weights.khat > 0.7).nonzero().flatten().tolist()
    assert bad == [3]


def test_draws_do_not_depend_on_how_many_are_made_at_once():
    model, guide, x, _, _ = hierarchy(7)
    options = {"level": "global", "num_samples": 30, "num_nested": 3, **QUIET}
    whole = pe.evidence(model, guide, x, **options)
    for chunk in (1, 7):
        torch.randn(3)
        again = pe.evidence(model, guide, x, chunk=chunk, **options)
        assert torch.allclose(again.log_evidence, whole.log_evidence, rtol=1e-9)


def test_auto_normal_has_levels_and_a_joint_draw_has_none():
    model, _, x, _, _ = hierarchy(6)
    guide = autoguide.AutoNormal(model)
    guide(x)
    found = pe.psis(model, guide, x, level="local", num_samples=50, num_nested=2, **QUIET)
    assert found.khat.shape == (6,)
    joint = autoguide.AutoMultivariateNormal(model)
    joint(x)
    with pytest.raises(ValueError, match="a joint draw of all latents has no levels"):
        pe.psis(model, joint, x, level="local")


def three_levels(num_groups=4, num_subgroups=3):
    """m ~ N(0, 1), a_g ~ N(m, 1), b_gs ~ N(a_g, 1), x_gs ~ N(b_gs, 1)."""
    x = torch.randn(num_groups, num_subgroups) + 0.5

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(m, 1.0))
            with pyro.plate("subgroups", x.shape[1], dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        m = pyro.sample("m", dist.Normal(0.3, 0.6))
        with pyro.plate("groups", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(0.4 * m + 0.5 * x.mean(1, keepdim=True), 0.8))
            with pyro.plate("subgroups", x.shape[1], dim=-1):
                pyro.sample("b", dist.Normal((a + x) / 2, 0.75))

    size = num_groups * num_subgroups
    group = torch.arange(size) // num_subgroups
    same = (group[:, None] == group).double()
    covariance = torch.ones(size, size) + same + 2 * torch.eye(size)
    return (
        model,
        guide,
        x,
        dist.MultivariateNormal(torch.zeros(size), covariance).log_prob(x.flatten()),
    )


@pytest.mark.parametrize("level", ["joint", "global"])
def test_three_levels(level):
    model, guide, x, truth = three_levels()
    options = {"level": level, "num_samples": 2000, "num_nested": 30, **QUIET}
    found = pe.evidence(model, guide, x, plate="groups", **options)
    assert abs(found.log_evidence.item() - truth.item()) < 4 * found.stderr.item()
    assert found.stderr.item() < 0.3
