"""Baselines of scores: what is subtracted from a draw's cost, for a less noisy gradient."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor

from pyproelbo._terms.roles import is_drawn
from pyproelbo._terms.traces import Site, Traces
from pyproelbo.elbo.users_baselines import BaselineStep, DecayingAverages, baselined, options_of

Baselines = Literal["leave_one_out", "none"]

Runs = list[Traces]  # of one particle, or of all at once: one for each value enumerated in sequence

_scored = attrgetter("scored")


class ScoreBaselines:
    r"""The baselines of an objective's sites whose draws have a score-function gradient.

    Such a site z adds sum (c_k - b_k) grad log q(z_k) to the gradient of particle k, where c_k is
    the part of the objective that comes after the draw, with the objective's weights, by element of
    z's plates. Any b_k that does not depend on z_k leaves the mean unchanged: here the one that the
    guide's ``infer={"baseline": ...}`` gives, else the mean of c_j over the other particles.

    The gradient of a loss with respect to log q, as a tensor of its own, is -c_k; it is changed on
    its way back. Objectives need not know of baselines.
    """

    def __init__(self, kind: Baselines, num_particles: int, averages: DecayingAverages) -> None:
        self._leave_one_out = kind == "leave_one_out" and num_particles > 1
        self._num = num_particles
        self._averages = averages
        self._step: BaselineStep | None = None  # the last one, if it has users' baselines

    def together(self, particles: Iterator[Runs]) -> Iterator[list[Runs]]:
        """Each particle separately, or all together where each needs the costs of the others."""
        self._step = None
        if not torch.is_grad_enabled():
            yield from ([runs] for runs in particles)
            return
        linked: list[tuple[Runs, list[dict[str, Site]]]] = []
        for i, runs in enumerate(particles):
            if not (linked or any(map(_scored, runs))):
                yield [runs]
                continue
            scored = [self._without_users(traces) for traces in runs]
            needed = self._leave_one_out and any(scored)
            looped = runs[0].num_particles == 1
            if linked or (needed and looped and i == 0):
                linked.append((runs, scored))
                continue
            if needed and not looped:
                for traces, sites in zip(runs, scored, strict=True):
                    _less_others_at(traces, sites)
            yield [runs]
        if linked:
            _link([scored for _, scored in linked], self._num)
            yield [runs for runs, _ in linked]

    def follow(self, loss: Tensor) -> None:
        """Learn from the backward pass of a step's loss the factor of the loss."""
        if self._step is not None and loss.requires_grad:
            loss.register_hook(self._step.take_factor)

    def _without_users(self, traces: Traces) -> dict[str, Site]:
        """The scored sites without a baseline of the user's; the others get theirs."""
        scored = {}
        for name in traces.scored:
            if not is_drawn(site := traces.guide_sites[name]):
                continue
            options = options_of(name, site["infer"].get("baseline"))
            if options is None:
                scored[name] = site
                continue
            self._step = self._step or BaselineStep(self._num, self._averages)
            dim = traces.particle_dim if traces.num_particles > 1 else None
            _put(site, baselined(name, _score(site), options, self._step, dim))
        return scored


def _link(particles: list[list[dict[str, Site]]], num: int) -> None:
    """Subtract from each looped particle's costs the mean of the others, in its scores."""
    alike = defaultdict[tuple, list[Site]](list)
    for runs in particles:
        for i, sites in enumerate(runs):
            for name, site in sites.items():
                alike[i, name, _score(site).shape].append(site)
    for sites in alike.values():
        scores = torch.stack([_score(site) for site in sites])
        scores.register_hook(partial(_less_others, dim=0, num=num))
        for site, score in zip(sites, scores.unbind(), strict=True):
            _put(site, score)


def _less_others_at(traces: Traces, sites: dict[str, Site]) -> None:
    """The same for vectorised particles."""
    dim, num = traces.particle_dim, traces.num_particles
    for site in sites.values():
        score = _score(site)
        if score.dim() >= -dim and score.shape[dim] == num:
            score = score.view_as(score)
            score.register_hook(partial(_less_others, dim=dim, num=num))
            _put(site, score)


def _less_others(cost: Tensor, dim: int, num: int) -> Tensor:
    """The cost of each of ``num`` particles minus the mean of the others."""
    others = cost.sum(dim, keepdim=True) - cost
    return cost - others / (num - 1)


def _score(site: Site) -> Tensor:
    return site["score_parts"].score_function


def _put(site: Site, score: Tensor) -> None:
    site["score_parts"] = site["score_parts"]._replace(score_function=score)
