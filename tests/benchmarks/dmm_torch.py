"""The deep Markov model of Krishnan, Shalit & Sontag (2017) in torch alone, written by hand.

Its loss is minus the ELBO of padded sequences,

    sum_t [KL(q(z_t | z_{t-1}, x) || p(z_t | z_{t-1})) - log p(x_t | z_t)],

at one sample of the guide q, once as a loop over time, once with all that allows it batched over
time. The structure and the sizes are those of Pyro's example ``dmm.py``.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Sizes(NamedTuple):
    """The widths of the networks."""

    latents: int
    rnn: int
    emission: int
    transition: int
    features: int = 88


class Gaussian(NamedTuple):
    """A diagonal Normal: loc and scale, (..., k)."""

    loc: Tensor
    scale: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        return -functional.gaussian_nll_loss(
            self.loc, z, self.scale.square(), full=True, reduction="none", eps=0.0
        ).sum(-1)


def kl(q: Gaussian, p: Gaussian, z: Tensor) -> Tensor:
    """KL(q || p), (...); z is not used."""
    ratio = (q.scale / p.scale).square()
    return 0.5 * (ratio + ((q.loc - p.loc) / p.scale).square() - 1 - ratio.log()).sum(-1)


def log_ratio(q: Gaussian, p: Gaussian, z: Tensor) -> Tensor:
    """log q(z) - log p(z), (...), the estimate of KL(q || p) at a sample of q."""
    return q.log_prob(z) - p.log_prob(z)


class Emitter(nn.Module):
    """The logits of p(x_t | z_t)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.first = nn.Linear(sizes.latents, sizes.emission)
        self.second = nn.Linear(sizes.emission, sizes.emission)
        self.logits = nn.Linear(sizes.emission, sizes.features)

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(self.second(self.first(z).relu()).relu())


class GatedTransition(nn.Module):
    """p(z_t | z_{t-1}): for each dimension, a gate between a linear mean and a network's."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        k, hidden = sizes.latents, sizes.transition
        self.gate = nn.Sequential(nn.Linear(k, hidden), nn.ReLU(), nn.Linear(hidden, k))
        self.proposal = nn.Sequential(nn.Linear(k, hidden), nn.ReLU(), nn.Linear(hidden, k))
        self.linear = nn.Linear(k, k)
        self.scale = nn.Linear(k, k)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> Gaussian:
        gate, proposal = self.gate(z).sigmoid(), self.proposal(z)
        loc = (1 - gate) * self.linear(z) + gate * proposal
        return Gaussian(loc, functional.softplus(self.scale(proposal.relu())))


class Combiner(nn.Module):
    """q(z_t | z_{t-1}, x_t, ..., x_T), of z_{t-1} and what the RNN has read of x."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.past = nn.Linear(sizes.latents, sizes.rnn)
        self.loc = nn.Linear(sizes.rnn, sizes.latents)
        self.scale = nn.Linear(sizes.rnn, sizes.latents)

    def forward(self, z: Tensor, h: Tensor) -> Gaussian:
        h = 0.5 * (self.past(z).tanh() + h)
        return Gaussian(self.loc(h), functional.softplus(self.scale(h)))


class DeepMarkovModel(nn.Module):
    """Model and guide, with the two forms of the loss.

    They draw the same numbers at the same seed. x is (B, T, D) of zeros and ones, padded at the
    end; lengths (B,). ``divergence`` is :func:`kl` or :func:`log_ratio`.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.emitter, self.transition = Emitter(sizes), GatedTransition(sizes)
        self.combiner = Combiner(sizes)
        self.rnn = nn.RNN(sizes.features, sizes.rnn, nonlinearity="relu", batch_first=True)
        self.z_0 = nn.Parameter(torch.zeros(sizes.latents))
        self.z_q_0 = nn.Parameter(torch.zeros(sizes.latents))
        self.h_0 = nn.Parameter(torch.zeros(1, 1, sizes.rnn))

    def read(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The mask (B, T) of what is no padding, and h (B, T, H) of the RNN, backward in time."""
        t = torch.arange(x.shape[1], device=x.device)
        mask = t < lengths[:, None]
        index = torch.where(mask, lengths[:, None] - 1 - t, t)  # reverses each, but its padding
        backward = x.gather(1, index[..., None].expand_as(x))
        h, _ = self.rnn(backward, self.h_0.expand(-1, len(x), -1).contiguous())
        return mask, h.gather(1, index[..., None].expand_as(h))

    def looped(self, x: Tensor, lengths: Tensor, divergence=kl) -> Tensor:
        """Minus the ELBO, every term of it made step by step."""
        mask, h = self.read(x, lengths)
        z_q, z_p = self.z_q_0.expand(len(x), -1), self.z_0.expand(len(x), -1)
        loss = 0.0
        for t in range(x.shape[1]):
            q, p = self.combiner(z_q, h[:, t]), self.transition(z_p)
            z_q = z_p = q.loc + q.scale * torch.randn_like(q.loc)
            cost = divergence(q, p, z_q) + negative_log_likelihood(self.emitter(z_q), x[:, t])
            loss = loss + torch.where(mask[:, t], cost, 0.0).sum()
        return loss

    def batched(self, x: Tensor, lengths: Tensor, divergence=kl) -> Tensor:
        """Minus the ELBO: only the guide's samples are made step by step."""
        mask, h = self.read(x, lengths)
        z, qs, zs = self.z_q_0.expand(len(x), -1), [], []
        for h_t in h.unbind(1):
            q = self.combiner(z, h_t)
            z = q.loc + q.scale * torch.randn_like(q.loc)
            qs.append(q)
            zs.append(z)
        q = Gaussian(*(torch.stack(part, 1) for part in zip(*qs, strict=True)))
        z = torch.stack(zs, 1)
        p = self.transition(torch.cat([self.z_0.expand(len(x), 1, -1), z[:, :-1]], 1))
        cost = divergence(q, p, z) + negative_log_likelihood(self.emitter(z), x)
        return torch.where(mask, cost, 0.0).sum()


def negative_log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    """-log p(x_t | z_t), (...)."""
    nll = functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return nll.sum(-1)
