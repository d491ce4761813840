"""The Fisher divergence of posteriors that are known."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.conjugate import Hierarchy, guide_of, model, ppca_and_data
from helpers.oracles import rows
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal

import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal, Exact

QUIET = {"progress": False}


def of_normal(ratio, shift):
    """Times q's variance, of a q that is wider by a ratio, and off by some sds of the posterior."""
    return (ratio**2 - 1) ** 2 + ratio**2 * shift**2


@pytest.mark.parametrize("ratio, shift", [(1.0, 0.0), (1.5, 0.0), (0.5, 0.0), (1.2, 0.7), (5, 3)])
def test_a_normal_posterior_of_each_datum(ratio, shift):
    x, sd = rows(7), 0.5**0.5
    found = pe.fisher_divergence(
        model, guide_of(ratio * sd, shift * sd), x, num_samples=4000, **QUIET
    )
    expected = of_normal(ratio, shift)
    assert found.dims == ("z",) and found.scaled.shape == (7, 1) and found.per == "datum"
    assert ((found.scaled - expected).abs() <= 5 * found.scaled_stderr + 1e-9).all()
    unscaled = expected / (ratio * sd) ** 2
    assert ((found.divergence - unscaled).abs() <= 5 * found.divergence_stderr + 1e-9).all()


def test_errors_are_those_of_many_seeds():
    x = rows(1)
    found = [
        pe.fisher_divergence(model, guide_of(1.0, 0.3), x, num_samples=50, seed=s, **QUIET)
        for s in range(60)
    ]
    for name in ("scaled", "divergence"):
        spread = torch.stack([getattr(part, name) for part in found]).std().item()
        said = torch.stack([getattr(part, f"{name}_stderr") for part in found]).mean().item()
        assert said == pytest.approx(spread, rel=0.35)  # four standard errors of a spread of 60


def test_correlations_that_q_has_not():
    """Of the best independent q: the sum of squared partial correlations."""
    ppca, x = ppca_and_data(5)
    W, sigma = ppca.W.detach(), ppca.sigma.detach()
    precision = torch.eye(2) + W.mT @ W / sigma**2
    squared = precision[0, 1] ** 2 / (precision[0, 0] * precision[1, 1])
    found = pe.fisher_divergence(ppca, Diagonal.optimum(ppca), x, num_samples=4000, **QUIET)
    assert ((found.scaled - squared).abs() < 5 * found.scaled_stderr + 1e-3).all()
    exact = pe.fisher_divergence(ppca, Exact(ppca), x, **QUIET)
    assert exact.scaled.max() < 1e-9


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, AutoIAFNormal])
def test_global_and_local_latents(guide):
    of = Hierarchy.of(6)
    q = guide(of.model)
    q(of.x)
    found = pe.fisher_divergence(of.model, q, of.x, **QUIET)
    assert found.per == "data set" and found.scaled.shape == (1, 7)
    assert found.scaled.isfinite().all() and "Fisher divergence" in str(found)
    good = pe.fisher_divergence(of.model, of.guide(), of.x, **QUIET)
    assert good.scaled.max() < 1e-9 and set(good.dims) == {"mu", *(f"z[{i}]" for i in range(6))}


def test_in_parts():
    x = rows(9)
    whole = pe.fisher_divergence(model, guide_of(0.4), x, num_samples=30, **QUIET)
    options = {"num_samples": 30, "batch_size": 4, "chunk": 7}
    part = pe.fisher_divergence(model, guide_of(0.4), x, **options, **QUIET)
    assert torch.allclose(part.scaled, whole.scaled)


def test_a_constrained_latent_in_its_coordinate():
    """Gamma(a, b) by LogNormal: by quadrature over u = log z."""

    def program():
        pyro.sample("z", dist.Gamma(3.0, 2.0))

    def guide():
        pyro.sample("z", dist.LogNormal(0.2, 0.7))

    u = torch.linspace(-6, 6, 200001)
    q = dist.Normal(0.2, 0.7)
    # log p(u) = a u - b e^u + constant
    difference = (u - 0.2) / 0.7**2 + 3.0 - 2.0 * u.exp()
    expected = torch.trapezoid(q.log_prob(u).exp() * difference**2, u)
    found = pe.fisher_divergence(program, guide, None, num_samples=20000, **QUIET)
    assert abs(found.divergence.item() - expected.item()) < 5 * found.divergence_stderr.item()


def test_what_has_no_gradient():
    def program(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="'k' is discrete, but the Fisher divergence needs grad"):
        pe.fisher_divergence(program, guide, rows(4), **QUIET)
    with pytest.raises(ValueError, match="num_samples should be"):
        pe.fisher_divergence(model, guide_of(), rows(4), num_samples=1, **QUIET)
