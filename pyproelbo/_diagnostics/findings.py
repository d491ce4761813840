"""The findings of a check: each diagnostic judged, in a sentence."""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, Protocol

import torch

from pyproelbo._evidence.decompositions import Decompositions
from pyproelbo._evidence.fisher import FisherDivergence
from pyproelbo._evidence.linear_response import LinearResponse
from pyproelbo._evidence.moments import Moments
from pyproelbo._evidence.pareto import usable
from pyproelbo._evidence.psis import Psis
from pyproelbo._evidence.weights import LEAST_ESS
from pyproelbo._results.numbers import with_error
from pyproelbo._results.per import Per
from pyproelbo._surgery.result import COLLAPSED, Surgery

Verdict = Literal["fine", "doubtful", "bad"]
WORST_FIRST: tuple[Verdict, ...] = ("bad", "doubtful", "fine")

SHARES = (0.01, 0.1)  # of the data, that may have a large k-hat: beyond, doubtful and bad
GAPS = (0.5, 3.0)  # nats per datum below log p(x): beyond, doubtful and bad
OFF = (0.1, 0.5)  # of the data, whose means or sds may be off: beyond, doubtful and bad
SHIFTS = (0.15, 0.3)  # sds of the posterior that a mean may be off: beyond, doubtful and bad
RATIOS = (1.15, 1.3)  # factors that an sd may be off: beyond, doubtful and bad
FISHER = 0.48  # for an sd 1.3 times too large, (1.3^2 - 1)^2: of a datum, doubtful

INTERRUPTED = "the check was interrupted before"  # why a part of a check is not there


class Finding(NamedTuple):
    """The result of one diagnostic, in a sentence."""

    verdict: Verdict
    text: str


class Reports(Protocol):
    """What is judged: the attributes of :class:`Check`."""

    @property
    def decompositions(self) -> Decompositions: ...
    @property
    def psis(self) -> Psis: ...
    @property
    def moments(self) -> Moments: ...
    @property
    def surgery(self) -> Surgery | None: ...
    @property
    def skipped(self) -> str: ...
    @property
    def is_amortised(self) -> bool: ...
    @property
    def levels(self) -> Mapping[str, tuple[Psis, Moments]]: ...
    @property
    def fisher(self) -> FisherDivergence | None: ...
    @property
    def response(self) -> LinearResponse | None: ...
    @property
    def per(self) -> Per: ...


def findings(check: Reports) -> Iterator[Finding]:
    """In the order of their weight: the tails of the weights, means and sds, the gap, the rest."""
    judged = dict(check.levels) or {"": (check.psis, check.moments)}
    for tails, off in judged.values():
        yield from _of_tails(tails, check.is_amortised)
        yield from _of_moments(off)
    if check.fisher is not None:
        yield _of_gradients(check.fisher)
    if check.response is not None:
        yield _of_response(check.response)
    if check.skipped == INTERRUPTED:
        yield Finding("doubtful", "The check was interrupted: the rest may be worse.")
    yield from _of_gap(check)
    tails, _ = judged.get("global", (check.psis, check.moments))
    ess = float(tails.effective_sample_size.median())
    if ess < LEAST_ESS:
        median = " (median)" * (check.per == "datum")
        yield Finding(
            "doubtful",
            f"log p(x) is itself uncertain, and probably larger: the effective sample size is "
            f"{ess:.0f} of {tails.num_samples:,}{median}.",
        )
    if check.surgery is not None:
        collapsed = check.surgery.average_kl < COLLAPSED
        for note in check.surgery.notes:
            yield Finding("doubtful" if collapsed else "fine", note)


def _of_tails(psis: Psis, is_amortised: bool) -> Iterator[Finding]:
    """Whether importance weights can be used, not whether q is good."""
    missed = "Train the guide longer, or take a richer family."
    if psis.per == "data set":
        of = "of the global latents " * (psis.level == "global")
        level = f"Pareto k-hat {of}is {float(psis.khat):.2f}"
        if psis.is_usable.all():
            alike = ", and the weights hardly differ" * (float(psis.khat) >= psis.threshold)
            yield Finding("fine", f"{level}{alike}: importance weights of q can be used.")
        else:
            yield Finding(
                "bad",
                f"{level}, above {psis.threshold:.2f}: q misses important parts of the posterior. "
                + missed,
            )
        return
    bad = float((~psis.is_usable).double().mean())
    given = " given the global latents" * bool(psis.num_globals)
    level = f"Pareto k-hat{given} is above {psis.threshold:.2f} for {bad:.1%} of the data"
    few, some = SHARES
    if bad <= few:
        yield Finding("fine", f"{level}: importance weights of q can be used.")
    elif bad <= some:
        yield Finding("doubtful", f"{level}: do not trust q for those.")
    else:
        yield Finding(
            "bad",
            f"{level}: q misses important parts of their posterior. "
            + (
                missed
                if is_amortised or psis.num_globals
                else "It is not computed from the data, but belongs to the data that the guide "
                "was fitted to, in their order: if these are others, fit it to them; else train "
                "it longer, or take a richer family."
            ),
        )


def _of_moments(moments: Moments) -> Iterator[Finding]:
    """Whether q's means and sds are those of the weighted draws, where weights can be used."""
    use = usable(moments.khat, moments.effective_sample_size, moments.num_samples)
    if not use.any():
        return
    shift, ratio = moments.mean_shift[use].abs(), moments.sd_ratio[use]
    factor = torch.maximum(ratio, 1 / ratio)
    if moments.per == "data set":
        s, r = (int(x[0].argmax()) for x in (shift, factor))
        mean_off = with_error(
            float(moments.mean_shift[0, s]), float(moments.mean_shift_stderr[0, s])
        )
        times = with_error(float(ratio[0, r]), float(moments.sd_ratio_stderr[0, r]))
        text = (
            f"By the weighted draws q's mean of {moments.dims[s]} is off by {mean_off} sds, and "
            f"its sd of {moments.dims[r]} is {times} times that of the posterior: the worst of "
            f"{len(moments.dims):,}"
        )
        worst = float(shift.max()), float(factor.max())
        level = sum(
            worst[0] > shift_limit or worst[1] > ratio_limit
            for shift_limit, ratio_limit in zip(SHIFTS, RATIOS, strict=True)
        )
        verdict = WORST_FIRST[2 - level]
        cure = ". pe.from_svi(..., corrected=True) has those draws."
        if not moments.can_be_corrected.all():
            cure = (
                ", or worse: q is so narrow that its draws do not reach the posterior. "
                "Train the guide longer, or take a richer family."
            )
        cure = "." if verdict == "fine" else cure
        yield Finding(verdict, text + cure)
        return
    given = " given the global latents" * bool(moments.num_globals)
    off = float(((shift > SHIFTS[1]) | (factor > RATIOS[1])).any(1).double().mean())
    text = (
        f"By the weighted draws q's mean is off by more than {SHIFTS[1]} sds, or its sd by more "
        f"than {RATIOS[1] - 1:.0%},{given} for {off:.1%} of the data"
    )
    few, some = OFF
    yield Finding("fine" if off <= few else "doubtful" if off <= some else "bad", f"{text}.")


def _of_gradients(fisher: FisherDivergence) -> Finding:
    """Whether log q and log p have the same gradients at q's draws; needs no weights."""
    surely = fisher.scaled - 2 * fisher.scaled_stderr
    if fisher.per == "data set":
        k = int(surely[0].argmax())
        value = with_error(float(fisher.scaled[0, k]), float(fisher.scaled_stderr[0, k]))
        return Finding(
            "fine",  # not a criterion: means and sds are judged by the moments
            f"The gradients of log q and log p(x, z) differ most in {fisher.dims[k]}: Fisher "
            f"divergence times q's variance {value} (0 at the posterior, {FISHER} of an sd 30% too "
            "large).",
        )
    off = float((surely > FISHER).any(1).double().mean())
    return Finding(
        "fine" if off <= OFF[0] else "doubtful",
        f"The Fisher divergence times q's variance is above {FISHER}, as for an sd 30% too large, "
        f"for {off:.1%} of the data.",
    )


def _of_response(response: LinearResponse) -> Finding:
    """Whether q's sds agree with linear response, which needs no weights."""
    ratio, error = response.q_sd / response.sd, response.sd_stderr / response.sd
    off = ratio.log().abs() - 2 * error
    k = int(off.argmax())
    value = f"{ratio[k]:.2f} ± {ratio[k] * error[k]:.2f}"
    return Finding(
        "fine" if float(off[k].exp()) < RATIOS[1] else "doubtful",
        f"By linear response q's sd of {response.names[k]} is {value} times that of the posterior: "
        f"the worst of {len(response.names):,}.",
    )


def _of_gap(check: Reports) -> Iterator[Finding]:
    gap = check.decompositions.posterior_kl.value
    if check.per == "data set":
        yield Finding(
            "fine",  # a number of all latents together, which k-hat and the moments judge
            f"The ELBO is {gap:.2f} nats below log p(x), for all data together: pe.inference_gap "
            "shows whether the family or the training is to blame.",
        )
        return
    missing = f"The ELBO is {gap:.2f} nats per datum below log p(x)"
    small, large = GAPS
    if gap < small:
        yield Finding("fine", f"{missing}.")
    else:
        verdict: Verdict = "doubtful" if gap < large else "bad"
        yield Finding(
            verdict,
            f"{missing}: pe.inference_gap shows whether the family or the encoder is to blame.",
        )
