"""The codes of a data set compared with their prior."""

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.typing import ColorType
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)

from pyproelbo._backend import rng
from pyproelbo._distributions.marginals import is_factorised, is_normal, marginals
from pyproelbo._surgery.result import Surgery
from pyproelbo.plots.axes import axes, tidy
from pyproelbo.priors.mixture import Mixture

# Petroff (2021), "Accessible color sequences for data visualization": ten colours that colour-blind
# readers tell apart.
_TEN = [
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
]
_REGIONS = {0.5: "solid", 0.9: "dashed", 0.99: "dotted"}


def plot_aggregate_posterior(
    codes: Surgery | Tensor | np.ndarray,
    prior: Distribution | None = None,
    *,
    dims: tuple[int, int] = (0, 1),
    labels: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Two dimensions of all codes as points, on the prior's highest-density regions.

    Where those regions have no codes, or codes lie outside, the decoder was not trained on draws
    like those from the prior.

    Args:
        codes: (N, K), a code for each datum; or a :class:`~pyproelbo.Surgery`, which also gives the
            names of the dimensions.
        prior: of event shape (K,), or (2,) for only the two dimensions; N(0, I) by default.
        dims: which two dimensions to draw.
        labels: (N,), the class of each datum, for its colour and a legend; at most 20 classes.

    Raises:
        ValueError: for another shape; for more than 20 classes; for a prior of K > 2 dimensions
            that are not independent and that is neither normal nor a mixture of such.
    """
    names = codes.dims if isinstance(codes, Surgery) else ()
    points = torch.as_tensor(codes.codes if isinstance(codes, Surgery) else codes).detach().cpu()
    if points.dim() != 2 or points.shape[1] < 2:
        raise ValueError(
            f"codes should have shape (N, K) with K at least 2, got {tuple(points.shape)}"
        )
    num, size = points.shape
    if len(set(dims)) != 2 or not all(0 <= d < size for d in dims):
        raise ValueError(f"dims should be two of the dimensions 0 to {size - 1}, got {dims}")
    colors, handles = _classes(labels, num)
    x, y, density, levels = _regions(*_plane(prior, dims, size))

    ax = axes(ax)
    ax.scatter(
        *points[:, list(dims)].T.numpy(),
        c=colors,
        s=10,
        alpha=min(0.8, 20 / max(num, 1) ** 0.5),
        linewidths=0,
        rasterized=True,
    )
    label = "N(0, I)" if prior is None else "prior"
    for level, (mass, style) in zip(levels, _REGIONS.items(), strict=True):
        ax.contour(x, y, density, [level], colors="0.15", linewidths=1.1, linestyles=style)
        handles.append(Line2D([], [], color="0.15", ls=style, label=f"{mass:.0%} of {label}"))
    ax.set_aspect("equal")
    shown = [names[d] if names else f"dimension {d}" for d in dims]
    ax.set(xlabel=shown[0], ylabel=shown[1])
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return tidy(ax)


def _classes(labels: ArrayLike | None, num: int) -> tuple[str | np.ndarray, list[Line2D]]:
    """The colour of each point, and the entries of the legend."""
    if labels is None:
        return "C0", [_dot("C0", f"codes ({num:,})")]
    labels = np.asarray(labels)
    if labels.shape != (num,):
        raise ValueError(f"labels should have shape ({num},), got {labels.shape}")
    classes, at = np.unique(labels, return_inverse=True)
    if len(classes) > 20:
        raise ValueError(f"labels should be of at most 20 classes, got {len(classes)}")
    palette = ListedColormap(_TEN) if len(classes) <= 10 else matplotlib.colormaps["tab20"]
    return palette(at), [_dot(palette(i), str(name)) for i, name in enumerate(classes)]


def _dot(color: ColorType, label: str) -> Line2D:
    return Line2D([], [], linestyle="", marker="o", markersize=5, color=color, label=label)


def _plane(
    prior: Distribution | None, dims: tuple[int, int], size: int
) -> tuple[Distribution, list[int]]:
    """A prior that can be drawn, and its dimensions in the figure."""
    if prior is None:
        prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    if prior.batch_shape or prior.event_shape not in ((size,), (2,)):
        raise ValueError(
            f"prior should have batch shape () and event shape ({size},) or (2,), got "
            f"{tuple(prior.batch_shape)} and {tuple(prior.event_shape)}"
        )
    if prior.event_shape == (2,) != (size,):
        return prior, [0, 1]
    at = list(dims)
    marginal = _marginal(prior, at)
    if marginal is not None:
        return marginal, [0, 1]
    if size > 2 and not is_factorised(prior):
        raise ValueError(
            f"the density of two of the {size} dimensions of this {type(prior).__name__} is not "
            "known: give a prior of event shape (2,)"
        )
    return prior, at


def _marginal(d: Distribution, at: list[int]) -> Distribution | None:
    """The distribution of two dimensions, for normals and their mixtures."""
    if isinstance(d, Mixture):
        components = _marginal(d.components, at)
        return None if components is None else Mixture(components, d.log_weights)
    if isinstance(d, MultivariateNormal | LowRankMultivariateNormal):
        return MultivariateNormal(d.mean[..., at], d.covariance_matrix[..., at, :][..., at])
    each = marginals(d) if is_factorised(d) else None
    if not is_normal(each):
        return None
    return Independent(Normal(each.mean[..., at], each.stddev[..., at]), 1)


@torch.no_grad()
def _regions(prior: Distribution, at: list[int]) -> tuple[np.ndarray, ...]:
    """A grid, the density there up to a factor, and its levels at the edges of the regions.

    A fraction p of draws from the prior has a density above the level for p.
    """
    with rng.put_aside(seed=0):
        draws = prior.sample(torch.Size([20_000]))

    def log_density(points: Tensor) -> Tensor:
        """(G, 2) to (G,), where the other dimensions are those of one draw."""
        values = draws[0].expand(len(points), -1).clone()
        values[:, at] = points
        inside = prior.support.check(values)  # type: ignore[union-attr]
        result = values.new_full((len(points),), -torch.inf)
        result[inside] = prior.log_prob(values[inside])
        return result

    drawn = log_density(draws[:, at])
    shares = drawn.new_tensor([1 - mass for mass in _REGIONS])
    levels = drawn.quantile(shares)
    region = draws[:, at][drawn >= levels.min()]
    low, high = region.min(0).values, region.max(0).values
    low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
    x, y = (torch.linspace(float(low[i]), float(high[i]), 200).to(draws) for i in (0, 1))
    grid = torch.cartesian_prod(x, y)
    density = (log_density(grid) - drawn.max()).exp().reshape(200, 200).T
    # A little lower, as all of a flat density would be at its level.
    levels = (levels - drawn.max()).exp() * (1 - 1e-6)
    return tuple(t.double().cpu().numpy() for t in (x, y, density, levels))
