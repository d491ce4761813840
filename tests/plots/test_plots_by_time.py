"""Figures of the ELBO by timestep, of what a model of sequences gives."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt

import pyproelbo as pe
from pyproelbo.sequences import IndependentSteps, MarkovChain, lengths_mask

PLOTS = {
    "kl": (pe.plot_kl_by_time, "KL (nats)"),
    "reconstruction": (pe.plot_reconstruction_by_time, "reconstruction (nats)"),
}


def terms(lengths, observed=None, **options):
    """Of a random walk that is seen in noise, one sequence of each length."""
    B, T = len(lengths), max(lengths)
    own = lengths_mask(torch.tensor(lengths), T)
    observed = own if observed is None else own & observed

    def model(x):
        with pyro.plate("data", B):
            first = dist.Normal(torch.zeros(B), 1.0)
            walk = MarkovChain(first, lambda z: dist.Normal(z, 0.5), T, mask=own)
            z = pyro.sample("z", walk)
            pyro.sample("x", IndependentSteps(dist.Normal(z, 1.0), mask=observed), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("z", IndependentSteps(dist.Normal(x / 2, 0.6), mask=own))

    x = torch.randn(B, T).cumsum(1)
    return pe.SequentialELBO(**options).terms(model, guide, x)


@pytest.fixture(params=PLOTS)
def figure(request):
    """Of the name of a figure: its values (B, T), its function and its label."""

    def values(terms):
        return terms.by_time.to_xarray()[request.param].transpose(..., "time").values

    return values, *PLOTS[request.param]


def parts(ax):
    """Image, curve, edges of the band and the colour bar's axes."""
    above, below, bar = ax.figure.axes
    assert above is ax
    band = below.collections[0].get_paths()[0].vertices
    return ax.images[0], below.lines[0], band, bar


def test_a_row_for_each_sequence_and_below_their_mean(figure):
    values, plot, label = figure
    result = terms([5, 2, 4])
    rows, ax = values(result), plot(result)
    ax.figure.canvas.draw()
    image, curve, band, bar = parts(ax)
    np.testing.assert_array_equal(image.get_array().filled(np.nan), rows)
    assert tuple(image.get_extent()) == (-0.5, 4.5, 2.5, -0.5)
    np.testing.assert_array_equal(curve.get_xdata(), range(5))
    np.testing.assert_allclose(curve.get_ydata(), np.nanmean(rows, 0))
    for t in range(5):
        edges = band[band[:, 0] == t, 1]
        low, high = np.nanquantile(rows[:, t], (0.1, 0.9))
        assert (edges.min(), edges.max()) == pytest.approx((low, high))
    below = curve.axes
    assert ax.get_ylabel() == "sequence" and below.get_xlabel() == "timestep"
    assert below.get_ylabel() == bar.get_ylabel() == label
    said = [text.get_text() for text in below.get_legend().get_texts()]
    assert said == ["mean", "10 % to 90 % of sequences"]
    assert below.get_xlim() == ax.get_xlim() == (-0.5, 4.5)


def test_missing_data_are_blank_in_the_reconstruction_alone():
    observed = torch.ones(2, 5, dtype=torch.bool)
    observed[0, 2] = False
    result = terms([5, 5], observed)
    kl, reconstruction = pe.plot_kl_by_time(result), pe.plot_reconstruction_by_time(result)
    assert not np.ma.getmaskarray(parts(kl)[0].get_array()).any()
    blank = np.ma.getmaskarray(parts(reconstruction)[0].get_array())
    assert blank.tolist() == (~observed).tolist()
    assert np.isfinite(parts(reconstruction)[1].get_ydata()).all()


@pytest.mark.parametrize("vectorize", [False, True])
def test_of_particles_the_mean(figure, vectorize):
    values, plot, _ = figure
    result = terms([5, 3], num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
    image = parts(plot(result))[0].get_array().filled(np.nan)
    rows = values(result)
    assert rows.shape == (3, 2, 5)
    np.testing.assert_allclose(image, rows.mean(0))


@pytest.mark.parametrize("plates", [0, 1])
def test_a_single_sequence_is_a_line(figure, plates):
    values, plot, label = figure
    result = terms([7]) if plates else without_plates()
    ax = plot(result)
    ax.figure.canvas.draw()
    assert not ax.images and ax.figure.axes == [ax]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("timestep", label)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), values(result).reshape(-1))


def without_plates():
    def model(x):
        walk = MarkovChain(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.5), len(x))
        pyro.sample("x", IndependentSteps(dist.Normal(pyro.sample("z", walk), 1.0)), obs=x)

    def guide(x):
        pyro.sample("z", IndependentSteps(dist.Normal(x / 2, 0.6)))

    return pe.SequentialELBO().terms(model, guide, torch.randn(7))


def test_steps_without_a_site_are_gaps():
    def model(x):
        with pyro.plate("data", 2):
            for t in (2, 5):
                z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            for t in (2, 5):
                pyro.sample(f"z_{t}", dist.Normal(x / 2, 1.0))

    image, curve, *_ = parts(
        pe.plot_kl_by_time(pe.SequentialELBO().terms(model, guide, torch.randn(2)))
    )
    assert tuple(image.get_extent()) == (1.5, 5.5, 1.5, -0.5)
    assert np.ma.getmaskarray(image.get_array()).tolist() == [[False, True, True, False]] * 2
    np.testing.assert_array_equal(curve.get_xdata(), [2, 5])


def test_the_colours_leave_out_the_outermost_values_and_say_so():
    result = terms([40] * 10)
    result.by_time.kl[0, 0] = 1e6
    image, _, _, bar = parts(pe.plot_kl_by_time(result))
    low, high = image.get_clim()
    assert low == 0 and high < 100
    assert image.colorbar.extend == "max"
    assert bar is image.colorbar.ax


@pytest.mark.parametrize("sizes", [([3], 2), ([160] * 150 + [7] * 50, 160)], ids=["small", "large"])
def test_figures_of_any_size(figure, sizes):
    lengths, T = sizes
    _, plot, _ = figure
    plot(terms([*lengths, T])).figure.canvas.draw()


def test_a_place_that_is_given_is_divided():
    result = terms([5, 2, 4])
    figure, (left, right) = plt.subplots(1, 2, layout="constrained")
    assert pe.plot_kl_by_time(result, ax=left) is left
    assert pe.plot_reconstruction_by_time(result.by_time, ax=right) is right
    figure.canvas.draw()
    assert len(figure.axes) == 6
    assert max(ax.get_position().x1 for ax in figure.axes[2:4]) < right.get_position().x0

    figure = plt.figure()
    ax = pe.plot_kl_by_time(result, ax=figure.add_axes((0.1, 0.2, 0.5, 0.7)))
    figure.canvas.draw()
    for part in figure.axes:
        x0, y0, x1, y1 = part.get_position().extents
        assert x0 >= 0.1 - 1e-9 and y0 >= 0.2 - 1e-9 and x1 <= 0.6 + 1e-9 and y1 <= 0.9 + 1e-9
    assert ax.get_position().y0 > figure.axes[1].get_position().y1


def test_what_cannot_be_drawn_by_time_is_refused():
    result = terms([3, 2])
    with pytest.raises(ValueError, match=r"Terms of a SequentialELBO.* got ndarray"):
        pe.plot_kl_by_time(np.zeros((3, 2)))
    other = pe.BetaELBO().terms(*[lambda: pyro.sample("z", dist.Normal(0.0, 1.0))] * 2)
    with pytest.raises(ValueError, match="got the Terms of another objective"):
        pe.plot_kl_by_time(other)
    result.by_time.mask[:] = False
    with pytest.raises(ValueError, match="there is no KL to draw: no timestep counts"):
        pe.plot_kl_by_time(result)
