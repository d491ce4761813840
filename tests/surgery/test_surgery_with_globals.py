"""The surgery of local latents with global ones beside them: means over draws of these."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyproelbo as pe

N = 40


def hierarchy():
    """mu ~ N(0, 2), z_n ~ N(mu, 1), x_n ~ N(z_n, 1/2), with the exact guide given mu."""
    x = 0.7 + 1.25**0.5 * rows(N)
    precision = 1 / 4 + N / 1.25
    q = dist.Normal(x.sum() / 1.25 / precision, 1.3 * precision**-0.5)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        mu = pyro.sample("mu", q)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((mu + 4 * x) / 5, 0.2**0.5))

    return model, guide, x, q


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
