import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from pyproelbo.latent_dims import kl_per_dim
from pyproelbo.plots import plot_elbo_trace, plot_kl_per_dim, plot_reconstructions


@pytest.fixture(autouse=True)
def _agg(monkeypatch):
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("a plot called show"))
    yield
    plt.close("all")
    matplotlib.use(backend)


STEPS = np.arange(100)
CURVE = -20 - 1000 * np.exp(-STEPS / 2)
CALLS = {
    "elbo_trace": lambda ax=None: plot_elbo_trace(
        STEPS, {"train": CURVE, "held out": CURVE}, ax=ax
    ),
    "kl_per_dim": lambda ax=None: plot_kl_per_dim(torch.tensor([0.1, 2.0, 0.0]), ax=ax),
    "images": lambda ax=None: plot_reconstructions(
        np.random.rand(3, 64), np.random.rand(3, 64), shape=(8, 8), ax=ax
    ),
    "lines": lambda ax=None: plot_reconstructions(
        torch.randn(3, 5), torch.randn(3, 5), shape=(5,), ax=ax
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_plots_draw_into_the_axes_given_or_into_new_ones(call):
    ax = plt.subplots()[1]
    assert call(ax=ax) is ax
    new = call()
    assert new is not ax
    assert new.get_xlabel()
    new.figure.canvas.draw()


@pytest.mark.parametrize("name", ["elbo_trace", "kl_per_dim"])
def test_values_have_their_unit(name):
    assert "nats per datum" in CALLS[name]().get_ylabel()


def test_the_axis_of_a_trace_leaves_out_its_steep_beginning():
    ax = CALLS["elbo_trace"]()
    low, high = ax.get_ylim()
    assert low > -50 and high > -20
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "held out"]


@pytest.mark.parametrize("values", [[], [1.0], [np.nan, np.nan], [2.0, 2.0]])
def test_a_trace_may_be_short_constant_or_full_of_gaps(values):
    plot_elbo_trace(range(len(values)), {"train": values}).figure.canvas.draw()


def test_bars_are_sorted_and_tell_active_from_inactive():
    ax = plot_kl_per_dim([0.1, 2.0, 0.001, 0.5])
    heights = [bar.get_height() for bar in sorted(ax.patches, key=lambda bar: bar.get_x())]
    assert heights == [2.0, 0.5, 0.1, 0.001]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "3", "0", "2"]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["active (3 of 4)", "inactive (1 of 4)"]
    ax = plot_kl_per_dim([0.1, 2.0], active=[True, False])
    assert len({bar.get_facecolor() for bar in ax.patches}) == 2


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (1, 4, 6), (4, 2, 3), (3, 4, 2)])
def test_images_of_any_layout(shape):
    x = np.random.rand(5, 24)
    ax = plot_reconstructions(x, x, shape=shape)
    assert len(ax.images) == 1
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == ["data", "reconstruction"]


@pytest.mark.parametrize("shape", [None, (24,), (2, 3, 4), (2, 3, 2, 2)])
def test_what_is_no_image_is_drawn_as_lines(shape):
    ax = plot_reconstructions(np.random.rand(5, 24), np.random.rand(5, 24), shape=shape)
    assert not ax.images and len(ax.lines) == 10


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="one shape"):
        plot_reconstructions(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"kl should have shape \(D,\)"):
        plot_kl_per_dim(np.zeros((2, 3)))


def test_kl_per_dim_is_the_mean_over_data_and_sums_to_the_kl():
    loc, scale = torch.randn(7, 3), torch.rand(7, 3) + 0.1
    q = torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)
    kl = kl_per_dim(q)
    exact = (0.5 * (loc**2 + scale**2 - 1) - scale.log()).mean(0)
    torch.testing.assert_close(kl, exact)
    own = torch.distributions.Normal(loc.mean(0), scale.mean(0))
    assert (kl_per_dim(q, own) >= 0).all() and not torch.allclose(kl_per_dim(q, own), kl)


def test_kl_per_dim_refuses_correlated_posteriors():
    q = torch.distributions.MultivariateNormal(torch.zeros(4, 2), torch.eye(2))
    with pytest.raises(ValueError, match="no sum over dimensions"):
        kl_per_dim(q)
