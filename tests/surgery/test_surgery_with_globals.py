"""The surgery of local latents with global ones beside them: means over draws of these."""

import pyro.distributions as dist
import pytest
import torch
from helpers.conjugate import Hierarchy
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyproelbo as pe

N = 40


def hierarchy():
    """With a guide that is exact given mu, of which q is too wide."""
    of = Hierarchy.of(N)
    return of.model, of.guide(factor=1.3), of.x, of.of_mu(factor=1.3)


def test_against_closed_forms():
    model, guide, x, q = hierarchy()
    found = pe.surgery(model, guide, x, site="z", num_nested=40, progress=False)
    kl = torch.distributions.kl_divergence(q, dist.Normal(0.0, 2.0)).item() / N
    assert found.global_kl == pytest.approx(kl, rel=1e-6)
    # E_q KL(q(z | x_n, mu) || N(mu, 1)), the mean over n and mu
    square = (0.64 * ((x - q.mean) ** 2 + q.variance)).mean().item()
    average = 0.5 * (0.2 - 1 + square) - 0.5 * torch.tensor(0.2).log().item()
    assert abs(found.average_kl - average) < 4 * found.stderr["average_kl"] + 1e-9
    parts = found.reconstruction - found.average_kl - found.global_kl
    assert found.elbo == pytest.approx(parts, rel=1e-9)
    whole = pe.decompositions(model, guide, x, num_samples=2000, progress=False)
    error = (found.stderr["elbo"] ** 2 + (whole.elbo.stderr / N) ** 2) ** 0.5
    assert abs(found.elbo - whole.elbo.value / N) < 4 * error
    assert found.num_globals == 40 and "KL of global latents / N" in str(found)
    assert found.mutual_information <= found.log_n
    again = pe.surgery(model, guide, x, site="z", num_nested=40, batch_size=7, progress=False)
    assert again.elbo == pytest.approx(found.elbo, rel=1e-6)


def test_auto_guides():
    model, _, x, _ = hierarchy()
    guide = AutoNormal(model)
    guide(x)
    found = pe.surgery(model, guide, x, site="z", num_nested=3, progress=False)
    assert found.num_globals == 3 and found.dims == ("z",)
    joint = AutoMultivariateNormal(model)
    joint(x)
    with pytest.raises(ValueError):
        pe.surgery(model, joint, x, site="z", progress=False)


def test_a_global_latent_has_no_aggregate():
    model, guide, x, _ = hierarchy()
    for site in (None, "mu"):
        with pytest.raises(ValueError, match=r"'mu' is in no plate|the latent sites are"):
            pe.surgery(model, guide, x, site=site, progress=False)
