"""Sobol draws: their numbers fill the space evenly, in each replicate and each datum anew."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyproelbo as pe
from pyproelbo._distributions.sobol import Points, enough, points_of
from pyproelbo._rows.noise import RowNoise
from pyproelbo._terms.traces import PARTICLES

BITS = 3
NUM = 2**BITS  # points in a replicate


def drawn(program, num_draws, num_rows=1, bits=BITS):
    """What a program draws, (draws, rows, ...)."""
    noise = RowNoise("data", 0, range(num_draws), 0, points=Points(bits))
    with noise, pyro.plate(PARTICLES, num_draws, dim=-2), pyro.plate("data", num_rows, dim=-1):
        return program()


def uniform(name, size):
    return pyro.sample(name, dist.Uniform(torch.zeros(size), 1.0).to_event(1))


def test_each_eighth_has_one_of_eight_points_in_each_dim():
    """In each dim, replicate and row, wherever a part of a site comes from."""
    u = torch.cat(drawn(lambda: (uniform("a", 3), uniform("b", 40)), 4 * NUM, 5), -1)
    cells = (u.reshape(4, NUM, 5, 43) * NUM).long().sort(1).values
    assert (cells == torch.arange(NUM)[:, None, None]).all()
    assert not torch.equal(u[:NUM], u[NUM : 2 * NUM])  # replicates are scrambled anew


@pytest.mark.parametrize("by", range(BITS + 1))
def test_the_first_two_dims_are_a_net(by):
    """Each box of 2^-k by 2^-(3-k) has one of eight points, also where each is of another site."""
    u = torch.cat(drawn(lambda: (uniform("a", 1), uniform("b", 1)), 2 * NUM, 50), -1)
    cell = (u[..., 0] * 2**by).long() * 2 ** (BITS - by) + (u[..., 1] * 2 ** (BITS - by)).long()
    cells = cell.reshape(2, NUM, 50).sort(1).values
    assert (cells == torch.arange(NUM)[:, None]).all()


def test_means_are_right_and_products_of_sites_have_the_mean_0():
    """Dims and sites are independent, for a replicate's means vary less than of other draws."""

    def program():
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return torch.cat([a, pyro.sample("b", dist.Normal(0.0, 1.0))[..., None]], -1)

    z = drawn(program, 32, 4000, bits=5)  # one replicate, 4,000 times
    moments = [z[..., i] * z[..., j] for i, j in itertools.combinations(range(3), 2)]
    for values, expected, of_independent in [
        *((m, 0.0, 1.0) for m in moments),
        *((z[..., k], 0.0, 1.0) for k in range(3)),
        *((z[..., k] ** 2, 1.0, 2.0) for k in range(3)),
    ]:
        mean = values.mean(0)  # of each row
        assert (mean.mean() - expected).abs() < 4 * mean.std() / 4000**0.5
        assert mean.var() < 0.5 * of_independent / 32


def test_rows_and_replicates_are_independent():
    u = drawn(lambda: uniform("a", 2), 600 * NUM, 3).reshape(600, NUM, 3, 2)[:, 0].flatten(1)
    correlation = torch.corrcoef(u.mT)  # of the first point's numbers, over replicates
    assert (correlation - torch.eye(6)).abs().max() < 5 / 600**0.5


def test_as_many_dims_as_there_are():
    with pytest.raises(ValueError, match=r"more than 21,201 numbers.*take draws='independent'"):
        drawn(lambda: (uniform("a", 21000), uniform("b", 202)), 2)
    a, _ = drawn(lambda: (uniform("a", 21000), uniform("b", 201)), NUM)
    assert a.shape[-1] == 21000 and a.std() > 0.25


def test_numbers_of_draws():
    assert [enough("sobol", n) for n in (1, 8, 9, 64, 1000)] == [8, 8, 16, 64, 1024]
    assert enough(pe.Sobol(3), 100) == 192 and enough("independent", 100) == 100
    assert points_of("independent", 5) is None
    assert points_of(pe.Sobol(5), 640).num == 128
    for kind, num, words in (
        ("sobol", 100, "8 times a power of two.* got 100: take 64 or 128"),
        ("sobol", 3, "8 times a power of two.* got 3: take 8"),
        (pe.Sobol(3), 64, "3 times a power of two.* take 48 or 96"),
    ):
        with pytest.raises(ValueError, match=f"num_samples should be {words}"):
            points_of(kind, num)
    for kind in ("halton", None, 3, [], pe.Sobol):
        with pytest.raises(ValueError, match=r"draws should be one of .*or Sobol\(\.\.\.\), got"):
            points_of(kind, 64)
    for replicates in (1, 2.0, True, "8"):
        with pytest.raises(ValueError, match="replicates should be a whole number of at least 2"):
            pe.Sobol(replicates)
