"""A model, a guide and an objective as a ``LightningModule``."""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pyro
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import CombinedLoader
from pyro.infer.autoguide import AutoGuide
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from pyproelbo._backend import rng
from pyproelbo._backend.lightning_private import attached_trainer, callbacks_of, training_data
from pyproelbo._messages.warn import said_elsewhere
from pyproelbo._processes import TrainingProcesses, all_processes
from pyproelbo._rows.batches import Arguments
from pyproelbo._rows.batches import arguments as called_with
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import Program
from pyproelbo.elbo import TermsELBO
from pyproelbo.lightning.data_of_processes import (
    check_loaders,
    check_that_all_go_on,
    warn_of_partial,
    warn_of_repeated,
)
from pyproelbo.lightning.ended_process import NoteOnEndedProcess
from pyproelbo.lightning.per_datum import in_nats_per_datum, num_rows
from pyproelbo.lightning.random_numbers import draw_apart

if TYPE_CHECKING:
    from pyro.params.param_store import StateDict

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)


class UnfinishedScheduleWarning(UserWarning):
    """Training ended before a weight of the objective had reached its final value."""


class ELBOTask(LightningModule):
    r"""A model, a guide and an objective, for training by ``lightning.pytorch.Trainer``.

    ::

        task = ELBOTask(model, guide, BetaELBO(beta=Linear(0.0, 1.0, steps=1000)))
        Trainer(max_epochs=50).fit(task, train_loader, val_loader)

    A batch holds the arguments of model and guide: a tensor is the only argument, a tuple or a list
    the arguments, a dict the keyword arguments, ``((x,), {"y": y})`` both.

    The loss is per datum, ``-objective / terms.num_data``, in nats; a model without local latents
    counts as one datum. Learning rates therefore do not depend on the batch size.

    Logged at each step, per datum in nats: ``train_elbo`` (the true ELBO, whatever the weights),
    ``train_objective``, ``train_reconstruction``, ``train_kl``, with more than one latent site
    ``train_kl/SITE``, and the weights (``beta``). Their means over the data of a validation epoch
    are logged as ``val_elbo`` and so on: for early stopping, ``EarlyStopping("val_elbo",
    mode="max")`` suffices. Validation counts no step.

    Schedules advance with the optimiser's steps; batches whose gradients are accumulated count as
    one step.

    Checkpoints hold the parameters, the optimiser, the objective's step and the states of the
    random number generators: ``Trainer.fit(task, ..., ckpt_path=...)`` continues with the same
    numbers as without the stop. For a checkpoint from within an epoch this requires that the data
    loader can resume too (with ``state_dict`` and ``load_state_dict``, as
    :class:`pyproelbo.datasets.Minibatches` has); a ``torch.utils.data.DataLoader`` restarts its
    epoch. A checkpoint from after an epoch's last batch, but before its validation, resumes without
    that validation.

    With several processes (DDP) a step is that of one process with all their batches. Process r of
    P, whose batch has B_r data, has the weight P B_r / (B_1 + ... + B_P), so that Lightning's mean
    of the gradients over processes is, for batches of any size,

    .. math:: \nabla \frac{\sum_r B_r \, \mathrm{loss}_r}{\sum_r B_r},

    and what is logged is the same mean of the terms. This holds for objectives that add up over
    data; those that compare the data of a batch, such as
    :class:`~pyproelbo.TotalCorrelationELBO`, compare those of one process. If there are global
    latents, each process draws its own; give the plate over data the size of the whole data, as for
    minibatches, or each process takes its batch for all data. Processes that begin with the same
    seed draw different numbers from the start of the training on. A checkpoint holds the generators
    of all processes, for as many processes again.

    ``Minibatches(x, batch_size, distributed=True)`` uses each datum once in an epoch. The sampler
    that Lightning gives to a ``DataLoader`` repeats some data if their number is not a multiple of
    that of the processes (:class:`RepeatedDataWarning`).

    If a process dies, the others end with an error as soon as they next wait for it. One that
    hangs keeps them waiting for the ``timeout`` of ``lightning.pytorch.strategies.DDPStrategy``, 30
    minutes by default. Start all again, with the last checkpoint as ``ckpt_path``.

    The parameters of ``pyro.nn.PyroModule`` stay out of Pyro's global parameter store: only those
    of the modules count, two tasks share none, and ``load_state_dict`` takes effect. ``pyro.param``
    outside a PyroModule is for :class:`pyro.infer.SVI` and refused here. An AutoGuide makes its
    parameters when first called: ``fit`` calls it once with the first batch.

    Args:
        model: a Pyro program, an ``nn.Module`` or without parameters.
        guide: likewise; one of the two is an ``nn.Module``.
        objective: any :class:`~pyproelbo.TermsELBO`.
        optimizer: makes the optimiser from parameters: a class of ``torch.optim``, with its
            arguments by ``functools.partial``. Pyro's optimisers and
            :class:`~pyproelbo.SharedOptim` are for SVI.
        arguments: from a batch to the arguments of the programs, where the two differ.

    Raises:
        ValueError: if neither model nor guide is an ``nn.Module``, or the optimiser is Pyro's; from
            ``fit``, if there are no parameters, or some that the optimiser does not have, and if
            processes have different numbers of batches, or Minibatches of the same rows.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: TermsELBO,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] = ADAM,
        arguments: Arguments | None = None,
    ) -> None:
        super().__init__()
        if not (isinstance(model, nn.Module) or isinstance(guide, nn.Module)):
            raise ValueError(
                "model or guide should be an nn.Module: make it a pyro.nn.PyroModule, or train "
                "pyro.param with pyro.infer.SVI"
            )
        _check_optimizer(optimizer)
        self.module = objective(model, guide)
        self.optimizer, self.arguments = optimizer, arguments
        self._step = objective.step
        self._checked = self._has_validated = False

    @property
    def model(self) -> Program:
        """The program that was passed as the model."""
        return self.module.model

    @property
    def guide(self) -> Program:
        """The program that was passed as the guide."""
        return self.module.guide

    @property
    def objective(self) -> TermsELBO:
        """The objective, which also counts the steps."""
        return self.module.elbo  # type: ignore[return-value]

    def terms(self, batch: object) -> Terms:
        """The terms of a batch, without a graph and without counting a step."""
        args, kwargs = called_with(batch, self.arguments)
        with _own_parameters():
            return self.objective.terms(self.model, self.guide, *args, **kwargs)

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        """-objective / N of a batch of N data, in nats, with its graph; the terms are logged.

        With several processes, times the weight of this process.
        """
        args, kwargs = called_with(batch, self.arguments)
        self._step = self.objective.step
        weights = self.objective.current_weights()
        processes = self._processes
        if processes.are_several:
            check_that_all_go_on(self.trainer, processes)
        with _own_parameters() as store, said_elsewhere(processes.rank > 0):
            loss = self.module(*args, **kwargs)
        terms = self.objective.last_terms
        assert terms is not None
        if not self._checked:
            self._check_parameters(store["params"])
            if processes.are_several:
                warn_of_partial(terms, args, kwargs, processes)
        loss = loss / terms.num_data
        values = in_nats_per_datum(terms, -loss.detach())
        if processes.are_several:
            own = torch.stack([*values.values()])
            means, weight = processes.weighted_mean(own, num_rows(terms))
            values, loss = dict(zip(values, means, strict=True)), loss * weight.to(loss)
        self._log("train", values, batch_size=1)
        self.log_dict(dict(weights), prog_bar=True, batch_size=1)
        return loss

    def on_validation_epoch_start(self) -> None:
        """With several processes: warn, once, of data that count twice."""
        is_first = self._processes.are_several and self._processes.rank == 0
        if is_first and not self._has_validated:
            warn_of_repeated(self.trainer.val_dataloaders, "validation")
        self._has_validated = True

    def validation_step(self, batch: object, batch_idx: int) -> None:
        """Log the terms of a batch, per datum; no training step is counted."""
        with said_elsewhere(self._processes.rank > 0):
            terms = self.terms(batch)
        objective = self.objective.objective(terms) / terms.num_data
        # The weights are no ints, whose mean over processes Lightning would round.
        values = in_nats_per_datum(terms, objective)
        self._log("val", values, batch_size=num_rows(terms), sync_dist=True)

    def on_after_backward(self) -> None:
        """Restore the count of steps: a backward pass is not an optimiser step."""
        self.objective.step = self._step  # the step is the optimiser's, not the backward pass's

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        """Advance the optimiser and the schedules by a step."""
        super().optimizer_step(*args, **kwargs)  # type: ignore[arg-type]
        self.objective.step = self._step + 1

    def configure_optimizers(self) -> Optimizer:
        """The optimiser of all parameters that need a gradient; a ValueError if there are none."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(
                "model and guide have no parameters to train: give one of them an nn.Parameter or "
                "a pyro.nn.PyroParam"
            )
        optimizer = self.optimizer(iter(parameters))
        _check_optimizer(optimizer)
        return optimizer

    def setup(self, stage: str) -> None:
        """Call the programs once before a fit, if they have yet to make parameters."""
        self._checked = self._has_validated = False
        if stage == "fit" and self._is_lazy():
            with rng.put_aside():
                loader = training_data(self.trainer)
                batch, _, _ = next(iter(CombinedLoader(loader)))
            with said_elsewhere(self._processes.rank > 0):
                self.terms(batch)

    def configure_callbacks(self) -> list[Callback]:
        """A note to the error that other processes see when one of them has ended."""
        known = any(isinstance(each, NoteOnEndedProcess) for each in callbacks_of(self.trainer))
        return [] if self.trainer.world_size == 1 or known else [NoteOnEndedProcess()]

    def on_train_start(self) -> None:
        """With several processes: check their loaders, and let them draw different numbers."""
        if self._processes.are_several:
            check_loaders(self.trainer, self._processes)
            draw_apart(self._processes)

    def on_train_end(self) -> None:
        """Warn of schedules that have not reached their final value."""
        if self._processes.rank > 0:
            return
        step = self.objective.step
        ends = {name: s.settled() for name, s in self.objective.schedules.items()}
        unfinished = {name: end for name, end in ends.items() if end is not None and end > step}
        if unfinished:
            which = ", ".join(f"{name} changes until step {n}" for name, n in unfinished.items())
            warnings.warn(
                f"training ended at step {step}, but {which}: train longer, or make the schedule "
                "shorter",
                UnfinishedScheduleWarning,
                stacklevel=2,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Put the states of all processes' random number generators into a checkpoint."""
        checkpoint["pyproelbo.rng"] = self._processes.gathered(rng.state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore this process's generators, if there are as many processes as before."""
        states = checkpoint.get("pyproelbo.rng", [])
        trainer = attached_trainer(self)
        if trainer is not None and len(states) == trainer.world_size:
            rng.restore(states[trainer.global_rank])

    @property
    def _processes(self) -> TrainingProcesses:
        """Those of the trainer: ``torch.distributed`` may have others, for other work."""
        trainer = attached_trainer(self)
        is_alone = trainer is None or trainer.world_size == 1
        return TrainingProcesses() if is_alone else all_processes()

    def _is_lazy(self) -> bool:
        """Whether parameters are yet to be made by a first call."""
        unmade = any(isinstance(m, AutoGuide) and m.prototype_trace is None for m in self.modules())
        return unmade or any(is_lazy(p) for p in self.parameters())

    def _check_parameters(self, used: Mapping[str, Tensor]) -> None:
        """Raise for parameters that the first step has found and the optimiser does not have."""
        trained = {id(p) for group in self._optimizer().param_groups for p in group["params"]}
        late = [n for n, p in self.named_parameters() if p.requires_grad and id(p) not in trained]
        if late:
            names = ", ".join(name.removeprefix("module.") for name in late)
            raise ValueError(
                f"the optimiser does not have {names}: call model and guide once with a batch "
                "before fit if they make parameters at their first call, and let `optimizer` take "
                "all parameters (freeze some by requires_grad_(False))"
            )
        # The store copies what is not contiguous.
        own = {id(p) for p in self.parameters()}
        copies = [p for p in self.parameters() if not p.is_contiguous()]
        for name, value in used.items():
            if id(value) in own or any(_is_equal(value, p) for p in copies):
                continue
            raise ValueError(
                f"pyro.param({name!r}) is not a parameter of model or guide, and its training "
                "would be lost: make it a pyro.nn.PyroParam of a PyroModule, or use pyro.infer.SVI"
            )
        self._checked = True

    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        return optimizer

    def _log(self, prefix: str, values: Mapping[str, Tensor], **options: Any) -> None:
        for name, value in values.items():
            self.log(f"{prefix}_{name}", value, prog_bar=name in _IN_BAR, **options)


_IN_BAR = ("elbo", "reconstruction", "kl")


def _own_parameters() -> AbstractContextManager["StateDict"]:
    """An empty parameter store: PyroModules use the parameters that they hold."""
    return pyro.get_param_store().scope()


def _check_optimizer(optimizer: object) -> None:
    if isinstance(optimizer, PyroOptim):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}, which is for pyro.infer.SVI: give a class "
            "of torch.optim and its arguments, as functools.partial(torch.optim.Adam, lr=1e-3, "
            "fused=True), which is one for all parameters as pe.SharedOptim is"
        )


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())
