"""Sequential Monte Carlo: a particle filter with a guide as proposal."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyproelbo._terms.log_weights import effective_sample_size, log_mean_exp
from pyproelbo.sequences.base import SequenceDistribution
from pyproelbo.sequences.emission import Emission

Gradient = Literal["biased", "unbiased"]


class ParticleFilter(NamedTuple):
    r"""The result of a filter of K particles on sequences.

    Attributes:
        log_evidence: log of an unbiased estimate of p(x_0, ..., x_{T-1}), in nats, with the shape
            of the plates.
        log_evidence_by_time: what every step adds to it, (T, plates).
        effective_sample_size: of the weights of every step, before it is resampled, (T, plates):
            from 1 to K.
        beliefs: the particles of every step with their weights, if asked for.
    """

    log_evidence: Tensor
    log_evidence_by_time: Tensor
    effective_sample_size: Tensor
    beliefs: "Beliefs | None" = None


class Beliefs(NamedTuple):
    r"""Weighted particles of z_t, for every t: an approximation of p(z_t | x_0, ..., x_t, u).

    The mean of any f(z_t) under it is sum_k w_tk f(z_tk), with ``weights[t, k]`` for w_tk.

    Attributes:
        particles: z_t before resampling, (T, K, plates, \*E).
        weights: normalised, (T, K, plates).
    """

    particles: Tensor
    weights: Tensor


def particle_filter(
    q: SequenceDistribution,
    p: SequenceDistribution,
    data: list[tuple[Emission, Tensor]],
    num_particles: int,
    resample_below: float,
    gradient: Gradient = "biased",
    keep: bool = False,
) -> ParticleFilter:
    r"""Draw z_t ~ q(z_t | ...), weight by p(x_t, z_t | ...) / q(z_t | ...), resample, repeat.

    A sequence is resampled, systematically, after a step whose effective sample size is less than
    ``resample_below`` times K.

    Args:
        q: the proposal of z, batch shape (...).
        p: the prior of z, likewise.
        data: the emissions of z, and what was observed of them.
        num_particles: K.
        resample_below: a fraction of K, from 0 (never) to 1.
        gradient: "biased" leaves out the choice of ancestors; "unbiased" starts each resampled
            particle from its ancestor's normalised weight divided by the same as a constant, which
            is 1.
        keep: whether to return the particles of all steps.
    """
    K, batch_shape = num_particles, q.batch_shape
    q, p = q.expand((K, *batch_shape)), p.expand((K, *batch_shape))
    emissions = [(d, d.filled(x).unbind(-d.event_dim)) for d, x in data]
    q_state, p_state = q.start(), p.start()
    log_weights: float | Tensor = 0.0
    before: float | Tensor = 0.0  # log-evidence of the steps before the last resampling
    totals, sizes, kept = [], [], []
    for t in range(q.num_steps):
        proposal, prior = q.step(t, q_state), p.step(t, p_state)
        z = proposal()
        gain = _masked(prior.log_prob(z), p, t) - _masked(proposal.log_prob(z), q, t)
        for emission, x in emissions:
            gain = gain + _masked(emission.at(t, z, p_state).log_prob(x[t]), emission, t)
        log_weights = log_weights + gain
        totals.append(before + log_mean_exp(log_weights))
        sizes.append(effective_sample_size(log_weights.detach()))
        if keep:
            kept.append((z, log_weights.softmax(0)))
        q_state, p_state = q.advance(t, q_state, z), p.advance(t, p_state, z)
        if K > 1 and resample_below > 0 and t + 1 < q.num_steps:
            poor = sizes[-1] < resample_below * K
            ancestors = _ancestors(log_weights.detach(), poor)
            q_state, p_state = _take(q_state, ancestors), _take(p_state, ancestors)
            before = torch.where(poor, totals[-1], before)
            fresh = _with_gradient(log_weights, ancestors) if gradient == "unbiased" else 0.0
            log_weights = torch.where(poor, fresh, log_weights)
    running = torch.stack(totals)
    by_time = running.diff(dim=0, prepend=torch.zeros_like(running[:1]))
    beliefs = Beliefs(*(torch.stack(part) for part in zip(*kept, strict=True))) if keep else None
    return ParticleFilter(totals[-1], by_time, torch.stack(sizes), beliefs)


def _masked(log_prob: Tensor, d: SequenceDistribution, t: int) -> Tensor:
    return log_prob if d.step_mask is None else torch.where(d.step_mask[..., t], log_prob, 0.0)


def _ancestors(log_weights: Tensor, poor: Tensor) -> Tensor:
    """The ancestor of each particle, (K, ...): itself, where weights are not poor."""
    K = len(log_weights)
    itself = torch.arange(K, device=log_weights.device)
    cumulative = log_weights.movedim(0, -1).softmax(-1).cumsum(-1)
    offset = torch.rand_like(cumulative[..., :1])
    positions = ((itself + offset) / K).clamp(max=1.0)
    chosen = torch.searchsorted(cumulative, positions).clamp(max=K - 1)
    return torch.where(poor.unsqueeze(-1), chosen, itself).movedim(-1, 0)


def _with_gradient(log_weights: Tensor, ancestors: Tensor) -> Tensor:
    """0, with the gradient of the log of the ancestors' normalised weights."""
    chosen = log_weights.log_softmax(0).gather(0, ancestors)
    return torch.where(chosen.isfinite(), chosen - chosen.detach(), 0.0)


def _take(state: Tensor | None, ancestors: Tensor) -> Tensor | None:
    if state is None:
        return None
    index = ancestors.reshape(ancestors.shape + (1,) * (state.dim() - ancestors.dim()))
    return state.expand(ancestors.shape + state.shape[ancestors.dim() :]).gather(
        0, index.expand(ancestors.shape + state.shape[ancestors.dim() :])
    )
