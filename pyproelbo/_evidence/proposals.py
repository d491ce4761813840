"""Proposals other than the guide: the prior, and a mixture of both."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, get_args

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import Message
from torch import Tensor

from pyproelbo._distributions.sobol import Points
from pyproelbo._evidence.weights import Evidence, Weights, summary
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.draws import RowDraws, RowTerms
from pyproelbo._rows.levels import Placed, places
from pyproelbo._rows.report_data import Unit
from pyproelbo._rows.runs import Use
from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.traces import Program, Traces

Proposal = Literal["guide", "prior", "mixture"]


def check_proposal(proposal: str) -> None:
    """Raise a ValueError for an unknown one."""
    if proposal not in get_args(Proposal):
        raise ValueError(f"proposal should be one of {list(get_args(Proposal))}, got {proposal!r}")


def prior_of(model: Program) -> Program:
    """p(z), as a guide."""
    return poutine.block(model, hide_fn=_is_observed)


def prior_draws(
    model: Program, batch: Batch, unit: Unit, seed: int, points: Points | None = None
) -> RowDraws:
    """Draws of the prior.

    Raises:
        ValueError: for a prior that cannot be drawn from.
    """
    try:
        return RowDraws(model, prior_of(model), batch, unit, seed, points)
    except NotImplementedError as error:
        raise ValueError(
            f"the prior cannot be drawn from: {str(error).partition(chr(10))[0]}. Take "
            "proposal='guide'"
        ) from error


def mixture_evidence(
    of_guide: RowDraws, of_prior: RowDraws, num_samples: int, chunk: int | None
) -> Evidence:
    """log p(x) by draws from the guide and from the prior, half of each.

    Every draw, from either, has the weight w = p(x, z) / (a q(z | x) + (1 - a) p(z)), with
    a the share of the guide's draws (deterministic mixture weights; Veach & Guibas 1995; Owen &
    Zhou 2000). They are bounded by p(x | z) / (1 - a): none is large where q misses a part of the
    posterior. The ELBO is that of the guide.

    Raises:
        ValueError: for a guide with auxiliary draws.
    """
    num = num_samples - num_samples // 2
    share = num / num_samples
    own = list(of_guide.chunks(num, chunk, Use.WEIGHTS))
    other = map(of_guide.terms, at_prior_draws(of_guide, of_prior, num_samples - num, chunk))
    weights = (mixture_weight(terms, share) for terms in (*own, *other))
    found = summary((Weights(w, w) for w in weights), num_samples)
    plain = summary((Weights(terms.log_weight, terms.log_weight) for terms in own), num)
    return replace(found, elbo=plain.elbo, elbo_stderr=plain.elbo_stderr)


def mixture_weight(terms: RowTerms, share: float) -> Tensor:
    """log p(x, z) - log (a q(z | x) + (1 - a) p(z)), with a the share of the guide's draws."""
    log_q = torch.where(terms.log_q.isnan(), -math.inf, terms.log_q)
    parts = log_q + math.log(share), terms.log_prior + math.log1p(-share)
    return terms.log_joint - torch.logaddexp(*parts)


def at_prior_draws(
    of_guide: RowDraws, of_prior: RowDraws, num: int, chunk: int | None
) -> Iterator[Traces]:
    """Runs of model and guide at draws of the prior.

    Raises:
        ValueError: for a guide with auxiliary draws.
    """
    for name, site in of_guide.first.guide_sites.items():
        if is_delta(site) or name not in of_guide.first.model_sites:
            raise ValueError(
                f"the guide's site {name!r} is {'a Delta' if is_delta(site) else 'auxiliary'}, as "
                "in Pyro's AutoGuides: a mixture needs the density of each latent of the model at "
                "draws of the prior. Take proposal='prior', or method='annealed'"
            )
    for draws in of_prior.ranges(num, chunk if of_guide.at_once else 1):
        for traces in of_prior.traces(draws, Use.MIXTURE):
            yield _at(of_guide, traces)


def _at(of_guide: RowDraws, drawn: Traces) -> Traces:
    first, num = of_guide.first, drawn.num_particles
    values = {
        name: drawn.model_sites[name]["value"].reshape(-1, *site["value"].shape)
        for name, site in first.guide_sites.items()
    }
    with pyro.validation_enabled(False), Placed(places(values, first, num)):
        return of_guide.run(num)


def _is_observed(msg: Message) -> bool:
    return msg.get("is_observed", False)
