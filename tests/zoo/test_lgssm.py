"""The linear-Gaussian model of sequences: Kalman's answers, exact guides, against dense algebra."""

import copy

import pytest
import torch
from helpers.lgssm import lgssm
from helpers.oracles import (
    gradients,
    lgssm_evidence,
    lgssm_joint,
    lgssm_posterior,
    mean_and_stderr,
    rows,
)
from helpers.sequence_data import B, D, T, data, k, own
from pyro import poutine
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyproelbo import BetaELBO
from pyproelbo.guides.lgssm import Exact, ExactFilter
from pyproelbo.models.lgssm import LGSSM

SETTINGS = {
    "all there": {},
    "inputs": {"num_inputs": 2},
    "lengths": {"lengths": True},
    "missing": {"observed": True},
    "everything": {"num_inputs": 2, "lengths": True, "observed": True},
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


@pytest.fixture
def problem(setting):
    """A model, the arguments of a program, and which x_t are there."""
    return lgssm(num_inputs=setting.get("num_inputs", 0)), *data(**setting)


def by_sequence(arguments, seen):
    """x, seen and inputs of each sequence, with zeros for what is not there."""
    inputs = arguments.get("inputs")
    inputs = [None] * B if inputs is None else inputs.nan_to_num()
    return list(zip(arguments["x"].nan_to_num(), seen, inputs, strict=True))


def dense_evidence(model, arguments, seen):
    return torch.stack([lgssm_evidence(model, *one) for one in by_sequence(arguments, seen)])


def blocks(covariance, num_latents=k):
    """The covariances of z_t and z_s, (T, T, k, k), of that of all, (T k, T k)."""
    return (
        covariance.unflatten(1, (-1, num_latents)).unflatten(0, (-1, num_latents)).transpose(1, 2)
    )


def diagonal(covariance):
    """The covariances of z_t, (T, k, k)."""
    return blocks(covariance).diagonal(dim1=0, dim2=1).movedim(-1, 0)


# --- Kalman's answers against dense algebra ------------------------------------------------------


def test_evidence(problem):
    model, arguments, seen = problem
    expected = dense_evidence(model, arguments, seen)
    assert (model.log_evidence(**arguments) - expected).abs().max() < 1e-10


def test_gradient_of_the_evidence(problem):
    model, arguments, seen = problem
    found = gradients(model.log_evidence(**arguments).sum(), model)
    expected = gradients(dense_evidence(model, arguments, seen).sum(), model)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-9


def test_filter(problem):
    model, arguments, seen = problem
    loc, covariance, log_evidence = model.filter(**arguments)
    assert (log_evidence[~seen] == 0).all()
    for n, (x, there, u) in enumerate(by_sequence(arguments, seen)):
        for t in range(T):
            past = there & (torch.arange(T) <= t)
            mean, dense = lgssm_posterior(model, x, past, u)
            assert (loc[n, t] - mean.reshape(T, k)[t]).abs().max() < 1e-10
            assert (covariance[n, t] - diagonal(dense)[t]).abs().max() < 1e-10
            if past.any():
                running = lgssm_evidence(model, x, past, u)
                assert (log_evidence[n, : t + 1].sum() - running).abs() < 1e-10


def test_smooth(problem):
    model, arguments, seen = problem
    loc, covariance = model.smooth(**arguments)
    for n, (x, there, u) in enumerate(by_sequence(arguments, seen)):
        mean, dense = lgssm_posterior(model, x, there, u)
        assert (loc[n] - mean.reshape(T, k)).abs().max() < 1e-10
        assert (covariance[n] - diagonal(dense)).abs().max() < 1e-10


def test_posterior_is_the_dense_conditional(problem):
    # the density at any z, and so the whole joint Gaussian, with its own steps alone
    model, arguments, seen = problem
    z = rows(5, B, T, k)
    found = model.posterior(**arguments).log_prob(z)
    for n, (x, there, u) in enumerate(by_sequence(arguments, seen)):
        mean, dense = lgssm_posterior(model, x, there, u)
        steps = own(arguments)[n].repeat_interleave(k)
        mean, dense = mean[steps], dense[steps][:, steps]
        q = MultivariateNormal(mean, (dense + dense.mT) / 2)
        assert (found[:, n] - q.log_prob(z[:, n].flatten(-2)[:, steps])).abs().max() < 1e-9


def propagated(q):
    """Mean and covariance of z_t, t = 0, ..., T - 1, for a linear-Gaussian chain q."""
    at = torch.cat([torch.zeros(1, T, k), torch.eye(k)[:, None].expand(k, T, k)])
    steps = q.expand((k + 1, *q.batch_shape)).steps(
        at.unsqueeze(1).expand(k + 1, *q.batch_shape, T, k)
    )
    b, A = steps.mean[0], (steps.mean[1:] - steps.mean[0]).movedim(0, -1)
    V = steps.covariance_matrix[0]
    locs, covariances = [b[..., 0, :]], [V[..., 0, :, :]]
    for t in range(1, T):
        A_t = A[..., t, :, :]
        locs.append((A_t @ locs[-1][..., None])[..., 0] + b[..., t, :])
        covariances.append(A_t @ covariances[-1] @ A_t.mT + V[..., t, :, :])
    return torch.stack(locs, -2), torch.stack(covariances, -3)


def test_marginals_of_the_posterior_are_those_of_the_smoother(problem):
    model, arguments, _ = problem
    loc, covariance = propagated(model.posterior(**arguments))
    smoothed = model.smooth(**arguments)
    steps = own(arguments)
    torch.testing.assert_close(loc[steps], smoothed.loc[steps])
    torch.testing.assert_close(covariance[steps], smoothed.covariance[steps])


def test_twenty_steps():
    model, x = lgssm(3, 4), rows(2, 20, 4)
    everything = torch.ones(20, dtype=torch.bool)
    for n in range(2):
        evidence = lgssm_evidence(model, x[n], everything)
        mean, dense = lgssm_posterior(model, x[n], everything)
        assert (model.log_evidence(x)[n] - evidence).abs() < 1e-10
        assert (model.smooth(x).loc[n] - mean.reshape(20, 3)).abs().max() < 1e-10
        found = model.smooth(x).covariance[n]
        expected = blocks(dense, 3).diagonal(dim1=0, dim2=1).movedim(-1, 0)
        assert (found - expected).abs().max() < 1e-10


def test_leading_dims(setting):
    model = lgssm(num_inputs=setting.get("num_inputs", 0))
    arguments, _ = data(**setting)
    whole = model.filter(**arguments), model.smooth(**arguments)
    square = {name: value.unflatten(0, (2, 2)) for name, value in arguments.items()}
    single = {name: value[1] for name, value in arguments.items()}
    for found, expected in zip(
        (model.filter(**square), model.smooth(**square)), whole, strict=True
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.flatten(0, 1), b)
    for found, expected in zip(
        (model.filter(**single), model.smooth(**single)), whole, strict=True
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b[1])
    assert model.posterior(**square).batch_shape == (2, 2)
    assert model.posterior(**single).batch_shape == ()


def test_a_sequence_of_one_step():
    model, x = lgssm(), rows(B, 1, D)
    seen = torch.ones(1, dtype=torch.bool)
    expected = torch.stack([lgssm_evidence(model, one, seen) for one in x])
    torch.testing.assert_close(model.log_evidence(x), expected)
    assert model.posterior(x).event_shape == model.optimal_proposal(x).event_shape == (1, k)


@pytest.mark.slow
@pytest.mark.parametrize(("log_sigma", "log_scale"), [(0, -0.8), (-4, -6)])
def test_long_sequences_in_single_precision(log_sigma, log_scale):
    single = lgssm(3, 4).float()
    with torch.no_grad():
        single.F.mul_(0.95 / torch.linalg.matrix_norm(single.F, 2))
        single.log_sigma.fill_(log_sigma)
        single.raw_Q.zero_().diagonal().fill_(log_scale)  # a singular Q takes double precision
        x, observed = single(num=4, num_steps=500), torch.rand(4, 500) > 0.2
        double = copy.deepcopy(single).double()
        for found, expected in zip(
            (*single.filter(x, observed=observed), *single.smooth(x, observed=observed)),
            (
                *double.filter(x.double(), observed=observed),
                *double.smooth(x.double(), observed=observed),
            ),
            strict=True,
        ):
            assert found.dtype == torch.float32
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        evidence = double.log_evidence(x.double(), observed=observed)
        elbo = BetaELBO(kl="sampled").terms(single, Exact(single), x, None, observed).elbo
        assert (elbo - evidence.sum()).abs() < 1e-6 * evidence.abs().sum()


# --- the program ---------------------------------------------------------------------------------


def ahead(model, z, arguments):
    """The mean and covariance of z_t given z_{t-1}: (..., B, T, k) and (T, k, k)."""
    mean = torch.cat([model.m.expand_as(z[..., :1, :]), z[..., :-1, :] @ model.F.mT], -2)
    if model.num_inputs:
        mean = mean + (arguments["inputs"].nan_to_num() @ model.B.mT)
    return mean, torch.stack([model.P] + [model.Q] * (T - 1))


def log_joint(model, z, arguments, seen):
    """log p(x_t | z_t) and log p(z_t | z_{t-1}) by time, (..., B, T)."""
    prior = MultivariateNormal(*ahead(model, z, arguments)).log_prob(z)
    fit = Normal(z @ model.H.mT + model.d, model.sigma).log_prob(arguments["x"].nan_to_num())
    return fit.sum(-1) * seen, prior * own(arguments)


def test_densities_of_the_program(problem):
    model, arguments, seen = problem
    z = rows(B, T, k)
    trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(**arguments)
    trace.compute_log_prob()
    fit, prior = log_joint(model, z, arguments, seen)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], fit.sum(-1))
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], prior.sum(-1))


def test_simulation():
    model = lgssm(num_inputs=1)
    inputs = rows(T, 1)
    x = model(inputs=inputs.expand(20_000, T, 1)).detach()
    assert x.shape == (20_000, T, D)
    mean, covariance = (a[T * k :] for a in lgssm_joint(model, T, inputs))
    covariance = covariance[:, T * k :].detach()
    variance = covariance.diagonal()
    stderr = ((covariance**2 + variance[:, None] * variance) / len(x)).sqrt()  # Wishart
    x = x.flatten(1)
    assert ((x.mT.cov() - covariance).abs() < 5 * stderr).all()
    assert ((x.mean(0) - mean).abs() < 5 * (variance / len(x)).sqrt()).all()


def test_starts_stationary():
    model = LGSSM(3, D)
    torch.testing.assert_close(model.P, torch.eye(3))
    torch.testing.assert_close(model.F @ model.F.mT + model.Q, torch.eye(3))


def test_simulates_what_is_asked_for():
    assert LGSSM(k, D, dataset_size=5)(num=9, num_steps=6).shape == (9, 6, D)
    assert LGSSM(k, D)(num_steps=6).shape == (1, 6, D)
    assert LGSSM(k, D)(num=2, num_steps=6, lengths=torch.tensor([6, 2])).shape == (2, 6, D)
    assert LGSSM(k, D, num_inputs=2)(inputs=rows(4, 6, 2)).shape == (4, 6, D)


# --- exact guides --------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [False, True])
def test_exact_guide_gives_the_evidence_at_every_sample(problem, vectorize):
    model, arguments, seen = problem
    objective = BetaELBO(kl="sampled", num_particles=3, vectorize_particles=vectorize)
    terms = objective.terms(model, Exact(model), **arguments)
    elbo = terms.log_likelihood["x"] - terms.kl["z"]
    assert elbo.shape == (3, B)
    assert (elbo - dense_evidence(model, arguments, seen)).abs().max() < 1e-8


def test_exact_guide_gives_the_gradient_of_the_evidence_at_every_sample(problem):
    model, arguments, seen = problem
    loss = BetaELBO(kl="sampled").differentiable_loss(model, Exact(model), **arguments)
    expected = gradients(dense_evidence(model, arguments, seen).sum(), model)
    for gradient, exact in zip(gradients(-loss, model), expected, strict=True):
        assert (gradient - exact).abs().max() < 1e-8


def running(model, guide, arguments, seen, num_samples):
    """The sums of the ELBO's terms up to every step, for samples: (num_samples, B, T)."""
    q = guide.posterior(**arguments)
    z = q.sample((num_samples,))
    fit, prior = log_joint(model, z, arguments, seen)
    return (fit + prior - q.log_prob_by_time(z)).cumsum(-1)


def test_running_sums_of_the_exact_guide_lack_what_the_future_tells(problem):
    model, arguments, seen = problem
    mean, stderr = mean_and_stderr(running(model, Exact(model), arguments, seen, 2000))
    evidence = model.filter(**arguments).log_evidence_by_time.cumsum(-1)
    for n, (x, there, u) in enumerate(by_sequence(arguments, seen)):
        for t in range(int(own(arguments)[n].sum())):
            past = there & (torch.arange(T) <= t)
            so_far, whole = (
                MultivariateNormal(loc[: (t + 1) * k], (V + V.mT)[: (t + 1) * k, : (t + 1) * k] / 2)
                for loc, V in (lgssm_posterior(model, x, which, u) for which in (past, there))
            )
            expected = evidence[n, t] - kl_divergence(whole, so_far)
            assert (mean[n, t] - expected).abs() < 4.5 * stderr[n, t] + 1e-8


def predictive(model, z, arguments, seen):
    """log p(x_t | z_{t-1}) by time, (..., B, T), and the covariances of x_t given z_{t-1}."""
    mean, V = ahead(model, z, arguments)
    V = model.H @ V @ model.H.mT + model.sigma.square().diag()
    x = MultivariateNormal(mean @ model.H.mT + model.d, V)
    return x.log_prob(arguments["x"].nan_to_num()) * seen, V


def test_each_term_of_the_filtering_guide_is_a_predictive_density(problem):
    model, arguments, seen = problem
    q = ExactFilter(model).posterior(**arguments)
    z = q.sample()
    fit, prior = log_joint(model, z, arguments, seen)
    expected, _ = predictive(model, z, arguments, seen)
    assert (fit + prior - q.log_prob_by_time(z) - expected).abs().max() < 1e-9


def test_running_sums_of_the_filtering_guide_bound_the_running_evidence(problem):
    model, arguments, seen = problem
    guide = ExactFilter(model)
    evidence = model.filter(**arguments).log_evidence_by_time.cumsum(-1)
    gap = evidence - running(model, guide, arguments, seen, 4000)
    assert gap[..., 0].abs().max() < 1e-10
    # E[log p(x_t | z_{t-1})], of a Gaussian z_{t-1}
    loc, covariance = propagated(guide.posterior(**arguments))
    at_mean, V = predictive(model, loc, arguments, seen)
    HF = model.H @ model.F
    spread = torch.linalg.solve(V[1:], HF @ covariance[..., :-1, :, :] @ HF.mT)
    at_mean[:, 1:] -= spread.diagonal(dim1=-2, dim2=-1).sum(-1) / 2 * seen[:, 1:]
    expected = evidence - at_mean.cumsum(-1)
    assert (expected > -1e-10).all() and (expected[seen[:, 1:].any(-1), -1] > 0.01).any()
    mean, stderr = mean_and_stderr(gap)
    assert ((mean - expected).abs() < 4 * stderr + 1e-10).all()
