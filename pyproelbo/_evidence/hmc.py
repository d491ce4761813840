"""Hamiltonian Monte Carlo, of many chains for many data side by side."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Point(NamedTuple):
    """Where chains are, and what a target density is there.

    Attributes:
        position: u, (S, B, K): S chains for each of B data, K coordinates each.
        log_density: (S, B), up to a constant.
        gradient: that of log_density by u, (S, B, K).
        log_ratio: a diagnostic of the target, (S, B).
    """

    position: Tensor
    log_density: Tensor
    gradient: Tensor
    log_ratio: Tensor


def hmc(
    target: Callable[[Tensor], Point],
    start: Point,
    step: Tensor,
    num_leapfrog: int,
    momentum: Tensor,
    level: Tensor,
) -> tuple[Tensor, Tensor]:
    """One transition of every chain, accepted or rejected each by itself.

    It leaves the target invariant, and is its own reverse, whatever the steps are, so long as
    they do not depend on where these chains are. Where the density or its gradient stops being
    finite on the way, the move is rejected (Neal 2011, "MCMC using Hamiltonian dynamics").

    Args:
        target: the density, and its gradient, at positions (S, B, K).
        start: the point at which the chains are.
        step: the step size of each datum and coordinate, (B, K); 0 leaves a coordinate alone.
        num_leapfrog: steps of a move.
        momentum: standard normal numbers, (S, B, K).
        level: uniform numbers from 0 to 1, (S, B), below which a move is accepted.

    Returns:
        The new positions (S, B, K), and the probability with which each was accepted, (S, B).
    """
    point = start
    before = start.log_density - _kinetic(momentum)
    for _ in range(num_leapfrog):
        momentum = momentum + step * point.gradient / 2
        point = target(point.position + step * momentum)
        momentum = momentum + step * point.gradient / 2
    change = point.log_density - _kinetic(momentum) - before
    accept = change.clamp(max=0).exp().nan_to_num(nan=0.0)
    moves = level < accept
    return torch.where(moves.unsqueeze(-1), point.position, start.position), accept


def _kinetic(momentum: Tensor) -> Tensor:
    return momentum.square().sum(-1) / 2
