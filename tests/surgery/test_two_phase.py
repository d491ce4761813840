"""Means over all data of numbers that are known of some: chosen data, regression, errors."""

import math

import pytest
import torch
from helpers.oracles import rows
from torch.testing import assert_close

from pyproelbo._surgery.points import points
from pyproelbo._surgery.two_phase import Covariates, Parted, TwoPhase

N, M = 800, 200


@pytest.mark.parametrize("num_data, num", [(7, 7), (10, 3), (100_003, 2500)])
def test_points_are_one_of_each_stratum(num_data, num):
    parts = list(points(num_data, num, seed=3))
    found = torch.cat([part.rows for part in parts]).sort().values
    assert len(found.unique()) == num and found[0] >= 0 and found[-1] < num_data
    assert found.diff().max() < 2 * math.ceil(num_data / num)
    assert [part.stop for part in parts] == torch.tensor([len(part.rows) for part in parts]).cumsum(
        0
    ).tolist()
    for part in parts:  # each is of all of the data, not of the first
        assert part.rows.float().mean().item() == pytest.approx(num_data / 2, rel=0.5)
    again = torch.cat([part.rows for part in points(num_data, num, seed=3)])
    assert torch.equal(again, torch.cat([part.rows for part in parts]))


def test_each_datum_is_as_likely_as_another():
    counts = torch.zeros(30)
    for seed in range(3000):
        counts[next(points(30, 7, seed)).rows] += 1
    assert (counts / 3000 - 7 / 30).abs().max() < 4.5 * (7 / 30 * 23 / 30 / 3000) ** 0.5


def population(kind):
    """y of N data, and covariates (N, 2) that explain most of it."""
    x = rows(N, 4)
    c = torch.stack([x[:, 0], x[:, 1].exp()], 1)
    y = {
        "linear": c @ torch.tensor([1.0, -0.5]) + 0.3 * x[:, 2],
        "skewed": c.square().sum(1).sqrt() + x[:, 2].exp(),
        "trend": torch.arange(N) / 100 + x[:, 2],
        "alone": x[:, 3],
    }[kind]
    return y, c


@pytest.mark.parametrize("kind", ["linear", "skewed", "trend", "alone"])
@pytest.mark.parametrize("has_covariates", [True, False])
def test_means_of_two_phases_and_their_errors(kind, has_covariates):
    """Over choices of the data: no bias, and intervals that hold what they say."""
    y, c = population(kind)
    known = Covariates(c.expand(2, N, 2), c.expand(2, N, 2)) if has_covariates else None
    runs = 800
    estimates, errors = torch.empty(2, runs)
    for seed in range(runs):
        chosen = next(points(N, M, seed)).rows
        means = TwoPhase(1, chosen, known)
        value = Parted(torch.zeros(2, N), y[chosen].expand(2, M))
        estimates[seed], errors[seed] = means.mean(value), means.stderr(value)
    off, spread = estimates - y.mean(), estimates.std()
    # the regression's bias is of the order 1 / M
    assert abs(off.mean()) < 4 * spread / runs**0.5 + has_covariates * 0.1 * spread
    assert errors.square().mean().sqrt() == pytest.approx(spread.item(), rel=0.12)
    covered = (off.abs() < 1.96 * errors).double().mean().item()
    assert covered > 0.95 - 3.5 * (0.05 * 0.95 / runs) ** 0.5 - 0.01 * (kind == "skewed")
    plain = ((1 - M / N) * y.var() / M).sqrt()
    if kind == "trend" or (kind == "linear" and has_covariates):
        assert spread < 0.5 * plain
    if kind == "alone":
        assert spread == pytest.approx(plain.item(), rel=0.12)


def test_what_the_covariates_explain_has_no_error():
    _, c = population("linear")
    chosen = next(points(N, M, 0)).rows
    means = TwoPhase(1, chosen, Covariates(c.expand(2, N, 2), c.expand(2, N, 2)))
    value = Parted(torch.zeros(2, N), (3 - 2 * c[:, 1])[chosen].expand(2, M))
    assert_close(means.mean(value), (3 - 2 * c[:, 1]).mean())
    assert means.stderr(value) < 1e-12
