"""Ranks of simulated latents where the guide is fitted to each simulation."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from torch.distributions import constraints

import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.models.ppca import PPCA

JOINT = ("log p(x, z)", "log p(x | z)", "distance to a reference point")
NUM = 5


def model(x=None):
    """One mean of all data: p(mean | x) = N(sum(x) / 6, 1 / 6)."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", NUM):
        return pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def guide(x):
    loc = pyro.param("loc", torch.zeros(()))
    scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
    pyro.sample("mean", dist.Normal(loc, scale))


def exact(shift=0.0, factor=1.0):
    """The posterior, or one that is off by so many standard deviations, or so much too wide."""
    scale = (NUM + 1) ** -0.5

    def fit(x):
        pyro.get_param_store()["loc"] = x.sum() / (NUM + 1) + shift * scale
        pyro.get_param_store()["scale"] = torch.tensor(factor * scale)

    return fit


def calibrated(fit, num=120, **options):
    options = {"num_samples": 99, "progress": False, **options}
    return pe.calibration(model, guide, model, refit=pe.Refit(num, fit=fit), **options)


def test_the_posterior_is_calibrated():
    result = calibrated(exact())
    assert result.dims == ("mean", *JOINT) and result.ranks.shape == (120, 4)
    assert (result.p_value > 0.001).all() and not result.notes
    assert (result.bias.abs() < 4).all() and (result.spread.abs() < 4).all()
    assert str(result).startswith("Calibration on 120 simulations, with a refit to each")
    assert result.to_xarray().sizes == {"simulation": 120, "latent_dim": 4}
    assert pe.plot_calibration(result).get_xlabel().endswith("(120 simulations)")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"shift": 0.8}, "too high"),
        ({"shift": -0.8}, "too low"),
        ({"factor": 0.5}, "too narrow"),
        ({"factor": 4.0}, "too wide"),
    ],
)
def test_wrong_guides_are_called_so(options, word):
    result = calibrated(exact(**options), 80)
    assert result.p_value[0] < 1e-3 and result.notes[0] == f"q of mean is {word}."


def test_adam_finds_the_posterior():
    """At the same draws, its ranks are those of the closed form, but for the error of the fit."""
    whole = {"num_samples": 200, "progress": False, "seed": 1}
    expected = pe.calibration(model, guide, model, refit=pe.Refit(4, fit=exact()), **whole)
    refit = pe.Refit(4, steps=200, lr=0.1)
    found = pe.calibration(model, guide, model, refit=refit, **whole)
    # a rank moves by at most 0.4 for each posterior standard deviation that the fit is off
    assert (found.ranks - expected.ranks)[:, 0].abs().max() < 0.05
    assert (found.ranks - expected.ranks).abs().max() < 0.1
    short = pe.calibration(model, guide, model, refit=pe.Refit(4, steps=1), **whole)
    assert (short.ranks - expected.ranks).abs().max() > 0.1


def test_correlations_that_q_lacks_are_seen():
    """With the posterior's means and variances: each dimension is right, both together are not."""
    precision = torch.ones(2, 2) * NUM + torch.eye(2)
    covariance = torch.linalg.inv(precision)

    def program(x=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", NUM):
            return pyro.sample("x", dist.Normal(w.sum(-1), 1.0), obs=x)

    def fit(x):
        pyro.get_param_store()["loc"] = covariance @ (x.sum() * torch.ones(2))

    def guide_of(q):
        return lambda x: pyro.sample("w", q(pyro.param("loc", torch.zeros(2))))

    for q, is_right in (
        (lambda loc: dist.MultivariateNormal(loc, covariance), True),
        (lambda loc: dist.Normal(loc, covariance.diagonal().sqrt()).to_event(1), False),
    ):
        refit = pe.Refit(100, fit=fit)
        found = pe.calibration(program, guide_of(q), program, refit=refit, progress=False)
        assert found.dims == ("w[0]", "w[1]", *JOINT)
        assert (found.p_value[:2] > 0.001).all()
        if is_right:
            assert (found.p_value[2:] > 0.001).all() and not found.notes
        else:
            assert (found.p_value[2:4] < 1e-6).all() and len(found.notes) >= 2
            assert all("q as a whole is wrong" in note for note in found.notes)


def schools(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("schools", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def by_hand(y):
    for name, q in (("mu", dist.Normal), ("tau", dist.LogNormal)):
        scale = pyro.param(f"scale_{name}", torch.ones(()), constraint=constraints.positive)
        pyro.sample(name, q(pyro.param(f"loc_{name}", torch.zeros(())), scale))
    with pyro.plate("schools", 4):
        pyro.sample("theta", dist.Normal(pyro.param("loc", torch.zeros(4)), 1.0))


QUICK = {"refit": pe.Refit(2, steps=3, lr=0.1, num_particles=2), "num_samples": 20}


def state(program):
    """All parameters, by name."""
    own = program.named_parameters() if isinstance(program, torch.nn.Module) else ()
    found = [*own, *pyro.get_param_store().named_parameters()]
    return {name: value.detach().clone() for name, value in found}


@pytest.mark.parametrize(
    "kind",
    [
        AutoNormal,
        AutoDiagonalNormal,
        AutoMultivariateNormal,
        AutoStructured,
        AutoIAFNormal,
        AutoNormalMessenger,
        lambda _: by_hand,
    ],
)
def test_guides_of_each_kind_are_fitted_and_put_back(kind):
    program = kind(schools)
    program(torch.randn(4))
    before, generator = state(program), torch.get_rng_state()
    found = pe.calibration(schools, program, schools, **QUICK)
    thetas = tuple(f"theta[{n}]" for n in range(4))
    assert found.dims == ("mu", "tau", *thetas, *JOINT)
    assert found.ranks.shape == (2, 9) and found.per == "simulation"
    after = state(program)
    assert before.keys() == after.keys() and before
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), generator)
    chunked = pe.calibration(schools, program, schools, chunk=3, **QUICK)
    torch.testing.assert_close(chunked.ranks, found.ranks)


def test_an_amortised_guide_and_many_local_latents():
    """Of 120 elements the first 10 are ranked; the guide's parameters are fitted, too."""
    ppca, program = PPCA(2, 4), Diagonal(2, 4)
    few, many = (
        pe.calibration(ppca, program, lambda num=num: ppca(num=num), **QUICK) for num in (3, 60)
    )
    assert few.ranks.shape == (2, 6 + 3) and many.ranks.shape == (2, 10 + 3)
    assert many.dims[:3] == ("z[0,0]", "z[0,1]", "z[1,0]") and many.dims[10:] == JOINT


@pytest.mark.parametrize(
    ("objective", "refit", "num"),
    [(Trace_ELBO, lambda fit: pe.Refit(5, fit=fit), 5), (pe.BetaELBO, lambda fit: fit, 100)],
)
def test_a_function_that_fits(objective, refit, num):
    """SVI trains the model's parameters as well; those are put back before the draws."""
    seen = []

    def program(x=None):
        noise = pyro.param("noise", torch.ones(()), constraint=constraints.positive)
        seen.append(float(noise.detach()))
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", NUM):
            return pyro.sample("x", dist.Normal(mean, noise), obs=x)

    trained = []

    def fit(x):
        svi = SVI(program, auto, pyro.optim.Adam({"lr": 0.1}), objective())
        for _ in range(5):
            svi.step(x)
        trained.append(float(pyro.param("noise").detach()))
        auto.train()
        seen.clear()

    auto = AutoNormal(program)
    auto(torch.randn(NUM))
    before = state(auto)
    found = pe.calibration(program, auto, program, refit=refit(fit), num_samples=5)
    assert len(found.ranks) == len(set(trained)) == num
    assert set(seen) == {1.0} and auto.training
    after = state(auto)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_function_may_begin_anew():
    def fit(x):
        pyro.clear_param_store()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        svi.step(x)

    guide(torch.zeros(NUM))
    pyro.param("loc").data.fill_(3.0)
    calibrated(fit, 2, num_samples=5)
    assert float(pyro.param("loc")) == 3.0


class Stopping:
    """A fit that is interrupted, or fails, at one of its calls."""

    def __init__(self, at, error):
        self.calls, self.at, self.error = 0, at, error

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        exact()(x)


def test_what_is_finished_is_not_lost():
    expected = calibrated(exact(), 8, num_samples=20)
    with pytest.warns(pe.UnfinishedWarning, match="first 5 simulations"):
        part = calibrated(Stopping(6, KeyboardInterrupt), 8, num_samples=20)
    assert torch.equal(part.ranks, expected.ranks[:5])
    with pytest.raises(OSError) as caught:
        calibrated(Stopping(6, OSError), 8, num_samples=20)
    assert torch.equal(caught.value.calibration.ranks, part.ranks)
    assert not pyro.get_param_store().keys()


def fitted_by(max_time):
    """Fits by pe.fit, of which the i-th has so much time."""
    times = iter(max_time)

    def fit(x):
        pe.fit(model, guide, x, max_time=next(times), progress=False)

    return fit


@pytest.mark.filterwarnings("ignore::pyproelbo.NotConvergedWarning")
def test_fits_that_have_not_converged_are_said():
    """Also by a function that returns nothing, and whose warnings nobody sees."""
    guide(torch.zeros(NUM))
    short, long = 1e-9, 60.0
    found = calibrated(fitted_by([long, short, long, short, short]), 5, num_samples=20)
    assert found.ended == ("converged", "time", "converged", "time", "time")
    assert found.is_converged.tolist() == [True, False, True, False, False]
    assert found.notes[0].startswith("3 of 5 refits have not converged (3 by 'time'): ")
    assert found.to_xarray().is_converged.sum() == 2
    for fit in (fitted_by([long] * 3), exact()):
        found = calibrated(fit, 3, num_samples=20)
        assert not any("converged" in note for note in found.notes)
    assert found.ended is None and found.is_converged is None


def test_of_several_fits_to_a_simulation_the_last_counts():
    def fit(x):
        with pytest.warns(pe.NotConvergedWarning):
            pe.fit(model, guide, x, max_time=1e-9, progress=False)
        pe.fit(model, guide, x, progress=False)

    guide(torch.zeros(NUM))
    assert calibrated(fit, 2, num_samples=20).ended == ("converged", "converged")


@pytest.mark.filterwarnings("ignore:interrupted. the parameters are the best so far")
def test_ctrl_c_within_a_fit_ends_the_calibration(monkeypatch):
    """pe.fit takes it for its own end: ranks of that simulation would be those of no fit."""

    def fit(x):
        calls.append(x)
        if len(calls) == 4:
            monkeypatch.setattr(pe.FixedDraws, "fit", interrupted)
        pe.fit(model, guide, x, method=pe.FixedDraws(), progress=False)

    def interrupted(*_):
        raise KeyboardInterrupt

    calls = []
    guide(torch.zeros(NUM))
    with pytest.warns(pe.UnfinishedWarning, match="covers only the first 3 simulations"):
        found = calibrated(fit, 6, num_samples=20)
    assert len(found.ranks) == 3 and found.is_converged.all() and len(calls) == 4


def test_simulations_differ_and_are_those_of_the_seed():
    one, again, other = (calibrated(exact(), 20, seed=seed).ranks for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.isin(one, other).any()
    assert len(one[:, 0].unique()) == 20


def test_discrete_latents_have_ranks_but_no_distance():
    def program(x=None):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with pyro.plate("data", NUM):
            return pyro.sample("x", dist.Normal(1.0 * k, 1.0), obs=x)

    def q(x):
        probability = pyro.param("probability", torch.tensor(0.5), constraints.unit_interval)
        pyro.sample("k", dist.Bernoulli(probability))

    def fit(x):
        ratio = torch.tensor(0.3 / 0.7).log() + (x - 0.5).sum()
        pyro.get_param_store()["probability"] = ratio.sigmoid()

    found = pe.calibration(program, q, program, refit=pe.Refit(80, fit=fit), progress=False)
    assert found.dims == ("k", *JOINT[:2]) and not found.notes
    with pytest.raises(ValueError, match="'k' has no reparameterised draws"):
        pe.calibration(program, q, program, refit=pe.Refit(2))


def test_without_refit_it_is_named():
    for program in (AutoNormal(model), guide):
        with pytest.raises(ValueError, match=r"refit=pe\.Refit\(\)"):
            pe.calibration(model, program, model)


def test_bad_input():
    for options, message in (
        ({"num": 1}, "num should be a whole number of at least 2, got 1"),
        ({"steps": 0}, "steps should be a positive whole number, got 0"),
        ({"lr": -1.0}, "lr should be a positive number"),
        ({"fit": 3}, "fit should be a function, got 3"),
        ({"fit": exact(), "lr": 0.1}, "fit replaces the steps of Adam, got lr as well"),
    ):
        with pytest.raises(ValueError, match=message):
            pe.Refit(**options)
    refit = pe.Refit(2, fit=exact())
    with pytest.raises(ValueError, match=r"refit should be a pe\.Refit, or a function, got 3"):
        pe.calibration(model, guide, model, refit=3)
    with pytest.raises(ValueError, match="plate is for rows that are data"):
        pe.calibration(model, guide, model, refit=refit, plate="data")
    with pytest.raises(ValueError, match="simulate should draw latents at the guide's sites"):
        pe.calibration(model, guide, lambda: torch.zeros(NUM), refit=refit)
    with pytest.raises(ValueError, match="refit fits the parameters of the guide, but it has none"):
        pe.calibration(
            model,
            lambda x: pyro.sample("mean", dist.Normal(x.mean(), 1.0)),
            model,
            refit=pe.Refit(2),
        )

    sizes = iter([2, 3, 4, 5])

    def changing():
        num = next(sizes)
        w = pyro.sample("w", dist.Normal(torch.zeros(num), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(w, 1.0).to_event(1))

    def of_any(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    def q(x):
        scale = pyro.param("scale", torch.ones(()))
        pyro.sample("w", dist.Normal(x / 2, scale).to_event(1))

    with pytest.raises(ValueError, match=r"'w' with the shape that it has in the g.*, \(2,\), got"):
        pe.calibration(of_any, q, changing, refit=pe.Refit(2))
