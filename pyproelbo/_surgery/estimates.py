"""From draws of a guide, and q(z) at them, to the means and errors of a surgery."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyproelbo._surgery.control import controlled, errors_of
from pyproelbo._surgery.covariates import covariates_of
from pyproelbo._surgery.draws import DataDraws
from pyproelbo._surgery.local_latents import LocalLatents
from pyproelbo._surgery.series import At, Series
from pyproelbo._surgery.two_phase import Parted, TwoPhase, noise

ACTIVE = 0.01  # Burda et al. (2016), section 5.2
ROUNDING = 1e-3  # relative, of a log-density that the guide gives twice
_EXACT = 1e-13  # relative to the ELBO: standard errors below are of rounding
_ELEMENTS = 2**23  # of a value by dimension, held at once


class Estimates(NamedTuple):
    """The numbers of a surgery.

    Attributes:
        mean: by name, over data and draws: numbers, or tensors (K,).
        stderr: the standard error of each.
        active_units: whether E[z | x] varies over the data, (K,); None where it is not known.
        num_data: N.
        num_points: for how many of them log q(z) is known.
    """

    mean: Mapping[str, Any]
    stderr: Mapping[str, Any]
    active_units: Tensor | None
    num_data: int
    num_points: int


def check_terms(draws: Sequence[DataDraws], num_samples: int) -> None:
    """Check that the terms of the ELBO are finite.

    Raises:
        ValueError: where they are not.
    """
    drawn = draws[:num_samples]
    series = Series(drawn)
    _check_finite(series.by_name([part.terms for part in drawn]), series.rows)


def estimates_of(
    which: LocalLatents,
    draws: Sequence[DataDraws],
    log_q: At,
    log_q_by_dim: At | None,
    num_samples: int,
) -> Estimates:
    """The estimates for all data.

    Args:
        draws: of all data.
        log_q: of the aggregate, at all draws or at those of some data.
        log_q_by_dim: of each dimension, (rows, K), at all draws or where ``log_q`` is; None where
            unknown.

    Raises:
        ValueError: for densities that are not finite, and for a guide that gives its own draws
            another density when it runs again.
    """
    series, some = Series(draws), Series(log_q.draws)
    terms = series.by_name([part.terms for part in draws])
    joint = some.of(log_q.values)
    _check_finite({"log_q of the aggregate": joint[:num_samples]}, some.rows)
    own, log_n = terms["log_q"][:, some.rows] - joint, math.log(series.num_data)
    if not which.given:
        _check_own_density(own[:num_samples], terms["log_q"][:num_samples, some.rows], log_n)

    num, errors, means = len(which.keys), errors_of(terms, series.num_again), TwoPhase(num_samples)
    if some.num_data < series.num_data:
        known = covariates_of(series, terms, num, log_q_by_dim, num_samples)
        means = TwoPhase(num_samples, some.rows, known)
    information = _controlled(own, errors, series)
    # at the draws themselves it never exceeds log N
    if means.mean(information) > log_n:
        information, means = _parted(own, series), means.without_covariates()
    found = _totals(terms, errors, num, information)
    moments = {}
    if which.has_factorised_prior:
        moments["kl_per_dim"] = _kl_per_dim(series, means)
    if log_q_by_dim is not None and which.has_factorised_prior:
        marginal, moments["marginal_kl_per_dim"] = _marginal_kl(series, log_q_by_dim, means)
        found["dimension_wise_kl"] = marginal
        found["total_correlation"] = found["marginal_kl"] - marginal
    elif log_q_by_dim is not None:
        of = Series(log_q_by_dim.draws)
        total = of.of(value.double().sum(1) for value in log_q_by_dim.values)
        found["total_correlation"] = _parted(joint, series) - _parted(total, series)
    moments |= {name: _Moments(means.mean(v), means.stderr(v)) for name, v in found.items()}
    scale = max(1.0, *(abs(moments[name].mean.item()) for name in ("elbo", "reconstruction")))
    return Estimates(
        {name: _number(moment.mean) for name, moment in moments.items()},
        {name: _number(_exact(moment.stderr, scale)) for name, moment in moments.items()},
        _active(series, num_samples),
        series.num_data,
        some.num_data,
    )


class _Moments(NamedTuple):
    mean: Tensor
    stderr: Tensor


def _parted(value: Tensor, series: Series) -> Parted:
    """A value (draws, rows, ...) of all data, or of some."""
    draws, num, *rest = value.shape
    if num == series.num_data:
        return Parted(value)
    return Parted(value.new_zeros(draws, series.num_data, *rest), value)


def _controlled(value: Tensor, errors: Tensor, series: Series) -> Parted:
    """For all data without its noise; for some unchanged, as the covariates lose theirs."""
    of_all = value.shape[1] == series.num_data
    return _parted(controlled(value, errors) if of_all else value, series)


def _totals(
    terms: Mapping[str, Tensor], errors: Tensor, num_chosen: int, information: Parted
) -> dict[str, Parted]:
    """The parts of the ELBO that are one number for each draw of each datum."""
    reconstruction, factor, average, other = (
        Parted(controlled(value, errors))
        for value in (
            terms["reconstruction"],
            terms["factor"],
            terms["kl"][..., :num_chosen].sum(-1),
            terms["kl"][..., num_chosen:].sum(-1),
        )
    )
    return {
        "elbo": reconstruction + factor - average - other,
        "reconstruction": reconstruction,
        "average_kl": average,
        "mutual_information": information,
        "marginal_kl": average - information,
        "other_kl": other,
        "factor": factor,
    }


def _kl_per_dim(series: Series, means: TwoPhase) -> _Moments:
    parts = (Parted(series.by_dim("kl", dims)) for dims in _dims(series))
    return _concatenated(_Moments(means.mean(kl), means.stderr(kl)) for kl in parts)


def _marginal_kl(series: Series, log_q_by_dim: At, means: TwoPhase) -> tuple[Parted, _Moments]:
    """KL(q(z_k) || p(z_k)): the sum over dimensions, and each."""
    some = Series(log_q_by_dim.draws)
    at, sums, moments = some.rows, [], []
    for dims in _dims(series):
        kl, sampled, log_q = (series.by_dim(name, dims) for name in ("kl", "sampled_kl", "log_q"))
        own = log_q[:, at] - some.of(value[:, dims] for value in log_q_by_dim.values)
        own = _controlled(own, (sampled - kl).unsqueeze(-1), series)
        marginals = Parted(kl) - own
        sums.append(marginals.sum())
        moments.append(_Moments(means.mean(marginals), means.stderr(marginals)))
    return reduce(add, sums), _concatenated(moments)


def _concatenated(parts: Iterable[_Moments]) -> _Moments:
    means, errors = zip(*parts, strict=True)
    return _Moments(torch.cat(means), torch.cat(errors))


def _dims(series: Series) -> Iterator[slice]:
    """Few enough dimensions at a time."""
    size = max(1, _ELEMENTS // (len(series.draws) * series.num_data))
    return (slice(start, start + size) for start in range(0, series.num_dims, size))


def _check_own_density(own: Tensor, log_q: Tensor, log_n: float) -> None:
    """
    Raises:
        ValueError: where a datum's own z has a share in q(z) below 1 / N.
    """
    if (own > log_n + ROUNDING * (1 + log_q.abs())).any():
        raise ValueError(
            f"mutual information comes out at {own.mean():.1f} nats, above its bound log N = "
            f"{log_n:.1f}: q(z | x_n) differs when the guide runs on x_n again. Let it draw random "
            "numbers by pyro.sample only, and depend only on its own row"
        )


def _exact(stderr: Tensor, scale: float) -> Tensor:
    """0 where an error is that of rounding, of numbers that are exact."""
    return torch.where(stderr < _EXACT * scale, 0.0, stderr)


def _number(value: Tensor) -> Any:
    return value.item() if value.dim() == 0 else value


def _active(series: Series, num_samples: int) -> Tensor | None:
    """Whether E[z | x] varies over the data: (K,). Its own noise, if any, is subtracted."""
    found = []
    for dims in _dims(series):
        mean = series.by_dim("mean", dims)
        if mean[:num_samples].isnan().any():
            return None
        spread = mean[:num_samples].mean(0).var(0, correction=0)
        found.append(spread - noise(mean) / num_samples > ACTIVE)
    return torch.cat(found)


def _check_finite(terms: Mapping[str, Tensor], rows: Tensor) -> None:
    for name, value in terms.items():
        bad = (~value.isfinite()).reshape(*value.shape[:2], -1).any(2).any(0).nonzero()[:, 0]
        if len(bad):
            raise ValueError(
                f"{name} is NaN or infinite for {len(bad)} of {len(rows)} data, the first of them "
                f"row {int(rows[bad[0]])}: look for NaN in the data, and at the parameters of "
                "model and guide there"
            )
