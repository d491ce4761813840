"""The prior, and a mixture of it and the guide, as proposals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from pyro.infer import autoguide

import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.models.ppca import PPCA

QUIET = {"progress": False}


@pytest.mark.parametrize("proposal", ["prior", "mixture"])
def test_a_guide_that_misses_the_posterior_is_mended(proposal):
    """Its own weights find nothing, and say so; with draws of the prior log p(x) is right."""
    model = PPCA(2, 4)
    guide, x = Diagonal.optimum(model), rows(5, 4)
    with torch.no_grad():
        guide.loc.bias += 1.5
        guide.raw -= 1.5
    truth = model.log_evidence(x).detach()
    own = pe.evidence(model, guide, x, num_samples=4000, **QUIET)
    assert (own.log_evidence < truth - 1).all() and own.is_uncertain.any()
    assert any("log p(x) is uncertain" in note for note in own.notes)
    found = pe.evidence(model, guide, x, proposal=proposal, num_samples=4000, **QUIET)
    assert ((found.log_evidence - truth).abs() < 4 * found.stderr).all()
    assert (found.stderr < 0.2).all() and not found.is_uncertain.any()
    if proposal == "mixture":  # the ELBO is the guide's
        error = torch.hypot(found.elbo_stderr, own.elbo_stderr)
        assert ((found.elbo - own.elbo).abs() < 5 * error).all()


def test_mixture_weights_are_unbiased():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(2.0, 0.4))

    x = rows(3)
    truth = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)
    found = pe.evidence(model, guide, x, proposal="mixture", num_samples=20_001, **QUIET)
    assert abs((found.log_evidence - truth).item()) < 4 * found.stderr.item()
    assert found.stderr.item() < 0.02 and found.per == "data set"


def test_bad_input():
    model = PPCA(2, 4)
    x, auto = rows(5, 4), autoguide.AutoNormal(model)
    auto(x)
    for kwargs, message in [
        ({"proposal": "posterior"}, "proposal should be one of"),
        ({"proposal": "mixture"}, "is auxiliary"),
        ({"proposal": "prior", "method": "annealed"}, "is for importance weighting"),
        ({"proposal": "prior", "level": "local"}, "is for importance weighting"),
    ]:
        with pytest.raises(ValueError, match=message):
            pe.evidence(model, auto, x, **kwargs)
    few = pe.evidence(model, Diagonal.optimum(model), x, num_samples=2, **QUIET)
    assert not few.is_uncertain.any()

    def improper():
        m = pyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(m, 1.0), obs=torch.tensor(0.0))

    def guide():
        pyro.sample("m", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="cannot be drawn from"):
        pe.evidence(improper, guide, None, proposal="mixture", **QUIET)
    with pytest.raises(ValueError, match="cannot be drawn from"):
        pe.evidence(improper, guide, None, proposal="prior", **QUIET)
