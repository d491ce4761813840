"""The linear-Gaussian state space model: a sequence model with known answers."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyproelbo._messages.renamed import renamed
from pyproelbo.models.base import check_last_dim, check_sizes
from pyproelbo.models.linalg import cholesky_of_inverse
from pyproelbo.models.sequences import SequenceProgram, Sequences
from pyproelbo.sequences import Emission, LinearGaussianChain
from pyproelbo.sequences.linear import times


class Filtered(NamedTuple):
    """The result of the Kalman filter.

    Attributes:
        loc: E[z_t | x_0, ..., x_t], (..., T, k).
        covariance: Cov[z_t | x_0, ..., x_t], (..., T, k, k).
        log_evidence_by_time: log p(x_t | x_0, ..., x_{t-1}) in nats, (..., T); 0 where x_t is
            missing or padding. The sums up to each step are log p(x_0, ..., x_t).
    """

    loc: Tensor
    covariance: Tensor
    log_evidence_by_time: Tensor


class Smoothed(NamedTuple):
    """The marginals of the smoothing posterior.

    Attributes:
        loc: E[z_t | x_0, ..., x_{T-1}], (..., T, k).
        covariance: Cov[z_t | x_0, ..., x_{T-1}], (..., T, k, k).
    """

    loc: Tensor
    covariance: Tensor


class LGSSM(SequenceProgram):
    r"""The linear-Gaussian state space model of sequences x_0, ..., x_{T-1}.

        z_0 ~ N(m, P)
        z_t ~ N(F z_{t-1} + B u_t, Q)
        x_t ~ N(H z_t + d, diag(sigma)^2)

    The evidence, the posterior and the filtering distributions are known at any parameters: a
    reference for the ELBO of a sequence. Its initial latents rotate and decay, and are N(0, I) at
    every step.

    Kalman (1960), "A New Approach to Linear Filtering and Prediction Problems"; Särkkä (2013),
    "Bayesian Filtering and Smoothing", chapters 4 and 8.

    All methods take x (..., T, D) and, for different lengths, missing data and inputs:

        lengths: the steps of each sequence, whole numbers (...); the rest of x is padding.
        observed: bool (..., T), False where x_t is missing.
        inputs: u, (..., T, U); u_0 is not used.

    Where Q is nearly singular, take float64: in single precision draws of z are then too coarse for
    their densities, and so for an ELBO by draws (the evidence is not concerned).

    Padded and missing x may be NaN; x_t is missing as a whole. In padding, the distributions of z_t
    are forecasts. Arguments that do not match raise a ValueError, as in :meth:`read`.

    Args:
        num_latents: k, the size of z_t.
        num_features: D, the size of x_t.
        num_inputs: U, the size of u_t; 0 for none.
        dataset_size: N, the number of all sequences, if x will be a part of them: log-densities are
            then scaled by N / B. Give the guide the same.

    Attributes:
        m: the mean of z_0, (k,).
        raw_P: the Cholesky factor of P, with logarithms on its diagonal, (k, k).
        F: the transition, (k, k).
        B: the weights of the inputs, (k, U); None without inputs.
        raw_Q: the Cholesky factor of Q, as ``raw_P``.
        H: the loadings, (D, k).
        d: the offset of x, (D,).
        log_sigma: the logarithms of the noise scales ``sigma``, (D,).
    """

    B: nn.Parameter | None

    @renamed(size="dataset_size")
    def __init__(
        self,
        num_latents: int,
        num_features: int,
        num_inputs: int = 0,
        dataset_size: int | None = None,
    ) -> None:
        super().__init__(num_features, num_inputs, dataset_size)
        check_sizes(num_latents=num_latents)
        self.num_latents = k = num_latents
        turn = 0.3 * torch.randn(k, k)
        self.m = nn.Parameter(torch.zeros(k))
        self.raw_P = nn.Parameter(torch.zeros(k, k))
        self.F = nn.Parameter(0.9 * torch.linalg.matrix_exp(turn - turn.mT))
        self.B = nn.Parameter(torch.randn(k, num_inputs) / num_inputs**0.5) if num_inputs else None
        self.raw_Q = nn.Parameter(math.log(1 - 0.9**2) / 2 * torch.eye(k))
        self.H = nn.Parameter(torch.randn(num_features, k) / math.sqrt(k))
        self.d = nn.Parameter(torch.zeros(num_features))
        self.log_sigma = nn.Parameter(torch.zeros(num_features))

    @property
    def sigma(self) -> Tensor:
        """The noise scales: positive, (D,)."""
        return self.log_sigma.exp()

    @property
    def P(self) -> Tensor:
        """The covariance of z_0, (k, k)."""
        L = _lower(self.raw_P)
        return L @ L.mT

    @property
    def Q(self) -> Tensor:
        """The covariance of z_t given z_{t-1}, (k, k)."""
        L = _lower(self.raw_Q)
        return L @ L.mT

    def decode(self, z: Tensor) -> TorchDistribution:
        """p(x_t | z_t), for z (..., k): batch shape (...), event shape (D,)."""
        check_last_dim("z", z, self.num_latents)
        return dist.Normal(z @ self.H.mT + self.d, self.sigma).to_event(1)

    def prior(
        self, num_steps: int, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> LinearGaussianChain:
        """p(z_0, ..., z_{T-1}), for inputs (..., T, U) and a mask (..., T) of steps that count."""
        initial = dist.MultivariateNormal(self.m, scale_tril=_lower(self.raw_P))
        drift = self.m.new_zeros(num_steps, self.num_latents)
        if inputs is not None and self.B is not None:
            drift = inputs @ self.B.mT
        return LinearGaussianChain(initial, self.F, drift, _lower(self.raw_Q), mask)

    def forward(
        self,
        x: Tensor | None = None,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
        num: int = 1,
        num_steps: int | None = None,
    ) -> Tensor:
        """The generative program, for data x (B, T, D).

        Without x it simulates: a sequence for each of the inputs (B, T, U), or ``num`` sequences
        of ``num_steps`` steps.
        """
        data = self.read(x, lengths, observed, inputs, num, num_steps)
        with self.plate_over(x, data.shape[0]):
            z = pyro.sample("z", self.prior(data.shape[-1], data.inputs, data.own))
            return pyro.sample("x", Emission(self.decode, z, mask=data.observed), obs=x)

    def filter(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> Filtered:
        r"""p(z_t | x_0, ..., x_t) and log p(x_t | x_0, ..., x_{t-1}) for all t: the Kalman filter.

        With N(m, L L^T) = p(z_t | x_0, ..., x_{t-1}) and p(x_t | z_t) as a density of z_t,
        proportional to exp(eta^T z - z^T J z / 2),

            T T^T = (I + L^T J L)^-1,  w = T T^T L^T (eta - J m),
            p(z_t | x_0, ..., x_t) = N(m + L w, L T (L T)^T).

        The increments follow from Bayes' rule at the new mean: log p(x_t | m + L w) - |w|^2 / 2 +
        log |T|. Only a matrix with eigenvalues above 1 is inverted, and no D x D matrix is formed.
        """
        data = self.read(x, lengths, observed, inputs)
        loc, S, log_evidence = self._filter(data)
        covariance = (S @ S.mT).expand(*loc.shape, self.num_latents)
        return Filtered(loc, covariance, log_evidence)

    def log_evidence(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """log p(x_0, ..., x_{T-1}) in nats: (...)."""
        return self.filter(x, lengths, observed, inputs).log_evidence_by_time.sum(-1)

    def posterior(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> LinearGaussianChain:
        r"""p(z_0, ..., z_{T-1} | x_0, ..., x_{T-1}), as a chain forward in time.

            p(z_t | z_{t-1}, x) proportional to p(z_t | z_{t-1}) p(x_t, ..., x_{T-1} | z_t),

        where the last factor is the message of a filter that runs backward (Mayne 1966, "A
        solution of the smoothing problem for linear dynamic systems").
        """
        data = self.read(x, lengths, observed, inputs)
        return _chain(*self._conditionals(data, *self._future(data)), mask=data.own)

    def optimal_proposal(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> LinearGaussianChain:
        r"""The chain of p(z_t | z_{t-1}, x_t): the posterior of each step without the future.

        As a particle filter's proposal it gives weights with the least variance (Doucet, Godsill &
        Andrieu 2000, "On sequential Monte Carlo sampling methods for Bayesian filtering",
        proposition 2).
        """
        data = self.read(x, lengths, observed, inputs)
        return _chain(*self._conditionals(data, *self._likelihood(data)), mask=data.own)

    def smooth(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> Smoothed:
        r"""p(z_t | x_0, ..., x_{T-1}) for every t: the smoother of Rauch, Tung & Striebel (1965).

        With N(m, P) = p(z_t | x_0, ..., x_t) and G = P F^T (F P F^T + Q)^-1, z_t given z_{t+1} is

            N(m + G (z_{t+1} - F m - B u_{t+1}), (I - G F) P (I - G F)^T + G Q G^T).
        """
        data = self.read(x, lengths, observed, inputs)
        m, S, _ = self._filter(data)
        P, F, Q = S @ S.mT, self.F, self.Q
        L = torch.linalg.cholesky_ex(F @ P @ F.mT + Q).L
        G = torch.cholesky_solve(F @ P, L).mT
        K = torch.eye(len(F), dtype=F.dtype, device=F.device) - G @ F
        C = K @ P @ K.mT + G @ Q @ G.mT
        c = m - times(G, m @ F.mT + self._drift(data).roll(-1, -2))
        locs, covariances = [m[..., -1, :]], [P[..., -1, :, :]]
        for t in reversed(range(data.shape[-1] - 1)):
            G_t = G[..., t, :, :]
            locs.append(c[..., t, :] + times(G_t, locs[-1]))
            covariances.append(C[..., t, :, :] + G_t @ covariances[-1] @ G_t.mT)
        loc, covariance = torch.stack(locs[::-1], -2), torch.stack(covariances[::-1], -3)
        return Smoothed(loc, covariance.expand(*loc.shape, self.num_latents))

    def _filter(self, data: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`filter`, with Cholesky factors: without batch dims if no x is missing."""
        F, Q = self.F, self.Q
        m, L = self.m, _lower(self.raw_P)
        locs, factors, ws, log_dets = [], [], [], []
        v = self._drift(data).unbind(-2)
        for t, (eta, J) in enumerate(_by_time(*self._likelihood(data))):
            if t > 0:
                m, FS = m @ F.mT + v[t], F @ factors[-1]
                L = torch.linalg.cholesky_ex(FS @ FS.mT + Q).L
            T, S = _update(L, J)
            w = times(T @ S.mT, eta - times(J, m))
            m = m + times(L, w)
            locs.append(m)
            factors.append(S)
            ws.append(w)
            log_dets.append(T.diagonal(dim1=-2, dim2=-1).log().sum(-1))
        loc, S = torch.stack(locs, -2), torch.stack(factors, -3)
        fit = self.decode(loc).log_prob(data.x)
        fit = fit if data.observed is None else torch.where(data.observed, fit, 0.0)
        cost = torch.stack(ws, -2).square().sum(-1) / 2
        return loc, S, fit - cost + torch.stack(log_dets, -1)

    def _drift(self, data: Sequences) -> Tensor:
        """B u_t for all steps, (..., T, k)."""
        if data.inputs is None or self.B is None:
            return self.m.new_zeros(data.shape[-1], self.num_latents)
        return data.inputs @ self.B.mT

    def _likelihood(self, data: Sequences) -> "Messages":
        """p(x_t | z_t) for all steps as a density of z_t; flat for missing x_t."""
        W = self.H / self.sigma.square().unsqueeze(-1)
        eta, J = (data.x - self.d) @ W, (W.mT @ self.H).expand(data.shape[-1], -1, -1)
        if data.observed is None:
            return Messages(eta, J)
        there = data.observed.unsqueeze(-1)
        return Messages(torch.where(there, eta, 0.0), torch.where(there.unsqueeze(-1), J, 0.0))

    def _future(self, data: Sequences) -> "Messages":
        """p(x_t, ..., x_{T-1} | z_t) for all steps as a density of z_t.

        With the message (eta, J) of step t + 1, T, S and K as in :func:`_update` and
        :func:`_share` for L L^T = Q, A = K F and G = T S^T J F, that of step t is

            eta_t = H^T R^-1 (x_t - d) + A^T (eta - J B u),
            J_t = H^T R^-1 H + A^T J A + G^T G,

        with the precision in Joseph's form, a sum without differences.
        """
        F, L_Q, v = self.F, _lower(self.raw_Q), self._drift(data)
        here = list(_by_time(*self._likelihood(data)))
        messages = [here.pop()]
        for t in reversed(range(1, data.shape[-1])):
            eta, J = messages[-1]
            T, S = _update(L_Q, J)
            A, G = _share(L_Q, T, S) @ F, T @ S.mT @ J @ F
            eta_t, J_t = here.pop()
            eta_t = eta_t + times(A.mT, eta - times(J, v[..., t, :]))
            messages.append((eta_t, J_t + A.mT @ J @ A + G.mT @ G))
        etas, Js = zip(*reversed(messages), strict=True)
        return Messages(torch.stack(etas, -2), torch.stack(Js, -3))

    def _conditionals(self, data: Sequences, eta: Tensor, J: Tensor) -> "Conditionals":
        """The chain whose steps are p(z_t | z_{t-1}) times the messages, normalised."""
        rest = data.shape[-1] - 1, -1, -1
        L = torch.cat([_lower(self.raw_P).unsqueeze(0), _lower(self.raw_Q).expand(*rest)])
        v = self._drift(data)
        c = torch.cat([self.m.expand_as(v[..., :1, :]), v[..., 1:, :]], -2)
        T, S = _update(L, J)
        K = _share(L, T, S)
        return Conditionals(K @ self.F, times(K, c) + times(S @ S.mT, eta), S)


class Messages(NamedTuple):
    """Functions of z_t, exp(eta^T z - z^T J z / 2) up to constants: (..., T, k), (..., T, k, k)."""

    eta: Tensor
    J: Tensor


class Conditionals(NamedTuple):
    """z_0 ~ N(b_0, S_0 S_0^T), z_t ~ N(A_t z_{t-1} + b_t, S_t S_t^T), for all steps.

    The batch dims of A and S (..., T, k, k) broadcast with those of b (..., T, k).
    """

    A: Tensor
    b: Tensor
    S: Tensor


def _chain(A: Tensor, b: Tensor, S: Tensor, mask: Tensor | None) -> LinearGaussianChain:
    """The chain of conditionals."""
    initial = dist.MultivariateNormal(b[..., 0, :], scale_tril=S[..., 0, :, :])
    return LinearGaussianChain(initial, A, b, S, mask)


def _update(L: Tensor, J: Tensor) -> tuple[Tensor, Tensor]:
    r"""N(c, L L^T) times exp(eta^T z - z^T J z / 2) is N(K c + S S^T eta, S S^T): T and S.

    T is lower triangular with T T^T = (I + L^T J L)^-1, and S = L T.
    """
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    T = cholesky_of_inverse(identity + L.mT @ J @ L)
    return T, L @ T


def _share(L: Tensor, T: Tensor, S: Tensor) -> Tensor:
    """The K of :func:`_update`, the factor of the old mean: S T^T L^-1, which is I - S S^T J."""
    return torch.linalg.solve_triangular(L, S @ T.mT, upper=False, left=False)


def _lower(raw: Tensor) -> Tensor:
    """A Cholesky factor, from a matrix with the logarithms of its diagonal."""
    return raw.tril(-1) + raw.diagonal().exp().diag_embed()


def _by_time(eta: Tensor, J: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(eta.unbind(-2), J.unbind(-3), strict=True)
