"""Distributions that depend only on parameters, computed once per step for all particles."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar, cast

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution

from pyproelbo._distributions.family import Family

D = TypeVar("D", bound=Distribution)


class Shared:
    """What has been computed so far, by key.

    Args:
        cut: whether each distribution's graph ends at its parameters: the backward pass of one
            particle then frees nothing that the next needs, and :meth:`backward` continues from
            there, once for all of them.
    """

    def __init__(self, cut: bool = False) -> None:
        self._cut = cut
        self._known: dict[Hashable, Distribution] = {}
        self._ends: list[tuple[Tensor, Tensor]] = []  # of the graph before and after the cut

    def __call__(self, key: Hashable, compute: Callable[[], D]) -> D:
        """The distribution for this key, which ``compute`` returns at first use."""
        key = key, torch.is_grad_enabled()
        if key not in self._known:
            d = compute()
            self._known[key] = self._without_graph(d) if self._cut else d
        return cast(D, self._known[key])

    @property
    def cut_off(self) -> list[Tensor]:
        """Tensors with graphs of their own, which are cut from those of the losses."""
        return [before for before, _ in self._ends]

    def backward(self, retain_graph: bool | None = None) -> None:
        """Propagate the gradients from the parameters of the distributions to their sources."""
        ends = [(before, after.grad) for before, after in self._ends if after.grad is not None]
        if ends:
            before, gradients = zip(*ends, strict=True)
            torch.autograd.backward(before, gradients, retain_graph=retain_graph)

    def _without_graph(self, d: Distribution) -> TorchDistribution:
        family = Family.of(d)
        before = family.tensors(d)
        after = [x.detach().requires_grad_(x.requires_grad) for x in before]
        self._ends += [(x, end) for x, end in zip(before, after, strict=True) if end.requires_grad]
        return family.made_of(after)


_shared: ContextVar[Shared | None] = ContextVar("shared", default=None)


@contextmanager
def sharing(cut: bool = False) -> Iterator[Shared]:
    """Within this no parameter changes, and :func:`once` computes nothing twice."""
    shared = Shared(cut)
    token = _shared.set(shared)
    try:
        yield shared
    finally:
        _shared.reset(token)


@contextmanager
def not_sharing() -> Iterator[None]:
    """Within this parameters may change, whatever the outer context."""
    token = _shared.set(None)
    try:
        yield
    finally:
        _shared.reset(token)


def once(key: Hashable, compute: Callable[[], D]) -> D:
    """``compute()``; within :func:`sharing`, only once for each key."""
    shared = _shared.get()
    return compute() if shared is None else shared(key, compute)
