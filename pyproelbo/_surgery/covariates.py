"""Covariates of log q(z) of the aggregate posterior that are known for all data."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyproelbo._surgery.control import controlled, errors_of
from pyproelbo._surgery.series import At, Series
from pyproelbo._surgery.two_phase import ROWS_PER_SLOPE, Covariates

_MOST_DIMS = 500  # with few enough pairs
_ROWS = 2**16  # of draws, at once


def covariates_of(
    series: Series,
    terms: Mapping[str, Tensor],
    num_chosen: int,
    log_q_by_dim: At | None,
    num_samples: int,
) -> Covariates:
    """The covariates of log q(z), or of log q(z) of single dimensions.

    They are log q(z | x), the log-density of the product of the marginals of q(z) where these are
    known for all data, the log-density of the Normal with the codes' mean and covariance, and the
    KL of the chosen latents with its error at the draw; by dimension where the marginals are known
    for some data.
    """
    kl, sampled = (terms[name][..., :num_chosen].sum(-1) for name in ("kl", "sampled_kl"))
    errors, columns = errors_of(terms, series.num_again), [terms["log_q"]]
    num_known = 0 if log_q_by_dim is None else len(log_q_by_dim.draws[0].rows)
    if log_q_by_dim is not None and num_known == series.num_data:
        columns.append(series.of(value.double().sum(1) for value in log_q_by_dim.values))
    if series.num_dims <= _MOST_DIMS:
        columns.append(_log_normal(series, num_samples))
    columns += [sampled - kl, kl]
    less_noise = [controlled(value, errors) for value in columns]
    if num_known < series.num_data and 2 * series.num_dims + 5 < num_known // ROWS_PER_SLOPE:
        kl, sampled = (series.by_dim(name, slice(None)) for name in ("kl", "sampled_kl"))
        columns += [*kl.unbind(-1), *(sampled - kl).unbind(-1)]
        less_noise += [*kl.unbind(-1), *torch.zeros_like(kl).unbind(-1)]
    return Covariates(torch.stack(columns, -1), torch.stack(less_noise, -1))


def _log_normal(series: Series, num_samples: int) -> Tensor:
    """The log-density, up to a constant, of the Normal that fits the draws, (draws, N)."""
    draws = [part.by_dim["z"] for part in series.draws]
    drawn = draws[:num_samples]
    mean = torch.stack([z.double().mean(0) for z in drawn]).mean(0)
    parts = (x.double() - mean for z in drawn for x in z.split(_ROWS))
    square = sum(part.mT @ part for part in parts)
    assert isinstance(square, Tensor)
    precision = torch.linalg.pinv(square / (num_samples * series.num_data), hermitian=True)
    return series.of(
        torch.cat([_form(x.double() - mean, precision) for x in z.split(_ROWS)]) for z in draws
    )


def _form(x: Tensor, precision: Tensor) -> Tensor:
    return -0.5 * ((x @ precision) * x).sum(1)
