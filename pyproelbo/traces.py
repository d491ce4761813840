"""One run of a guide, and of the model against it.

Pyro's own way of pairing them (trace, replay, enumerate, the checks of its validation), without
the host syncs: nothing here looks at the value of a tensor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, check_traceenum_requirements

Site = Any  # a node of a pyro.poutine.Trace: a dict
Program = Callable[..., Any]  # a model or a guide

PARTICLES = "num_particles_vectorized"  # the plate that Pyro puts around vectorised particles
UNKNOWN = float("inf")


def sample_sites(trace: Any) -> dict[str, Site]:
    """The sample sites of a trace, in the order in which they ran."""
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


class Traces(NamedTuple):
    """The traces of a guide and of the model that ran on its samples.

    ``max_plate_nesting`` counts the dims, from the right, kept for the program's own plates;
    infinite where nothing needed to know it.
    """

    model: poutine.Trace
    guide: poutine.Trace
    max_plate_nesting: float
    num_particles: int = 1

    @property
    def samples(self) -> list[Site]:
        """Every sample site, the guide's first."""
        return [*sample_sites(self.guide).values(), *sample_sites(self.model).values()]

    @property
    def enumerates(self) -> bool:
        """Whether a site asks for parallel enumeration."""
        return any(
            site["infer"].get("enumerate") == "parallel" and not site["is_observed"]
            for site in self.samples
        )

    @property
    def plate_nesting(self) -> int:
        """The dims that the program's plates take, counted from the right."""
        return -min((frame.dim for s in self.samples for frame in plates(s)), default=0)


def plates(site: Site) -> list:
    """The frames of a site's plates that have a dim, without that of the particles."""
    return [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]


def run(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    *,
    num_particles: int = 1,
    max_plate_nesting: float = UNKNOWN,
) -> Traces:
    """Run the guide, then the model on its samples, and compute the log-density of every site.

    The sites hold what Pyro's ``compute_log_prob`` and ``compute_score_parts`` put there.
    Sites marked ``infer={"enumerate": "parallel"}`` are enumerated.

    Args:
        num_particles: more than 1 are run in one go, under a plate at the left of all others.
        max_plate_nesting: as in Pyro; where it is infinite and particles or enumeration need
            it, the program runs once more to find it.

    Raises:
        ValueError: for sequential enumeration, enumeration by a guide that is a messenger, and
            plates beyond ``max_plate_nesting``.
    """
    traces = None
    if max_plate_nesting == UNKNOWN and num_particles > 1:
        with poutine.block():
            max_plate_nesting = _trace(model, guide, args, kwargs, 1, UNKNOWN).plate_nesting
    elif max_plate_nesting == UNKNOWN:
        traces = _trace(model, guide, args, kwargs, 1, UNKNOWN)
        if traces.enumerates:
            traces, max_plate_nesting = None, traces.plate_nesting
    if traces is None:
        try:
            traces = _trace(model, guide, args, kwargs, num_particles, max_plate_nesting)
        except ValueError as error:
            if PARTICLES not in str(error):
                raise
            raise ValueError(_too_shallow(max_plate_nesting)) from error

    left_of: Any = max_plate_nesting + (num_particles > 1)
    if is_validation_enabled():
        check_model_guide_match(traces.model, traces.guide, left_of)
    traces = Traces(
        prune_subsample_sites(traces.model),
        prune_subsample_sites(traces.guide),
        max_plate_nesting,
        num_particles,
    )
    if traces.plate_nesting > max_plate_nesting:
        raise ValueError(_too_shallow(max_plate_nesting))
    _compute_log_probs(traces.model, is_guide=False)
    _compute_log_probs(traces.guide, is_guide=True)
    if is_validation_enabled():
        if traces.enumerates:
            check_traceenum_requirements(traces.model, traces.guide)
        for site in traces.samples:
            check_site_shape(site, left_of)
    return traces


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
    num_particles: int,
    max_plate_nesting: float,
) -> Traces:
    first_free_dim = -1 - max_plate_nesting
    if num_particles > 1:
        particles = pyro.plate(PARTICLES, num_particles, dim=int(first_free_dim))
        model, guide = particles(model), particles(guide)
        first_free_dim -= 1

    messenger: Any = poutine.unwrap(guide)
    if isinstance(messenger, Messenger):
        guide(*args, **kwargs)
        model_trace, guide_trace = messenger.get_traces()
        traces = Traces(model_trace, guide_trace, max_plate_nesting)
        if traces.enumerates:
            raise ValueError(
                "a guide messenger cannot enumerate: take the infer={'enumerate': 'parallel'} "
                "off the model's sites, or write the guide as a function"
            )
        return traces

    if max_plate_nesting != UNKNOWN:
        guide = EnumMessenger(first_available_dim=int(first_free_dim))(guide)
        model = EnumMessenger()(model)  # takes the dims that the guide's left free
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    for name, site in sample_sites(guide_trace).items():
        if site["infer"].get("enumerate") == "sequential":
            raise ValueError(
                f"guide site {name!r} asks for sequential enumeration, which gives no terms by "
                "site: use infer={'enumerate': 'parallel'}"
            )
    replayed = poutine.replay(model, trace=guide_trace)
    return Traces(
        poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace, max_plate_nesting
    )


def _compute_log_probs(trace: poutine.Trace, is_guide: bool) -> None:
    for name, site in sample_sites(trace).items():
        fn, scale, mask = site["fn"], site["scale"], site["mask"]
        density = fn.score_parts if is_guide else fn.log_prob
        try:
            parts = density(site["value"], *site["args"], **site["kwargs"])
        except ValueError as error:
            raise ValueError(
                f"log_prob failed at site {name!r} of the {'guide' if is_guide else 'model'}: "
                f"{error}\n{trace.format_shapes(last_site=name)}"
            ) from error
        log_prob = parts.log_prob if is_guide else parts
        site["unscaled_log_prob"] = log_prob
        site["log_prob"] = scale_and_mask(log_prob, scale, mask)
        if is_guide:
            _, score, entropy = parts
            if entropy is log_prob:  # fully reparameterised
                entropy = site["log_prob"]
            else:
                entropy = scale_and_mask(entropy, scale, mask)
            site["score_parts"] = ScoreParts(site["log_prob"], score, entropy)
