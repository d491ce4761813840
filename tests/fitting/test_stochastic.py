"""Fits that end by themselves: on programs whose best fit is known."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.conjugate import Hierarchy
from helpers.oracles import rows
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from torch.utils.data import DataLoader, TensorDataset

import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.models.ppca import PPCA

QUIET = {
    "progress": False,
    "method": pe.Stochastic(lr=0.05, least_steps=50),
    "objective": pe.BetaELBO(num_particles=8, vectorize_particles=True),
    "tolerance": 0.05,
}
FOUND = {"progress": False, "method": pe.Stochastic(trial_steps=30, least_steps=100)}


def mean_model(x, size=None):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x) if size is None else size, subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def normal_guide(x, size=None):
    loc = pyro.param("loc", lambda: torch.tensor(2.0))
    scale = pyro.param("scale", lambda: torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("m", dist.Normal(loc, scale))


def check_posterior(x, nats=0.06):
    """That of ``mean_model``: the parameters are within some nats of it."""
    q = dist.Normal(pyro.param("loc"), pyro.param("scale"))
    p = dist.Normal(x.sum() / (1 + len(x)), (1 + len(x)) ** -0.5)
    assert torch.distributions.kl_divergence(q, p).item() < nats


def test_a_posterior_in_closed_form():
    x = rows(40) + 1
    result = pe.fit(mean_model, normal_guide, x, **FOUND)
    assert result.reason == "converged" and result.per == "data set"
    check_posterior(x)
    covariance = torch.ones(40, 40) + torch.eye(40)
    truth = dist.MultivariateNormal(torch.zeros(40), covariance).log_prob(x).item()
    assert abs(result.elbo - truth) < 0.02 + 4 * result.elbo_stderr
    assert "ended: converged" in str(result) and not result.notes
    found = result.to_xarray()
    assert found.attrs["reason"] == "converged" and found["elbo"].dims == ("step",)


def test_model_and_guide_of_every_datum():
    torch.manual_seed(0)
    x = torch.randn(100, 6) @ torch.randn(6, 6)
    model = PPCA(2, 6)
    result = pe.fit(model, Diagonal(2, 6), x, **QUIET)
    best = PPCA.optimum(x, 2).log_evidence(x).mean().item()
    assert result.is_converged and result.per == "datum"
    assert best - 0.05 < result.elbo < best + 4 * result.elbo_stderr
    assert set(result.history.values) == {"elbo", "objective", "reconstruction", "kl", "lr"}


@pytest.mark.parametrize("data", ["rows", "loader"])
def test_minibatches_of_a_global_latent(data):
    """The plate says how many data there are; else each batch would count the prior in full."""
    x = rows(60) + 1
    batches, options = x, {"batch_size": 20}
    if data == "loader":
        generator = torch.Generator("cpu").manual_seed(1)
        batches = DataLoader(TensorDataset(x), 20, shuffle=True, generator=generator)
        options = {}
    with pytest.raises(ValueError, match="Give it the size of the whole data"):
        pe.fit(mean_model, normal_guide, batches, **options, **QUIET)
    of = {"arguments": lambda batch: ((batch[0] if data == "loader" else batch, 60), {})}
    result = pe.fit(mean_model, normal_guide, batches, **of, **options, **QUIET)
    assert result.is_converged
    check_posterior(x, 0.1)


def test_minibatches_of_local_latents():
    torch.manual_seed(0)
    x = torch.randn(200, 4) @ torch.randn(4, 4)
    result = pe.fit(PPCA(2, 4), Diagonal(2, 4), x, batch_size=50, **QUIET)
    best = PPCA.optimum(x, 2).log_evidence(x).mean().item()
    assert result.is_converged
    assert abs(result.elbo - best) < 0.05 + 4 * result.elbo_stderr


def test_minibatches_of_an_auto_guide():
    """Of global latents they are what they say; of local ones all rows would share parameters."""
    x = rows(60) + 1
    guide = AutoNormal(mean_model)
    of = {"arguments": lambda batch: ((batch, 60), {}), "batch_size": 20}
    result = pe.fit(mean_model, guide, x, **of, **QUIET)
    assert result.is_converged and "lr" in result.history.values
    q = dist.Normal(guide.locs.m, guide.scales.m)
    p = dist.Normal(x.sum() / 61, 61**-0.5)
    assert torch.distributions.kl_divergence(q, p).item() < 0.1
    local = Hierarchy.of(20)
    with pytest.raises(ValueError, match="'z' for each row of its plate, which different rows"):
        pe.fit(local.model, AutoNormal(local.model), local.x, batch_size=5, **QUIET)


def test_global_and_local_latents():
    of = Hierarchy.of(20)
    guide = AutoNormal(of.model)
    result = pe.fit(of.model, guide, of.x, **QUIET)
    assert result.is_converged
    # the best of the family: precisions are those of the conditionals
    assert guide.scales.z.mean().item() == pytest.approx(0.2**0.5, rel=0.1)
    assert guide.scales.mu.item() == pytest.approx((0.25 + 20) ** -0.5, rel=0.15)
    assert guide.locs.mu.item() == pytest.approx(of.q.loc.item(), abs=0.1)


def test_discrete_latents():
    """Enumerated in the guide, and by the score function."""
    x = torch.tensor([-2.0, 0.1, 0.4, 3.0])

    def model(x):
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(2 * k, 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", lambda: torch.zeros(4))
        with pyro.plate("data", 4):
            pyro.sample("k", dist.Bernoulli(logits=logits))

    log_odds = dist.Normal(2.0, 1.0).log_prob(x) - dist.Normal(0.0, 1.0).log_prob(x)
    exact = (log_odds + torch.tensor(0.4).logit()).sigmoid()
    for q in (config_enumerate(guide), guide):
        pyro.clear_param_store()
        result = pe.fit(model, q, x, **{**QUIET, "objective": pe.BetaELBO()})
        assert result.is_converged
        found = pyro.param("logits").sigmoid()
        kl = found * (found / exact).log() + (1 - found) * ((1 - found) / (1 - exact)).log()
        assert kl.mean().item() < 0.05


def test_a_weight_that_changes_is_waited_for():
    """The fit does not end before the objective is what it will be."""
    x = rows(20)
    warm_up = pe.schedules.Linear(0.0, 1.0, steps=600)
    objective = pe.BetaELBO(beta=warm_up, num_particles=8, vectorize_particles=True)
    result = pe.fit(mean_model, normal_guide, x, **{**QUIET, "objective": objective})
    assert result.is_converged and objective.step >= 600
    check_posterior(x)


def test_an_objective_of_several_draws():
    of = Hierarchy.of(3)
    objective = pe.ImportanceWeightedELBO(num_particles=5, vectorize_particles=True)
    guide = AutoMultivariateNormal(of.model)
    result = pe.fit(of.model, guide, of.x, **{**QUIET, "objective": objective})
    assert result.is_converged
    assert result.objective == pytest.approx(of.log_evidence.item(), abs=0.2)


def test_nothing_else_is_changed_and_a_seed_says_all():
    x, found = rows(10), []
    for _ in range(2):
        pyro.clear_param_store()
        torch.manual_seed(3)
        state = torch.get_rng_state()
        pe.fit(mean_model, normal_guide, x, seed=4, **QUIET)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(pyro.param("loc").item())
        torch.randn(5)
    assert found[0] == found[1]
    assert not pyro.param("loc").unconstrained().grad


def test_time():
    x = rows(30)
    with pytest.warns(pe.NotConvergedWarning, match="the time was over"):
        result = pe.fit(mean_model, normal_guide, x, max_time=0.3, **QUIET)
    assert result.reason == "time" and not result.is_converged and "Not converged" in str(result)
    assert result.seconds < 10


def test_ctrl_c_leaves_the_best_so_far():
    x, calls = rows(30), []

    def stopped(x):
        calls.append(1)
        if len(calls) == 150:
            raise KeyboardInterrupt
        normal_guide(x)

    with pytest.warns(pe.UnfinishedWarning, match="the best so far"):
        result = pe.fit(mean_model, stopped, x, **QUIET)
    assert result.reason == "interrupted"
    check_posterior(x, 5.0)


@pytest.mark.parametrize("how", ["NaN", "invalid"])
def test_what_does_not_stay_finite(how):
    """The densities at first are: those of the steps are NaN, or of a scale that is negative."""
    calls = []

    def model():
        calls.append(1)
        is_late = len(calls) > 80
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", z * (torch.nan if is_late and how == "NaN" else 1.0))
        scale = -1.0 if is_late and how == "invalid" else 1.0
        pyro.sample("x", dist.Normal(z, scale), obs=torch.tensor(0.0))

    guide = AutoNormal(model)
    said = "did not stay finite" if how == "NaN" else "The last error was: Expected parameter scale"
    with pytest.warns(pe.NotConvergedWarning, match=said):
        result = pe.fit(model, guide, None, **FOUND)
    assert result.reason == "diverged"


def test_loggers():
    class Kept:
        def __init__(self):
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, metrics))

    logger, again = Kept(), Kept()
    result = pe.fit(mean_model, normal_guide, rows(10), loggers=[logger], **QUIET)
    assert logger.rows and set(logger.rows[0][1]) == set(result.history.values)
    result.history.log_to(again)
    assert again.rows[-1][0] == result.history.step[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tolerance": 0.0}, "tolerance should be"),
        ({"max_time": -1.0}, "max_time should be"),
        ({"batch_size": 0}, "batch_size should be"),
        ({"objective": pyro.infer.Trace_ELBO()}, "should be a TermsELBO"),
        ({"seed": -1}, "seed should be"),
    ],
)
def test_bad_input(options, said):
    with pytest.raises(ValueError, match=said):
        pe.fit(mean_model, normal_guide, rows(10), **{**QUIET, **options})


def test_no_parameters():
    with pytest.raises(ValueError, match="no parameters to fit"):
        pe.fit(mean_model, lambda x: pyro.sample("m", dist.Normal(0.0, 1.0)), rows(5), **QUIET)


@pytest.mark.parametrize("method", [pe.FixedDraws(), QUIET["method"]])
def test_parameters_that_begin_in_the_same_memory(method):
    """Pyro's AutoNormalMessenger starts in the prior's own mean: each goes where it belongs."""

    def model(x):
        mu = pyro.param("mu", lambda: torch.tensor([1.0]))
        z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        pyro.sample("about_mu", dist.Normal(mu, 0.1).to_event(1), obs=torch.tensor([3.0]))
        pyro.sample("about_z", dist.Normal(z, 0.5).to_event(1), obs=x)

    guide = AutoNormalMessenger(model)
    options = {**QUIET, "method": method, "tolerance": 1e-3}
    result = pe.fit(model, guide, (torch.tensor([-1.0]),), **options)
    assert result.is_converged
    # of mu: that of the evidence, N(-1; mu, 1.25) N(3; mu, 0.01)
    mu = (3 / 0.01 - 1 / 1.25) / (1 / 0.01 + 1 / 1.25)
    assert pyro.param("mu").item() == pytest.approx(mu, abs=0.01)
    loc = next(v for n, v in pyro.get_param_store().items() if "loc" in n)
    assert loc.item() == pytest.approx((mu - 4) / 5, abs=0.05)
