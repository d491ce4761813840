"""Second ways to know an answer: dense linear algebra, enumeration, torch's own mixtures."""

import math

import torch
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)


def rows(*shape):
    """Data from a fixed generator, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(11)
    x = torch.randn(shape, generator=generator, device="cpu")
    return x.to(torch.get_default_device())


def gradients(value, module):
    """The gradient of a scalar for each parameter of a module, in order, zero where it has none."""
    params = list(module.parameters())
    found = torch.autograd.grad(value, params, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


def mean_and_stderr(draws):
    """The mean of independent draws along dim 0, and its standard error."""
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


def log_weight(estimator, i, j, num, size):
    """The weight of posterior j at z_i, of a minibatch of num from a data set of size."""
    if estimator == "weighted":
        return math.log(1 / (size * num))
    return math.log(1 / size if i == j else (size - 1) / (size * (num - 1)))


def ppca_evidence(model, x):
    """log N(x; mu, W W^T + sigma^2 I), with the D x D covariance."""
    return MultivariateNormal(model.mu, _covariance(model)).log_prob(x)


def ppca_posterior(model, x):
    """z given x, by conditioning the joint Gaussian of (z, x)."""
    gain = torch.linalg.solve(_covariance(model), model.W).mT
    covariance = torch.eye(model.num_latents) - gain @ model.W
    return MultivariateNormal((x - model.mu) @ gain.mT, (covariance + covariance.mT) / 2)


def ppca_elbo(model, x, loc, covariance):
    """E_q[log p(x, z)] + H(q) per datum for q(z) = N(loc, covariance), all in closed form."""
    prior = MultivariateNormal(torch.zeros(model.num_latents), torch.eye(model.num_latents))
    q = MultivariateNormal(loc, covariance)
    at_mean = Normal(loc @ model.W.mT + model.mu, model.sigma).log_prob(x).sum(-1)
    spread = ((model.W.mT @ model.W) * covariance).sum((-2, -1)) / (2 * model.sigma**2)
    return at_mean - spread - torch.distributions.kl_divergence(q, prior)


def _covariance(model):
    return model.W @ model.W.mT + model.sigma**2 * torch.eye(model.num_features)


def gmm_evidence(model, x):
    """log p(x), as torch's mixture has it."""
    copies = Independent(Normal(model.loc, model.scale), 1)
    return MixtureSameFamily(Categorical(model.weights), copies).log_prob(x)


def gmm_log_joint(model, x):
    """log p(x, z = k) for every k, one after the other: (B, K)."""
    joint = [
        model.weights[k].log() + Normal(model.loc[k], model.scale[k]).log_prob(x).sum(-1)
        for k in range(model.num_components)
    ]
    return torch.stack(joint, -1)


def gmm_elbo(model, x, q):
    """sum_k q_k (log p(x, z = k) - log q_k) per datum, for q (B, K)."""
    return (q * (gmm_log_joint(model, x) - q.log())).sum(-1)


def lgssm_joint(model, num_steps, inputs=None):
    """(z_0, ..., z_{T-1}, x_0, ..., x_{T-1}) of one sequence as one Gaussian: mean, covariance.

    M z = c + e, where the blocks of M are I and, below them, -F; x stacks H z_t + d + noise.
    """
    T, k = num_steps, model.num_latents
    M = torch.eye(T * k) - torch.kron(torch.ones(T - 1).diag(-1), model.F)
    drift = torch.zeros(T, k) if inputs is None else inputs @ model.B.mT
    c = torch.cat([model.m[None], drift[1:]]).flatten()
    half = torch.linalg.solve(M, torch.block_diag(model.P, *[model.Q] * (T - 1)))
    z, zz = torch.linalg.solve(M, c), torch.linalg.solve(M, half.mT)
    H = torch.kron(torch.eye(T), model.H)
    noise = model.sigma.square().repeat(T).diag()
    mean = torch.cat([z, H @ z + model.d.repeat(T)])
    return mean, torch.cat(
        [torch.cat([zz, zz @ H.mT], 1), torch.cat([H @ zz, H @ zz @ H.mT + noise], 1)]
    )


def lgssm_evidence(model, x, seen, inputs=None):
    """log p of the steps of one sequence x (T, D) that are seen (T,)."""
    mean, covariance = lgssm_joint(model, len(x), inputs)
    there = _of_x(model, x, seen)
    covariance = covariance[there][:, there]
    return MultivariateNormal(mean[there], (covariance + covariance.mT) / 2).log_prob(
        x[seen].flatten()
    )


def lgssm_posterior(model, x, seen, inputs=None):
    """Mean and covariance of z_0, ..., z_{T-1}, (T k,), given the steps that are seen (T,)."""
    mean, covariance = lgssm_joint(model, len(x), inputs)
    there = _of_x(model, x, seen)
    n = len(x) * model.num_latents
    gain = torch.linalg.solve(covariance[there][:, there], covariance[there][:, :n]).mT
    loc = mean[:n] + gain @ (x[seen].flatten() - mean[there])
    return loc, covariance[:n, :n] - gain @ covariance[there][:, :n]


def _of_x(model, x, seen):
    """Where in the joint Gaussian of z and x the steps of x are that are seen."""
    z = torch.zeros(len(x) * model.num_latents, dtype=torch.bool)
    return torch.cat([z, seen.repeat_interleave(x.shape[-1])])
