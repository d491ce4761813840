"""The history of a fit, step by step."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pyproelbo._results.per import Per, nats
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Table, row
from pyproelbo._terms.terms import Terms

if TYPE_CHECKING:
    import xarray

_RECORDS = 4096  # that are kept; for a longer fit every second, every fourth, ...


class Logger(Protocol):
    """A receiver of metrics: Lightning's ``CSVLogger``, ``TensorBoardLogger``, and others."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> object:
        """Take the metrics of a step."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class History(Result):
    r"""The terms of the ELBO at the steps of a fit, in nats.

    Not every step of a long fit is kept. Values are estimates from the draws of one step, and in a
    fit by minibatches from the rows of one batch.

    Attributes:
        step: the indices of the T steps.
        seconds: since the start, (T,).
        values: by name, (T,) each: "elbo", "objective", "reconstruction", "kl", with more than one
            latent also "kl/SITE", and "lr", the learning rate, where there is one.
        per: the unit that nats refer to: a "datum", or the "data set".
    """

    step: np.ndarray
    seconds: np.ndarray
    values: Mapping[str, np.ndarray]
    per: Per = "datum"

    @property
    def elbo(self) -> np.ndarray:
        """The true ELBO, whatever the objective's weights, (T,)."""
        return self.values["elbo"]

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dim "step"."""
        import xarray

        units = {"lr": "1"}
        values: dict[str, Any] = {
            name.replace("/", "."): ("step", column, {"units": units.get(name, "nats")})
            for name, column in self.values.items()
        }
        values["seconds"] = ("step", self.seconds, {"units": "s"})
        return xarray.Dataset(values, {"step": self.step}, {"per": self.per})

    def log_to(self, logger: Logger) -> None:
        """Write it step by step to a logger, such as those of ``lightning.pytorch.loggers``."""
        for i, step in enumerate(self.step.tolist()):
            logger.log_metrics({n: float(v[i]) for n, v in self.values.items()}, step=step)

    def _table(self) -> Table:
        last = max(1, len(self.step) // 10)
        rows = [row(name, v[-last:].mean()) for name, v in self.values.items() if name != "lr"]
        steps = f"steps: {self.step[-1] + 1:,}, in {self.seconds[-1]:.1f} s" if last else ""
        return Table(f"History, {nats(self.per)}, mean of the last tenth ({steps})", rows)


class Recorder:
    """Writes a history, without waiting for the device until it is read.

    Args:
        per: the unit that nats refer to.
        loggers: they also receive the metrics of the steps that are kept.
    """

    def __init__(self, per: Per, loggers: Iterable[Logger] = ()) -> None:
        self._per: Per = per
        self._loggers, self._start = list(loggers), time.monotonic()
        self._every, self._num = 1, 0
        self._records: list[tuple[int, float, dict[str, Tensor | float]]] = []

    @property
    def num_steps(self) -> int:
        """The number of steps so far."""
        return self._num

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def add(
        self, values: "Mapping[str, Tensor | float] | Callable[[], dict[str, Tensor | float]]"
    ) -> None:
        """Add a step, by its metrics, or by a function that returns them if the step is kept."""
        step, self._num = self._num, self._num + 1
        if step % self._every:
            return
        found = dict(values() if callable(values) else values)
        self._records.append((step, self.seconds, found))
        for logger in self._loggers:
            logger.log_metrics({name: float(value) for name, value in found.items()}, step=step)
        if len(self._records) == _RECORDS:
            self._records, self._every = self._records[::2], 2 * self._every

    def history(self) -> History:
        """The history of the steps so far."""
        steps, seconds, found = zip(*self._records, strict=True) if self._records else ((), (), ())
        names = list(found[0]) if found else ["elbo"]
        columns = {
            name: np.array([float(values.get(name, np.nan)) for values in found]) for name in names
        }
        return History(np.array(steps, int), np.array(seconds, float), columns, self._per)


def values_of(terms: Terms, objective: Tensor | float, per: Per) -> dict[str, Tensor | float]:
    """The metrics of a step, in nats per datum or of the data set, on the device."""
    num = terms.num_data if per == "datum" else 1
    parts: dict[str, Any] = {
        "elbo": terms.elbo,
        "objective": objective,
        "reconstruction": terms.reconstruction,
        "kl": terms.shrinkage,
    }
    if len(terms.kl) > 1:
        parts |= {f"kl/{site}": terms.mean([kl]) for site, kl in terms.kl.items()}
    with torch.no_grad():
        return {name: value / num for name, value in parts.items()}
