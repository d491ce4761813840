"""The base of all objectives: Pyro's ``ELBO`` interface over :class:`pyproelbo.Terms`."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyproelbo._backend.captures import is_captured
from pyproelbo._backend.kept_samples import kept, restore, samples_forgotten
from pyproelbo._distributions.sharing import sharing
from pyproelbo._rows.several import may_be_at_once
from pyproelbo._terms.collect import KL, terms_of
from pyproelbo._terms.masked_latents import warn_of_masks
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.terms import Terms, add, stack
from pyproelbo._terms.traces import Program, Traces, run
from pyproelbo.capture import Call, Capture, CapturedSteps, LazyLoss, Records, Replay, as_capture
from pyproelbo.elbo.ignored import warn_of_baselines, warn_of_ignored
from pyproelbo.elbo.known import Known
from pyproelbo.elbo.module import LossModule
from pyproelbo.elbo.untrained import has_graph, warn_of_untrained
from pyproelbo.schedules import Schedule, as_schedule


class NonFiniteWarning(UserWarning):
    """A loss is NaN or infinite; the message names the sites that are."""


class NoParametersWarning(UserWarning):
    """``objective(model, guide)`` holds no parameters, since neither is an ``nn.Module``."""


class TermsELBO(ELBO, nn.Module):
    r"""An objective that is a function of :class:`~pyproelbo.Terms`.

    Subclass it and say what to maximise:

    >>> class HalfTheKL(TermsELBO):
    ...     def objective(self, terms):
    ...         return terms.fit - 0.5 * terms.shrinkage

    It then works wherever Pyro's ``Trace_ELBO`` does: ``SVI(model, guide, optim, HalfTheKL())``,
    or ``HalfTheKL()(model, guide)`` as an ``nn.Module`` whose forward is the loss. Gradients
    are right for reparameterised, sampled and enumerated sites alike. A backward pass through
    a loss is a training step: :attr:`step` counts them, and schedules read it.

    Args:
        kl: "auto" takes the closed form of a site's KL where there is one that is valid,
            "analytic" raises where there is none, "sampled" never takes one.
        schedules: weights by name, numbers or :mod:`pyproelbo.schedules`; ``objective`` reads
            their values at the current step by ``self.weights(terms)``.
        compile: True captures the training step, with its gradients, in one graph of tensor
            operations, and compiles it; the same numbers, faster. A
            :class:`pyproelbo.Capture` has the options, and :mod:`pyproelbo.capture` says what
            can be captured; the rest runs eagerly, with a warning.
        **kwargs: Pyro's own: ``num_particles``, ``max_plate_nesting``, ``vectorize_particles``,
            ``retain_graph`` and so on. Vectorised particles are tried when programs are first seen:
            where two at once are not what each is by itself, particles are looped, and a
            :class:`~pyproelbo.LoopedWarning` says why.

    Attributes:
        additive: whether the objective of several particles is the mean of theirs. Where it
            is not known to be, ``loss_and_grads`` keeps the graphs of looped particles until
            all have run; where it is, each is freed at once.
        step: the training steps so far; in ``state_dict()``. A state of Pyro's objectives has
            none, and leaves it as it is; they load ours with ``strict=False``.
    """

    additive = False
    # which no graph depends on
    _changes_by_itself = ("step", "_warned_of_masks", "_warned_of_baselines")

    def __init__(
        self,
        *,
        kl: KL = "auto",
        schedules: Mapping[str, float | Schedule] | None = None,
        compile: bool | Capture | Mapping[str, Any] = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        ELBO.__init__(self, **kwargs)
        warn_of_ignored(kwargs)
        if kl not in ("auto", "analytic", "sampled"):
            raise ValueError(f"kl should be 'auto', 'analytic' or 'sampled', got {kl!r}")
        if self.num_particles < 1:
            raise ValueError(f"num_particles should be at least 1, got {self.num_particles}")
        if self.vectorize_particles and self.num_particles > 1:
            self.max_plate_nesting -= 1  # here it counts the program's plates alone
        self.kl: KL = kl
        self.schedules = {n: as_schedule(w, n) for n, w in (schedules or {}).items()}
        self.step = 0
        self.records = Records()
        options = as_capture(compile)
        self._captured = None if options is None else CapturedSteps(options)
        self._weights: dict[str, Tensor] | None = None
        self._at_once, self._is_sequential = Known[bool](), Known[bool]()
        self._warned_of_masks = self._warned_of_baselines = False
        self.current_weights()

    @property
    def last_terms(self) -> Terms | None:
        """The Terms of the last training step, detached, on their device."""
        return self.records["terms"]

    @abstractmethod
    def objective(self, terms: Terms) -> Tensor:
        """The scalar to maximise."""

    def current_weights(self) -> dict[str, float]:
        """The values of the schedules at the current step.

        Raises:
            ValueError: for one that is negative.
        """
        weights = {name: schedule(self.step) for name, schedule in self.schedules.items()}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} should not be negative, got {weight} at step {self.step}")
        return weights

    def weights(self, terms: Terms) -> dict[str, Tensor]:
        """The current weights as scalars that mix with ``terms``.

        They are on the CPU: so they mix with tensors on any device without waiting for it.
        """
        if self._weights is not None:
            return self._weights
        return {
            name: torch.tensor(weight, dtype=terms.dtype, device="cpu")
            for name, weight in self.current_weights().items()
        }

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        """Evaluate the terms, without a graph and without counting a step."""
        with torch.no_grad(), sharing():
            return stack(list(self._particles(model, guide, args, kwargs)))

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """An estimate of minus the objective; no graph, no training step."""
        terms = self.terms(model, guide, *args, **kwargs)
        return self._checked(-self._maximised(terms)[0].item(), terms)

    @contextmanager
    def weighted_by(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Take these weights in place of those of the current step."""
        self._weights = weights
        try:
            yield
        finally:
            self._weights = None

    def loss_with_graph(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the objective as a scalar with a graph, without counting a step."""
        with sharing():
            terms = stack(list(self._particles(model, guide, args, kwargs)))
        value, part = self._maximised(terms)
        if torch.is_grad_enabled():
            self.records["terms"] = terms.detach()
            self._keep([part])
        return -value

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the objective as a scalar, whose backward pass counts as a training step."""
        replay = self._replay(model, guide, args, kwargs)
        if replay is not None:
            return replay.differentiable(at_backward=self._count_step)
        loss = self.loss_with_graph(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.register_hook(lambda _: self._count_step())
        return loss

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Add the loss's gradients to ``.grad`` of the parameters, and return the loss."""
        replay = self._replay(model, guide, args, kwargs)
        if replay is not None:
            replay.backward()
            self.step += bool(replay.leaves)
            if self._captured is not None and self._captured.options.lazy_loss:
                return replay.loss.as_subclass(LazyLoss)  # type: ignore[return-value]
            return self._checked(replay.loss.item())
        with sharing(cut=True) as shared:
            particles = self._particles(model, guide, args, kwargs)
            parts = ([terms] for terms in particles) if self.additive else [list(particles)]
            losses, done, kept_parts, trained = [], [], [], False
            for part in parts:
                terms = stack(part)
                value, kept_part = self._maximised(terms)
                loss = -value
                if terms.num_particles < self.num_particles:
                    loss = loss * (terms.num_particles / self.num_particles)
                if loss.requires_grad:
                    if self.step == 0 and not trained:
                        warn_of_untrained([loss, *shared.cut_off], model, guide)
                    loss.backward(retain_graph=self.retain_graph)
                    trained = True
                losses.append(loss.detach())
                done.append(terms.detach())
                kept_parts.append(kept_part)
            shared.backward(self.retain_graph)
        self.records["terms"] = stack(done)
        self._keep(kept_parts)
        self.step += trained
        return self._checked(sum(losses[1:], start=losses[0]).item())

    def __call__(self, model: Any, guide: Any) -> ELBOModule:
        """An ``nn.Module`` of model, guide and this objective, whose forward is the loss."""
        if not (isinstance(model, nn.Module) or isinstance(guide, nn.Module)):
            warnings.warn(
                "neither model nor guide is an nn.Module, so that this module has no parameters "
                "to train: make one a PyroModule, or use pyro.infer.SVI, which finds pyro.param",
                NoParametersWarning,
                stacklevel=2,
            )
        return LossModule(model, guide, self)

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        step = state.get("step") if isinstance(state, Mapping) else None
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(
                f"the state of a {type(self).__name__} should be {{'step': a whole number}}, got "
                f"{state!r}: without its '_extra_state' the step stays as it is"
            )
        self.step = step

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As torch's; without a state, as in what Pyro's objectives save, the step stays."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args, **kwargs
        )
        if f"{prefix}_extra_state" in missing_keys:
            missing_keys.remove(f"{prefix}_extra_state")

    def _evaluated(self, terms: Terms) -> tuple[Tensor, Any]:
        """The objective, and what a training step keeps of its making; see :meth:`_keep`."""
        return self.objective(terms), None

    def _keep(self, parts: Sequence[Any]) -> None:
        """Record what :meth:`_evaluated` gave of a training step's particles."""

    def _maximised(self, terms: Terms) -> tuple[Tensor, Any]:
        """What :meth:`_evaluated` gives.

        Raises:
            ValueError: if the objective is no scalar, or has lost the graph of the terms.
        """
        value, part = self._evaluated(terms)
        if not isinstance(value, Tensor) or value.dim() > 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{type(self).__name__}.objective should return a scalar tensor, got {got}: sum or "
                "average what is not one, and convert nothing to Python numbers"
            )
        if torch.is_grad_enabled() and not value.requires_grad and has_graph(terms):
            raise ValueError(
                f"{type(self).__name__}.objective returned a tensor without a graph, from which "
                "nothing would be trained: compute it from the terms as they are, without "
                "detach(), item() or torch.no_grad()"
            )
        return value, part

    def _replay(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> Replay | None:
        """The training step by its captured graph, None where it has to run eagerly."""
        if self._captured is None or not torch.is_grad_enabled():
            return None
        return self._captured.replay(Call(self, model, guide, args, kwargs))

    def _particles(
        self, model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> Iterator[Terms]:
        """Terms of one looped particle after the other; of all at once if vectorised."""
        for runs in self._runs(model, guide, args, kwargs):
            self.max_plate_nesting = runs[0].max_plate_nesting
            if self._is_sequential.of(model, guide) is None:
                self._is_sequential.put("sequential" in runs[0].enumerated, model, guide)
            self._look_at(runs[0])
            yield add([self._terms_of(traces) for traces in runs])

    def _runs(
        self, model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> Iterator[list[Traces]]:
        def of(num_particles: int) -> list[Traces]:
            return run(
                model,
                guide,
                args,
                kwargs,
                num_particles=num_particles,
                max_plate_nesting=self.max_plate_nesting,
                may_be_sequential=self._is_sequential.of(model, guide) is not False,
            )

        if self.vectorize_particles and self.num_particles > 1:
            runs = self._at_once_runs(of, model, guide, args, kwargs)
            if runs is not None:
                yield runs
                return
        for left in reversed(range(self.num_particles)):
            with samples_forgotten() if left else nullcontext():  # so that each makes its own
                runs = of(1)
            yield runs

    def _at_once_runs(
        self,
        of: Callable[[int], list[Traces]],
        model: Program,
        guide: Program,
        args: tuple,
        kwargs: dict,
    ) -> list[Traces] | None:
        """All particles in one run; None where they have to be looped.

        Programs that are seen for the first time are tried, after their run, so that random
        numbers are those of Pyro.
        """
        found = self._at_once.of(model, guide)
        if found is False:
            return None
        if found or is_captured():  # by others, before any eager step
            return of(self.num_particles)
        before, runs, failed = kept(), None, None
        try:
            runs = of(self.num_particles)
        except Exception as error:  # whatever it is: a particle by itself need not have it
            failed = error
        found = self._at_once.put(may_be_at_once(model, guide, args, kwargs), model, guide)
        if found and failed is not None:
            raise failed
        if found:
            return runs
        restore(before)
        return None

    def _look_at(self, traces: Traces) -> None:
        """Warn once of a latent that model or guide masks alone, and of baselines.

        Masks that are different tensors are compared where Pyro's validation, which reads numbers
        as well, is on, at steps 0, 1, 3, 7, ...
        """
        if not self._warned_of_baselines:
            self._warned_of_baselines = warn_of_baselines(traces)
        may_read = is_validation_enabled() and not is_captured()
        if may_read and not (self._warned_of_masks or self.step & (self.step + 1)):
            self._warned_of_masks = warn_of_masks(Sites.of(traces))

    def _terms_of(self, traces: Traces) -> Terms:
        return terms_of(traces, self.kl)

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError("a TermsELBO has terms(...) in place of Pyro's traces")

    def _count_step(self) -> None:
        self.step += 1

    def _checked(self, loss: float, terms: Terms | None = None) -> float:
        if not math.isfinite(loss):
            terms = terms or self.last_terms  # which a captured step puts together only now
            sites = terms.non_finite() if terms is not None else {}
            where = "; ".join(f"{part} of {', '.join(names)}" for part, names in sites.items())
            warnings.warn(
                f"the loss is {loss} at step {self.step}" + (f": look at {where}" if where else ""),
                NonFiniteWarning,
                stacklevel=3,
            )
        return loss
