"""Which densities of a program change when a value changes, found by running the program."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyproelbo._backend import rng
from pyproelbo._backend.pyro_private import site_is_subsample, sites_of
from pyproelbo._distributions.densities import log_density
from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.traces import Program

T = TypeVar("T")

DATA = "the data"


def parents(
    program: Program,
    args: tuple,
    kwargs: Mapping[str, object],
    names: Iterable[str] | None = None,
    seed: int = 0,
) -> dict[str, set[str]]:
    """The sites among ``names``, and ``DATA``, on which the density of each depends.

    The program runs on its own samples; then again with the sample of one site replaced by
    another draw, or with the rows of the data in another order. A density that has changed
    depends on what was replaced. (Tracing the tensors would miss values that are written into
    others in place.) Dependence through other sites counts only where these are derived from
    the replaced one without a draw of their own.

    Args:
        names: sample sites that the program draws; by default all of them.
        seed: of the draws; random number generators are unchanged.
    """
    # without validation: a value may be outside the support that another value implies
    unchecked = pyro.validation_enabled(False)
    with unchecked, torch.no_grad(), rng.put_aside(), poutine.block():
        first, second = (_values(program, args, kwargs, seed + i) for i in range(2))
        names = list(first if names is None else names)

        def densities(
            values: dict[str, Tensor], turn: Callable[[object], object] = _unchanged
        ) -> dict[str, Tensor]:
            rng.begin(seed)
            at = {name: first[name] for name in names}
            return _densities(program, args, kwargs, values, turn, at)

        before = densities(first)
        changes = {n: densities({**first, n: second[n]}) for n in names}
        changes[DATA] = densities(first, _turned)
    return {
        n: {what for what, after in changes.items() if what != n and _differ(before[n], after[n])}
        for n in names
    }


def ignores_data(guide: Program, args: tuple, kwargs: Mapping[str, object]) -> bool:
    """Whether a guide with draws has the same distributions for any data."""
    unchecked = pyro.validation_enabled(False)
    with unchecked, torch.no_grad(), rng.put_aside(), poutine.block():
        values = _values(guide, args, kwargs, 0)
        before, after = (_densities(guide, args, kwargs, values, t) for t in (_unchanged, _turned))
    return bool(values) and not any(_differ(before[name], after[name]) for name in values)


def _densities(
    program: Program,
    args: tuple,
    kwargs: Mapping[str, object],
    values: Mapping[str, Tensor],
    turn: Callable[[object], object],
    at: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The log-densities of sites at the values ``at`` in a run with the values ``values``."""
    conditioned = poutine.condition(program, data=dict(values))
    turned = {key: turn(value) for key, value in kwargs.items()}
    nodes = sites_of(poutine.trace(conditioned).get_trace(*map(turn, args), **turned))
    at = values if at is None else at
    return {name: log_density(nodes[name]["fn"], value) for name, value in at.items()}


def _values(program: Program, args: tuple, kwargs: Mapping[str, object], seed: int) -> dict:
    """What the program draws."""
    rng.begin(seed)
    trace = poutine.trace(program).get_trace(*args, **kwargs)
    sites = sites_of(trace)
    return {
        name: sites[name]["value"]
        for name in trace.stochastic_nodes
        if not (is_delta(sites[name]) or site_is_subsample(sites[name]))
    }


def _unchanged(arg: T) -> T:
    return arg


def _turned(arg: object) -> object:
    """Anything but a single number in another order; for one row, its columns."""
    if not isinstance(arg, Tensor) or arg.numel() < 2:
        return arg
    return arg.roll(1, next(dim for dim, size in enumerate(arg.shape) if size > 1))


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
