"""Where estimators of ELBOs are known to go wrong without a word; here they must not."""

import math
from subprocess import run
from sys import executable

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from helpers.losses import initialised, loss_and_grads
from helpers.vae import Guide, Model
from pyro import poutine
from pyro.infer import Trace_ELBO, autoguide

import pyproelbo as pe

MANY = {"num_particles": 200_000, "vectorize_particles": True, "max_plate_nesting": 1}


def log_normal_model():
    """log z ~ N(0, 1), log y | z ~ N(log z, 1), y = e^2: log z given y is N(1, 1/2)."""
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.LogNormal(z.log(), 1.0), obs=torch.tensor(2.0).exp())


def log_normal_evidence():
    return dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(2.0)).item() - 2.0


@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize("auto", ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal"])
def test_autoguides_on_constrained_latents(auto, kl):
    """At the exact posterior the bound is the evidence, sample by sample."""
    guide = getattr(autoguide, auto)(log_normal_model)
    guide()
    if auto == "AutoNormal":
        guide.locs.z, guide.scales.z = torch.tensor(1.0), torch.tensor(0.5).sqrt()
    else:
        guide.loc.data.fill_(1.0)
        guide.scale = torch.tensor([0.5]).sqrt()
    objective = pe.BetaELBO(kl=kl)
    assert objective.terms(log_normal_model, guide).analytic == set()
    for seed in range(5):
        loss, _ = loss_and_grads(objective, log_normal_model, guide, seed)
        assert loss == pytest.approx(-log_normal_evidence(), abs=1e-10)


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_scale_on_one_side(kl):
    """Trap: the closed form takes one side's scale for both."""
    q, p = dist.Normal(1.0, 1.0), dist.Normal(0.0, 1.0)

    def model():
        with poutine.scale(scale=3.0):
            pyro.sample("z", p)

    def guide():
        pyro.sample("z", q)

    expected = -q.entropy() + 3 * (torch.distributions.kl_divergence(q, p) + q.entropy())
    terms = pe.BetaELBO(kl=kl, **MANY).terms(model, guide)
    error = terms.kl["z"].std() / math.sqrt(MANY["num_particles"])
    assert abs(terms.shrinkage - expected) < 4 * error
    assert terms.analytic == set()


def test_mask_on_one_side():
    """The masked half keeps its log q, whether masked at the site or in the distribution."""
    mask = torch.tensor([True, False])
    q, p = dist.Normal(torch.tensor([1.0, 1.0]), 1.0), dist.Normal(torch.zeros(2), 1.0)
    expected = 0.5 - q.entropy()[1]

    def at_site():
        with pyro.plate("data", 2), poutine.mask(mask=mask):
            pyro.sample("z", p)

    def in_distribution():
        with pyro.plate("data", 2):
            pyro.sample("z", p.mask(mask))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", q)

    for model in (at_site, in_distribution):
        terms = pe.BetaELBO(**MANY).terms(model, guide)
        error = terms.kl["z"].sum(-1).std() / math.sqrt(MANY["num_particles"])
        assert abs(terms.shrinkage - expected) < 4 * error


def test_score_function_counts_auxiliary_sites():
    """u ~ q auxiliary, z = u: the gradient against the sum over both values of u."""
    q = torch.tensor(0.2, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    def guide():
        u = pyro.sample("u", dist.Bernoulli(q.sigmoid()), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u))

    probs = torch.stack([1 - q.sigmoid(), q.sigmoid()])
    z = torch.tensor([0.0, 1.0])
    log_joint = dist.Bernoulli(0.3).log_prob(z) + dist.Normal(z, 1.0).log_prob(torch.tensor(2.0))
    (exact,) = torch.autograd.grad((probs * (log_joint - probs.log())).sum(), q)

    estimates = []
    for seed in range(20):
        pyro.set_rng_seed(seed)
        q.grad = None
        objective = pe.BetaELBO(num_particles=5000, vectorize_particles=True, max_plate_nesting=0)
        objective.loss_and_grads(model, guide)
        estimates.append(-q.grad)
    estimates = torch.stack(estimates)
    error = estimates.std() / math.sqrt(len(estimates))
    assert error < 0.02
    assert abs(estimates.mean() - exact) < 4 * error


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_score_function_gradients_in_nested_plates(kl):
    """Against the expectation over all values, by enumeration."""
    x = programs.noise(2, 2)
    qa = torch.tensor(0.3, requires_grad=True)
    qb = programs.noise(2).requires_grad_()
    means = torch.tensor(0.7, requires_grad=True)

    def model():
        a = pyro.sample("a", dist.Bernoulli(0.4))
        with pyro.plate("outer", 2, dim=-1):
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
            with pyro.plate("inner", 2, dim=-2):
                pyro.sample("x", dist.Normal(means * (a + b), 1.0), obs=x)

    def guide():
        a = pyro.sample("a", dist.Bernoulli(qa.sigmoid()))
        with pyro.plate("outer", 2, dim=-1):
            pyro.sample("b", dist.Bernoulli((qb + a).sigmoid()))

    exact_elbo = pe.BetaELBO().differentiable_loss(model, pyro.infer.config_enumerate(guide))
    exact = torch.autograd.grad(exact_elbo, [qa, qb, means])
    objective = pe.BetaELBO(kl=kl, num_particles=4000, vectorize_particles=True)
    runs = [
        torch.autograd.grad(objective.differentiable_loss(model, guide), [qa, qb, means])
        for _ in range(25)
    ]
    for parameter, expected in zip(zip(*runs, strict=True), exact, strict=True):
        estimates = torch.stack(parameter)
        error = estimates.std(0) / math.sqrt(len(estimates))
        assert (error < 0.05).all()
        assert ((estimates.mean(0) - expected).abs() < 4.5 * error).all()


def test_closed_form_needs_less_noise_for_discrete_sites():
    """The closed-form KL of a site is not multiplied by the site's own score."""
    q = torch.tensor(0.3, requires_grad=True)

    def model():
        pyro.sample("z", dist.Bernoulli(0.4))

    def guide():
        pyro.sample("z", dist.Bernoulli(q.sigmoid()))

    kl = torch.distributions.kl_divergence(dist.Bernoulli(q.sigmoid()), dist.Bernoulli(0.4))
    (exact,) = torch.autograd.grad(kl, q)
    (estimate,) = torch.autograd.grad(pe.BetaELBO().differentiable_loss(model, guide), q)
    torch.testing.assert_close(estimate, exact)


def test_enumeration_outside_of_its_plate_is_an_error():
    """Pyro's TraceEnum_ELBO warns at best, and counts wrong."""

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=torch.ones(1))

    @pyro.infer.config_enumerate
    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(0.3))

    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="outside a plate"):
        pe.BetaELBO(max_plate_nesting=1).loss(model, guide)


def test_guide_messengers_do_not_enumerate():
    def model():
        pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})

    class Same(poutine.guide.GuideMessenger):
        def get_posterior(self, name, prior):
            return prior

    with pytest.raises(ValueError, match="a guide messenger cannot enumerate"):
        pe.BetaELBO().loss(model, Same(model))


@pytest.mark.parametrize("masked", ["model", "guide", "both"])
def test_sites_masked_out(masked):
    """mask=False takes a site's term away on its side, and only there."""
    q, p = dist.Normal(1.0, 0.5), dist.Normal(0.0, 1.0)

    def model():
        pyro.sample("z", p.mask(masked == "guide"))

    def guide():
        with poutine.mask(mask=masked == "model"):
            z = pyro.sample("z", q)
        guide.z = z

    terms = pe.BetaELBO(kl="sampled").terms(model, guide)
    expected = {
        "model": q.log_prob(guide.z),
        "guide": -p.log_prob(guide.z),
        "both": torch.tensor(0.0),
    }[masked]
    torch.testing.assert_close(terms.kl["z"], expected)


def test_plate_without_a_size():
    def program(obs=None):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand_by([4]))
            if obs is not None:
                pyro.sample("x", dist.Normal(z, 1.0), obs=obs)

    terms = pe.BetaELBO().terms(lambda: program(torch.ones(4)), program)
    assert terms.kl["z"].shape == (4,)
    assert terms.num_data == 4


def test_different_scales_of_what_is_summed_together():
    def model():
        with poutine.scale(scale=2.0):
            z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="share a common"):
        pe.BetaELBO().loss(model, lambda: None)


def test_roles():
    """Factors, deterministic and rewritten sites are observed, but no data."""
    model, guide = initialised(programs.reparameterised)
    terms = pe.BetaELBO().terms(model, guide)
    assert set(terms.log_likelihood) == {"x"}
    assert set(terms.log_prior) == set(terms.kl) == {"z_decentered", "y_base"}
    assert not terms.factors
    model, guide = initialised(programs.factors)
    terms = pe.BetaELBO(kl="sampled").terms(model, guide)
    assert set(terms.factors) == {"potential"}
    assert terms.groups == {"u": ("z",)}
    assert set(terms.log_q) == {"u", "jacobian", "z"}
    torch.testing.assert_close(terms.elbo, terms.reconstruction - terms.shrinkage + terms.factor)


def test_groups_of_autoguides():
    for name, groups in {
        "AutoNormal": {"scale": ("scale",), "w": ("w",), "p": ("p",)},
        "AutoNormalMessenger": {"scale": ("scale",), "w": ("w",), "p": ("p",)},
        "AutoStructured": {"scale": ("scale",), "w": ("w",), "p": ("p",)},
        "AutoMultivariateNormal": {"_AutoMultivariateNormal_latent": ("scale", "w", "p")},
        "list": {"p": ("p",), "_AutoGuideList.0_latent": ("scale", "w")},
    }.items():
        model, guide = initialised(programs.AUTO[name])
        assert pe.BetaELBO().terms(model, guide).groups == groups, name


def test_loss_and_gradients_report_the_same_number():
    """Pyro's Trace_ELBO.loss goes another way than loss_and_grads."""
    model, guide = initialised(programs.score_function)
    for objective in (pe.BetaELBO(0.3), pe.CapacityELBO(1.0), pe.FreeBitsELBO(1.0)):
        loss, _ = loss_and_grads(objective, model, guide)
        pyro.set_rng_seed(1)
        assert objective.loss(model, guide) == loss
        pyro.set_rng_seed(1)
        assert objective.differentiable_loss(model, guide).item() == loss


def test_looped_particles_may_differ_in_structure():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        if k > 0:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        if k > 0:
            pyro.sample("z", dist.Normal(0.5, 0.7))

    pyro.set_rng_seed(1)
    theirs = Trace_ELBO(num_particles=8).loss(model, guide)
    pyro.set_rng_seed(1)
    assert pe.BetaELBO(num_particles=8, kl="sampled").loss(model, guide) == pytest.approx(theirs)


@pytest.mark.slow
def test_import_changes_nothing():
    """No setting, seed, validation flag or param store; and no heavy optional package."""
    code = """
import sys, torch, pyro, matplotlib
def state():
    return (pyro.settings.get(), torch.get_rng_state().sum().item(), torch.get_default_dtype(),
            torch.distributions.Distribution._validate_args, torch.get_num_threads(),
            dict(matplotlib.rcParams), len(pyro.get_param_store()), torch.is_grad_enabled(),
            len(torch.distributions.kl._KL_REGISTRY))
before = state()
import pyproelbo
assert state() == before
assert "lightning" not in sys.modules and "sklearn" not in sys.modules
"""
    assert run([executable, "-c", code], check=False).returncode == 0


def test_no_host_sync_in_a_step():
    """The captured step has no read of a value; see also test_capture."""
    module = pe.BetaELBO(pe.schedules.Linear(0.0, 1.0, 3))(Model(), Guide())
    reads = []

    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
            ):
                reads.append(function)
            return function(*args, **(kwargs or {}))

    with pyro.validation_enabled(False), Reads():
        module(programs.noise(5, 3)).backward()
        assert not reads
        module.elbo.loss_and_grads(module.model, module.guide, programs.noise(5, 3))
        assert len(reads) == 1


def test_errors_in_a_program_show_the_shapes_so_far():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        z @ z  # shapes do not fit

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        pe.BetaELBO().loss(model, guide)
    assert any("z dist" in note for note in caught.value.__notes__)
