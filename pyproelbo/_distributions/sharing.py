"""Distributions of parameters alone, computed once a training step by all its particles."""

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
        cut: whether each distribution's graph ends at its parameters, so that the backward pass
            of one particle frees nothing that the next needs: :meth:`backward` then goes on
            from there, once for all of them.
    """

    def __init__(self, cut: bool = False) -> None:
        self._cut = cut
        self._known: dict[Hashable, Distribution] = {}
        self._ends: list[tuple[Tensor, Tensor]] = []  # of the graph before and after the cut

    def __call__(self, key: Hashable, compute: Callable[[], D]) -> D:
        """The distribution of this key, which ``compute`` returns when it is first asked for."""
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
        """Take the gradients on, from the parameters of the distributions to what made them."""
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
    """While this lasts no parameter changes, so that :func:`once` computes nothing twice."""
    shared = Shared(cut)
    token = _shared.set(shared)
    try:
        yield shared
    finally:
        _shared.reset(token)


@contextmanager
def not_sharing() -> Iterator[None]:
    """While this lasts parameters may change, whatever is around it."""
    token = _shared.set(None)
    try:
        yield
    finally:
        _shared.reset(token)


def once(key: Hashable, compute: Callable[[], D]) -> D:
    """``compute()``; within :func:`sharing`, of each key only once."""
    shared = _shared.get()
    return compute() if shared is None else shared(key, compute)
