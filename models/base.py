"""Shared by all models and guides: unique names, the plate over the data, checks."""

import itertools
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyproelbo._backend.pyro_private import name_of, rename
from pyproelbo._messages.renamed import renamed, renamed_attribute, renamed_members
from pyproelbo._messages.warn import warn

_numbers = itertools.count()
__getattr__ = renamed_members(__name__, Program="NamedModule", data_plate="rows_plate")


class NamedModule(PyroModule):
    """A PyroModule that shares its parameters with no other.

    Pyro's parameter store identifies a parameter by its name. Two PyroModules of one class have
    parameters with the same names: SVI on the second would train the first; so would SVI on a copy.
    Here each instance and each copy has a number in its name (``PPCA_0.W``), which counts those
    made in this process. To save and load, use ``state_dict``, whose keys do not contain the
    number.

    As a part of another PyroModule it takes its name from that, like any PyroModule.
    """

    size = renamed_attribute("size", "dataset_size")

    def __init__(self) -> None:
        self._own_name = f"{type(self).__name__}_{next(_numbers)}"
        super().__init__(name=self._own_name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "size" in state:  # pickled when dataset_size was called so
            state = {"dataset_size": state["size"], **state}
            del state["size"]
        super().__setstate__(state)
        if name_of(self) != self._own_name:
            return
        old, self._own_name = self._own_name, f"{type(self).__name__}_{next(_numbers)}"
        rename(self, old, self._own_name)


@renamed(size="dataset_size")
def rows_plate(num: int, dataset_size: int | None = None) -> pyro.plate:
    """The plate "data", at dim -1, over the ``num`` rows of a batch.

    Args:
        num: B, the rows of the batch.
        dataset_size: N, the rows that they represent; log-densities are then scaled by N / B. Give
            the model and the guide the same. Unlike ``subsample_size`` this draws no indices: the
            data loader has chosen the rows.

    Raises:
        ValueError: if ``num`` is 0, or more than ``dataset_size``.
    """
    if num < 1:
        raise ValueError("x should have at least one row, got an empty batch")
    if dataset_size is None:
        return pyro.plate("data", num, dim=-1)
    if num > dataset_size:
        raise ValueError(
            f"x has {num} rows, more than dataset_size={dataset_size}: it should be the number of "
            "rows of the whole data, or None where x is the whole"
        )
    return pyro.plate("data", dataset_size, subsample=torch.arange(num), dim=-1)


@renamed(size="dataset_size")
def plate_over(
    x: Tensor | None, num_features: int, dataset_size: int | None, num: int
) -> pyro.plate:
    """The plate of a model: over the rows of x (B, num_features), or ``num`` to simulate."""
    if x is None:
        return rows_plate(num)
    check_rows("x", x, num_features)
    return rows_plate(len(x), dataset_size)


def dataset_size_of(model: Any) -> int | None:
    """N of a model; by its old name ``size`` if the model has no other."""
    if hasattr(model, "dataset_size") or not hasattr(model, "size"):
        return model.dataset_size
    name = type(model).__name__
    warn(f"{name}.size is deprecated: call it {name}.dataset_size", DeprecationWarning)
    return model.size


def check_sizes(**sizes: int) -> None:
    """Raise a ValueError, with its name, for a size that is not a positive whole number."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} should be a positive whole number, got {size!r}")


def check_last_dim(name: str, value: Tensor, size: int) -> None:
    """Raise a ValueError if ``value`` is not of shape (..., size)."""
    if value.dim() < 1 or value.shape[-1] != size:
        raise ValueError(f"{name} should have shape (..., {size}), got {tuple(value.shape)}")


def check_rows(name: str, value: Tensor, size: int) -> None:
    """Raise a ValueError if ``value`` is not of shape (B, size)."""
    if value.dim() != 2 or value.shape[-1] != size:
        raise ValueError(
            f"{name} should have shape (B, {size}), one row for each datum, "
            f"got {tuple(value.shape)}"
        )
