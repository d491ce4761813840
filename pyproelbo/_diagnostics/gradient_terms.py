"""The terms of an objective as scalars with the gradients of its parts, by estimator."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor

from pyproelbo._backend import rng
from pyproelbo._backend.autograd import is_holdable, through
from pyproelbo._distributions.sharing import sharing
from pyproelbo._rows.batches import Batch
from pyproelbo._terms.collect import KL, terms_of
from pyproelbo._terms.groups import Group, groups_of
from pyproelbo._terms.masked_latents import warn_of_masks
from pyproelbo._terms.roles import is_delta, is_drawn
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.terms import Terms, Treatment, add_terms, stack_terms
from pyproelbo._terms.traces import Program, Traces, run
from pyproelbo._terms.treated import Treated

Kind = Literal[
    "log_likelihood",
    "factors",
    "guide_log_likelihood",
    "log_evidence",
    "kl",
    "log_prior",
    "log_q",
    "rest",
    "total",
]
Estimator = Literal["auto", "sampled", "path", "score"]
_DATA: tuple[Kind, ...] = ("log_likelihood", "factors", "guide_log_likelihood")
_SIGN: dict[Kind, int] = {"kl": -1, "log_q": -1, "guide_log_likelihood": -1}


class GradientTerm(NamedTuple):
    """A term of an objective.

    Attributes:
        kind: such as "log_likelihood"; "rest" for what is in no term; "total" for all together.
        site: the site that it belongs to; "" if none.
        within: the key of the KL that contains it.
    """

    kind: Kind
    site: str = ""
    within: str | None = None


class Pieces(NamedTuple):
    """Scalars at one draw.

    Attributes:
        scalars: each under its own name; those that are summed have their sign in the objective.
        sums: for each estimator its terms, and the scalars that each sums.
    """

    scalars: dict[str, Tensor]
    sums: dict[str, dict[GradientTerm, tuple[str, ...]]]


class Source(ABC):
    """A source of the pieces of a draw of two programs.

    Attributes:
        analytic: the latents whose KL "auto" takes in closed form.
    """

    analytic: frozenset[str] = frozenset()

    def __init__(self, model: Program, guide: Program) -> None:
        self._programs = model, guide

    @abstractmethod
    def __call__(self, batch: Batch) -> Pieces:
        """The pieces of the next draw of torch's generator."""

    def draw(self, batch: Batch, treatment: Treatment = "functions") -> list[Traces]:
        """The next draw of torch's generator itself."""
        with sharing(), Treated(treatment):
            return run(*self._programs, batch.args, batch.kwargs)


@runtime_checkable
class Objective(Protocol):
    """The interface of a :class:`~pyproelbo.TermsELBO`."""

    def objective(self, terms: Terms) -> Tensor:
        """The scalar to maximise."""
        ...

    def _particles(
        self, model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> Iterator[Terms]: ...


class ELBOPieces(Source):
    """The pieces of the ELBO at one draw, by every available estimator of its gradient.

    "sampled" and "auto" take the KL as ``kl=`` of objectives does. "path" leaves out the gradient
    of log q in q's own parameters. "score" treats the draws as constants, even where they have
    gradients. Of identical estimators one is kept.
    """

    def __init__(self, model: Program, guide: Program, batch: Batch) -> None:
        super().__init__(model, guide)
        runs = self.draw(batch)
        warn_of_masks(Sites.of(runs[0]))
        self.analytic = _terms(runs, "auto").analytic
        self.estimators: list[Estimator] = ["auto", "sampled"] if self.analytic else ["sampled"]
        drawn = [site for traces in runs for site in traces.guide_sites.values() if is_drawn(site)]
        have_gradient = [site["value"].requires_grad for site in drawn]
        if any(have_gradient) and not any(traces.enumerated for traces in runs):
            has_path = not any(traces.scored for traces in runs)
            possible: list[Estimator] = ["path", "score"] if has_path else ["score"]
            for name in possible:
                if self._is_possible(name, batch):
                    self.estimators.append(name)

    def _is_possible(self, name: Estimator, batch: Batch) -> bool:
        try:
            self._pieces(batch, ["sampled", name])
        except Exception:  # as for a flow without an inverse, which knows only its own draws
            return False
        return True

    def __call__(self, batch: Batch) -> Pieces:
        """The pieces of the next draw of torch's generator."""
        return self._pieces(batch, self.estimators)

    def _pieces(self, batch: Batch, estimators: Sequence[Estimator]) -> Pieces:
        state, scalars = rng.state(), dict[str, Tensor]()
        runs = self.draw(batch, "variables" if "path" in estimators else "functions")
        sampled = _Rows(scalars, "", runs, _terms(runs, "sampled"))
        sums = {"sampled": sampled.all()}
        if "auto" in estimators:
            auto, rows = _terms(runs, "auto"), _Rows(scalars, "", runs, sampled.terms)
            sums["auto"] = rows.all({key: auto.kl[key] for key in sorted(auto.analytic)})
        if "path" in estimators:
            sums["path"] = _Rows(scalars, "", runs, sampled.terms, is_path=True).all()
        if "score" in estimators:
            rng.restore(state)
            runs = self.draw(batch, "constants")
            for traces in runs:
                _score_alone(traces)
            sums["score"] = _Rows(scalars, "score ", runs, _terms(runs, "sampled")).all()
        return Pieces(scalars, {name: sums[name] for name in estimators})


def _terms(runs: list[Traces], kl: KL) -> Terms:
    return add_terms([terms_of(traces, kl) for traces in runs])


def _score_alone(traces: Traces) -> None:
    """Let each draw's distribution have its gradient by the score."""
    traces.scored = []
    for name, site in traces.guide_sites.items():
        if not (site["is_observed"] or is_delta(site)):
            log_prob, score = site["log_prob"], site["unscaled_log_prob"]
            site["score_parts"] = ScoreParts(log_prob, score, 0)  # type: ignore[arg-type]
            if score.requires_grad:
                traces.scored.append(name)


class _Rows:
    """The terms of one estimator, whose scalars are added to those of others.

    Args:
        scalars: the mapping that they are added to.
        prefix: of their names.
        terms: with a sampled KL.
        is_path: whether log q gives its gradient only through the draws.
    """

    def __init__(
        self,
        scalars: dict[str, Tensor],
        prefix: str,
        runs: list[Traces],
        terms: Terms,
        is_path: bool = False,
    ) -> None:
        self._scalars, self._prefix, self.terms = scalars, prefix, terms
        self._groups = [] if runs[0].enumerated else _groups(runs[0])
        self._is_path = is_path

    def all(
        self, analytic: Mapping[str, Tensor] | None = None
    ) -> dict[GradientTerm, tuple[str, ...]]:
        """The terms, and their scalars' names; with some KLs in closed form."""
        analytic, rows = analytic or {}, dict[GradientTerm, tuple[str, ...]]()
        for kind in _DATA:
            for site, value in getattr(self.terms, kind).items():
                rows[GradientTerm(kind, site)] = (self._put(kind, site, value),)
        parts = {group.key: group for group in self._groups}
        for key, value in self.terms.kl.items():
            if key in analytic:
                rows[GradientTerm("kl", key)] = (self._put("closed kl", key, -analytic[key]),)
            elif key in parts:
                within = self._densities(parts[key])
                rows[GradientTerm("kl", key)] = tuple(within.values())
                rows |= {term: (name,) for term, name in within.items()}
            else:
                rows[GradientTerm("kl", key)] = (self._put("kl", key, value),)
        return rows

    def _densities(self, group: Group) -> dict[GradientTerm, str]:
        """log p and log q of the latents that share a KL."""
        terms, found = self.terms, dict[GradientTerm, str]()
        for (name,) in group.prior:
            found[GradientTerm("log_prior", name, group.key)] = self._put(
                "log_prior", name, terms.log_prior[name]
            )
        for name in group.guide:
            log_q = terms.log_q[name]
            if log_q.requires_grad and self._is_path and name in terms.drawn:
                variables = [z for draws in terms.draws for z in draws.values() if is_holdable(z)]
                put = self._put("path log_q", name, -through(log_q.sum(), variables))
            else:
                put = self._put("log_q", name, log_q)
            found[GradientTerm("log_q", name, group.key)] = put
        return found

    def _put(self, what: str, site: str, value: Tensor) -> str:
        name = f"{self._prefix}{what} {site}"
        if name not in self._scalars:
            self._scalars[name] = value.sum() * _SIGN.get(what, 1)  # type: ignore[call-overload]
        return name


def _groups(traces: Traces) -> list[Group]:
    sites = Sites.of(traces)
    return groups_of(sites, [(name,) for name in sites.latents])


class ObjectivePieces(Source):
    """The pieces of objectives: each term's gradient times the derivative by that term.

    The part of the gradient that is no function of the terms, as through draws, is "rest".
    """

    def __init__(self, model: Program, guide: Program, objectives: Mapping[str, Objective]) -> None:
        super().__init__(model, guide)
        self._objectives = objectives

    def __call__(self, batch: Batch) -> Pieces:
        """The pieces of the next draws of torch's generator, for each objective."""
        state, pieces = rng.state(), Pieces({}, {})
        for name, objective in self._objectives.items():
            rng.restore(state)
            with sharing():
                particles = objective._particles(*self._programs, batch.args, batch.kwargs)
                terms = stack_terms(list(particles))
            found = _weighted(objective, terms)
            scalars = {f"{name} {t.kind} {t.site}": value for t, value in found.items()}
            pieces.scalars.update(scalars)
            pieces.sums[name] = {t: (s,) for t, s in zip(found, scalars, strict=True)}
        return pieces


def _weighted(objective: Objective, terms: Terms) -> dict[GradientTerm, Tensor]:
    """Scalars that add up to the objective's gradient."""
    total = objective.objective(terms)
    if terms.treatment == "variables":  # whose gradient is none of the terms themselves
        return {GradientTerm("rest"): total}
    kinds = [kind for kind in get_args(Kind) if kind not in ("rest", "total")]
    own = {GradientTerm(kind, n): v for kind in kinds for n, v in getattr(terms, kind).items()}
    own = {term: value for term, value in own.items() if value.requires_grad}
    if not own:
        return {GradientTerm("rest"): total}
    alone = {term: value.detach().requires_grad_() for term, value in own.items()}
    cut = {kind: {**getattr(terms, kind), **_of(kind, alone)} for kind in kinds}
    weights = torch.autograd.grad(
        objective.objective(replace(terms, **cut)), list(alone.values()), allow_unused=True
    )
    pairs = zip(own.items(), weights, strict=True)
    found = {t: (value * w).sum() for (t, value), w in pairs if w is not None}
    found[GradientTerm("rest")] = total - _sum(found.values())
    return found


def _of(kind: Kind, values: Mapping[GradientTerm, Tensor]) -> dict[str, Tensor]:
    return {term.site: value for term, value in values.items() if term.kind == kind}


def _sum(values: Iterable[Tensor]) -> Tensor | float:
    values = list(values)
    return sum(values[1:], start=values[0]) if values else 0.0
