"""Ranks of simulated latents, for guides that are right, too narrow, too low."""

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.conjugate import ppca
from matplotlib import pyplot as plt

import pyproelbo as pe
from pyproelbo._diagnostics.ranks import Reference
from pyproelbo.guides.lgssm import Exact as ExactSmoother
from pyproelbo.guides.ppca import Exact
from pyproelbo.models.lgssm import LGSSM

JOINT = ("log p(x, z)", "log p(x | z)", "distance to a reference point")


def wrong(guide, shift=0.0, factor=1.0):
    """A guide that is off by so many standard deviations, or so much too wide."""

    def program(x):
        q = guide.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            loc = q.mean + shift * q.stddev
            pyro.sample("z", dist.MultivariateNormal(loc, factor**2 * q.covariance_matrix))

    return program


def test_the_posterior_is_calibrated():
    model = ppca()
    result = pe.calibration(model, Exact(model), lambda: model(num=500), num_samples=50, chunk=20)
    assert result.ranks.shape == (500, 5)
    assert result.dims == ("z[0]", "z[1]", *JOINT)
    assert ((result.ranks > 0) & (result.ranks < 1)).all()
    assert (result.p_value > 0.001).all() and not result.notes
    assert (result.bias.abs() < 4).all() and (result.spread.abs() < 4).all()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"shift": 0.5}, "too high"),
        ({"shift": -0.5}, "too low"),
        ({"factor": 0.6}, "too narrow"),
        ({"factor": 1.8}, "too wide"),
    ],
)
def test_wrong_guides_are_called_so(options, word):
    model = ppca()
    guide = wrong(Exact(model), **options)
    result = pe.calibration(model, guide, lambda: model(num=500))
    assert (result.p_value[:2] < 1e-3).all()
    assert result.notes[:2] == [f"q of z[{d}] is {word}." for d in range(2)]
    assert word in str(result)


def test_false_alarms_are_rare():
    """p-values of right guides are uniform: over 40 runs of two dimensions, few are small."""
    model = ppca()
    p = torch.cat(
        [
            pe.calibration(
                model, Exact(model), lambda: model(num=100), num_samples=40, seed=seed
            ).p_value[:2]
            for seed in range(40)
        ]
    )
    assert (p < 0.05).double().mean() < 0.05 + 4 * (0.05 * 0.95 / 80) ** 0.5
    assert abs(p.mean() - 0.5) < 4 / (12 * 80) ** 0.5


def test_sequences_discrete_latents_and_inner_plates():
    model = LGSSM(2, 3)
    result = pe.calibration(model, ExactSmoother(model), lambda: model(num=200, num_steps=3))
    assert len(result.dims) == 6 + 3 and not result.notes

    def program(x=None):
        with pyro.plate("data", 300, dim=-2):
            k = pyro.sample("k", dist.Bernoulli(0.3 * torch.ones(300, 1)))
            with pyro.plate("inner", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                return pyro.sample("x", dist.Normal(z + 0.0 * k, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 300, dim=-2):
            pyro.sample("k", dist.Bernoulli(0.3 * torch.ones(300, 1)))
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    result = pe.calibration(program, guide, program, plate="data")
    assert result.ranks.shape == (300, 3 + 3) and not result.notes


def test_report_and_figure():
    model, backend = ppca(), matplotlib.get_backend()
    state = torch.get_rng_state()
    result = pe.calibration(model, wrong(Exact(model), shift=0.6), lambda: model(num=200))
    assert torch.equal(torch.get_rng_state(), state)
    assert result.to_xarray().sizes == {"datum": 200, "latent_dim": 5}
    matplotlib.use("Agg")
    try:
        ax = pe.plot_calibration(result)
        texts = [text.get_text() for text in ax.get_legend().get_texts()]
        assert texts[:3] == ["95% where q is right", "z[0]", "z[1]"]
        ax.figure.canvas.draw()
    finally:
        plt.close("all")
        matplotlib.use(backend)


def sum_of_two(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z.sum(-1), 0.4), obs=x)


def test_a_correlation_that_q_lacks_is_seen():
    """Ranks of each dimension are uniform for q with the posterior's marginals; others are not."""
    precision = torch.ones(2, 2) / 0.16 + torch.eye(2)
    covariance = torch.linalg.inv(precision)

    def simulate():
        with pyro.plate("data", 4000):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z.sum(-1), 0.4))

    def guide_of(q):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", q(x[..., None] * (covariance.sum(1) / 0.16)))

        return guide

    scale = covariance.diagonal().sqrt()
    for q, is_right in (
        (lambda mean: dist.MultivariateNormal(mean, covariance), True),
        (lambda mean: dist.Normal(mean, scale).to_event(1), False),
    ):
        found = pe.calibration(sum_of_two, guide_of(q), simulate, num_samples=50)
        assert found.dims[2:] == JOINT
        assert (found.p_value[:2] > 0.001).all()
        assert (found.p_value[2:] > 0.001).all() == is_right
        if not is_right:
            assert (found.p_value[2:] < 1e-9).all()
            assert len(found.notes) == 3
            assert all("q as a whole is wrong" in note for note in found.notes)


def test_the_prior_for_a_posterior_is_seen_by_the_likelihood_alone():
    """q(z | x) = p(z): ranks of z are uniform, and coverage is right around points without x."""
    model = ppca()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    found = pe.calibration(model, guide, lambda: model(num=500), progress=False)
    assert (found.p_value[[0, 1, 4]] > 0.001).all() and found.p_value[3] < 1e-9


def test_the_unit_of_a_dimension_does_not_matter():
    def programs(unit):
        unit = torch.tensor([1.0, unit])

        def simulate(x=None):
            with pyro.plate("data", 40):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), unit).to_event(1))
                return pyro.sample("x", dist.Normal(z / unit, 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", 40):
                pyro.sample("z", dist.Normal(x / 2 * unit, 0.6 * unit).to_event(1))

        return simulate, guide, simulate

    one, other = (pe.calibration(*programs(unit), num_samples=30) for unit in (1.0, 1000.0))
    assert torch.equal(one.ranks[:, 4], other.ranks[:, 4])


def test_distances_by_hand():
    """To the true z of the next datum, in standard deviations, without what is discrete."""
    truth = torch.tensor([[0.0, 1.0, 5.0], [1.0, 0.0, 5.0], [4.0, 1.0, 5.0]])
    reference = Reference.of(truth, torch.tensor([True, False, True]))
    z = torch.randn(7, 3, 3)
    expected = (z[..., 0] - torch.tensor([1.0, 4.0, 0.0])).abs() / truth[:, 0].std()
    torch.testing.assert_close(reference.distance(z)[..., 0], expected)
    torch.testing.assert_close(reference.row(1).distance(z[:, 1:2])[..., 0], expected[:, 1:2])
    assert Reference.of(truth, torch.zeros(3, dtype=torch.bool)) is None
    assert Reference.of(truth[:1], torch.ones(3, dtype=torch.bool)) is None


def test_draws_that_are_nan_are_refused():
    def simulate(x=None):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0, validate_args=False))
            return pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x * broken, 1.0, validate_args=False))

    broken = torch.tensor([torch.nan, 1.0, 1.0])
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="z is NaN at a draw"):
        pe.calibration(simulate, guide, simulate)


def test_bad_input():
    model = ppca()
    with pytest.raises(ValueError, match="num_samples should be a positive whole number, got 0"):
        pe.calibration(model, Exact(model), lambda: model(num=5), num_samples=0)
    with pytest.raises(ValueError, match="simulate should draw latents at the guide's sites"):
        pe.calibration(model, Exact(model), lambda: torch.zeros(5, 4))
