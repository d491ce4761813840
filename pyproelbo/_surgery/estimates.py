"""From draws of a guide, and q(z) at them, to the means and errors of a surgery."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyproelbo._surgery.draws import DataDraws
from pyproelbo._surgery.local_latents import LocalLatents

ACTIVE = 0.01  # Burda et al. (2016), section 5.2
ROUNDING = 1e-3  # of a log-density, relative, that the guide gives twice


class Estimates(NamedTuple):
    """What a surgery is made of.

    Attributes:
        mean: by name, over data and draws: numbers, or tensors (K,).
        stderr: the Monte Carlo standard error of each.
        active_units: whether E[z | x] varies over the data, (K,); None where it is not known.
        num_data: N.
    """

    mean: Mapping[str, Any]
    stderr: Mapping[str, Any]
    active_units: Tensor | None
    num_data: int


class _Series:
    """Values by draw and datum, (draws, N, ...), on the CPU; NaN where a datum was not drawn."""

    def __init__(self, draws: Sequence[DataDraws]) -> None:
        self._rows = [part.rows.cpu() for part in draws]
        self.num_data = len(self._rows[0])
        self.sizes = [len(rows) for rows in self._rows]

    def of(self, parts: Iterable[Tensor]) -> Tensor:
        """That of a value of each draw, (rows, ...)."""
        parts = list(parts)
        shape = (len(self._rows), self.num_data, *parts[0].shape[1:])
        value = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
        for s, (rows, part) in enumerate(zip(self._rows, parts, strict=True)):
            value[s, rows] = part.double().cpu()
        return value

    def by_name(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Those of several values."""
        return {name: self.of(part[name] for part in parts) for name in parts[0]}


def estimates_of(
    which: LocalLatents,
    draws: Sequence[DataDraws],
    log_q: Tensor,
    log_q_by_dim: Tensor | None,
    num_samples: int,
) -> Estimates:
    """Those of all data.

    Args:
        log_q: log q(z) of the aggregate at all draws, one after the other, (M,).
        log_q_by_dim: that of each dimension, (M, K); None where it is not known.

    Raises:
        ValueError: for terms that are not finite, and for a guide that gives its own draws another
            density when it runs again.
    """
    series = _Series(draws)
    terms = series.by_name([part.terms for part in draws])
    terms["log_q of the aggregate"] = series.of(log_q.split(series.sizes))
    by_dim = series.by_name([part.by_dim for part in draws])
    drawn = {name: value[:num_samples] for name, value in terms.items()}
    _check_finite(drawn)
    if not which.given:
        _check_own_density(drawn, math.log(series.num_data))

    found = _totals(terms, _errors(terms, sum(series.sizes[1:])), len(which.keys), num_samples)
    if log_q_by_dim is not None:
        aggregates = series.of(log_q_by_dim.split(series.sizes))
        if which.has_factorised_prior:
            found |= _by_dim(by_dim, aggregates, found["marginal_kl"])
        else:
            joint = terms["log_q of the aggregate"]
            found["total_correlation"] = joint - aggregates.sum(-1)
    mean = {name: _number(value[:num_samples].mean((0, 1))) for name, value in found.items()}
    stderr = {name: _number(_stderr(value, num_samples)) for name, value in found.items()}
    return Estimates(mean, stderr, _active(by_dim["mean"], num_samples), series.num_data)


def _errors(terms: Mapping[str, Tensor], num_again: int) -> Tensor:
    """Log-densities less their expectations, (draws, N, L): what is known to have the mean 0.

    One sum for all latents where so few data were drawn again that many errors would explain the
    changes by chance.
    """
    errors = terms["sampled_kl"] - terms["kl"]
    return errors.sum(-1, keepdim=True) if num_again < 20 * errors.shape[-1] else errors


def _totals(
    terms: Mapping[str, Tensor], errors: Tensor, num_chosen: int, num_samples: int
) -> dict[str, Tensor]:
    """The parts of the ELBO that are one number, of each draw of each datum."""
    own = terms["log_q"] - terms["log_q of the aggregate"]
    reconstruction, factor, average, other, information = (
        _controlled(value, errors)
        for value in (
            terms["reconstruction"],
            terms["factor"],
            terms["kl"][..., :num_chosen].sum(-1),
            terms["kl"][..., num_chosen:].sum(-1),
            own,
        )
    )
    # the draws themselves never exceed log N
    if information[:num_samples].mean() > math.log(own.shape[1]):
        information = own
    return {
        "elbo": reconstruction + factor - average - other,
        "reconstruction": reconstruction,
        "average_kl": average,
        "mutual_information": information,
        "marginal_kl": average - information,
        "other_kl": other,
        "factor": factor,
    }


def _by_dim(
    by_dim: Mapping[str, Tensor], aggregates: Tensor, marginal_kl: Tensor
) -> dict[str, Tensor]:
    """The parts of the KL by dimension, where the prior's dimensions are independent."""
    errors = (by_dim["sampled_kl"] - by_dim["kl"]).unsqueeze(-1)
    marginals = by_dim["kl"] - _controlled(by_dim["log_q"] - aggregates, errors)
    return {
        "kl_per_dim": by_dim["kl"],
        "marginal_kl_per_dim": marginals,
        "dimension_wise_kl": marginals.sum(-1),
        "total_correlation": marginal_kl - marginals.sum(-1),
    }


def _check_own_density(drawn: Mapping[str, Tensor], log_n: float) -> None:
    """
    Raises:
        ValueError: where a datum's own z has a smaller share in q(z) than 1 / N.
    """
    own = drawn["log_q"] - drawn["log_q of the aggregate"]
    if (own > log_n + ROUNDING * (1 + drawn["log_q"].abs())).any():
        raise ValueError(
            f"mutual information comes out at {own.mean():.1f} nats, above its bound log N = "
            f"{log_n:.1f}: q(z | x_n) is not the same when the guide runs on x_n again. Let it "
            "draw nothing at random but by pyro.sample, and depend on nothing but its own row"
        )


def _number(value: Tensor) -> Any:
    return value.item() if value.dim() == 0 else value


def _controlled(value: Tensor, errors: Tensor) -> Tensor:
    """``value`` less its regression on errors whose means are known to be 0: (draws, N, ...).

    The mean stays, and the noise is the least that a linear function of the errors, (draws, N,
    ..., L), leaves. The noise is what differs between the draws for one datum. The regression
    is linear in ``value``: on the same errors, parts of a sum are controlled as the sum is.
    """
    changes = (part - part[:1] for part in (value, errors))  # exactly 0 where nothing was sampled
    noise, known = ((part - part.mean(0)).nan_to_num() for part in changes)
    squares = torch.einsum("sn...i,sn...j->...ij", known, known)
    products = torch.einsum("sn...i,sn...->...i", known, noise)
    slopes = torch.linalg.pinv(squares, hermitian=True) @ products.unsqueeze(-1)
    return value - (errors * slopes.squeeze(-1)).sum(-1)


def _stderr(value: Tensor, num_samples: int) -> Tensor:
    """Of the mean over data and draws, from the variance between draws for the same datum."""
    return (value.var(0).nanmean(0) / (num_samples * value.shape[1])).sqrt()


def _active(mean: Tensor, num_samples: int) -> Tensor | None:
    """Whether E[z | x] varies over the data: (K,). Its own noise, if any, is taken off."""
    if mean[:num_samples].isnan().any():
        return None
    noise = mean.var(0).nanmean(0) / num_samples
    return mean[:num_samples].mean(0).var(0, correction=0) - noise > ACTIVE


def _check_finite(terms: Mapping[str, Tensor]) -> None:
    for name, value in terms.items():
        bad = (~value.isfinite()).reshape(*value.shape[:2], -1).any(2).any(0).nonzero()
        if len(bad):
            raise ValueError(
                f"{name} is NaN or infinite for {len(bad)} of {value.shape[1]} data, the first of "
                f"them row {int(bad[0])}: look for NaN in data, and at the parameters that model "
                "and guide have there"
            )
