"""What a sample site of a trace holds, as a type: Pyro has a dict of each."""

from typing import NamedTuple, TypedDict

from pyro.distributions import TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import InferDict
from torch import Tensor


class Plate(NamedTuple):
    """A plate that is a dim of its sites' tensors."""

    name: str
    dim: int
    size: int  # of the dim, B
    full_size: int  # of what its rows stand for, N: densities are scaled by N / B


Plates = frozenset[Plate]


class Infer(InferDict, total=False):
    """What a program asks for a site, and what Pyro's enumeration notes there.

    Keys, besides those of Pyro's ``InferDict``:
        baseline: what a score's variance is reduced by, as Pyro's TraceGraph_ELBO takes it.
        _enum_total: how many values a site takes one after the other.
    """

    baseline: object
    _enum_total: int


class Packed(TypedDict):
    """The tensors of a site in the order of the trace's symbols, without the dims of size 1.

    Keys:
        log_prob: scaled and masked.
        unscaled_log_prob: neither.
        mask: where the site counts.
    """

    log_prob: Tensor
    unscaled_log_prob: Tensor
    mask: Tensor | bool | None


class Site(TypedDict):
    """A sample site of a trace, or the message of its statement while that runs.

    A site need not have all of these keys; who reads one takes a site that has it.

    Keys that every site has:
        type: "sample".
        name: the site's.
        fn: its distribution, whose batch and event dims together are those of the value.
        value: z, or the x that is observed; while a message runs, None until it is drawn.
        args: what ``fn`` is called with, beside the value: nothing, as a rule.
        kwargs: likewise, by name.
        is_observed: whether the value is given: data, a factor, or a deterministic one.
        scale: what the log-density is multiplied with: N / B within a plate that subsamples.
        mask: where the site counts, of the dims of its plates; None for everywhere.
        infer: what the program asks for it.
        cond_indep_stack: the plates around it, also those that are loops.

    Keys of the message:
        done: whether the value is decided, and no handler need draw it.
        stop: whether no handler further out sees it.

    Keys that this library and Pyro add to a trace that has run:
        plates: the plates that are dims of its tensors.
        log_prob: the log-density, scaled and masked, of the dims of the plates.
        unscaled_log_prob: neither scaled nor masked.
        score_parts: of a site of the guide: log q, and the parts of it that the gradient is of.
        packed: where latents are enumerated, the tensors with symbols for their dims.
        steps: of a sequence, the distribution of each step given the steps before, batch shape
            (..., T).
        log_prob_by_time: of a sequence, the log-density of each step, (..., T), neither scaled
            nor masked from outside.
    """

    type: str
    name: str
    fn: TorchDistribution
    value: Tensor
    args: tuple
    kwargs: dict
    is_observed: bool
    scale: float | Tensor
    mask: Tensor | bool | None
    infer: Infer
    cond_indep_stack: tuple[CondIndepStackFrame, ...]

    done: bool
    stop: bool

    plates: Plates
    log_prob: Tensor
    unscaled_log_prob: Tensor
    score_parts: ScoreParts
    packed: Packed
    steps: TorchDistribution
    log_prob_by_time: Tensor


class Param(TypedDict):
    """The message of a ``pyro.param`` statement.

    Keys:
        name: the parameter's.
        value: it, constrained.
    """

    name: str
    value: Tensor
