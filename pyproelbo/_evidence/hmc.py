"""Hamiltonian Monte Carlo with many chains for many data in parallel."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Point(NamedTuple):
    """The positions of chains, and the target density there.

    Attributes:
        position: u, (S, B, K): S chains for each of B data, K coordinates each.
        log_density: (S, B), up to a constant.
        gradient: of log_density with respect to u, (S, B, K).
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
    """One transition of every chain, each accepted or rejected separately.

    It leaves the target invariant, and is its own reverse, for any step sizes that do not depend on
    the positions of these chains. If the density or its gradient ceases to be finite on the way,
    the move is rejected (Neal 2011, "MCMC using Hamiltonian dynamics").

    Args:
        target: the density, and its gradient, at positions (S, B, K).
        start: the current point of the chains.
        step: the step size of each datum and coordinate, (B, K); 0 holds a coordinate fixed.
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
