"""Whether draws miss a part of the posterior that draws of the prior find."""

from collections.abc import Iterable
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyproelbo._evidence.proposals import prior_draws
from pyproelbo._evidence.weights import Weights, summary
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.report_data import Unit
from pyproelbo._rows.runs import Use
from pyproelbo._terms.traces import Program

TIMES = 4  # as many draws of the prior as of a posterior
APART = 4.0  # standard errors of log p(x)
LEAST = 20.0  # effective draws of the prior, for a standard error to be meaningful
HALF = 0.6931  # nats, for half of the posterior's mass


class Known(NamedTuple):
    """log p(x) of each of B rows, in nats.

    Attributes:
        log_evidence, stderr: (B,); -inf and inf where unknown.
    """

    log_evidence: Tensor
    stderr: Tensor

    @classmethod
    def nothing(cls, num: int) -> "Known":
        """For ``num`` rows about which nothing is known."""
        unknown = torch.full((num,), torch.inf, dtype=torch.float64, device="cpu")
        return cls(-unknown, unknown)

    @property
    def sees_half(self) -> Tensor:
        """Where missing half of the mass would be detected, (B,)."""
        return APART * self.stderr < HALF

    def misses(self, log_evidence: Tensor, stderr: Tensor) -> Tensor:
        """Where log p(x) by other draws is too small, (B,).

        Both estimates have the mean p(x), if q is not 0 where the posterior is not. But draws that
        stay in one of two modes find only half of it, which their weights do not show: log p(x) is
        then too small by log 2. Draws of the prior reach all modes where there are few latents, or
        the data carry little information about them.
        """
        error = (self.stderr.square() + stderr.square()).sqrt()
        return self.log_evidence - log_evidence > APART * error

    def or_higher(self, other: "Known", is_sure: Tensor) -> "Known":
        """The other, where it is higher, given the errors of both.

        Args:
            is_sure: where the error of the other is reliable, (B,).
        """
        here, there = (k.log_evidence - APART * k.stderr for k in (self, other))
        is_higher = is_sure & (there > here.nan_to_num(nan=-torch.inf))
        pairs = zip(other, self, strict=True)
        return Known(*(torch.where(is_higher, new, old) for new, old in pairs))

    def take(self, index: Tensor) -> "Known":
        """The same for some rows."""
        return Known(self.log_evidence[index], self.stderr[index])


def of_prior(
    model: Program, batch: Batch, unit: Unit, num: int, chunk: int | None, seed: int
) -> Known:
    """By ``num`` draws of the prior; unknown where it cannot be drawn from."""
    try:
        draws = prior_draws(model, batch, unit, seed)
    except ValueError:
        return Known.nothing(batch.size)
    if draws.is_improper:
        return Known.nothing(batch.size)
    with pyro.validation_enabled(False):
        parts = (part.log_weight for part in draws.chunks(num, chunk, Use.OF_PRIOR))
        return known_of(parts, num)


def known_of(log_weights: Iterable[Tensor], num: int) -> Known:
    """By ``num`` weights (S, B), in parts; unknown where a few of them dominate."""
    found = summary((Weights(w, w) for w in log_weights), num)
    log_evidence, error = found.log_evidence.cpu(), found.stderr.cpu()
    is_known = log_evidence.isfinite() & (found.effective_sample_size.cpu() >= LEAST)
    return Known(
        torch.where(is_known, log_evidence, -torch.inf), torch.where(is_known, error, torch.inf)
    )
