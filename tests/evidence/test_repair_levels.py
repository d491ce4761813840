"""Posteriors of hierarchical programs that are repaired level by level."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from helpers import conjugate
from helpers.conjugate import Hierarchy
from helpers.oracles import rows
from helpers.stopping import Stopping
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyproelbo as pe

QUIET = {"progress": False}
BOTH = {"level": "both", **QUIET}


def spoilt(of, bad, shift=0.0, factor=1.0):
    """The posterior, but of mu off by so many sds, and far too narrow and off for some data."""
    of_mu, sd = of.of_mu(shift, factor), 0.2**0.5

    def guide(x):
        mu = pyro.sample("mu", of_mu)
        with pyro.plate("data", len(x)):
            is_bad = torch.zeros(len(x), dtype=torch.bool)
            is_bad[bad] = True
            mean = (mu + 4 * x) / 5 + 4 * sd * is_bad
            pyro.sample("z", dist.Normal(mean, torch.where(is_bad, 0.3, 1.0) * sd))

    return guide


def exact(of):
    """The posterior of (mu, z), from its precision."""
    num = len(of.x)
    precision = 5 * torch.eye(num + 1)
    precision[0], precision[:, 0] = -1.0, -1.0
    precision[0, 0] = 1 / 4 + num
    linear = torch.cat([torch.zeros(1), 4 * of.x])
    return dist.MultivariateNormal(
        torch.linalg.solve(precision, linear), precision_matrix=precision
    )


def assert_is(found, draws, p):
    """Draws (S, D), the global latents first, with means and covariances of p: 4 standard errors.

    Those of all directions have as many effective draws as the global latents at least, but for
    what the data add.
    """
    size = torch.cat([found.of_globals.effective_sample_size, found.effective_sample_size]).min()
    e = torch.linalg.solve_triangular(p.scale_tril, (draws - p.mean).mT, upper=False)
    off = e.mean(1) * size.sqrt()
    identity = torch.eye(len(e))
    second = (e @ e.mT / e.shape[1] - identity) * (size / (1 + identity)).sqrt()
    for z_scores in (off, second):
        assert z_scores.abs().max() < 4
        assert z_scores.square().mean() < 1 + 4 * (2 / z_scores.numel()) ** 0.5


def joined(found):
    return torch.cat([found.draws["mu"].unsqueeze(1), found.draws["z"]], 1)


@pytest.mark.parametrize("num", [8, 40])
def test_data_of_which_the_guide_is_off(num):
    """They are repaired given mu; the others, and mu, stay the guide's."""
    of, bad = Hierarchy.of(num), [1, 5]
    guide = spoilt(of, bad)
    found = pe.repair(of.model, guide, of.x, **BOTH)
    expected = ["correlated" if n in bad else "guide" for n in range(num)]
    assert found.method.tolist() == expected and found.passes.all() and not found.left_out
    w = found.of_globals
    assert w.method.tolist() == ["guide"] and w.per == "data set" and w.khat_after < 0.5
    assert found.draws["mu"].shape == (1000,) and found.draws["z"].shape == (1000, num)
    assert torch.equal(w.draws["mu"], found.draws["mu"]) and list(w.draws) == ["mu"]
    assert_is(found, joined(found), exact(of))
    # before, it is what psis says by level
    local, of_mu = (pe.psis(of.model, guide, of.x, level=n, **QUIET) for n in ("local", "global"))
    torch.testing.assert_close(found.khat_before, local.khat)
    torch.testing.assert_close(w.khat_before, of_mu.khat)
    assert (local.khat[bad] > 0.7).all() and of_mu.khat > 0.7
    assert (found.khat_after[bad] < 0.5).all()


def test_what_passes_is_kept():
    of = Hierarchy.of(10)
    found = pe.repair(of.model, of.guide(0.6, 1.2, 0.3, 1.2), of.x, **BOTH)
    assert (found.method == "guide").all() and found.of_globals.method.tolist() == ["guide"]
    assert set(found.seconds) == {"guide", "prior"} and set(found.of_globals.seconds) == {"guide"}
    assert_is(found, joined(found), exact(of))


def test_both_levels():
    """q(mu) is 3 sds off and half as wide, and z of some data is off as well."""
    of = Hierarchy.of(10)
    found = pe.repair(of.model, spoilt(of, [2], 3.0, 0.5), of.x, steps=240, **BOTH)
    assert found.of_globals.method.tolist() == ["correlated"]
    assert [n for n in range(10) if found.method[n] == "correlated"] == [2]
    assert_is(found, joined(found), exact(of))


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_autoguide_that_is_not_fitted(seed):
    """q(z) does not know of mu: its Gaussian given mu does."""
    of = Hierarchy.of(6)
    guide = AutoNormal(of.model, init_scale=0.3)
    guide(of.x)
    before = [p.detach().clone() for p in guide.parameters()]
    state = torch.get_rng_state()
    found = pe.repair(of.model, guide, of.x, seed=seed, steps=300, **BOTH)
    assert found.passes.all() and found.of_globals.passes.all()
    assert_is(found, joined(found), exact(of))
    assert torch.equal(torch.get_rng_state(), state)
    for old, new in zip(before, guide.parameters(), strict=True):
        assert torch.equal(old, new) and new.requires_grad and new.grad is None
    tree = pe.from_svi(of.model, guide, (of.x,), repaired=found, num_samples=300, **QUIET)
    mu, z = (torch.as_tensor(tree.posterior[name].values[0]) for name in ("mu", "z"))
    torch.testing.assert_close(mu, found.draws["mu"][:300])
    torch.testing.assert_close(z, found.draws["z"][:300])
    lp = dist.Normal(0.0, 2.0).log_prob(mu) + dist.Normal(mu[:, None], 1.0).log_prob(z).sum(1)
    lp = lp + dist.Normal(z, 0.5).log_prob(of.x).sum(1)
    torch.testing.assert_close(torch.as_tensor(tree.sample_stats.lp.values[0]), lp)


def test_nested_plates():
    """m ~ N(0, 1), a_g ~ N(m, 1), b_gs ~ N(a_g, 1), x_gs ~ N(b_gs, 1), with plates in plates."""
    x = rows(4, 3) + 0.5

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(m, 1.0))
            with pyro.plate("subgroups", x.shape[1], dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        m = pyro.sample("m", dist.Normal(0.3, 0.6))
        off = torch.tensor([0.0, 3.0, 0.0, 0.0]).unsqueeze(-1)
        with pyro.plate("groups", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(0.4 * m + 0.5 * x.mean(1, keepdim=True) + off, 0.6))
            with pyro.plate("subgroups", x.shape[1], dim=-1):
                pyro.sample("b", dist.Normal((a + x) / 2, 0.71))

    found = pe.repair(model, guide, x, plate="groups", steps=240, **BOTH)
    assert found.passes.all() and found.method[1] == "correlated"
    assert found.draws["a"].shape == (1000, 4, 1) and found.draws["b"].shape == (1000, 4, 3)
    group = torch.arange(12) // 3
    precision = torch.zeros(17, 17)  # of m, a and b
    precision[0, 0], precision[0, 1:5], precision[1:5, 0] = 5.0, -1.0, -1.0
    precision[1:5, 1:5] = 4 * torch.eye(4)
    precision[5:, 5:] = 2 * torch.eye(12)
    for b, g in enumerate(group.tolist()):
        precision[5 + b, 1 + g] = precision[1 + g, 5 + b] = -1.0
    linear = torch.cat([torch.zeros(5), x.flatten()])
    p = dist.MultivariateNormal(torch.linalg.solve(precision, linear), precision_matrix=precision)
    draws = [found.draws[n].flatten(1) for n in ("a", "b")]
    assert_is(found, torch.cat([found.draws["m"].unsqueeze(1), *draws], 1), p)


def schools():
    """Eight schools, with effects in sds."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(8.0))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    # with eta integrated out, y_n ~ N(mu, tau^2 + sigma_n^2): quadrature over mu and tau
    mu, tau = torch.linspace(-25, 35, 301)[:, None], torch.linspace(1e-3, 60, 1500)[None]
    marginal = dist.Normal(mu[..., None], (tau[..., None] ** 2 + sigma**2).sqrt())
    log_p = marginal.log_prob(y).sum(-1) + dist.Normal(0.0, 5.0).log_prob(mu)
    log_p = log_p + dist.HalfNormal(8.0).log_prob(tau)
    weight = log_p.flatten().softmax(0).reshape(log_p.shape).sum(0)
    mean = (weight * tau[0]).sum()
    return model, mean, (weight * (tau[0] - mean).square()).sum().sqrt()


@pytest.mark.slow
def test_a_scale_whose_posterior_is_not_normal():
    model, mean, sd = schools()
    guide = AutoNormal(model, init_scale=0.3)
    guide()
    found = pe.repair(model, guide, None, steps=300, **BOTH)
    assert found.passes.all() and found.of_globals.method.tolist() == ["correlated"]
    tau, size = found.draws["tau"], found.of_globals.effective_sample_size
    assert abs(tau.mean() - mean) < 4 * sd / size.sqrt()
    assert tau.std() / sd == pytest.approx(1, abs=4 / float(size) ** 0.5)


def test_one_of_two_modes_is_no_posterior():
    """Given mu z has two modes, of which the guide and a Gaussian have one: draws of the prior."""
    x = torch.tensor([4.0, 5.0, 6.0])

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.5))
            pyro.sample("x", dist.Normal(z.square(), 0.5), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(0.3, 0.45))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sqrt(), 0.3 / x.sqrt()))

    found = pe.repair(model, guide, x, steps=240, **BOTH)
    assert (found.method == "failed").all() and found.sees_modes.all()
    assert (found.khat_before < 0.7).all()  # so that weights alone would not tell
    assert found.of_globals.method.tolist() == ["failed"]
    assert any("global latents do not pass" in note for note in found.notes)
    with pytest.warns(pe.CorrectionWarning, match="the global latents do not pass"):
        pe.from_svi(model, guide, (x,), repaired=found, num_samples=50, groups=["posterior"])


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    of = Hierarchy.of(4)
    options = {"num_samples": 26, "num_nested": 3, "steps": 9, **BOTH}
    whole = pe.repair(of.model, spoilt(of, [2]), of.x, **options)
    for num_rows in (2 * 4, 50 * 4):  # fewer draws at once than there are for one mu, and more
        monkeypatch.setattr("pyproelbo._rows.levels.ROWS", num_rows)
        part = pe.repair(of.model, spoilt(of, [2]), of.x, chunk=7, **options)
        xarray.testing.assert_allclose(
            part.to_xarray().drop_vars(["cost", "global_cost"]),
            whole.to_xarray().drop_vars(["cost", "global_cost"]),
        )
        torch.testing.assert_close(part.draws["z"], whole.draws["z"])


def test_time_runs_out():
    of = Hierarchy.of(6)
    found = pe.repair(of.model, spoilt(of, [2]), of.x, max_time=1e-9, **BOTH)
    assert not found.is_finished.any() and "correlated" not in found.seconds
    assert found.method.tolist() == ["guide", "guide", "failed", "guide", "guide", "guide"]
    assert "Time ran out" in " ".join(found.notes)


def test_ctrl_c_leaves_what_is_finished():
    of = Hierarchy.of(6)
    options = {"steps": 240, **BOTH}
    counting = Stopping(of.model, 0)
    pe.repair(counting, spoilt(of, [2]), of.x, **options)
    with pytest.warns(pe.UnfinishedWarning, match="covers only the first 1 of 3 steps"):
        part = pe.repair(Stopping(of.model, counting.calls - 20), spoilt(of, [2]), of.x, **options)
    assert part.method[2] == "failed" and not part.is_finished.any()


def test_too_many_coordinates_are_said():
    x = rows(3)

    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(300), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w[..., :1].sum(-1, keepdim=True).squeeze(-1), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(300), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(w[..., 0] + 9.0, 0.1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pe.LoopedWarning)
        found = pe.repair(model, guide, x, num_samples=30, num_nested=2, **BOTH)
    assert (found.method == "failed").all() and found.is_finished.all()
    assert "300 coordinates" in found.left_out["correlated"]


def test_all_data_of_their_own_as_one_row():
    x = rows(5)
    found = pe.repair(conjugate.model, conjugate.guide_of(), x, level="joint", **QUIET)
    assert found.per == "data set" and found.method.tolist() == ["guide"]
    assert found.draws["z"].shape == (1000, 5)


def test_bad_input():
    of, x = Hierarchy.of(6), rows(6)
    guide = of.guide()
    for options, match in (
        ({"level": "each"}, r"level should be one of \['joint', 'both'\], or None, got 'each'"),
        ({"level": "local"}, "level should be one of"),
        ({"level": "both", "num_nested": 0}, "num_nested should be a positive whole number"),
        ({"level": "both", "methods": ["annealed"]}, "some of .* where level='both', got"),
    ):
        with pytest.raises(ValueError, match=match):
            pe.repair(of.model, guide, of.x, **options)
    with pytest.raises(ValueError, match="draws no global one"):
        pe.repair(conjugate.model, conjugate.guide_of(), x, level="both")
    joint = AutoMultivariateNormal(of.model)
    joint(of.x)
    with pytest.raises(ValueError, match="a joint draw of all latents has no levels"):
        pe.repair(of.model, joint, of.x, level="both")

    def discrete(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(mu + k, 1.0), obs=x)

    def guide_of_discrete(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(torch.full((len(x),), 0.5)))

    with pytest.raises(ValueError, match=r"'k' is discrete, but by level .* level='joint'"):
        pe.repair(discrete, guide_of_discrete, x, level="both")
