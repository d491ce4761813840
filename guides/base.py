"""Shared by all amortised guides: q(z | x) for the rows of x, in the plate "data"."""

from typing import Protocol

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyproelbo._backend.unregistered import Unregistered
from pyproelbo._messages.renamed import renamed
from pyproelbo.models.base import NamedModule, check_rows, dataset_size_of, rows_plate


class Amortised(NamedModule):
    """A guide that samples z from ``posterior(x)``, which a subclass defines.

    Args:
        num_features: D, the size of x.
        dataset_size: N, the number of all rows, as in the model.
    """

    @renamed(size="dataset_size")
    def __init__(self, num_features: int, dataset_size: int | None = None) -> None:
        super().__init__()
        self.num_features, self.dataset_size = num_features, dataset_size

    def posterior(self, x: Tensor) -> TorchDistribution:
        """q(z | x), for x (..., D): batch shape (...)."""
        raise NotImplementedError(f"{type(self).__name__} should define posterior(x)")

    def forward(self, x: Tensor) -> Tensor:
        """The guide's program, for data x (B, D)."""
        check_rows("x", x, self.num_features)
        with rows_plate(len(x), self.dataset_size):
            return pyro.sample("z", self.posterior(x))


class Solved(Protocol):
    """A model whose posterior is known."""

    num_features: int
    dataset_size: int | None

    def posterior(self, x: Tensor) -> TorchDistribution:
        """p(z | x), for x (..., D): batch shape (...)."""
        ...


class Exact(Amortised):
    """q(z | x) = p(z | x) of a model, at the model's current parameters.

    The ELBO is then the evidence, for every single sample. The guide has no parameters: those of
    the model are only in the model's ``parameters()`` and ``state_dict()``. A deep copy of the
    guide alone has its own copy of the model; copy both in one call to keep them together.

    Args:
        model: a model with ``posterior(x)``, such as PPCA or GMM. Its ``dataset_size`` is used.
    """

    def __init__(self, model: Solved) -> None:
        super().__init__(model.num_features, dataset_size_of(model))
        self._model = Unregistered(model)

    @property
    def model(self) -> Solved:
        """The model whose posterior this is."""
        return self._model.module

    def posterior(self, x: Tensor) -> TorchDistribution:
        """p(z | x) of the model, for x (..., D): batch shape (...)."""
        return self.model.posterior(x)
