"""The base of all objectives: Pyro's ``ELBO`` interface over :class:`pyproelbo.Terms`."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Never, Unpack, get_args

import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from pyproelbo._distributions.sharing import sharing
from pyproelbo._messages.warn import warn
from pyproelbo._terms.collect import KL, terms_of
from pyproelbo._terms.terms import Terms, add_terms, stack_terms
from pyproelbo._terms.traces import Program, Traces
from pyproelbo.capture import Capture, CapturedSteps, Records, as_capture
from pyproelbo.elbo import training
from pyproelbo.elbo.baselines import Baselines, Runs, ScoreBaselines
from pyproelbo.elbo.counting import CountsSteps
from pyproelbo.elbo.ignored import warn_of_ignored
from pyproelbo.elbo.minibatch import MinibatchSurgery
from pyproelbo.elbo.module import LossModule
from pyproelbo.elbo.options import ParticleOptions
from pyproelbo.elbo.particles import Particles
from pyproelbo.elbo.users_baselines import DecayingAverages
from pyproelbo.elbo.weights import ScheduledWeights
from pyproelbo.schedules import Schedule


class NoParametersWarning(UserWarning):
    """``objective(model, guide)`` holds no parameters, since neither is an ``nn.Module``."""


class TermsELBO(ELBO, CountsSteps):
    r"""An objective that is a function of :class:`~pyproelbo.Terms`.

    Subclass it and return what to maximise:

    >>> class HalfTheKL(TermsELBO):
    ...     def objective(self, terms):
    ...         return terms.data_fit - 0.5 * terms.shrinkage

    It then works wherever Pyro's ``Trace_ELBO`` does: ``SVI(model, guide, optim, HalfTheKL())``,
    or ``HalfTheKL()(model, guide)`` as an ``nn.Module`` whose forward is the loss. Gradients are
    correct for reparameterised, sampled and enumerated sites alike. A backward pass through a loss
    is a training step: :attr:`step` counts them, and schedules read it.

    Args:
        kl: "auto" takes the closed form of a site's KL where there is one that is valid,
            "analytic" raises where there is none, "sampled" never uses one.
        schedules: weights by name, numbers or :mod:`pyproelbo.schedules`; ``objective`` reads
            their values at the current step by ``self.weights(terms)``.
        baselines: what is subtracted from the cost of a draw whose gradient is by the score.
            "leave_one_out" subtracts the mean cost of the other particles, by element of the
            site's plates (Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline
            for Free!"), "none" nothing; with one particle there are no others. Neither has a bias:
            with eight particles of ten Bernoullis the variance fell to a seventeenth. Looped
            particles with a scored site keep their graphs until all have run. Where each takes
            its own subsample, the costs of the others belong to other data: vectorise. A guide
            site with ``infer={"baseline": ...}`` uses that instead, with the options of Pyro's
            ``TraceGraph_ELBO``: "nn_baseline" with "nn_baseline_input", "baseline_value",
            "use_decaying_avg_baseline" with "baseline_beta".
        compile: True captures the training step, with its gradients, in one graph of tensor
            operations, and compiles it; the same numbers, faster. :class:`pyproelbo.Capture` has
            the options, and :mod:`pyproelbo.capture` describes what can be captured; the rest runs
            eagerly, with a warning.
        **kwargs: Pyro's own: ``num_particles``, ``max_plate_nesting``, ``vectorize_particles``,
            ``retain_graph`` and so on. Vectorised particles are tried when programs are first seen:
            if two drawn at once differ from two drawn one by one, particles are looped, and a
            :class:`~pyproelbo.LoopedWarning` gives the reason.

    Attributes:
        additive: whether the objective of several particles is the mean of their objectives. If so,
            ``loss_and_grads`` frees the graph of each looped particle at once; if that is not
            known, it keeps the graphs until all have run.
        step: the training steps so far; in ``state_dict()``. The state of a Pyro objective has
            none, and leaves it unchanged; Pyro's objectives load ours with ``strict=False``.
        averages: the decaying averages that sites ask for, in ``state_dict()``; one for each site,
            updated once a step with the mean cost of its particles.
    """

    additive = False
    _changes_by_itself = ("step",)  # which no graph depends on

    def __init__(
        self,
        *,
        kl: KL = "auto",
        schedules: Mapping[str, float | Schedule] | None = None,
        baselines: Baselines = "leave_one_out",
        compile: bool | Capture | Mapping[str, object] = False,
        **kwargs: Unpack[ParticleOptions],
    ) -> None:
        nn.Module.__init__(self)
        ELBO.__init__(self, **kwargs)
        warn_of_ignored(kwargs)
        if kl not in ("auto", "analytic", "sampled"):
            raise ValueError(f"kl should be 'auto', 'analytic' or 'sampled', got {kl!r}")
        if baselines not in get_args(Baselines):
            raise ValueError(f"baselines should be one of {get_args(Baselines)}, got {baselines!r}")
        if self.num_particles < 1:
            raise ValueError(f"num_particles should be at least 1, got {self.num_particles}")
        if self.vectorize_particles and self.num_particles > 1:
            self.max_plate_nesting -= 1  # here it counts the program's plates alone
        self.kl: KL = kl
        self.baselines: Baselines = baselines
        self.averages = DecayingAverages()
        self._scores = ScoreBaselines(baselines, self.num_particles, self.averages)
        self.step = 0
        self.records = Records()
        self._weights = ScheduledWeights(schedules or {})
        options = as_capture(compile)
        self._captured = None if options is None else CapturedSteps(options)
        self._runs = Particles()
        self.current_weights()

    @abstractmethod
    def objective(self, terms: Terms) -> Tensor:
        """The scalar to maximise: a function of the terms and of :meth:`weights` only."""

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The weights by name, as functions of the step."""
        return self._weights.schedules

    def current_weights(self) -> dict[str, float]:
        """The values of the schedules at the current step.

        Raises:
            ValueError: for one that is negative.
        """
        return self._weights.at(self.step)

    def weights(self, terms: Terms) -> dict[str, Tensor]:
        """The current weights as scalars that mix with ``terms``, on any device."""
        return self._weights.like(terms, self.step)

    @property
    def last_terms(self) -> Terms | None:
        """The Terms of the last training step, detached, on their device."""
        return self.records["terms"]

    def terms(self, model: Program, guide: Program, *args: object, **kwargs: object) -> Terms:
        """Evaluate the terms, without a graph and without counting a step."""
        with torch.no_grad(), sharing():
            return stack_terms(list(self._particles(model, guide, args, kwargs)))

    def loss(self, model: Program, guide: Program, *args: object, **kwargs: object) -> float:
        """An estimate of minus the objective; no graph, no training step."""
        terms = self.terms(model, guide, *args, **kwargs)
        return training.checked(self, -training.maximised(self, terms)[0].item(), terms)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Tensor:
        """Minus the objective as a scalar, whose backward pass counts as a training step."""
        return training.differentiable_loss(self, model, guide, args, kwargs)

    def loss_and_grads(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> float:
        """Add the loss's gradients to ``.grad`` of the parameters, and return the loss."""
        return training.loss_and_grads(self, model, guide, args, kwargs)

    def __call__(self, model: Program, guide: Program) -> ELBOModule:
        """An ``nn.Module`` of model, guide and this objective, whose forward is the loss."""
        if not (isinstance(model, nn.Module) or isinstance(guide, nn.Module)):
            warn(
                "neither model nor guide is an nn.Module, and this module has no parameters to "
                "train: make one a PyroModule, or use pyro.infer.SVI, which finds pyro.param",
                NoParametersWarning,
            )
        return LossModule(model, guide, self)

    # What subclasses of this library may do otherwise.

    def _particles(
        self, model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> Iterator[Terms]:
        """Terms of the looped particles one by one; of all together where they need it."""
        num, nesting, at_once = self.num_particles, self.max_plate_nesting, self.vectorize_particles
        runs = self._runs.runs(model, guide, args, kwargs, num, nesting, at_once)
        for particles in self._together(runs):
            self.max_plate_nesting = particles[0][0].max_plate_nesting
            self._runs.look_at(particles[0][0], self.step)
            each = [add_terms([self._terms_of(t) for t in runs]) for runs in particles]
            yield stack_terms(each)

    def _together(self, particles: Iterator[Runs]) -> Iterator[list[Runs]]:
        return self._scores.together(particles)

    def _terms_of(self, traces: Traces) -> Terms:
        return terms_of(traces, self.kl)

    def _evaluated(self, terms: Terms) -> tuple[Tensor, MinibatchSurgery | None]:
        """The objective, and what a training step keeps from computing it; see :meth:`_keep`."""
        return self.objective(terms), None

    def _keep(self, parts: Sequence[MinibatchSurgery | None]) -> None:
        """Record what :meth:`_evaluated` gave for a training step's particles."""

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> Never:
        raise NotImplementedError("a TermsELBO has terms(...) in place of Pyro's traces")
