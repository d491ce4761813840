"""Whether the processes of a training use its data as one process would."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DistributedSampler

from pyproelbo._messages.warn import warn
from pyproelbo._processes import TrainingProcesses
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import PARTICLES
from pyproelbo.datasets import Minibatches, Shuffled
from pyproelbo.datasets.minibatches import Epochs

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class RepeatedDataWarning(UserWarning):
    """The sampler of a loader repeats data, to give all processes equally many."""


class PartialDataWarning(UserWarning):
    """Each of several processes takes its batch for all data, and the latents see only that."""


def check_loaders(trainer: "Trainer", processes: TrainingProcesses) -> None:
    """Check the loaders of a training by several processes.

    Raises:
        ValueError: if processes have different numbers of batches, for which some would wait, and
            for Minibatches that do not share their rows, or share others.
    """
    numbers = processes.gathered(trainer.num_training_batches)
    if len(set(numbers)) > 1:
        raise ValueError(
            f"the processes have {_list(numbers)} batches in an epoch, but should have equally "
            f"many, since each step is one of all: {_ADVICE}"
        )
    for loader in _loaders(trainer.train_dataloader):
        if not isinstance(loader, Epochs):
            continue
        have_same = len(set(processes.gathered(_rows_of(loader)))) == 1
        name = "Files.shuffled" if isinstance(loader, Shuffled) else "Minibatches"
        if have_same and not loader.distributed:
            raise ValueError(
                f"all processes have the same {type(loader).__name__}: let them share the rows by "
                f"{name}(..., distributed=True)"
            )
        if loader.distributed and not have_same:
            raise ValueError(
                f"the processes have {name}(..., distributed=True) of different data, and each "
                "would use only a part of its own: give all of them the whole data, or leave "
                "distributed out if each has its own part"
            )
    if processes.rank == 0:
        warn_of_repeated(trainer.train_dataloader, "training")


def _rows_of(loader: Epochs) -> object:
    """Something that tells apart the rows of a loader."""
    if isinstance(loader, Minibatches):
        return _summary([loader.x])
    return loader.rows if isinstance(loader, Shuffled) else None


def check_that_all_go_on(trainer: "Trainer", processes: TrainingProcesses) -> None:
    """Check that this batch is the last of all processes or of none.

    Raises:
        ValueError: if it is the last of some.
    """
    if math.isfinite(trainer.num_training_batches):
        return  # compared before the training
    ends = processes.gathered(trainer.is_last_batch)
    if len(set(ends)) > 1:
        over = [rank for rank, end in enumerate(ends) if end]
        raise ValueError(
            f"the epoch is over for process {_list(over)}, but not for the others, and all should "
            f"have equally many batches, since each step is one of all: {_ADVICE}"
        )


def warn_of_repeated(loaders: object, what: str) -> None:
    """Warn of loaders whose sampler repeats data."""
    for loader in _loaders(loaders):
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            continue
        size = len(sampler.dataset)  # type: ignore[arg-type]
        if sampler.total_size > size:
            warn(
                f"{size} {what} data are no multiple of {sampler.num_replicas} processes, and the "
                f"sampler repeats {sampler.total_size - size} in each epoch, which count twice: "
                "use pyproelbo.datasets.Minibatches(..., distributed=True), or another number of "
                "data",
                RepeatedDataWarning,
            )


def warn_of_partial(
    terms: Terms, args: tuple, kwargs: Mapping[str, object], processes: TrainingProcesses
) -> None:
    """Warn, in the first process, of global latents that see one process's batch as all data."""
    scales = [scale for both in terms.scales.values() for scale in both]
    is_scaled = any(isinstance(scale, Tensor) or scale != 1 for scale in scales)
    plates = {n: [p for p in found if p.name != PARTICLES] for n, found in terms.plates.items()}
    outside = [key for key in terms.kl if not plates.get(key, True)]
    is_partial = not is_scaled and any(plates.get(name) for name in terms.log_likelihood)
    batches = processes.gathered(_summary([*args, *kwargs.values()]))
    if processes.rank == 0 and is_partial and outside and len(set(batches)) > 1:
        warn(
            f"each process takes its batch for all data, and {_list(outside)} sees no more than "
            "that, since the plate over data has the size of the batch: give it the size N of the "
            "whole data, pyro.plate(name, N, subsample=batch), in model and guide",
            PartialDataWarning,
        )


_ADVICE = (
    "let Lightning distribute a DataLoader, use Minibatches(..., distributed=True), or leave out "
    "what is over"
)


def _loaders(loaders: object) -> Iterator[object]:
    return iter(CombinedLoader(loaders).flattened) if loaders is not None else iter(())


def _summary(values: Iterable[object]) -> str:
    """What tells two batches, or two sets of data, apart."""
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    return str([(tuple(value.shape), value.double().sum().item()) for value in tensors])


def _list(values: list) -> str:
    return " and ".join(map(str, values))
