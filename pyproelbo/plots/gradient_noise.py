"""The noise of a gradient by term, for several estimators."""

import numpy as np
from matplotlib.axes import Axes

from pyproelbo._diagnostics.gradient_report import WHOSE, GradientNoise
from pyproelbo.plots.axes import array, axes, tidy

_SMALLEST = 1e-6  # relative to the largest noise, to have a bar


def plot_gradient_noise(
    noise: GradientNoise, *, parameters: str = "all", ax: Axes | None = None
) -> Axes:
    """The noise of each term's gradient on a log scale, with its Monte Carlo error.

    A term without a bar has no noise, or less than a millionth of the largest; terms whose gradient
    in these parameters is zero are left out.

    Args:
        noise: the result of :func:`~pyproelbo.gradient_noise`.
        parameters: one of ``noise.parameters``, "model", "guide", "shared" or "all".

    Raises:
        ValueError: for parameters that the programs do not have.
    """
    if parameters not in noise.parameters:
        raise ValueError(f"parameters should be one of {noise.parameters}, got {parameters!r}")
    g = noise.parameters.index(parameters)
    values, errors = array(noise.noise[:, g]), array(noise.noise_stderr[:, g])
    shown = np.flatnonzero((np.nan_to_num(values) > 0).any(axis=0)).tolist()
    num = len(noise.estimators)
    ax = axes(ax, (6.4, 1.2 + 0.16 * (num + 1) * max(len(shown), 1)))
    places = np.arange(len(shown))
    for e, name in enumerate(noise.estimators):
        ax.barh(
            places + (e - (num - 1) / 2) * 0.8 / num,
            values[e, shown],
            0.8 / num,
            xerr=np.nan_to_num(errors[e, shown]),
            error_kw={"linewidth": 1, "ecolor": "0.3"},
            label=name,
        )
    positive = values[:, shown][values[:, shown] > 0]
    if len(positive):
        large = positive[positive > _SMALLEST * positive.max()]
        ax.set_xscale("log")
        ax.set_xlim(large.min() / 3, 2 * large.max())
    ax.set_yticks(places, [noise.labels[t] for t in shown])
    for label, t in zip(ax.get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if noise.terms[t][0] == "total" else "normal")
    ax.invert_yaxis()
    ax.set(xlabel=f"noise of the gradient in {WHOSE[parameters]}, nats$^2$")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return tidy(ax)
