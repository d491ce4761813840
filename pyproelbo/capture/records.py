"""The records of a training step, by name."""

from collections.abc import Callable
from typing import Any


class Records:
    """Values by name; those of a graph are assembled when one of them is requested."""

    def __init__(self) -> None:
        self._values: dict[str, object] = {}
        self._made: Callable[[], dict[str, object]] | None = None

    def __getitem__(self, name: str) -> Any:
        """The value, None before there is one."""
        return self.all().get(name)

    def __setitem__(self, name: str, value: object) -> None:
        self.all()[name] = value

    def __getstate__(self) -> dict[str, object]:
        return {"_values": self.all(), "_made": None}

    def all(self) -> dict[str, object]:
        """All values by name, assembled where a graph has made them."""
        if self._made is not None:
            self._values, self._made = self._made(), None
        return self._values

    def later(self, made: Callable[[], dict[str, object]]) -> None:
        """Take the values from ``made``, once they are requested."""
        self._made = made
