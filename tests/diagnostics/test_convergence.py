"""Iterates that are at rest, and such that are not."""

import numpy as np
import pytest
import torch

import pyproelbo as pe


def noise(*shape, correlation=0.0):
    draws = np.random.default_rng(0).normal(size=shape)
    for t in range(1, len(draws)):
        draws[t] += correlation * draws[t - 1]
    return draws


def test_rest_and_drift():
    result = pe.convergence(5.0 + noise(400))
    assert result.is_at_rest and result.window == 200 and "At rest" in str(result)
    assert abs(result.mean[0] - 5.0) < 4 * result.mcse[0]
    rising = pe.convergence(0.05 * np.arange(400) + noise(400))
    assert not rising.is_at_rest and "still rising" in rising.notes[0] and rising.rhat[0] > 1.1
    falling = pe.convergence(torch.as_tensor(-0.05 * np.arange(400) + noise(400)))
    assert "still falling" in falling.notes[0]


def test_the_error_of_the_mean_counts_correlation():
    alone, chained = (pe.convergence(noise(4000, correlation=c)) for c in (0.0, 0.9))
    assert alone.mcse[0] == pytest.approx(1 / 2000**0.5, rel=0.2)
    assert chained.mcse[0] == pytest.approx(10 / 2000**0.5, rel=0.5)


def test_several_quantities():
    values = noise(300, 3)
    values[:, 1] += 0.1 * np.arange(300)
    values[:, 2] = 7.0
    result = pe.convergence(values)
    assert result.rhat.shape == (3,) and result.rhat[2] == 1.0 and result.drift[2] == 0.0
    assert "(quantity 1)" in result.notes[0]


def test_advice_is_a_note():
    result = pe.convergence(noise(400))
    with pytest.warns(DeprecationWarning, match=r"use notes\[0\]"):
        assert [result.advice] == result.notes


def test_false_alarms_are_rare():
    alarms = [
        not pe.convergence(np.random.default_rng(seed).normal(size=200)).is_at_rest
        for seed in range(100)
    ]
    assert sum(alarms) <= 4


def test_an_optimisation():
    """SGD on a quadratic with noisy gradients: from far away, then at rest."""
    generator, x, path = torch.Generator(device="cpu").manual_seed(0), 50.0, []
    for _ in range(600):
        x -= 0.02 * (x + torch.randn((), generator=generator, device="cpu").item())
        path.append(x)
    assert not pe.convergence(path[:100]).is_at_rest
    result = pe.convergence(path, window=0.4)
    assert abs(result.mean[0]) < 5 * result.mcse[0]


@pytest.mark.parametrize(
    ("iterates", "window", "match"),
    [
        (noise(30), 0.5, "at least 20 iterates, got 14 of 30"),
        (noise(100), 0.0, "window should be a fraction"),
        (noise(50, 2, 2), 0.5, r"shape \(T,\) or \(T, P\)"),
        (np.full(100, np.nan), 0.5, "iterates should be finite"),
    ],
)
def test_bad_input(iterates, window, match):
    with pytest.raises(ValueError, match=match):
        pe.convergence(iterates, window=window)
