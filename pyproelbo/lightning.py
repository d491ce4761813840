"""Objectives under Lightning: the extra ``lightning`` (``pip install pyproelbo[lightning]``)."""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from pyproelbo._backend import rng
from pyproelbo._backend.lightning_private import attached_trainer, training_data
from pyproelbo._rows.batches import Arguments
from pyproelbo._rows.batches import arguments as called_with
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import Program
from pyproelbo.elbo import TermsELBO

if TYPE_CHECKING:
    from pyro.params.param_store import StateDict

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities import CombinedLoader
except ImportError as error:
    raise ImportError(
        "pyproelbo.lightning needs Lightning: pip install pyproelbo[lightning]"
    ) from error


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
    counts as one datum. Learning rates therefore do not depend on the batch size, and Lightning's
    mean of the gradients over processes (DDP) is the gradient of one process with all their
    batches, if these have equal size. A model with global latents sees only its process's batch:
    give its plate the size of the whole data, as for minibatches.

    Logged at each step, per datum in nats: ``train_elbo`` (the true ELBO, whatever the weights),
    ``train_objective``, ``train_reconstruction``, ``train_kl``, with more than one latent site
    ``train_kl/SITE``, and the weights (``beta``). Their means over a validation epoch are logged as
    ``val_elbo`` and so on: for early stopping, ``EarlyStopping("val_elbo", mode="max")`` suffices.
    Validation counts no step.

    Schedules advance with the optimiser's steps; batches whose gradients are accumulated count as
    one step.

    Checkpoints hold the parameters, the optimiser, the objective's step and the states of the
    random number generators: ``Trainer.fit(task, ..., ckpt_path=...)`` continues with the same
    numbers as without the stop. For a checkpoint from within an epoch this requires that the data
    loader can resume too (with ``state_dict`` and ``load_state_dict``, as
    :class:`pyproelbo.datasets.Minibatches` has); a ``torch.utils.data.DataLoader`` restarts its
    epoch. A checkpoint from after an epoch's last batch, but before its validation, resumes without
    that validation.

    The parameters of ``pyro.nn.PyroModule`` stay out of Pyro's global parameter store: only those
    of the modules count, two tasks share none, and ``load_state_dict`` takes effect. ``pyro.param``
    outside a PyroModule is for :class:`pyro.infer.SVI` and refused here. An AutoGuide makes its
    parameters when first called: ``fit`` calls it once with the first batch.

    Args:
        model: a Pyro program, an ``nn.Module`` or without parameters.
        guide: likewise; one of the two is an ``nn.Module``.
        objective: any :class:`~pyproelbo.TermsELBO`.
        optimizer: makes the optimiser from parameters.
        arguments: from a batch to the arguments of the programs, where the two differ.

    Raises:
        ValueError: if neither model nor guide is an ``nn.Module``; from ``fit``, if there are no
            parameters, or some that the optimiser does not have.
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
        self.module = objective(model, guide)
        self.optimizer, self.arguments = optimizer, arguments
        self._step = objective.step
        self._checked = False

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
        """-objective / N of a batch of N data, in nats, with its graph; the terms are logged."""
        args, kwargs = called_with(batch, self.arguments)
        self._step = self.objective.step
        weights = self.objective.current_weights()
        with _own_parameters() as store:
            loss = self.module(*args, **kwargs)
        if not self._checked:
            self._check_parameters(store["params"])
        terms = self.objective.last_terms
        assert terms is not None
        loss = loss / terms.num_data
        self._log("train", batch, terms, -loss.detach(), weights)
        return loss

    def validation_step(self, batch: object, batch_idx: int) -> None:
        """Log the terms of a batch, per datum; no training step is counted."""
        terms = self.terms(batch)
        objective = self.objective.objective(terms) / terms.num_data
        self._log("val", batch, terms, objective, {})

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
        return self.optimizer(iter(parameters))

    def setup(self, stage: str) -> None:
        """Call the programs once before a fit, if they have yet to make parameters."""
        self._checked = False
        if stage == "fit" and self._is_lazy():
            with rng.put_aside():
                loader = training_data(self.trainer)
                batch, _, _ = next(iter(CombinedLoader(loader)))
            self.terms(batch)

    def on_train_end(self) -> None:
        """Warn of schedules that have not reached their final value."""
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
        states = [rng.state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, rng.state())
        checkpoint["pyproelbo.rng"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore this process's generators, if there are as many processes as before."""
        states = checkpoint.get("pyproelbo.rng", [])
        trainer = attached_trainer(self)
        if trainer is not None and len(states) == trainer.world_size:
            rng.restore(states[trainer.global_rank])

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

    def _log(
        self,
        prefix: str,
        batch: object,
        terms: Terms,
        objective: Tensor,
        weights: Mapping[str, float],
    ) -> None:
        size = _size(*called_with(batch, self.arguments))
        log = functools.partial(self.log_dict, batch_size=size, sync_dist=prefix == "val")
        shown = {
            "elbo": terms.elbo,
            "reconstruction": terms.reconstruction,
            "kl": terms.shrinkage,
        }
        per_datum = {f"{prefix}_{n}": value / terms.num_data for n, value in shown.items()}
        log(per_datum, prog_bar=True)
        more = {f"{prefix}_objective": objective}
        if len(terms.kl) > 1:
            for site, kl in terms.kl.items():
                more[f"{prefix}_kl/{site}"] = terms.mean([kl]) / terms.num_data
        log(more)
        log(dict(weights), prog_bar=True)


def _own_parameters() -> AbstractContextManager["StateDict"]:
    """An empty parameter store: PyroModules use the parameters that they hold."""
    return pyro.get_param_store().scope()


def _size(args: tuple, kwargs: Mapping[str, object]) -> int:
    """The rows of the first tensor of a batch, by which Lightning weights its means."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    return 1


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())
