"""One run of a guide, and of the model against it.

Pyro's own way of pairing them (trace, replay, enumerate, the checks of its validation), without the
host syncs: nothing here reads the value of a tensor.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from queue import LifoQueue
from typing import TypeVar, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.infer.enum import iter_discrete_escape, iter_discrete_extend
from pyro.infer.util import is_validation_enabled
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import Message, NonlocalExit
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_traceenum_requirements
from torch import Tensor

from pyproelbo._backend.kept_samples import kept, restore
from pyproelbo._backend.pyro_private import (
    check_site_shape,
    record,
    replay,
    scale_and_mask,
    site_is_subsample,
    sites_of,
)
from pyproelbo._backend.sites import Plate as Plate
from pyproelbo._backend.sites import Plates as Plates
from pyproelbo._backend.sites import Site as Site
from pyproelbo._distributions.densities import at_given_values
from pyproelbo._terms.masks import filled
from pyproelbo._terms.value_shapes import check_value
from pyproelbo.sequences.base import SequenceDistribution

T = TypeVar("T")

Program = Callable[..., object]  # a model or a guide

PARTICLES = "num_particles_vectorized"  # the plate that Pyro puts around vectorised particles
UNKNOWN = float("inf")


class Traces:
    """The traces of a guide and of the model that ran on its samples.

    Attributes:
        model: Pyro's trace; ``model_sites`` are its sample sites by name, in the order in
            which they ran, without those of subsampling.
        guide: Pyro's trace; likewise ``guide_sites``.
        max_plate_nesting: the number of dims, from the right, reserved for the program's own
            plates; infinite where it was not needed.
        num_particles: the number that ran at once.
        num_rows: of the first tensor argument with rows; None where there is none.
        scored: the guide's sites whose gradient comes, entirely or in part, by the score.
    """

    def __init__(
        self,
        model: poutine.Trace,
        guide: poutine.Trace,
        max_plate_nesting: float,
        num_particles: int,
        num_rows: int | None = None,
    ) -> None:
        self.model, self.model_sites = model, _sample_sites(model)
        self.guide, self.guide_sites = guide, _sample_sites(guide)
        self.max_plate_nesting = max_plate_nesting
        self.num_particles = num_particles
        self.num_rows = num_rows
        self.scored: list[str] = []

    @property
    def sites(self) -> list[Site]:
        """Every site, the guide's first."""
        return [*self.guide_sites.values(), *self.model_sites.values()]

    @cached_property
    def enumerated(self) -> set[str]:
        """How sites ask to be enumerated: "parallel", "sequential", both, or not at all."""
        asked = (s["infer"].get("enumerate") for s in self.sites if not s["is_observed"])
        return {how for how in asked if how in ("parallel", "sequential")}

    @property
    def particle_dim(self) -> int:
        """The dim of particles that ran at once, counted from the right."""
        return -1 - int(self.max_plate_nesting)

    @property
    def plate_nesting(self) -> int:
        """The number of dims of the program's plates, counted from the right."""
        plates = (plate for site in self.sites for plate in site["plates"])
        return -min((plate.dim for plate in plates if plate.name != PARTICLES), default=0)


def _sample_sites(trace: poutine.Trace) -> dict[str, Site]:
    sites = {}
    for name, site in sites_of(trace).items():
        if site["type"] == "sample" and not site_is_subsample(site):
            sites[name] = site
            site["plates"] = frozenset(
                _plate(frame, site) for frame in site["cond_indep_stack"] if frame.vectorized
            )
    return sites


def _plate(frame: CondIndepStackFrame, site: Site) -> Plate:
    assert frame.dim is not None
    if frame.size >= 0:
        return Plate(frame.name, frame.dim, frame.size, frame.full_size)  # type: ignore[arg-type]
    # a plate that was given none: it has what distribution and value have
    shape = torch.broadcast_shapes(site["fn"].batch_shape, _batch_shape_of_value(site))
    size = shape[frame.dim] if len(shape) >= -frame.dim else 1
    return Plate(frame.name, frame.dim, size, size)


def _batch_shape_of_value(site: Site) -> tuple[int, ...]:
    value = site["value"]
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    return shape[: max(0, len(shape) - site["fn"].event_dim)]


def run(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    *,
    num_particles: int = 1,
    max_plate_nesting: float = UNKNOWN,
    may_be_sequential: bool = True,
) -> list[Traces]:
    """Run the guide, then the model on its samples, and compute the log-density of every site.

    The sites hold what Pyro's ``compute_log_prob`` and ``compute_score_parts`` put there.

    Args:
        num_particles: more than 1 are run at once, under a plate at the left of all others.
        max_plate_nesting: as in Pyro; where it is infinite and particles or enumeration need
            it, the program runs once more to find it.
        may_be_sequential: whether a site may ask for sequential enumeration. If none does, this
            avoids the search for one.

    Returns:
        One pair of traces, or, where sites of the guide are marked
        ``infer={"enumerate": "sequential"}``, one for each of their values. Those marked
        "parallel" are enumerated in new dims, at the left of the plates.

    Raises:
        ValueError: for enumeration by a guide that is a messenger, and for plates beyond
            ``max_plate_nesting``.
    """
    nesting = max_plate_nesting
    if nesting == UNKNOWN:
        before = kept()
        with poutine.block() if num_particles > 1 else nullcontext():
            first = _trace(model, guide, args, kwargs)
        if num_particles == 1 and not first.enumerated:
            return [_completed(first)]
        restore(before)  # those of the last run are to be kept
        nesting = first.plate_nesting

    first_free_dim = -1 - int(nesting)
    if num_particles > 1:
        particles = pyro.plate(PARTICLES, num_particles, dim=first_free_dim)
        model, guide = particles(model), particles(guide)
        first_free_dim -= 1
    if isinstance(poutine.unwrap(guide), GuideMessenger):
        may_be_sequential = False
    else:
        guide = EnumMessenger(first_available_dim=first_free_dim)(guide)
        model = EnumMessenger()(model)  # takes the dims that the guide's left free
    try:
        if not may_be_sequential:
            return [_completed(_trace(model, guide, args, kwargs, nesting, num_particles))]
        queue: LifoQueue = LifoQueue()
        queue.put(poutine.Trace())
        each, all_traces = _in_sequence(guide, queue), []
        while not queue.empty():
            all_traces.append(_trace(model, each, args, kwargs, nesting, num_particles))
    except ValueError as error:
        if not (PARTICLES in str(error) and "collide" in str(error)):
            raise
        raise ValueError(_too_shallow(nesting)) from error
    return [_completed(traces) for traces in all_traces]


def _in_sequence(guide: Program, queue: LifoQueue) -> Program:
    """The guide at the next of the values that it enumerates sequentially.

    Like Pyro's ``poutine.queue``, except for param sites, which may share names with samples.
    """

    def run_next(*args: object, **kwargs: object) -> object:
        while True:
            known, tracing = queue.get(), _SampleTrace()
            replayed = poutine.replay(guide, trace=known)
            escaping = poutine.escape(replayed, escape_fn=partial(iter_discrete_escape, known))
            try:
                with tracing:
                    return escaping(*args, **kwargs)
            except NonlocalExit as met:  # a site whose values are to be taken one by one
                met.reset_stack()
                for extended in iter_discrete_extend(tracing.trace.copy(), met.site):
                    queue.put(extended)

    return run_next


def _completed(traces: Traces) -> Traces:
    """The traces, checked as Pyro checks them, with the log-density of every site."""
    nesting = traces.max_plate_nesting
    left_of = nesting + (traces.num_particles > 1)
    if is_validation_enabled():
        check_model_guide_match(traces.model, traces.guide, left_of)
    if nesting != UNKNOWN and traces.plate_nesting > nesting:
        raise ValueError(_too_shallow(nesting))
    free = left_of if traces.num_particles > 1 or traces.enumerated else UNKNOWN
    for name, site in traces.guide_sites.items():
        check_value(name, site, free)
        _compute_score_parts(name, site, traces.guide)
        if getattr(site["score_parts"].score_function, "requires_grad", False):
            traces.scored.append(name)
    for name, site in traces.model_sites.items():
        check_value(name, site, free)
        _compute_log_prob(name, site, traces.model)
    if is_validation_enabled():
        if traces.enumerated:
            pruned = map(prune_subsample_sites, (traces.model, traces.guide))
            check_traceenum_requirements(*pruned)
        for site in traces.sites:
            check_site_shape(site, left_of)
    return traces


class _SampleTrace(TraceMessenger):
    """Pyro's trace, replayed against another, without the param sites, of which a module may
    have hundreds: no term needs them.
    """

    def __init__(self, against: poutine.Trace | None = None) -> None:
        super().__init__()
        self._against = {} if against is None else sites_of(against)
        self._replay = None if against is None else ReplayMessenger(against)

    def _process_message(self, msg: Message) -> None:
        if self._replay is not None and msg.get("type") == "sample":
            _check_drawn(cast(Site, msg), self._against)
            replay(self._replay, msg)

    def _postprocess_message(self, msg: Message) -> None:
        if msg.get("type") == "sample":
            record(self, msg)

    def of(self, program: Program, args: tuple, kwargs: dict) -> poutine.Trace:
        """Run the program; an error shows the shapes of the sites so far, as in Pyro."""
        with self:
            try:
                program(*args, **kwargs)
            except (ValueError, RuntimeError) as error:
                error.add_note(self.trace.format_shapes())
                raise
        return self.trace


def _check_drawn(msg: Site, guide: dict[str, Site]) -> None:
    """
    Raises:
        ValueError: where the model draws what the guide observes.
    """
    name = msg["name"]
    if not msg["is_observed"] and name in guide and guide[name]["is_observed"]:
        raise ValueError(
            f"the guide observes {name!r}, which the model draws: are model and guide swapped? "
            "What is observed belongs to the model; what the model draws the guide should draw too"
        )


def _too_shallow(max_plate_nesting: float) -> str:
    return (
        f"max_plate_nesting={max_plate_nesting} was given or found on the first call, but the "
        "plates of this model or guide nest deeper: pass a larger max_plate_nesting, or make a "
        "new objective for a deeper model"
    )


def _trace(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    max_plate_nesting: float = UNKNOWN,
    num_particles: int = 1,
) -> Traces:
    messenger, num_rows = poutine.unwrap(guide), _num_rows(args, kwargs)
    if isinstance(messenger, GuideMessenger):
        guide(*args, **kwargs)
        traces = Traces(*messenger.get_traces(), max_plate_nesting, num_particles, num_rows)
        if traces.enumerated:
            raise ValueError(
                "a guide messenger cannot enumerate: remove infer={'enumerate': ...} from the "
                "model's sites, or write the guide as a function"
            )
        return traces
    guide_trace = _SampleTrace().of(guide, args, kwargs)
    model_trace = _SampleTrace(guide_trace).of(model, args, kwargs)
    return Traces(model_trace, guide_trace, max_plate_nesting, num_particles, num_rows)


def _num_rows(args: tuple, kwargs: dict) -> int | None:
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim())
    return next((len(x) for x in tensors), None)


def _compute_log_prob(name: str, site: Site, trace: poutine.Trace) -> None:
    """What Pyro's Trace.compute_log_prob does."""
    if isinstance(site["fn"], SequenceDistribution):
        log_prob = _by_time(name, site, trace).sum(-1)
    else:
        log_prob = _call(site["fn"].log_prob, name, site, trace)
    site["unscaled_log_prob"] = log_prob
    site["log_prob"] = scale_and_mask(log_prob, site["scale"], site["mask"])


def _compute_score_parts(name: str, site: Site, trace: poutine.Trace) -> None:
    """What Pyro's Trace.compute_score_parts does."""
    if isinstance(site["fn"], SequenceDistribution):
        log_prob = _by_time(name, site, trace).sum(-1)
        score, entropy = (0, log_prob) if site["fn"].has_rsample else (log_prob, 0)
    else:
        log_prob, score, entropy = _call(site["fn"].score_parts, name, site, trace)
    scale, mask = site["scale"], site["mask"]
    site["unscaled_log_prob"] = log_prob
    site["log_prob"] = scaled = scale_and_mask(log_prob, scale, mask)
    reparameterised = entropy is log_prob
    entropy = scaled if reparameterised else scale_and_mask(entropy, scale, mask)
    site["score_parts"] = ScoreParts(scaled, score, entropy)  # type: ignore[arg-type]


def _by_time(name: str, site: Site, trace: poutine.Trace) -> Tensor:
    """The log-density of each step of a sequence, kept in the site with its source."""
    fn = site["fn"]
    site["steps"] = steps = _call(fn.steps, name, site, trace)
    site["log_prob_by_time"] = _call(partial(fn.log_prob_by_time, steps=steps), name, site, trace)
    return site["log_prob_by_time"]


def _call(density: Callable[..., T], name: str, site: Site, trace: poutine.Trace) -> T:
    try:
        with at_given_values(site["fn"], name):
            return density(filled(site), *site["args"], **site["kwargs"])
    except ValueError as error:
        if isinstance(error.__cause__, KeyError | NotImplementedError):
            raise
        shapes = trace.format_shapes(last_site=name)
        why = f"{_without_values(str(error))}{_nan_in(site['value'])}"
        raise ValueError(f"log_prob failed at site {name!r}: {why}\n{shapes}") from error


def _without_values(message: str) -> str:
    """torch's message on an invalid value, without the tensor itself."""
    return message.split(", but found invalid values:")[0]


def _nan_in(value: object) -> str:
    if not isinstance(value, Tensor) or not (num := int(value.isnan().sum())):
        return ""
    return (
        f". It has NaN in {num:,} of {value.numel():,} elements: remove or fill them in, or leave "
        "them out by poutine.mask(mask=~value.isnan())"
    )
