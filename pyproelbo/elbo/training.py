"""A training step of an objective: its loss and the gradients."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from pyproelbo._backend.pyro_private import optimiser_of, show
from pyproelbo._backend.updates import Update
from pyproelbo._distributions.sharing import sharing
from pyproelbo._messages.warn import warn
from pyproelbo._rows.shared_parameters import warn_of_shared_parameters
from pyproelbo._terms.terms import Terms, stack_terms
from pyproelbo._terms.traces import Program
from pyproelbo.capture import Call, CapturedSteps, LazyLoss, Parts, Records, Replay
from pyproelbo.elbo.baselines import ScoreBaselines
from pyproelbo.elbo.minibatch import MinibatchSurgery
from pyproelbo.elbo.untrained import has_graph, warn_of_untrained
from pyproelbo.elbo.weights import ScheduledWeights


class NonFiniteWarning(UserWarning):
    """A loss is NaN or infinite; the message names the sites responsible."""


class Trained(Protocol):
    """The interface of an objective that can be trained: a :class:`~pyproelbo.TermsELBO`."""

    additive: bool
    num_particles: int
    retain_graph: bool | None
    step: int
    records: Records
    _scores: ScoreBaselines
    _weights: ScheduledWeights
    _captured: CapturedSteps | None

    @property
    def last_terms(self) -> Terms | None:
        """The Terms of the last training step, detached."""
        ...

    def current_weights(self) -> dict[str, float]:
        """The values of the schedules at the current step."""
        ...

    def count_step(self) -> None:
        """Count one training step."""
        ...

    def _particles(
        self, model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> Iterator[Terms]: ...

    def _evaluated(self, terms: Terms) -> tuple[Tensor, MinibatchSurgery | None]: ...

    def _keep(self, parts: Sequence[MinibatchSurgery | None]) -> None: ...


def loss_with_graph(
    objective: Trained, model: Program, guide: Program, *args: object, **kwargs: object
) -> Tensor:
    """Minus the objective as a scalar with a graph, without counting a step."""
    with sharing():
        terms = stack_terms(list(objective._particles(model, guide, args, kwargs)))
    value, part = maximised(objective, terms)
    if torch.is_grad_enabled():
        objective.records["terms"] = terms.detach()
        objective._keep([part])
    loss = -value
    objective._scores.follow(loss)
    return loss


def differentiable_loss(
    objective: Trained, model: Program, guide: Program, args: tuple, kwargs: dict
) -> Tensor:
    """Minus the objective as a scalar, whose backward pass counts as a training step."""
    replay = _replay(objective, model, guide, args, kwargs)
    if replay is not None:
        return replay.differentiable(at_backward=objective.count_step)
    loss = loss_with_graph(objective, model, guide, *args, **kwargs)
    if loss.requires_grad:
        loss.register_hook(lambda _: objective.count_step())
    return loss


def loss_and_grads(
    objective: Trained, model: Program, guide: Program, args: tuple, kwargs: dict
) -> float:
    """Add the loss's gradients to ``.grad`` of the parameters, and return the loss."""
    update = None if objective._captured is None else _update_after(sys._getframe(2))
    replay = _replay(objective, model, guide, args, kwargs, update)
    if replay is None:
        return _eagerly(objective, model, guide, args, kwargs)
    if not replay.has_updated:
        replay.backward()
    if replay.leaves:
        objective.count_step()
    if objective._captured is not None and objective._captured.options.lazy_loss:
        return replay.loss.as_subclass(LazyLoss)  # type: ignore[return-value]
    loss = replay.loss.item()
    if replay.has_updated and not math.isfinite(loss):
        show(replay.parameters)  # all as after an eager step
        gradients = [x.clone() for x in replay.gradients]  # which the next step may write over
        replay._replace(gradients=gradients).backward()
    return checked(objective, loss)


def _update_after(frame: FrameType) -> Update | None:
    """The one update of the parameters that follows, if this frame is a step of Pyro's SVI."""
    following: Callable[[], Update | None] = getattr(optimiser_of(frame), "_next", lambda: None)
    return following()


def _eagerly(
    objective: Trained, model: Program, guide: Program, args: tuple, kwargs: dict
) -> float:
    """By the programs themselves; the graph of each particle is freed as soon as possible."""
    losses, done, parts, trained = [], [], [], False
    with sharing(cut=True) as shared:
        particles = objective._particles(model, guide, args, kwargs)
        for each in ([terms] for terms in particles) if objective.additive else [list(particles)]:
            terms = stack_terms(each)
            value, part = maximised(objective, terms)
            loss = -value
            if terms.num_particles < objective.num_particles:
                loss = loss * (terms.num_particles / objective.num_particles)
            if loss.requires_grad:
                if objective.step == 0 and not trained:
                    warn_of_untrained([loss, *shared.cut_off], model, guide)
                    warn_of_shared_parameters(model, guide)
                loss.backward(retain_graph=objective.retain_graph)
                trained = True
            losses.append(loss.detach())
            done.append(terms.detach())
            parts.append(part)
        shared.backward(objective.retain_graph)
    objective.records["terms"] = stack_terms(done)
    objective._keep(parts)
    objective.step += trained
    return checked(objective, sum(losses[1:], start=losses[0]).item())


def maximised(objective: Trained, terms: Terms) -> tuple[Tensor, MinibatchSurgery | None]:
    """The objective of some terms, and what a training step keeps from computing it.

    Raises:
        ValueError: if the objective is not a scalar, or has lost the graph of the terms.
    """
    value, part = objective._evaluated(terms)
    name = type(objective).__name__
    if not isinstance(value, Tensor) or value.dim() > 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{name}.objective should return a scalar tensor, got {got}: sum or average it, and "
            "convert nothing to Python numbers"
        )
    if torch.is_grad_enabled() and not value.requires_grad and has_graph(terms):
        raise ValueError(
            f"{name}.objective returned a tensor without a graph, which would train nothing: "
            "compute it from the terms as they are, without detach(), item() or torch.no_grad()"
        )
    return value, part


def checked(objective: Trained, loss: float, terms: Terms | None = None) -> float:
    """The loss, with a warning where it is not finite."""
    if not math.isfinite(loss):
        terms = terms or objective.last_terms  # assembled only now for a captured step
        sites = terms.non_finite() if terms is not None else {}
        where = "; ".join(f"{part} of {', '.join(names)}" for part, names in sites.items())
        warn(
            f"the loss is {loss} at step {objective.step}"
            + (f": look at {where}" if where else ""),
            NonFiniteWarning,
        )
    return loss


def _replay(
    objective: Trained,
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    update: Update | None = None,
) -> Replay | None:
    """The training step by its captured graph, None where it must run eagerly."""
    if objective._captured is None or not torch.is_grad_enabled():
        return None
    weights = objective._weights
    parts = Parts(
        loss_with_graph,
        objective.records,
        weights.schedules,
        objective.current_weights,
        weights.taken,
    )
    call = Call(objective, model, guide, args, kwargs, parts, update)  # type: ignore[arg-type]
    return objective._captured.replay(call)
