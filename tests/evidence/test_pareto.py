"""Smoothed tails of many rows at once: as ArviZ has them row by row."""

import tracemalloc

import numpy as np
import pytest
import torch
from helpers.psislw import IS_OLD, psislw
from scipy import stats

import pyproelbo as pe
from pyproelbo._evidence import pareto
from pyproelbo._evidence.pareto_fit import pareto_fit, pareto_quantiles
from pyproelbo._evidence.psis import PsisPart

RNG = np.random.default_rng(3)
S = 900  # draws, whose tail has 3 sqrt S: a whole number, which ArviZ 0 rounds up, and ArviZ 1 down


def normal(scale, num=S, size=12):
    return scale * RNG.normal(size=(num, size))


def exponential(k, num=S, size=12):
    return k * RNG.exponential(size=(num, size))


def with_zeros(num_zero):
    w = exponential(0.5)
    for row in w.T:
        row[RNG.permutation(len(row))[:num_zero]] = -np.inf
    return w


WEIGHTS = {
    "light": np.log(RNG.uniform(0.5, 1.0, (S, 12))),
    "bounded": np.log(RNG.uniform(size=(S, 12))),
    "normal": normal(0.1),
    "wide normal": normal(5.0),
    "Pareto, 0.3": exponential(0.3),
    "Pareto, 0.7": exponential(0.7),
    "Pareto, 2": exponential(2.0),
    "Pareto, 30": exponential(30.0),
    "no draw but one": np.concatenate([normal(1.0, S - 1) - 690.0, np.zeros((1, 12))]),
    "beyond floats": normal(400.0),
    "far from 0": normal(1.0) - 1e5,
    "some are 0": with_zeros(200),
    "most are 0": with_zeros(S - 70),
    "all but a few are 0": with_zeros(S - 7),
    "few draws": normal(1.0, 25),
    "some draws": normal(1.0, 105),
    "rounded up": normal(1.0, 1000),
    "many draws": normal(1.0, 19_600, 3),
}


# where ArviZ 1 has other rules: of the tail, of its threshold, and of when there is no fit
RULES_OF_0 = ("beyond floats", "most are 0", "all but a few are 0", "few draws", "rounded up")


@pytest.mark.parametrize(
    ("num", "expected"), [(1000, "ggubbb"), (10**6, "gguubb"), (100, "ggbbbb"), (25, "bbbbbb")]
)
def test_bands_end_at_the_threshold(num, expected):
    khat = np.array([0.3, 0.49, 0.6, 0.68, 0.8, np.inf])
    found = pareto.bands(khat, pareto.threshold_of(num))
    names = [[name[0] for name, mask in found.items() if mask[i]] for i in range(len(khat))]
    assert ["".join(name) for name in names] == list(expected)


@pytest.mark.filterwarnings("error:.*:RuntimeWarning")
@pytest.mark.parametrize("name", WEIGHTS)
def test_as_arviz_row_by_row(name):
    if name in RULES_OF_0 and not IS_OLD:
        pytest.skip("ArviZ has other rules since 1.0")
    smoothed, khat = pe.pareto_smooth(WEIGHTS[name])
    expected, k = psislw(WEIGHTS[name].T)
    np.testing.assert_allclose(khat, k, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(smoothed, expected.T, rtol=1e-10, atol=1e-10)
    assert np.isfinite(khat).all() or name == "all but a few are 0"


@pytest.mark.skipif(not IS_OLD, reason="ArviZ fits to equal weights since 1.0")
@pytest.mark.parametrize("digits", [0, 1, 2])
def test_ties_as_arviz_but_for_their_order(digits):
    w = np.round(normal(1.5, size=40), digits)
    smoothed, khat = pe.pareto_smooth(w)
    expected, k = psislw(w.T)
    is_constant = khat == 0.0
    assert not is_constant.any() or digits == 0
    np.testing.assert_allclose(khat[~is_constant], k[~is_constant], rtol=1e-10)
    found, expected = np.sort(smoothed, 0), np.sort(expected.T, 0)
    np.testing.assert_allclose(found[:, ~is_constant], expected[:, ~is_constant], atol=1e-10)
    if digits < 2:  # tails of several sizes
        tail = np.sort(w, 0)[-pareto.tail_size(S) - 1 :]
        assert len(np.unique((tail > tail[0]).sum(0))) > 5


def test_equal_but_for_rounding():
    """Whatever is fitted there, weights are weights."""
    noise = np.finfo(float).eps * RNG.integers(0, 3, (1000, 12))
    steps = np.where(np.arange(1000) < 50, 0.0, -2.0)[:, None]
    for w in (steps + noise, np.where(np.arange(1000) < 90, -1e-17, -2.0)[:, None] - noise):
        smoothed, khat = pe.pareto_smooth(w)
        assert not np.isnan(khat).any()
        np.testing.assert_allclose(np.exp(smoothed).sum(0), 1.0)


@pytest.mark.parametrize("numbers", [1, 5_000, 10**9])
def test_rows_at_once_do_not_matter(numbers, monkeypatch):
    w = np.concatenate([w for w in WEIGHTS.values() if len(w) == S], 1)
    smoothed, khat = pe.pareto_smooth(w)
    monkeypatch.setattr(pareto, "_NUMBERS", numbers)
    again, same = pe.pareto_smooth(w)
    np.testing.assert_allclose(same, khat, rtol=1e-13)
    np.testing.assert_allclose(again, smoothed, rtol=1e-13)


def test_memory_is_that_of_a_copy_of_the_weights():
    def peak(size):
        w = np.random.default_rng(0).normal(size=(200, size))
        tracemalloc.start()
        part = PsisPart.of(w)
        most = tracemalloc.get_traced_memory()[1] - sum(column.nbytes for column in part) - w.nbytes
        tracemalloc.stop()
        return most

    few, many = peak(2_000), peak(20_000)
    assert many < few + 2**20


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_weight_of_many(bad):
    w = normal(1.0, 100, 3000)
    w[3, -1] = bad
    with pytest.raises(ValueError, match="should not be NaN or"):
        pe.pareto_smooth(w)
    with pytest.raises(ValueError, match="should not be NaN or"):
        pareto.tail_khat(torch.as_tensor(w).topk(21, 0).values)


def test_the_largest_weights_tell_k():
    w = np.concatenate([w for w in WEIGHTS.values() if len(w) == S], 1)
    w = np.concatenate([w, np.full((S, 1), 3.0), np.full((S, 1), -np.inf)], 1)
    khat = pe.pareto_smooth(w)[1]
    largest = torch.as_tensor(w).topk(pareto.tail_size(S) + 1, 0).values
    np.testing.assert_allclose(pareto.tail_khat(largest).numpy(), khat, rtol=1e-13)
    assert khat[-2:].tolist() == [0.0, np.inf]


def test_parts_of_psis_are_those_of_the_smoothed_weights():
    w = np.concatenate([WEIGHTS[n] for n in ("normal", "Pareto, 0.7", "some are 0")], 1)
    part, (smoothed, khat) = PsisPart.of(w), pe.pareto_smooth(w)
    np.testing.assert_allclose(part.khat, khat)
    np.testing.assert_allclose(part.effective_sample_size, 1 / np.exp(2 * smoothed).sum(0))
    at = np.where(np.isfinite(w), w, np.inf).argmin(0)[None]  # the least weight is as it was
    shift = np.take_along_axis(w, at, 0) - np.take_along_axis(smoothed, at, 0)
    np.testing.assert_allclose(part.log_evidence, shift[0] - np.log(S))
    none = PsisPart.of(np.full((1000, 2), -np.inf))
    assert (none.log_evidence == -np.inf).all() and (none.khat == np.inf).all()


@pytest.mark.parametrize("k", [-0.4, 0.0, 0.5, 1.2])
def test_fits_of_known_distributions(k):
    """k within its standard error, (1 + k) / sqrt n, of the mean over many samples."""
    n, size, p = 2000, 200, np.array([0.01, 0.5, 0.999])
    x = stats.genpareto.rvs(k, scale=3.0, size=(size, n), random_state=0)
    found, sigma = pareto_fit(np.sort(x, -1))
    without_prior = ((n + 10) * found - 5) / n
    assert abs(without_prior.mean() - k) < 4 * found.std() / size**0.5 + 2 / n
    assert abs(sigma.mean() / 3 - 1) < 4 * sigma.std() / 3 / size**0.5 + 2 / n
    expected = stats.genpareto.ppf(p, k, scale=3.0)[None]
    np.testing.assert_allclose(pareto_quantiles(np.array([k]), np.array([3.0]), p), expected)
