"""The ELBO of sequences, by timestep."""

import re
from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import Tensor

from pyproelbo._terms.by_time import TimeOf
from pyproelbo._terms.collect import KL, terms_of
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import Traces
from pyproelbo.elbo.base import TermsELBO
from pyproelbo.elbo.options import Options
from pyproelbo.schedules import Schedule

_STEP = re.compile(r".*_(\d+)")

TimeWeights = Sequence[float] | Tensor | Callable[[int], float]


def time_of(name: str) -> int:
    """The timestep of a site called ``z_3``: 3.

    Raises:
        ValueError: for a name that ends otherwise.
    """
    match = _STEP.fullmatch(name)
    if match is None:
        raise ValueError(
            f"site {name!r} has no timestep in its name: call it {name + '_0'!r} and so on, make "
            "it a sequence (pyproelbo.sequences), or pass time=, a function from a site's name "
            "to its timestep, or to None where it belongs to no timestep"
        )
    return int(match[1])


class SequentialELBO(TermsELBO):
    r"""L = sum_t E_q[log p(x_t | z_0:t)] - beta w_t KL(q(z_t | z_0:t-1, x) || p(z_t | z_0:t-1)).

    With beta = w_t = 1 this is the ELBO of a sequence, each KL under the expectation over the past
    z_0:t-1, which is sampled: the filtering bound where q(z_t | ...) sees only x_0:t, the smoothing
    bound where it also sees x_t+1, ... Its terms have ``time``, ``reconstruction_by_time`` and
    ``kl_by_time``. The sum of their differences up to a step tau bounds log p(x_0:tau), for every
    tau, where the guide draws the steps in their order. The gap is KL(q(z_0:tau | x) || p(z_0:tau |
    x_0:tau)): a filtering guide cannot revise the past; the bound of a smoothing guide, which has
    seen the future, may be loose at tau and tight at the end. A single difference is not log
    p(x_tau | x_0:tau-1).

    The programs may be loops over time, with sites ``z_0``, ``z_1``, ..., or have whole sequences
    as sites (:mod:`pyproelbo.sequences`), which is several times faster and gives the same numbers.
    Masked steps add nothing.

    A closed-form KL given the sampled past has the expectation of log q - log p. The variance of
    its gradient, summed over parameters, is smaller: by 6 times at the start and 12 times at the
    end of training a deep Markov model of the JSB chorales. The variance of the loss is smaller at
    first too (10 times); but log p(x, z) - log q(z | x) varies less as q nears the posterior, and
    not at all there: to evaluate a trained guide, kl="sampled" may be the better estimate (1.7
    times).

    >>> from pyproelbo.schedules import Linear
    >>> objective = SequentialELBO(beta=Linear(0.01, 1.0, steps=5000))

    Args:
        beta: a number or a schedule, for every KL.
        kl: "auto", "analytic" or "sampled", as in :class:`TermsELBO`.
        time_weights: w_t, a number for each timestep from 0 on, or a function of the timestep;
            1 for all if None. A latent without a timestep has weight 1.
        time: from a site's name to its timestep, or to None for a site without one; by default the
            number at the end of names like ``z_3``, and an error if there is none.
        **kwargs: as in :class:`TermsELBO`.

    Raises:
        ValueError: for a negative beta or weight; at the first evaluation, for a site without a
            timestep, for latents of several timesteps that share one KL (under a joint guide), and
            for fewer weights than timesteps.
    """

    additive = True

    def __init__(
        self,
        beta: float | Schedule = 1.0,
        kl: KL = "auto",
        *,
        time_weights: TimeWeights | None = None,
        time: TimeOf = time_of,
        **kwargs: Unpack[Options],
    ) -> None:
        super().__init__(kl=kl, schedules={"beta": beta}, **kwargs)
        self.time = time
        if not (time_weights is None or callable(time_weights)):
            time_weights = _checked(time_weights)
        self.time_weights: Tensor | Callable[[int], float] | None = time_weights
        self._used: tuple[tuple, Tensor] | None = None  # the last weights, on their device

    def objective(self, terms: Terms) -> Tensor:
        """sum_t E_q[log p(x_t | ...)] - beta w_t KL_t; without a timestep w_t is 1."""
        beta, kl = self.weights(terms)["beta"], terms.kl_by_time
        by_time = kl.reshape(len(kl), -1).sum(1)
        if self.time_weights is not None:
            by_time = by_time * self._weights_like(by_time, terms.time)
        timeless = [terms.kl[name] for name in terms.timeless]
        return terms.data_fit - beta * terms.mean([by_time, *timeless])

    def _terms_of(self, traces: Traces) -> Terms:
        return terms_of(traces, self.kl, self.time)

    def _weights_like(self, by_time: Tensor, times: tuple[int, ...]) -> Tensor:
        """The weights of these timesteps, moved only where they differ from the last ones."""
        key = times, by_time.device, by_time.dtype
        if self._used is None or self._used[0] != key:
            self._used = key, self._weights_of(times).to(by_time)
        return self._used[1]

    def _weights_of(self, times: tuple[int, ...]) -> Tensor:
        if callable(self.time_weights):
            return _checked([self.time_weights(t) for t in times])
        assert self.time_weights is not None
        if times[-1] >= len(self.time_weights):
            raise ValueError(
                f"time_weights should have a weight for each timestep up to {times[-1]}, got "
                f"{len(self.time_weights)} of them"
            )
        if times == tuple(range(len(times))):
            return self.time_weights[: len(times)]
        return self.time_weights[list(times)]


def _checked(weights: Sequence[float] | Tensor) -> Tensor:
    weights = torch.as_tensor(weights)
    if weights.dim() != 1 or not (weights >= 0).all() or not weights.isfinite().all():
        raise ValueError(
            "time_weights should be a sequence of finite numbers that are not negative, one "
            f"for each timestep, got {weights}"
        )
    return weights
