import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from torch.distributions import (
    Categorical,
    Independent,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Uniform,
)

import pyproelbo as pe
from pyproelbo.plots import (
    plot_aggregate_posterior,
    plot_elbo_trace,
    plot_evidence_gap,
    plot_gradient_noise,
    plot_khat,
    plot_kl_per_dim,
    plot_pseudo_inputs,
    plot_rate_distortion,
    plot_reconstructions,
    plot_surgery,
)
from pyproelbo.priors import Mixture


def a_surgery(**changes):
    """Three dimensions, of which one is not in use."""
    values = {
        "elbo": -103.0,
        "reconstruction": -100.0,
        "average_kl": 3.0,
        "mutual_information": 2.0,
        "marginal_kl": 1.0,
        "log_n": np.log(50),
        "kl_per_dim": torch.tensor([0.9, 2.095, 0.005]),
        "marginal_kl_per_dim": torch.tensor([0.1, 0.3, 0.0]),
        "total_correlation": 0.6,
        "dimension_wise_kl": 0.4,
        "active_units": torch.tensor([True, True, False]),
        "num_data": 50,
        "num_samples": 1,
        "stderr": {
            "elbo": 0.25,
            "mutual_information": 0.0123,
            "marginal_kl_per_dim": torch.full((3,), 0.01),
        },
        "dims": ("z[0]", "z[1]", "w"),
        "codes": torch.randn(50, 3),
    }
    return pe.Surgery(**values | changes)


def a_gap():
    """Of two data: log p(x) -10, best ELBO -10.5, ELBO -12.5, on average."""
    stderr = {name: torch.tensor([0.03, 0.04]) for name in ("log_evidence", "best_elbo", "elbo")}
    values = torch.tensor([[-9.0, -11.0], [-9.5, -11.5], [-12.0, -13.0]])
    return pe.InferenceGap(*values, stderr)


def a_noise():
    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    def model(x):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x[0])

    return pe.gradient_noise(model, guide, torch.ones(1), num_samples=20, progress=False)


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
    "pseudo_inputs": lambda ax=None: plot_pseudo_inputs(
        torch.rand(3, 5, requires_grad=True), ax=ax
    ),
    "rate_distortion": lambda ax=None: plot_rate_distortion(
        {1.0: a_surgery(), 4.0: (1.0, 104.0)}, ax=ax
    ),
    "khat": lambda ax=None: plot_khat(torch.rand(50), ax=ax),
    "gradient_noise": lambda ax=None: plot_gradient_noise(a_noise(), ax=ax),
    "evidence_gap": lambda ax=None: plot_evidence_gap(a_gap(), ax=ax),
    "surgery": lambda ax=None: plot_surgery(a_surgery(), ax=ax),
    "kl_per_dim of a surgery": lambda ax=None: plot_kl_per_dim(a_surgery(), ax=ax),
    "aggregate_posterior": lambda ax=None: plot_aggregate_posterior(torch.randn(30, 2), ax=ax),
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
    with pytest.raises(ValueError, match=r"kl should have shape \(K,\)"):
        plot_kl_per_dim(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"active should have shape \(3,\)"):
        plot_kl_per_dim(np.zeros(3), active=[True])


# Pseudo-inputs


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (1, 4, 6), (4, 2, 3), (3, 4, 2)])
def test_the_pseudo_inputs_of_the_largest_weights_come_first(shape):
    inputs, weights = torch.arange(5.0).unsqueeze(1).expand(5, 24), [0.1, 0.05, 0.5, 0.3, 0.05]
    for u in (inputs, inputs.reshape(5, *shape)):
        ax = plot_pseudo_inputs(u, weights, shape=shape, num=3)
        assert [text.get_text() for text in ax.texts] == ["50%", "30%", "10%"]
        assert ax.get_title() == "The first 3 of 5 pseudo-inputs, and the share of each"
        picture = np.ma.getdata(ax.images[0].get_array())
        if picture.ndim == 2:
            assert (picture[0, 0], picture[0, -1]) == (2, 0)


def test_pseudo_inputs_go_on_in_the_next_row():
    ax = plot_pseudo_inputs(torch.rand(23, 4, 4))
    assert len(ax.texts) == 23 and len({text.get_position()[1] for text in ax.texts}) == 3
    ax.figure.canvas.draw()


def test_pseudo_inputs_that_are_no_images_are_a_heat_map():
    ax = plot_pseudo_inputs(torch.rand(50, 9))
    assert ax.images[0].get_array().shape == (40, 9) and "share" in ax.get_ylabel()


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ([torch.rand(0, 4)], {}, r"pseudo_inputs should have shape \(K, ...\)"),
        ([torch.rand(4)], {}, r"pseudo_inputs should have shape \(K, ...\)"),
        ([torch.rand(3, 4), [0.5, 0.5]], {}, r"weights should have shape \(3,\)"),
        ([torch.rand(3, 4)], {"num": 0}, "num should be at least 1"),
        (
            [torch.rand(3, 4)],
            {"shape": (3, 3)},
            r"shape \(3, 3\) has 9 numbers, but a pseudo-input",
        ),
    ],
)
def test_pseudo_inputs_that_cannot_be_shown(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        plot_pseudo_inputs(*arguments, **options)


# Rate and distortion


def test_fits_lie_above_the_line_of_the_best_elbo():
    ax = plot_rate_distortion({"b": (3.0, 10.0), "a": (1.0, 14.0), "c": (5.0, 9.0)})
    curve, line = (np.stack(drawn.get_data(), 1) for drawn in ax.lines)
    np.testing.assert_allclose(curve, [(1, 14), (3, 10), (5, 9)])
    np.testing.assert_allclose(line.sum(1), 13.0)
    assert {text.get_text() for text in ax.texts} == {"a", "b", "c"}
    assert ax.get_legend().get_texts()[0].get_text() == "ELBO = \N{MINUS SIGN}13.00"
    assert np.stack(plot_rate_distortion({1: a_surgery()}).lines[0].get_data()).tolist() == [
        [3.0],
        [100.0],
    ]
    for fits in ({}, {"a": (np.nan, 1.0)}):
        with pytest.raises(ValueError, match="at least one, with finite numbers"):
            plot_rate_distortion(fits)


# Evidence


def test_the_gaps_are_laid_end_to_end():
    ax = plot_evidence_gap(a_gap())
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches]
    np.testing.assert_allclose(spans, [(-12.5, -10.5), (-10.5, -10.0)])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["amortisation gap: 2.000 ± 0.035", "approximation gap: 0.500 ± 0.035"]


def test_khat_is_told_apart_at_its_lines():
    ax = plot_khat([0.1, 0.6, 0.69, 0.8, np.inf])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["good (1)", "usable (2)", "bad (2)"]
    assert [line.get_ydata()[0] for line in ax.lines] == [0.5, 0.7]
    with pytest.raises(ValueError, match=r"khat should have shape \(N,\)"):
        plot_khat([])


def heights(ax, color):
    """Of the bars of a colour, from left to right."""
    shown = [bar for bar in ax.patches if bar.get_facecolor() == to_rgba(color)]
    return [bar.get_height() for bar in sorted(shown, key=lambda bar: bar.get_x())]


# A surgery


def test_the_parts_of_the_kl_are_laid_end_to_end():
    ax = plot_surgery(a_surgery())
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches]
    np.testing.assert_allclose(spans, [(0, 3), (0, 2), (2, 3), (2, 2.6), (2.6, 3)])
    rows = [tick.get_text() for tick in ax.get_yticklabels()]
    assert rows[:3] == ["average KL", "mutual information\n(line: log N = 3.91)", "marginal KL"]
    assert ax.get_xlim()[1] > np.log(50)
    assert ax.get_xlabel() == "nats per datum"
    assert ax.yaxis_inverted()


def test_a_surgery_says_its_numbers_with_their_errors():
    ax = plot_surgery(a_surgery())
    said = [text.get_text() for text in ax.texts]
    assert "2.000 ± 0.012" in said and "3.0000" in said
    title = ax.get_title(loc="left")
    assert title == (
        "ELBO −103.00 ± 0.25\n= reconstruction −100.0000 − average KL 3.0000"  # noqa: RUF001
    )
    title = plot_surgery(a_surgery(factor=1.0, other_kl=0.5)).get_title(loc="left")
    assert "+ factor 1.0000" in title and title.endswith("other KL 0.5000")


@pytest.mark.parametrize(
    ("unknown", "num"),
    [(("dimension_wise_kl",), 4), (("dimension_wise_kl", "total_correlation"), 3)],
)
def test_of_a_surgery_what_is_known_is_drawn(unknown, num):
    ax = plot_surgery(a_surgery(**dict.fromkeys(unknown)))
    assert len(ax.patches) == len(ax.get_yticks()) == num


def test_bars_of_a_surgery_have_its_names_units_and_marginals():
    ax = plot_kl_per_dim(a_surgery())
    names = [tick.get_text() for tick in ax.get_xticklabels()]
    assert names == ["z[1]", "z[0]", "w"]
    np.testing.assert_allclose(heights(ax, "C0"), [2.095, 0.9])
    np.testing.assert_allclose(heights(ax, "C1"), [0.3, 0.1, 0.0])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["active (2 of 3)", "inactive (1 of 3)", "of which marginal KL"]
    unknown = a_surgery(active_units=None)
    assert len(heights(plot_kl_per_dim(unknown), "C0")) == 2  # by their KL


def test_the_noise_of_a_collapse_is_not_drawn_large():
    tiny = a_surgery(kl_per_dim=torch.full((3,), 1e-6), marginal_kl_per_dim=torch.full((3,), 1e-5))
    assert plot_kl_per_dim(tiny).get_ylim() == (0, 0.05)


def test_a_surgery_without_a_kl_per_dim_is_refused():
    with pytest.raises(ValueError, match=r"no kl_per_dim: .* no known marginals"):
        plot_kl_per_dim(a_surgery(kl_per_dim=None))


# The aggregate posterior


def points(ax):
    return np.asarray(ax.collections[0].get_offsets())


def regions(ax):
    """The corners of the closed curves, from the smallest region to the largest."""
    paths = [lines.get_paths()[0] for lines in ax.collections[1:]]
    return [np.concatenate(path.to_polygons(closed_only=False)) for path in paths]


def test_codes_are_drawn_over_the_regions_of_the_prior():
    result = a_surgery()
    ax = plot_aggregate_posterior(result, dims=(2, 0))
    np.testing.assert_allclose(points(ax), result.codes[:, [2, 0]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("w", "z[0]")
    assert ax.get_aspect() == 1
    # of N(0, I), a share p lies within the radius sqrt(-2 log(1 - p))
    for p, corners in zip((0.5, 0.9, 0.99), regions(ax), strict=True):
        radius = np.linalg.norm(corners, axis=1)
        np.testing.assert_allclose(radius, np.sqrt(-2 * np.log(1 - p)), rtol=0.05)


def test_a_prior_of_all_dimensions_is_drawn_by_two_of_them():
    codes, loc, scale = torch.randn(20, 3), torch.tensor([5.0, 0.0, -3.0]), torch.ones(3)
    independent = Independent(Normal(loc, scale), 1)
    covariance = torch.tensor([[1.0, 0.0, 0.9], [0.0, 1.0, 0.0], [0.9, 0.0, 1.0]])
    correlated = MultivariateNormal(loc, covariance)
    for prior, tilt in ((independent, 0.0), (correlated, 0.9)):
        corners = regions(plot_aggregate_posterior(codes, prior, dims=(2, 0)))[1] - [-3, 5]
        squares = np.einsum("ni,nj,ij->n", corners, corners, np.linalg.inv([[1, tilt], [tilt, 1]]))
        np.testing.assert_allclose(squares, -2 * np.log(0.1), rtol=0.1)


PRIORS = {
    "two modes": MixtureSameFamily(
        Categorical(torch.ones(2)),
        MultivariateNormal(torch.tensor([[-4.0, 0.0], [4.0, 0.0]]), torch.eye(2)),
    ),
    "positive": Independent(LogNormal(torch.zeros(3), 0.5), 1),
    "learned": Mixture(
        Independent(Normal(torch.tensor([[-4.0, 0.0, 2.0], [4.0, 0.0, 2.0]]), 1.0), 1),
        torch.tensor([0.3, 0.7]).log(),
    ),
    "flat": Independent(Uniform(torch.zeros(2), 1.0), 1),
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_priors_of_any_support_and_shape(prior):
    codes, state = torch.rand(20, 3), torch.get_rng_state()
    ax = plot_aggregate_posterior(codes, prior)
    assert torch.equal(torch.get_rng_state(), state)
    ax.figure.canvas.draw()
    assert all(len(corners) > 10 for corners in regions(ax))
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["codes (20)", "50% of prior", "90% of prior", "99% of prior"]


def test_classes_have_a_colour_and_a_name_each():
    labels = np.array(["cat", "dog", "cat", "eel"])
    ax = plot_aggregate_posterior(torch.randn(4, 2), labels=labels)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names[:3] == ["cat", "dog", "eel"]
    colors = ax.collections[0].get_facecolors()
    assert (colors[0] == colors[2]).all() and len(np.unique(colors, axis=0)) == 3


def test_many_points_are_faint_and_no_vectors():
    few = plot_aggregate_posterior(torch.randn(10, 2)).collections[0]
    many = plot_aggregate_posterior(torch.randn(40_000, 2)).collections[0]
    assert many.get_alpha() < few.get_alpha()
    assert many.get_rasterized()


CODES = torch.randn(30, 3)
REFUSED = [
    ((torch.randn(30),), {}, "codes should have shape"),
    ((torch.randn(30, 1),), {}, "K at least 2"),
    ((CODES,), {"dims": (0, 3)}, "dims should be two of the dimensions 0 to 2"),
    ((CODES,), {"dims": (1, 1)}, "dims should be two"),
    ((CODES,), {"labels": [0, 1]}, r"labels should have shape \(30,\)"),
    ((CODES,), {"labels": range(30)}, "at most 20 classes, got 30"),
    ((CODES, Normal(0.0, 1.0)), {}, r"event shape \(3,\) or \(2,\), got \(\) and \(\)"),
    ((CODES, Normal(torch.zeros(3), 1.0)), {}, "should have batch shape"),
    (
        (
            CODES,
            MixtureSameFamily(
                Categorical(torch.ones(2)), MultivariateNormal(torch.zeros(2, 3), torch.eye(3))
            ),
        ),
        {},
        "MixtureSameFamily is not known: give a prior of event shape",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "message"), REFUSED)
def test_what_cannot_be_drawn_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        plot_aggregate_posterior(*arguments, **options)


@pytest.mark.slow
def test_importing_the_library_leaves_matplotlib_alone():
    code = (
        "import sys, pyproelbo as pe; assert 'matplotlib' not in sys.modules; "
        "import matplotlib; before = dict(matplotlib.rcParams); pe.plot_surgery; "
        "assert dict(matplotlib.rcParams) == before and 'plot_surgery' in dir(pe)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
