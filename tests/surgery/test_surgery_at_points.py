"""pe.surgery(max_pairs=): q(z) at the draws of some of the data, as a sum over all of them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.conjugate import Hierarchy
from helpers.oracles import rows
from helpers.surgery_programs import (
    POSTERIORS,
    PRIORS,
    correlated,
    flow,
    log_q_matrix,
    normal,
    programs,
    standard,
)
from torch.testing import assert_close
from torch.utils.data import DataLoader

import pyproelbo as pe
from pyproelbo._surgery.points import points
from pyproelbo.guides.ppca import Exact
from pyproelbo.models.ppca import PPCA

N, M = 800, 200
OF_Q = ("mutual_information", "marginal_kl", "total_correlation", "dimension_wise_kl")


def at_points(q, x, num=M, **options):
    model, guide = programs(q, PRIORS.get(q, standard))
    num_samples = options.get("num_samples", 1)
    max_pairs = num * len(x) * num_samples
    return pe.surgery(model, guide, x, max_pairs=max_pairs, progress=False, **options)


def numbers(result):
    return {n: torch.as_tensor(v.values.copy()) for n, v in result.to_xarray().items()}


def levels():
    """Both draw z1 given z2."""

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(torch.stack([z1, z2], -1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.6 * x[..., 1], 0.7))
            pyro.sample("z1", dist.Normal(0.4 * x[..., 0] + 0.2 * z2, 0.6))

    return model, guide


@pytest.mark.parametrize("q", POSTERIORS)
@pytest.mark.parametrize("num_samples", [1, 2])
def test_its_parts_add_up_and_those_without_q_are_of_all_data(q, num_samples):
    x = rows(N, 4)
    model, guide = programs(q, PRIORS.get(q, standard))
    options = {"num_samples": num_samples, "seed": 5}
    full = pe.surgery(model, guide, x, progress=False, **options)
    s = at_points(q, x, batch_size=300, **options)
    assert (s.num_points, full.num_points, s.num_data) == (M, N, N)
    for name in ("elbo", "reconstruction", "average_kl", "kl_per_dim"):
        ours, theirs = getattr(s, name), getattr(full, name)
        if ours is None:
            assert theirs is None
            continue
        assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=1e-10, atol=1e-10)
        assert_close(torch.as_tensor(s.stderr[name]), torch.as_tensor(full.stderr[name]))
    close = {"abs": 1e-10, "rel": 1e-10}
    assert s.mutual_information + s.marginal_kl == pytest.approx(s.average_kl, **close)
    assert s.reconstruction - s.mutual_information - s.marginal_kl == pytest.approx(s.elbo, **close)
    if s.total_correlation is not None:
        assert s.total_correlation + s.dimension_wise_kl == pytest.approx(s.marginal_kl, **close)
        assert s.marginal_kl_per_dim.sum().item() == pytest.approx(s.dimension_wise_kl, **close)
    for name in OF_Q:
        if getattr(s, name) is not None:  # at the same draws
            off = abs(getattr(s, name) - getattr(full, name))
            assert off < 4 * math.hypot(s.stderr[name], full.stderr[name]) + 1e-9, name
            assert 0 < s.stderr[name] < 0.2


def test_all_pairs_are_exactly_what_they_are_without_it():
    x = rows(150, 4)
    for q in (normal, flow):
        expected = pe.surgery(*programs(q), x, progress=False)
        for num in (150, 151, 10**6):
            found = at_points(q, x, num)
            assert found.num_points == 150
            assert str(found) == str(expected)
            for name, value in numbers(expected).items():
                assert torch.equal(numbers(found)[name], value), name


def test_one_datum_less_than_all_is_nearly_that():
    x = rows(300, 4)
    full, most = pe.surgery(*programs(flow), x, progress=False), at_points(flow, x, 299)
    assert most.num_points == 299
    for name in ("mutual_information", "marginal_kl"):
        error = full.stderr[name]
        assert getattr(most, name) == pytest.approx(getattr(full, name), abs=0.5 * error)
        assert most.stderr[name] == pytest.approx(error, rel=0.2)


def test_ppca_of_which_the_marginal_kl_is_known():
    """Of N data of the model itself q(z) is the prior, but for their number.

    To the first order in 1 / N their KL is (prod_k 1 / v_k - 1) / 2 N, of posterior variances v_k
    along the axes.
    """
    num = 4000
    torch.manual_seed(1)
    model = PPCA(2, 4)
    with torch.no_grad():
        model.W.copy_(torch.tensor([[1.0, 0.3], [0.2, -0.9], [0.5, 0.4], [0.0, 0.6]]))
    x = model(num=num).detach()
    covariance = model.posterior(x[:1]).covariance_matrix[0].detach()
    information = -0.5 * covariance.logdet().item()
    expected = (math.exp(2 * information) - 1) / (2 * num)
    found = pe.surgery(model, Exact(model), x, max_pairs=250 * num, progress=False)
    error = found.stderr["marginal_kl"]
    assert error < 0.01
    assert abs(found.marginal_kl - expected) < 3.5 * error + 0.2 * expected
    assert abs(found.mutual_information - information) < 3.5 * error + 4 * 1.5 / num**0.5


@pytest.mark.parametrize("q", [normal, flow])
def test_errors_are_those_of_other_seeds(q):
    """Draws and chosen data anew each time, beside the mean of many draws of all data."""
    x, runs = rows(500, 4), 60
    model, guide = programs(q)
    truth = pe.surgery(model, guide, x, num_samples=60, seed=99, progress=False)
    found = [at_points(q, x, 120, seed=seed) for seed in range(runs)]
    for name in OF_Q:
        exact = getattr(truth, name)
        if exact is None:
            continue
        values = torch.tensor([getattr(s, name) for s in found])
        errors = torch.tensor([s.stderr[name] for s in found])
        error = math.hypot(values.std().item() / runs**0.5, truth.stderr[name])
        # the control variate's own bias, which all pairs have as well, is below half an error
        assert abs(values.mean() - exact) < 3.5 * error + 0.5 * errors.mean(), name
        assert errors.square().mean().sqrt() == pytest.approx(values.std().item(), rel=0.35), name
        covered = ((values - exact).abs() < 1.96 * errors).double().mean().item()
        assert covered > 0.95 - 3.5 * (0.05 * 0.95 / runs) ** 0.5, name


def test_information_stays_below_its_bound():
    x = rows(N, 4)
    s = at_points(lambda x: dist.Normal(1e3 * x[:, :2], 0.1).to_event(1), x)
    assert s.mutual_information <= s.log_n + 1e-9
    assert s.mutual_information == pytest.approx(s.log_n, abs=1e-3)


def test_the_points_do_not_depend_on_batches_nor_torch():
    x = rows(N, 4)
    expected = numbers(at_points(correlated, x, seed=4))
    before = torch.get_rng_state()
    for options in ({"batch_size": 37}, {"batch_size": N}):
        found = numbers(at_points(correlated, x, seed=4, **options))
        for name, value in expected.items():
            assert_close(found[name], value, rtol=1e-6, atol=1e-8)
    assert torch.equal(torch.get_rng_state(), before)
    assert numbers(at_points(correlated, x, seed=5))["marginal_kl"] != expected["marginal_kl"]
    loader = DataLoader(x, 100, shuffle=True)
    found = pe.surgery(*programs(flow), loader, max_pairs=M * N, progress=False)
    assert (found.num_points, found.num_data) == (M, N)


@pytest.mark.parametrize("options", [{"given": "z2", "site": "z1"}, {"site": ["z1", "z2"]}])
def test_levels(options):
    model, guide = levels()
    x = rows(400, 2)
    full = pe.surgery(model, guide, x, progress=False, **options)
    s = pe.surgery(model, guide, x, max_pairs=120 * 400, progress=False, **options)
    assert s.num_points == 120 and s.given == full.given
    assert s.average_kl == pytest.approx(full.average_kl)
    assert s.mutual_information + s.marginal_kl == pytest.approx(s.average_kl)
    error = math.hypot(s.stderr["mutual_information"], full.stderr["mutual_information"])
    assert abs(s.mutual_information - full.mutual_information) < 4 * error


def test_global_latents():
    """The pairs are those of all nested surgeries together."""
    of = Hierarchy.of(300)
    programs = of.model, of.guide(factor=1.3), of.x
    options = {"site": "z", "num_nested": 4, "progress": False}
    full = pe.surgery(*programs, **options)
    s = pe.surgery(*programs, max_pairs=4 * 120 * 300, **options)
    assert (s.num_globals, s.num_points, full.num_points) == (4, 120, 300)
    assert s.average_kl == pytest.approx(full.average_kl)
    error = math.hypot(s.stderr["mutual_information"], full.stderr["mutual_information"])
    assert abs(s.mutual_information - full.mutual_information) < 4 * error
    with pytest.raises(ValueError, match="max_pairs should be at least 120_000"):
        pe.surgery(*programs, max_pairs=4 * 99 * 300, **options)


def test_brute_force_at_the_chosen_draws():
    """Far from any KL in closed form and any covariate, it is the mean over the chosen data."""
    x = rows(N, 4)
    s = at_points(flow, x, 100)
    z = s.codes.to(x)
    chosen = next(points(N, 100, 0)).rows
    log_q = log_q_matrix(flow(x), z[chosen])
    own = log_q[torch.arange(100), chosen] - log_q.logsumexp(1) + math.log(N)
    assert abs(s.mutual_information - own.mean()) < 3 * own.std() / 10


# What it tells


def test_what_the_result_tells():
    x = rows(N, 4)
    s = at_points(normal, x)
    assert "(800 data, draws: 1, q(z) at those of 200 data)" in str(s)
    assert any("draws of 200 of the 800 data" in note for note in s.notes)
    assert s.to_xarray().attrs["num_points"] == M
    full = pe.surgery(*programs(normal), x[:20], progress=False)
    assert full.to_xarray().attrs["num_points"] == 20 and "q(z) at" not in str(full)
    assert "points" not in "".join(full.notes)


@pytest.mark.parametrize("max_pairs", [0, -1, 2.5, True, "all", math.nan])
def test_what_is_no_number_of_pairs(max_pairs):
    with pytest.raises(ValueError, match="max_pairs should be a positive whole number"):
        pe.surgery(*programs(normal), rows(10, 4), max_pairs=max_pairs)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_too_few_pairs(num_samples):
    """Before anything runs, where it is known how many data there are."""
    x, calls = rows(200, 4), []
    model, guide = programs(normal)

    def counting(x):
        calls.append(len(x))
        return guide(x)

    options = {"num_samples": num_samples, "progress": False}
    least = 100 * 200 * num_samples
    with pytest.raises(ValueError, match=f"max_pairs should be at least {least:_}.*got 199"):
        pe.surgery(model, counting, x, max_pairs=199, **options)
    assert not calls
    assert pe.surgery(model, guide, x, max_pairs=least, **options).num_points == 100
    with pytest.raises(ValueError, match=f"at least {least:_}, for the draws of 100 of 200 data"):
        pe.surgery(model, guide, DataLoader(x, 50), max_pairs=least - 1, **options)
    with pytest.raises(ValueError, match="at least 36, for the draws of 6 of 6 data"):
        pe.surgery(model, guide, x[:6], max_pairs=35)
