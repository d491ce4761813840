"""Processes that fit the same programs together, each on its part of the data."""

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class Processes(Protocol):
    """Several processes that do the same at the same time.

    Attributes:
        num: their number.
        rank: the index of this one, from 0.
    """

    num: int
    rank: int

    def first(self, values: Tensor) -> Tensor:
        """The values of the first process."""
        ...

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        ...

    def joined(self, values: Tensor) -> Tensor:
        """The values of all processes, one after another along the last dim."""
        ...


class Alone:
    """One process."""

    num, rank = 1, 0

    def first(self, values: Tensor) -> Tensor:
        """The same."""
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The same."""
        return values

    def joined(self, values: Tensor) -> Tensor:
        """The same."""
        return values


class OfFabric:
    """The processes of Lightning's Fabric, launched."""

    def __init__(self, fabric: "Fabric") -> None:
        self._fabric = fabric
        self.num, self.rank = fabric.world_size, fabric.global_rank

    def first(self, values: Tensor) -> Tensor:
        """The values of the first process."""
        return self._fabric.broadcast(values)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        found = self._fabric.all_reduce(values, reduce_op="mean")
        assert isinstance(found, Tensor)
        return found

    def joined(self, values: Tensor) -> Tensor:
        """The values of all processes, one after another along the last dim."""
        found = self._fabric.all_gather(values)
        assert isinstance(found, Tensor)
        return found.movedim(0, -2).flatten(-2) if self.num > 1 else found


def processes_of(fabric: "Fabric | None") -> Processes:
    """The processes of a Fabric; only this one where there is none.

    Raises:
        ValueError: for something else.
    """
    if fabric is None:
        return Alone()
    if not (hasattr(fabric, "all_reduce") and hasattr(fabric, "global_rank")):
        raise ValueError(
            "fabric should be a lightning.fabric.Fabric that has been launched, or None, got "
            f"{type(fabric).__name__}"
        )
    return OfFabric(fabric)
