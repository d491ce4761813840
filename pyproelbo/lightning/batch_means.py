"""What is logged of batches, per datum, and its means over data."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyproelbo._processes import TrainingProcesses
from pyproelbo._terms.terms import Terms, largest


def in_nats_per_datum(terms: Terms, objective: Tensor) -> dict[str, Tensor]:
    """The parts of the ELBO of a batch, per datum, and the objective that is given.

    The KL of single sites is there if there are several.
    """
    values = {"elbo": terms.elbo, "reconstruction": terms.reconstruction, "kl": terms.shrinkage}
    if len(terms.kl) > 1:
        values |= {f"kl/{site}": terms.mean([kl]) for site, kl in terms.kl.items()}
    return {n: value / terms.num_data for n, value in values.items()} | {"objective": objective}


def num_rows(terms: Terms) -> Tensor:
    """The data of a batch, without the factor N / B that minibatches have: their weight in means.

    Where all latents are global, B / N.
    """
    scales = [scale for both in terms.scales.values() for scale in both]
    number = terms.num_data / largest(s for s in scales if not (isinstance(s, Tensor) and s.dim()))
    if isinstance(number, Tensor):
        return number.to(terms.elbo)
    return terms.elbo.new_full((), number)  # on its device, without a copy from here


class BatchMeans:
    """Means over data, from those of batches, of all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._num: Tensor | None = None

    def add(self, means: Mapping[str, Tensor], num: Tensor) -> None:
        """Add a batch by its means and its number of data."""
        num = num.to(_accurate(num))
        self._num = num if self._num is None else self._num + num
        for name, value in means.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * num

    def means(self, processes: TrainingProcesses) -> dict[str, Tensor]:
        """The means over all data added so far, in all processes; none without data."""
        if self._num is None:
            return {}
        *sums, num = processes.total(torch.stack([*self._sums.values(), self._num]))
        return {name: of_name / num for name, of_name in zip(self._sums, sums, strict=True)}


def _accurate(value: Tensor) -> torch.dtype:
    return torch.float32 if value.device.type == "mps" else torch.float64
