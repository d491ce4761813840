"""The figure of ranks, and its band."""

import numpy as np
import pytest
import torch

import pyproelbo as pe
from pyproelbo.plots.ecdf_band import ecdf_band

X = np.linspace(0.0, 1.0, 101)


@pytest.mark.parametrize("probability", [0.95, 0.99])
@pytest.mark.parametrize("num", [1, 2, 7, 50, 500, 20_000])
def test_the_band_is_simultaneous(num, probability):
    """Of 10,000 uniform samples so many stay within at all points, by simulation."""
    low, high = ecdf_band(num, X, probability)
    counts = np.random.default_rng(0).multinomial(num, np.diff(X), size=10_000).cumsum(1)
    inside = ((counts >= low[1:]) & (counts <= high[1:])).all(1).mean()
    error = (probability * (1 - probability) / 10_000) ** 0.5
    assert inside > probability - 4 * error
    if num >= 50:  # with fewer a whole number more or less is much
        assert inside < probability + 0.01
    assert low[0] == high[0] == 0 and low[-1] == high[-1] == num


def test_pointwise_bands_would_not_do():
    """At single points the level is far below that of the band."""
    low, high = ecdf_band(500, X, 0.95)
    counts = np.random.default_rng(0).multinomial(500, np.diff(X), size=10_000).cumsum(1)
    at_each = ((counts >= low[1:]) & (counts <= high[1:])).mean(0)[:-1]
    assert at_each.min() > 0.99


def a_calibration(ranks, **changes):
    dims = tuple(f"z[{k}]" for k in range(ranks.shape[1]))
    return pe.Calibration(ranks, dims, torch.ones(ranks.shape[1], device="cpu"), 100, **changes)


def named(result):
    """The quantities whose lines leave the band."""
    ax = pe.plot_calibration(result)
    return [text.get_text() for text in ax.get_legend().get_texts()][1:]


def test_lines_of_uniform_ranks_stay_within_together():
    """95% of sets of four lines; 5,000 sets have a standard error of 0.3%."""
    low, high = ecdf_band(60, X, 1 - 0.05 / 4)  # that of the figure
    counts = np.random.default_rng(0).multinomial(60, np.diff(X), size=(5000, 4)).cumsum(2)
    inside = ((counts >= low[1:]) & (counts <= high[1:])).all((1, 2)).mean()
    assert 0.95 - 4 * 0.003 < inside < 0.96 + 4 * 0.003
    u = torch.from_numpy(np.random.default_rng(0).random((60, 4)))
    assert named(a_calibration(u)) == []
    band = pe.plot_calibration(a_calibration(u)).collections[0].get_paths()[0].vertices
    assert np.isclose(band[:, 1].max(), (high / 60 - X).max())


def test_other_lines_are_named():
    torch.manual_seed(0)
    u = torch.rand(100, 3, device="cpu")
    u[:, 1] = u[:, 1] ** 2
    u[:, 2] = u[:, 2].mul(6).sub(3).sigmoid()
    assert named(a_calibration(u)) == ["z[1]", "z[2]"]


@pytest.mark.parametrize(
    ("per", "label"), [("datum", "(1,200 data)"), ("simulation", "(1,200 simulations)")]
)
def test_the_rows_are_told(per, label):
    ax = pe.plot_calibration(a_calibration(torch.rand(1200, 1, device="cpu"), per=per))
    assert ax.get_xlabel() == f"rank of the true value among the draws {label}"
    assert len(ax.lines) == 2 and len(ax.collections) == 1
