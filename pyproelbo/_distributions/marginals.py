"""The marginal distribution of each dimension, where it is known."""

from typing import TypeGuard

from pyro.distributions import MaskedDistribution
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)

from pyproelbo._distributions.owners import DENSITY, keeps


def marginals(d: Distribution) -> Distribution | None:
    """The distributions of all dimensions of ``d``, as a batch.

    Returns:
        A distribution of batch shape ``d.batch_shape + d.event_shape`` and event shape (), or
        None where the marginals are not known, as for a mixture or a flow.
    """
    if isinstance(d, MaskedDistribution):
        return marginals(d.base_dist)
    if keeps(d, MultivariateNormal, DENSITY) or keeps(d, LowRankMultivariateNormal, DENSITY):
        return Normal(d.mean, d.variance.sqrt(), validate_args=False)
    if not d.event_shape:
        return d
    base = d.base_dist if keeps(d, Independent, DENSITY) else None
    return None if base is None or base.event_shape else base


def is_factorised(d: Distribution) -> bool:
    """Whether the dimensions of ``d`` are certainly independent."""
    if isinstance(d, MaskedDistribution):
        return is_factorised(d.base_dist)
    known = marginals(d) is not None
    return known and not isinstance(d, MultivariateNormal | LowRankMultivariateNormal)


def is_normal(d: Distribution | None) -> TypeGuard[Normal]:
    """Whether ``d`` has the density of a Normal."""
    return d is not None and keeps(d, Normal, DENSITY)
