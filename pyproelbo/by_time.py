"""The ELBO by timestep: which part of which site belongs to which."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyproelbo.expectations import Term, sum_to

TimeOf = Callable[[str], int | None]  # from a site's name to its timestep; None: it has none


@dataclass(frozen=True)
class ByTime:
    """The ELBO by timestep, in nats: tensors of dims (T, plates), particles after the time.

    Attributes:
        time: the timesteps, rising.
        reconstruction: log p(x_t | ...) of the data of each step.
        kl: KL(q(z_t | ...) || p(z_t | ...)) of the latents of each step, given the sampled past.
        timeless: the keys of the KLs that belong to no step.
    """

    time: tuple[int, ...]
    reconstruction: Tensor
    kl: Tensor
    timeless: tuple[str, ...] = ()

    def detach(self) -> "ByTime":
        """The same values without their graph."""
        return replace(self, reconstruction=self.reconstruction.detach(), kl=self.kl.detach())


class Timed(NamedTuple):
    """A term and its timestep; None for a sequence, whose dims are (T, *plates)."""

    time: int | None
    term: Term


def merge(parts: list[ByTime], join: Callable[[list[Tensor]], Tensor]) -> ByTime:
    """One of several runs.

    Raises:
        ValueError: if their timesteps differ.
    """
    times = {part.time for part in parts}
    if len(times) > 1:
        raise ValueError(
            f"runs of one step have different timesteps, {sorted(map(len, times))} of them: use "
            "num_particles=1, or a length that does not vary"
        )
    return replace(
        parts[0],
        reconstruction=join([part.reconstruction for part in parts]),
        kl=join([part.kl for part in parts]),
    )


def times_of(terms: Iterable[Timed]) -> tuple[int, ...]:
    """All timesteps of some terms, rising."""
    times: set[int] = set()
    for time, term in terms:
        times.update(range(len(term.value)) if time is None else [time])
    return tuple(sorted(times))


def sum_by_time(terms: list[Timed], times: tuple[int, ...], like: Tensor) -> Tensor:
    """Their sum at each of ``times``, over all plates that they do not share."""
    if not terms:
        return like.new_zeros(len(times))
    plates = frozenset.intersection(*(term.plates for _, term in terms))
    total: Tensor | None = None
    steps: dict[int, Tensor] = {}
    for time, term in terms:
        if time is None:  # the steps 0, ..., T - 1, the first of all times
            value = sum_to(term.value, plates, leading=1)
            value = pad(value, (0, 0) * (value.dim() - 1) + (0, len(times) - len(value)))
            total = value if total is None else total + value
        else:
            value = sum_to(term.value, plates)
            steps[time] = steps[time] + value if time in steps else value
    if steps:
        zero = torch.zeros_like(next(iter(steps.values())))
        stacked = torch.stack([steps.get(time, zero) for time in times])
        total = stacked if total is None else total + stacked
    assert total is not None
    return total
