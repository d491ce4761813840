"""Ascent steps in a distribution's parameters, with lengths set by its own spread."""

from collections.abc import Callable, Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import (
    Distribution,
    LogNormal,
    MultivariateNormal,
    Normal,
    transform_to,
)

from pyproelbo._distributions.family import Family

_FARTHEST, _LONGEST = 3.0, 1.0  # of a step: in standard deviations, and in other values


class Unconstrained:
    """The parameters of a distribution as values on the whole real line.

    Args:
        d: a distribution of the family.

    Raises:
        ValueError: if its parameters are not known.
    """

    def __init__(self, d: Distribution) -> None:
        family = Family.of(d)
        kind = next((cls for cls in _FACTORS if issubclass(family.kind, cls)), None)
        if kind is not None:  # however its covariance was given
            family = family._replace(names=("loc", _FACTORS[kind]))
        self._family = family
        constraints = family.kind.arg_constraints  # type: ignore[attr-defined]
        self._transforms = [transform_to(constraints[name]) for name in family.names]
        self._direction = _NATURAL.get(kind, _gradient)

    def values(self, d: Distribution) -> list[Tensor]:
        """The values of a distribution of the family, each with its whole batch shape."""
        pairs = zip(self._transforms, self._family.tensors(d), strict=True)
        return [transform.inv(value) for transform, value in pairs]

    def made_of(self, values: Sequence[Tensor]) -> TorchDistribution:
        """The distribution with these values."""
        pairs = zip(self._transforms, values, strict=True)
        return self._family.made_of(transform(value) for transform, value in pairs)

    def uphill(self, d: Distribution, gradients: Sequence[Tensor]) -> list[Tensor]:
        r"""The steps, at rate 1, in the values of ``d``, from their gradients.

        For normal, log-normal and multivariate normal distributions it is the natural gradient, the
        inverse of the Fisher information times g (Amari 1998):

            \sigma^2 g_\mu,  g_{log \sigma} / 2,

        and with covariance L L^T, L^T g_\mu in the coordinates of L^{-1} \mu. For others it is the
        gradient. No step is longer than three standard deviations, or than 1 in a logarithm or any
        other value.
        """
        return self._direction(self._family.tensors(d), gradients)


def _bounded(step: Tensor, by: float = _LONGEST) -> Tensor:
    return step.clamp(-by, by)


def _gradient(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    return [_bounded(g) for g in gradients]


def _of_normal(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    (_, scale), (by_loc, by_log_scale) = parameters, gradients
    return [scale * _bounded(scale * by_loc, _FARTHEST), _bounded(by_log_scale / 2)]


def _of_multivariate(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The values of a Cholesky factor L are its entries, and the logarithms of its diagonal's.

    A change L A of L, A triangular, changes KL by sum_{i > j} A_ij^2 / 2 + sum_i A_ii^2.
    """
    (_, tril), (by_loc, by_values) = parameters, gradients
    diagonal = tril.diagonal(dim1=-2, dim2=-1)
    by_log = by_values.diagonal(dim1=-2, dim2=-1)
    by_tril = by_values.tril(-1) + torch.diag_embed(by_log / diagonal)
    inner = (tril.mT @ by_tril).tril()
    change = _bounded(inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)) / 2)
    changed = tril @ change
    logs = torch.diag_embed(changed.diagonal(dim1=-2, dim2=-1) / diagonal)
    along = tril @ _bounded(tril.mT @ by_loc[..., None], _FARTHEST)
    return [along.squeeze(-1), changed.tril(-1) + logs]


_FACTORS = {Normal: "scale", LogNormal: "scale", MultivariateNormal: "scale_tril"}
_NATURAL: dict[type | None, Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]] = {
    Normal: _of_normal,
    LogNormal: _of_normal,
    MultivariateNormal: _of_multivariate,
}
