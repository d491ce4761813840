"""Random discrete programs, enumerated here and there, against Pyro's TraceEnum_ELBO."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.losses import assert_same, loss_and_grads
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import TraceEnum_ELBO, TraceTMC_ELBO

import pyproelbo as pe

ROLES = ["enumerated by the guide", "sampled by the guide", "enumerated by the model", "data"]
SITES = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(ROLES)), min_size=1, max_size=5)


def program(sites):
    """Bernoulli sites at plate level 0, 1 or 2, each depending on all before it that it may."""
    sites = sorted(sites, key=lambda site: site[0])
    levels = {f"z{i}": level for i, (level, _) in enumerate(sites)}
    roles = {f"z{i}": role for i, (_, role) in enumerate(sites)}

    def run(who):
        outer, inner = pyro.plate("outer", 2, dim=-1), pyro.plate("inner", 3, dim=-2)
        plates = [[], [outer], [outer, inner]]
        values = {}
        for i, (name, role) in enumerate(roles.items()):
            if who == "guide" and "guide" not in role:
                continue
            logits = pyro.param(f"{who}_{name}", torch.tensor(0.1 * i + 0.2))
            logits = logits + sum(0.7 * (v - 0.4) for v in values.values())
            infer = {"enumerate": "parallel"} if f"enumerated by the {who}" == role else {}
            obs = None
            if role == "data":
                shape = [2, 2, 3][: levels[name] + 1][1:][::-1]
                obs = (torch.arange(math.prod(shape)).reshape(shape) % 2).double()
            for plate in plates[levels[name]]:
                plate.__enter__()
            try:
                fn = dist.Bernoulli(logits=logits)
                values[name] = pyro.sample(name, fn, obs=obs, infer=infer)
            finally:
                for plate in reversed(plates[levels[name]]):
                    plate.__exit__(None, None, None)

    return lambda: run("model"), lambda: run("guide")


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(SITES, st.sampled_from([{}, {"num_particles": 2, "vectorize_particles": True}]))
def test_equals_trace_enum_elbo(sites, particles):
    assume(any("enumerated" in role for _, role in sites))  # or the estimator is Trace_ELBO's
    pyro.clear_param_store()
    model, guide = program(sites)
    kwargs = {"max_plate_nesting": 2, **particles}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            TraceEnum_ELBO(**kwargs).loss(model, guide)
        except (ValueError, NotImplementedError):
            assume(False)  # Pyro cannot
        assume(len(pyro.get_param_store()))
        theirs = loss_and_grads(TraceEnum_ELBO(**kwargs), model, guide)
        assert_same(
            loss_and_grads(pe.BetaELBO(kl="sampled", baselines="none", **kwargs), model, guide),
            theirs,
        )
        if not any("sampled" in role for _, role in sites):
            assert_same(
                loss_and_grads(pe.BetaELBO(baselines="none", **kwargs), model, guide), theirs
            )
        terms = pe.BetaELBO(**kwargs).terms(model, guide)
    torch.testing.assert_close(
        pe.BetaELBO(kl="sampled").objective(terms), terms.data_fit - terms.shrinkage
    )


# --- tensor Monte Carlo: draws of the prior in place of all values -----------------------------


@pytest.mark.parametrize("family", [dist.Normal, NonreparameterizedNormal])
def test_draws_of_the_model_are_weighed_as_in_tensor_monte_carlo(family):
    """In value and gradient, at the same random numbers; TraceEnum takes them for values."""
    x = torch.tensor([0.3, -1.0, 2.0])

    def sample(name, loc, num):
        infer = {"enumerate": "parallel", "num_samples": num, "expand": True}
        return pyro.sample(name, family(loc, 1.0), infer=infer)

    def model():
        a = pyro.param("a", torch.tensor(0.3))
        g = sample("g", a, 4)
        with pyro.plate("data", 3):
            z = sample("z", g * a, 5)
            pyro.sample("x", dist.Normal(z + a, 1.0), obs=x)

    found = []
    for elbo in (TraceTMC_ELBO(max_plate_nesting=1), pe.BetaELBO(max_plate_nesting=1)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = elbo.differentiable_loss(model, lambda: None)
        loss.backward()
        found.append((loss.detach(), pyro.param("a").unconstrained().grad))
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_draws_of_a_discrete_latent():
    """exp of the estimate has the evidence as its mean: within four standard errors."""
    x = torch.tensor(0.4)

    def model():
        infer = {"enumerate": "parallel", "num_samples": 5}
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=infer)
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    elbo = pe.BetaELBO(max_plate_nesting=0)
    draws = torch.tensor([-elbo.loss(model, lambda: None) for _ in range(2000)]).exp()
    densities = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x).exp()
    exact = (torch.tensor([0.7, 0.3]) * densities).sum()
    assert abs(draws.mean() - exact) < 4 * draws.std() / 2000**0.5


# --- plates and masks around enumerated sites --------------------------------------------------


def test_a_plate_within_a_mask():
    """Whose subsample site the mask would be of, too."""
    mask, x = torch.tensor([[1, 1, 0], [1, 0, 1]]).bool(), torch.randn(2, 3)

    def program(q, obs=None):
        inner, outer = pyro.plate("time", 2, dim=-2), pyro.plate("det", 3, dim=-1)
        with outer, poutine.mask(mask=mask), inner:
            infer = {"enumerate": "parallel"} if obs is None else {}
            z = pyro.sample("z", dist.Bernoulli(q), infer=infer)
            if obs is not None:
                pyro.sample("x", dist.Normal(z, 1.0), obs=obs)

    programs = lambda: program(0.5, x), lambda: program(torch.full((2, 3), 0.3))
    losses = [e(max_plate_nesting=2).loss(*programs) for e in (TraceEnum_ELBO, pe.BetaELBO)]
    assert losses[0] == pytest.approx(losses[1])


def test_a_mask_by_an_enumerated_site():
    """The evidence of a mixture of presence and absence, by both values."""
    x, p = torch.randn(5), 0.4

    def model():
        with pyro.plate("data", 5):
            there = pyro.sample("there", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            with poutine.mask(mask=there.bool()):
                pyro.sample("x", dist.Normal(1.0, 1.0), obs=x)

    log_p = dist.Normal(1.0, 1.0).log_prob(x)
    exact = torch.logaddexp(math.log(p) + log_p, torch.tensor(math.log(1 - p))).sum()
    loss = pe.BetaELBO(max_plate_nesting=1).loss(model, lambda: None)
    assert loss == pytest.approx(-exact.item())


def test_no_warning_of_a_plates_own_site():
    def model():
        for i in pyro.plate("steps", 2):
            pyro.sample(f"e_{i}", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(3))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elbo = pe.BetaELBO(max_plate_nesting=1)
        assert math.isfinite(elbo.loss(model, lambda: None))


# --- sequential enumeration --------------------------------------------------------------------


def test_sequential_enumeration_runs_as_often_as_pyros():
    """At the same random numbers from the first call on."""
    calls = [0]

    def model():
        a = pyro.sample("a", dist.Categorical(torch.ones(3)))
        z = pyro.sample("z", dist.Normal(a.double(), 1.0))
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z + b, 1.0), obs=torch.tensor(1.0))

    def guide():
        calls[0] += 1
        infer = {"enumerate": "sequential"}
        pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), infer=infer)
        pyro.sample("z", dist.Normal(0.5, 1.0))
        pyro.sample("b", dist.Bernoulli(0.4), infer=infer)

    found = []
    for elbo in (
        TraceEnum_ELBO(max_plate_nesting=0),
        pe.BetaELBO(kl="sampled", max_plate_nesting=0),
    ):
        pyro.set_rng_seed(0)
        calls[0] = 0
        found.append([*(elbo.loss(model, guide) for _ in range(3)), calls[0]])
    assert found[0] == pytest.approx(found[1])


def test_posteriors_of_what_the_model_sums_out():
    x = torch.tensor([-1.0, 0.2, 3.0])
    weights, loc = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 1.0])

    def model():
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)

    elbo = pe.BetaELBO(max_plate_nesting=1)
    exact = (weights.log() + dist.Normal(loc, 1.0).log_prob(x[:, None])).softmax(-1)
    marginals = elbo.compute_marginals(model, lambda: None)
    torch.testing.assert_close(marginals["k"].probs, exact)
    drawn = poutine.trace(lambda: elbo.sample_posterior(model, lambda: None)).get_trace()
    assert drawn is not None
