"""Repair of hierarchical posteriors by level: of z_n given w, and of w without z."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from pyproelbo._distributions.row_noise import Noise
from pyproelbo._evidence.by_level import integrated
from pyproelbo._evidence.level_coordinates import LevelCoordinates, LevelDensities, LevelPoints
from pyproelbo._evidence.level_gaussian import LevelGaussian, fitted_levels
from pyproelbo._evidence.level_picks import Drawn, Picked, with_next
from pyproelbo._evidence.missed import Known, known_of
from pyproelbo._evidence.proposals import prior_of
from pyproelbo._evidence.repair_judged import Judged, judged, least_effective
from pyproelbo._evidence.repair_settings import Settings, Weighted
from pyproelbo._evidence.repair_steps import WIDEST, picks_of
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.levels import LevelDraws
from pyproelbo._rows.runs import Use
from pyproelbo._terms.traces import Traces

WAYS = ("correlated",)
SHARE = 0.9  # of the draws of w, at which the weights of z_n must pass
GLOBAL = ", global"  # the suffix of a method in ``seconds``
STEPS = ("guide", "locals", "both")  # what is judged, and fitted, in order


class Proposal(NamedTuple):
    """The distributions from which w and z are drawn.

    Attributes:
        gaussian: of both levels; None before one is fitted.
        of_globals: whether w is drawn from it, and not from the guide.
        of_locals: the data whose z_n is drawn from it, (N,).
    """

    gaussian: LevelGaussian | None
    of_globals: bool
    of_locals: Tensor


class LocalVerdict(NamedTuple):
    """Whether draws of z_n given w can represent its posterior given w, for each of N data.

    Attributes:
        khat, effective_sample_size: means over draws of w, (N,).
        passes: where they can at nine of ten draws of w, (N,).
        sees_half: where draws of the prior given w would show that half of the mass is missed.
    """

    khat: Tensor
    effective_sample_size: Tensor
    passes: Tensor
    sees_half: Tensor

    def where(self, mask: Tensor, other: "LocalVerdict") -> "LocalVerdict":
        """This where the mask is true, the other elsewhere."""
        pairs = zip(self, other, strict=True)
        return LocalVerdict(*(torch.where(mask, mine, its) for mine, its in pairs))


@dataclass(frozen=True, eq=False)
class LevelState:
    """What is known after a step.

    Attributes:
        proposal: the last one.
        before, locals_: for the guide's draws of z, and for those of the last proposal.
        globals_before, globals_: the same for draws of w, with one row.
        known: log p(x) by draws of the prior.
        draws: by site, as in :meth:`LevelCoordinates.values`.
        effective_sample_size: of the draws of each z_n together with w, (N,).
        is_finished: whether nothing is left to try.
    """

    proposal: Proposal
    before: LocalVerdict
    locals_: LocalVerdict
    globals_before: Judged
    globals_: Judged
    known: Known
    draws: Mapping[str, Tensor]
    effective_sample_size: Tensor
    is_finished: bool

    @property
    def globals_pass(self) -> bool:
        """Whether the draws of w pass, for which those of all z must pass too."""
        judged = self.globals_
        misses = self.known.misses(judged.log_evidence, judged.stderr)
        return bool(judged.passes & ~misses & self.locals_.passes.all())


class LevelTarget:
    """log p(x, w, z) as a density of points; standard normal where nothing depends on them."""

    def __init__(self, coordinates: LevelCoordinates, some: LevelPoints) -> None:
        self._of = coordinates.densities
        with torch.enable_grad(), pyro.validation_enabled(False):
            points = LevelPoints(*(part.detach().requires_grad_() for part in some))
            log_p = self._of(points)
            total = log_p.globals_.sum() + log_p.locals_.sum()
            gradients = torch.autograd.grad(total, list(points), allow_unused=True)
        self._idle = [
            torch.ones_like(part[0], dtype=torch.bool) if g is None else (g == 0).all(0)
            for part, g in zip(points, gradients, strict=True)
        ]

    def __call__(self, points: LevelPoints) -> LevelDensities:
        """By level."""
        log_p = self._of(points)
        idle = [
            (u.square() * where).sum(-1) / 2 for u, where in zip(points, self._idle, strict=True)
        ]
        return LevelDensities(log_p.globals_ - idle[0], log_p.locals_ - idle[1])


class LevelLadder:
    """The steps of a repair by level, in order: an iterable of their names.

    Args:
        to: the settings of methods, with all data as one row.
        batch: all data.
        num_nested: draws of z for each w, and draws of w at which each z_n is judged.
        methods: whether Gaussians are fitted.
        max_time: seconds after which no further step is started.
        narrow: the factor by which weighted draws may be wider than the draws.

    Attributes:
        levels: the guide's draws.
        seconds: for data, and for global latents, by method, and "prior".
        left_out: methods that do not apply to these programs, and why.

    Raises:
        ValueError: for programs without levels, and for latents that are not continuous.
    """

    def __init__(
        self,
        to: Settings,
        batch: Batch,
        plate: str | None,
        num_nested: int,
        methods: Sequence[str],
        max_time: float | None,
        narrow: float,
    ) -> None:
        self.levels = LevelDraws(to.model, to.guide, batch, plate, to.seed)
        self._coordinates = LevelCoordinates(self.levels)
        self._to, self._batch, self._nested, self._narrow = to, batch, num_nested, narrow
        self._until = None if max_time is None else time.monotonic() + max_time
        self._state: LevelState | None = None
        self.seconds: dict[str, float] = defaultdict(float)
        self.left_out: dict[str, str] = {}
        sizes = self._coordinates.sizes
        if max(sizes) > WIDEST:
            self.left_out["correlated"] = (
                f"the global latents have {sizes[0]:,} coordinates, and those of a datum "
                f"{sizes[1]:,}, more than the {WIDEST} for which a full covariance is fitted"
            )
        self._fits = "correlated" in methods and not self.left_out
        self._prior = self._levels_of_prior()

    def __iter__(self) -> Iterator[str]:
        for step in STEPS:
            yield step
            assert self._state is not None
            is_late = self._until is not None and time.monotonic() > self._until
            if self._state.is_finished or is_late:
                return

    def after(self, before: LevelState | None, step: str) -> LevelState:
        """The state after a step."""
        with pyro.validation_enabled(False):
            if before is None:
                self._state = self._first()
            elif step == "locals":
                self._state = self._with_locals(before)
            else:
                self._state = self._with_both(before)
        return self._state

    def _first(self) -> LevelState:
        begin = time.monotonic()
        none = torch.zeros(self.levels.plate.size, dtype=torch.bool, device="cpu")
        proposal = Proposal(None, False, none)
        known = self._known()
        self.seconds["prior"] += time.monotonic() - begin
        verdict = self._judged(proposal, 0, "guide")
        return self._weighed(proposal, verdict, None, known, "guide", 0)

    def _with_locals(self, before: LevelState) -> LevelState:
        """For draws of z that do not pass, a Gaussian given w, at the guide's draws of w."""
        if before.locals_.passes.all():
            self._state = before
            return self._with_both(before)
        begin = time.monotonic()
        some = self._some()
        q = self._fit(LevelGaussian.of_draws(some), some, some.globals_, 1)
        self.seconds["correlated"] += time.monotonic() - begin
        proposal = Proposal(q, False, ~before.locals_.passes)
        verdict = self._judged(proposal, 1, "correlated")
        return self._weighed(proposal, verdict, before, before.known, "correlated", 1)

    def _with_both(self, before: LevelState) -> LevelState:
        """A Gaussian of w as well, with one of z given w for all data."""
        begin = time.monotonic()
        some, start = self._some(), before.proposal.gaussian
        q = self._fit(LevelGaussian.of_draws(some) if start is None else start, some, None, 2)
        self.seconds["correlated"] += time.monotonic() - begin
        none = torch.zeros_like(before.locals_.passes)
        own, fitted = (
            self._judged(Proposal(q, True, of), 2, name)
            for name, of in (("guide", none), ("correlated", ~none))
        )
        rest = before, before.known, "correlated", 2
        mixed = Proposal(q, True, ~own.passes)
        state = self._weighed(mixed, own.where(own.passes, fitted), *rest)
        if state.globals_pass or not own.passes.any():
            return state
        # the guide's z may be good enough for each datum, and its weights too noisy for w
        use = fitted.passes | ~own.passes
        return self._weighed(Proposal(q, True, use), fitted.where(use, own), *rest)

    def _fit(
        self, start: LevelGaussian, some: LevelPoints, given: Tensor | None, part: int
    ) -> LevelGaussian:
        to, index = self._to, torch.arange(2, device="cpu")
        noise = self._noise(range(to.num_particles), part, 0)
        target = LevelTarget(self._coordinates, some.take(index))
        return fitted_levels(target, start, to.steps, to.num_particles, noise, given)

    def _some(self) -> LevelPoints:
        """``num_nested`` draws of the guide."""
        runs = self.levels.runs(range(self._to.num_samples), 1, Use.LEVELS)
        parts = [self._coordinates.points(run.traces) for run in runs]
        return LevelPoints(*(torch.cat(part).detach() for part in zip(*parts, strict=True)))

    def _judged(self, proposal: Proposal, part: int, name: str) -> LocalVerdict:
        """The verdict on draws of z given each of some draws of w."""
        found, passed, sees = list[Judged](), list[Tensor](), list[Tensor]()
        for s in range(self._nested):
            begin = time.monotonic()
            w, z, weights = dict[str, Tensor](), list[Tensor](), list[Tensor]()
            counts = self._to.num_samples, part, True
            for drawn, traces in self._drawn(proposal, range(s, s + 1), *counts):
                w = w or self._of_prior(traces)
                z.append(drawn.values["z"])
                weights.append(drawn.of_locals)
            verdict = judged(Weighted({"z": torch.cat(z)}, torch.cat(weights)), self._narrow)
            middle = time.monotonic()
            known = self._known_given(w, s)
            self.seconds[name] += middle - begin
            self.seconds["prior"] += time.monotonic() - middle
            found.append(verdict)
            sees.append(known.sees_half)
            passed.append(verdict.passes & ~known.misses(verdict.log_evidence, verdict.stderr))
        return LocalVerdict(
            torch.stack([v.khat for v in found]).mean(0),
            torch.stack([v.effective_sample_size for v in found]).mean(0),
            _mostly(passed),
            _mostly(sees),
        )

    def _weighed(
        self,
        proposal: Proposal,
        verdict: LocalVerdict,
        before: LevelState | None,
        known: Known,
        name: str,
        part: int,
    ) -> LevelState:
        """S draws of w, each with one draw of z by its weight, and the weights of w."""
        begin, to = time.monotonic(), self._to
        picked: list[Picked] = []
        for chunk in self.levels.chunks(to.num_samples, to.chunk, self._nested):
            for drawn, _ in self._drawn(proposal, chunk, self._nested, part, False):
                picked = with_next(picked, drawn, {"z": -2}, self._nested, to.seed)
        log_weight = torch.cat([p.log_weight for p in picked]).unsqueeze(1)
        w, z = (torch.cat([p.values[n] for p in picked]) for n in ("w", "z"))
        found = judged(Weighted({"w": w.unsqueeze(1)}, log_weight), self._narrow)
        weights = torch.from_numpy(np.exp(found.smoothed)).nan_to_num(0.0)
        off = z.double().cpu()
        ess = least_effective(off - off.mean(0), weights.expand(-1, z.shape[1]))
        index = picks_of(found.smoothed, to, self._batch)[:, 0]
        draws = self._coordinates.values(LevelPoints(w, z).take(index))
        state = LevelState(
            proposal,
            verdict if before is None else before.before,
            verdict,
            found if before is None else before.globals_before,
            found,
            known,
            {n: value.cpu() for n, value in draws.items()},
            torch.minimum(ess, found.effective_sample_size),
            not self._fits or part == 2,
        )
        self.seconds[name + GLOBAL] += time.monotonic() - begin
        return replace(state, is_finished=state.is_finished or state.globals_pass)

    def _drawn(
        self, proposal: Proposal, draws: range, num_local: int, part: int, judges: bool
    ) -> Iterator[tuple[Drawn, Traces]]:
        """Draws of w with these indices, and ``num_local`` draws of z for each, with their weights.

        With the guide's runs at these w.

        Args:
            part: of the random numbers of Gaussians.
            judges: whether z is judged at these draws.
        """
        use, q = Use.LOCALS if judges else Use.GLOBALS, proposal.gaussian
        if q is not None and proposal.of_globals:
            shape = torch.Size((len(draws), 1, len(q.mean)))
            e = self._noise(draws, part, 1, judges).normal(q.mean, shape, 1)[:, 0]
            at = self._coordinates.globals_at(q.globals_at(e))
            runs = self.levels.runs_at(at, draws, num_local, use)
        else:
            runs = self.levels.runs(draws, num_local, use)
        for run in runs:
            w, z = self._coordinates.points(run.traces)
            of_globals, of_locals = run.of_globals, run.of_locals
            if q is not None and (proposal.of_globals or proposal.of_locals.any()):
                noise = self._noise(run.numbers, part, 2, judges).normal(z, z.shape, 1)
                points = LevelPoints(w, q.locals_at(q.standard(w), noise))
                log_p, log_q = self._coordinates.densities(points), q.log_prob(points)
                if proposal.of_globals:
                    of_globals = (log_p.globals_ - log_q.globals_).double().cpu()
                own = (log_p.locals_ - log_q.locals_).double().cpu()
                of_locals = torch.where(proposal.of_locals, own, of_locals)
                z = torch.where(proposal.of_locals.to(z.device)[:, None], points.locals_, z)
            of_globals, of_locals = (
                x.nan_to_num(-torch.inf, -torch.inf, -torch.inf) for x in (of_globals, of_locals)
            )
            yield Drawn(run.numbers, of_globals, of_locals, {"w": w, "z": z}), run.traces

    def _known(self) -> Known:
        """log p(x) by draws of the prior."""
        if self._prior is None:
            return Known.nothing(1)
        num, prior = self._to.num_samples, self._prior
        parts = prior.chunks(num, self._to.chunk, self._nested)
        weights = (prior.weights(part, self._nested, Use.PRIOR) for part in parts)
        return known_of((integrated(w).unsqueeze(1) for w in weights), num)

    def _of_prior(self, traces: Traces) -> dict[str, Tensor]:
        """The first w of a run, in the shapes of the prior, (1, *shape) by site."""
        first = self.levels.first.model_sites
        return {
            name: traces.model_sites[name]["value"].reshape(-1, *first[name]["value"].shape)[:1]
            for name in (() if self._prior is None else self._prior.names[0])
        }

    def _known_given(self, w: Mapping[str, Tensor], s: int) -> Known:
        """log p(x_n | w) by draws of the prior given w."""
        num = self._to.num_samples
        if self._prior is None:
            return Known.nothing(self.levels.plate.size)
        runs = self._prior.runs_at(w, range(s, s + 1), num, Use.OF_PRIOR)
        return known_of((run.of_locals for run in runs), num)

    def _levels_of_prior(self) -> LevelDraws | None:
        """Draws of the prior; None where it cannot be drawn from."""
        to, plate = self._to, self.levels.plate.name
        try:
            prior = LevelDraws(to.model, prior_of(to.model), self._batch, plate, to.seed)
        except (NotImplementedError, ValueError):
            return None
        return None if prior.is_improper else prior

    def _noise(self, draws: range, *part: int) -> Noise:
        return Noise((self._to.seed, Use.LEVELS, *part), draws, 0, -2, -1, part=())


def _mostly(found: Sequence[Tensor]) -> Tensor:
    """Where a condition holds at most of the draws of w."""
    return torch.stack(list(found)).double().mean(0) >= SHARE
