"""Means and covariances of gradients that arrive one by one, in bounded memory."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GROUPS = 20  # of draws, left out in turn for the errors


class Parameters(NamedTuple):
    """Parameters by group.

    Attributes:
        names: of the G groups.
        tensors: of all groups, one group after another.
        sizes: the number of elements of each group.
    """

    names: tuple[str, ...]
    tensors: list[Tensor]
    sizes: list[int]

    def gradients(self, scalars: Sequence[Tensor]) -> Tensor:
        """The gradients of T scalars, (T, all elements), in float64."""
        size, device = (len(scalars), sum(self.sizes)), self.tensors[0].device
        found = torch.zeros(size, dtype=torch.float64, device=device)
        for scalar, line in zip(scalars, found, strict=True):
            if not scalar.requires_grad:
                continue
            own = torch.autograd.grad(scalar, self.tensors, retain_graph=True, allow_unused=True)
            parts = line.split([x.numel() for x in self.tensors])
            for part, gradient in zip(parts, own, strict=True):
                if gradient is not None:
                    dense = gradient.to_dense() if gradient.is_sparse else gradient
                    part.copy_(dense.reshape(-1))
        return found

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products of rows, within each group: (T, P) and (U, P) -> (G, T, U)."""
        both = zip(a.split(self.sizes, -1), b.split(self.sizes, -1), strict=True)
        return torch.stack([x @ y.T for x, y in both])


class Group(NamedTuple):
    """Sums, over some of the draws, of T gradients minus their reference.

    Attributes:
        num: the number of draws.
        sums: (T, P).
        squares: of inner products, (G, T, T).
        within: the same for half the difference of two gradients at the same rows of the data.
    """

    num: int
    sums: Tensor
    squares: Tensor
    within: Tensor

    def plus(self, other: "Group") -> "Group":
        """The sums over the draws of both."""
        num, sums, squares, within = other
        return Group(self.num + num, self.sums + sums, self.squares + squares, self.within + within)


class Moments(NamedTuple):
    """Inner products of means, and covariances, of T gradients g, within each of G groups.

    Attributes:
        means: E[g]^T E[g], estimated without bias, (G, T, T).
        noise: the trace of the covariance of each pair of gradients, (G, T, T).
        of_rows: the part of it due to the choice of rows.
    """

    means: np.ndarray
    noise: np.ndarray
    of_rows: np.ndarray

    def with_all(self) -> "Moments":
        """The same with one more group: all parameters."""
        return Moments(*(np.concatenate([x, x.sum(0, keepdims=True)]) for x in self))


class Gathered(NamedTuple):
    """What is known about the gradients so far.

    Attributes:
        reference: the first gradients, subtracted from all to limit cancellation.
        groups: the i-th draw is in the (i mod ``GROUPS``)-th.
    """

    reference: Tensor
    groups: tuple[Group, ...]

    @property
    def num(self) -> int:
        """How many draws."""
        return sum(group.num for group in self.groups)

    def moments(self, parameters: Parameters) -> tuple[Moments, list[Moments]]:
        """The moments of all draws, and those without each group of them."""
        vectors = torch.cat([self.reference, *(group.sums for group in self.groups)])
        J, T = len(self.groups), len(self.reference)
        products = parameters.products(vectors, vectors).reshape(-1, J + 1, T, J + 1, T)
        products = products.cpu().numpy()
        squares = np.stack([group.squares.cpu().numpy() for group in self.groups])
        within = np.stack([group.within.cpu().numpy() for group in self.groups])
        sizes = np.array([group.num for group in self.groups])

        def of(kept: np.ndarray) -> Moments:
            num = sizes[kept].sum()
            centred = np.concatenate([[0.0], kept / num])  # how much of each vector
            weights = centred + np.eye(J + 1)[0]
            mean = np.einsum("j,k,gjtku->gtu", weights, weights, products)
            less = np.einsum("j,k,gjtku->gtu", centred, centred, products)
            covariance = (squares[kept].sum(0) - num * less) / (num - 1)
            of_pairs = within[kept].sum(0) / num
            return Moments(
                mean - covariance / num, covariance + of_pairs, covariance - of_pairs
            ).with_all()

        everything = np.ones(J, dtype=bool)
        left = [of(np.arange(J) != j) for j in range(J)] if self.num - sizes.max() > 1 else []
        return of(everything), left


def gathered(before: Gathered | None, draws: list[Tensor], parameters: Parameters) -> Gathered:
    """What is known after one more draw: one gradient, or two at the same rows, (T, P)."""
    mean = draws[0] if len(draws) == 1 else (draws[0] + draws[1]) / 2
    half = torch.zeros_like(mean) if len(draws) == 1 else (draws[0] - draws[1]) / 2
    reference = mean if before is None else before.reference
    centred = mean - reference
    squares, within = parameters.products(centred, centred), parameters.products(half, half)
    groups = [] if before is None else list(before.groups)
    new = Group(1, centred, squares, within)
    if len(groups) < GROUPS:
        return Gathered(reference, (*groups, new))
    j = before.num % GROUPS if before is not None else 0
    groups[j] = groups[j].plus(new)
    return Gathered(reference, tuple(groups))
