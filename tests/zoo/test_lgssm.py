import copy

import pyro
import pytest
import torch
from helpers.modules import at_random, values
from helpers.oracles import (
    gradients,
    lgssm_evidence,
    lgssm_joint,
    lgssm_posterior,
    mean_and_stderr,
    rows,
)
from helpers.sequence_data import WRONG, WRONG_INPUTS, B, D, T, data, k, own
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyproelbo import BetaELBO, SequentialELBO
from pyproelbo.guides.lgssm import Exact, ExactFilter, Filtering, MeanField, Smoothing
from pyproelbo.guides.sequences import Backward, LinearRNN, reverse
from pyproelbo.models.lgssm import LGSSM


def lgssm(num_latents=k, num_features=D, num_inputs=0, size=None):
    """An LGSSM with nothing special about its parameters, and of a stable F."""
    (model,) = at_random(LGSSM(num_latents, num_features, num_inputs, size))
    return model


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


@pytest.mark.parametrize(("log_sigma", "log_scale"), [(0, -0.8), (-4, -6)])
def test_long_sequences_in_single_precision(log_sigma, log_scale):
    single = lgssm(3, 4).float()
    with torch.no_grad():
        single.F.mul_(0.95 / torch.linalg.matrix_norm(single.F, 2))
        single.log_sigma.fill_(log_sigma)
        single.raw_Q.diagonal().fill_(log_scale)
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
        assert (elbo - evidence.sum()).abs() < 1e-5 * evidence.abs().sum()


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
    assert LGSSM(k, D, size=5)(num=9, num_steps=6).shape == (9, 6, D)
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


# --- guides to learn -----------------------------------------------------------------------------


def raw_of(family, covariance):
    return family.nearest(MultivariateNormal(torch.zeros(k), covariance))


@torch.no_grad()
def test_filtering_guide_can_be_the_exact_one():
    model, guide = lgssm(num_inputs=1), Filtering(k, D, num_inputs=1)
    H, R = model.H, model.sigma.square().diag()
    for loc, raw, V in (
        (guide.initial_loc, guide.initial_raw, model.P),
        (guide.loc, guide.raw, model.Q),
    ):
        gain = torch.linalg.solve(H @ V @ H.mT + R, H @ V).mT  # Kalman's
        rest, is_initial = torch.eye(k) - gain @ H, loc is guide.initial_loc
        weights = [gain, torch.zeros(k, 1), torch.zeros(k, 1) if is_initial else rest @ model.B]
        loc.weight.copy_(torch.cat(weights if is_initial else [rest @ model.F, *weights], -1))
        loc.bias.copy_((rest @ model.m if is_initial else 0.0) - gain @ model.d)
        raw.copy_(raw_of(guide.family, rest @ V))
    arguments, _ = data(num_inputs=1, lengths=True)
    z = rows(B, T, k)
    torch.testing.assert_close(
        guide.posterior(**arguments).log_prob(z),
        ExactFilter(model).posterior(**arguments).log_prob(z),
    )


@torch.no_grad()
def test_smoothing_guide_can_be_the_posterior_away_from_the_end():
    # the messages from the future become steady: J, and eta a linear recurrence
    model, guide = lgssm(num_inputs=1), Smoothing(k, D, num_inputs=1)
    F, H, Q, R = model.F, model.H, model.Q, model.sigma.square().diag()
    W = torch.linalg.solve(R, H).mT
    J = W @ H
    for _ in range(200):
        J = W @ H + F.mT @ torch.linalg.solve(torch.eye(k) + J @ Q, J) @ F
    V = torch.linalg.inv(torch.linalg.inv(Q) + J)
    A = V @ torch.linalg.solve(Q, F)
    recurrence = guide.read_elsewhere[0].rnn
    recurrence.M.copy_(A.mT)
    recurrence.C.copy_(torch.cat([W, -(W @ model.d)[:, None], -J @ model.B], -1))
    zeros = torch.zeros(k, D + 1)
    guide.loc.weight.copy_(torch.cat([A, zeros, model.B, V], -1))
    guide.loc.bias.zero_()
    guide.raw.copy_(raw_of(guide.family, V))
    num_steps = 60
    x, u = rows(B, num_steps, D), rows(B, num_steps, 1)
    z = rows(B, num_steps, k)
    found, expected = (
        program.posterior(x, inputs=u).log_prob_by_time(z) for program in (guide, model)
    )
    assert (found - expected)[:, 1:20].abs().max() < 1e-8  # z_0 has parameters of its own
    assert (found - expected)[:, -1].abs().max() > 1e-3


LEARNED = [Filtering, Smoothing, MeanField]
KNOWN = {Filtering: "the present", Smoothing: "the future", MeanField: "everything"}


@pytest.mark.parametrize("make", LEARNED)
def test_what_a_step_of_a_guide_knows(make):
    guide, z, x, t = make(k, D), rows(B, T, k), rows(B, T, D).requires_grad_(), 3
    for parameter in guide.parameters():
        torch.nn.init.normal_(parameter)
    steps = guide.posterior(x).steps(z)
    (gradient,) = torch.autograd.grad(steps.mean[:, t].sum(), x)
    known = gradient.abs().sum((0, -1)) > 0
    expected = {
        "the present": torch.arange(T) == t,
        "the future": torch.arange(T) >= t,
        "everything": torch.ones(T, dtype=torch.bool),
    }[KNOWN[make]]
    assert torch.equal(known, expected)


@pytest.mark.parametrize("make", LEARNED)
def test_padding_is_as_if_it_were_not_there(make):
    guide, z = make(k, D, num_inputs=2), rows(B, T, k)
    for parameter in guide.parameters():
        torch.nn.init.normal_(parameter)
    arguments, _ = data(num_inputs=2, lengths=True, observed=True)
    lengths = arguments.pop("lengths")
    padded = guide.posterior(lengths=lengths, **arguments).log_prob(z)
    for n, length in enumerate(lengths):
        alone = {name: value[n, :length] for name, value in arguments.items()}
        torch.testing.assert_close(guide.posterior(**alone).log_prob(z[n, :length]), padded[n])


@pytest.mark.parametrize("make", LEARNED)
def test_a_learned_guide_comes_nearer_to_the_evidence(make):
    model, guide = lgssm(), make(k, D)
    x = model(num=64, num_steps=T).detach()
    evidence = model.log_evidence(x).mean()

    def gap():
        objective = BetaELBO(num_particles=20, vectorize_particles=True)
        return evidence - objective.terms(model, guide, x).elbo / len(x)

    module, start = BetaELBO()(model, guide), gap()
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.05)
    for _ in range(40):
        optimiser.zero_grad()
        module(x).backward()
        optimiser.step()
    assert 0 < gap() < 0.2 * start


@pytest.mark.parametrize("guide", [Exact, ExactFilter, *LEARNED])
def test_training_raises_the_evidence(guide):
    model = lgssm(num_inputs=2)
    arguments, _ = data(num_inputs=2, lengths=True, observed=True)
    guide = guide(model) if guide in (Exact, ExactFilter) else guide(k, D, num_inputs=2)
    start = model.log_evidence(**arguments).sum()
    svi = SVI(model, guide, Adam({"lr": 0.05}), BetaELBO(max_plate_nesting=1))
    for _ in range(20):
        svi.step(**arguments)
    assert model.log_evidence(**arguments).sum() > start + 1.0


def test_reverse_and_backward():
    y = rows(2, 3, 5, 4)
    lengths = torch.tensor([[5, 3, 1], [2, 4, 5]])
    found = reverse(y, lengths)
    torch.testing.assert_close(found[0, 1], torch.cat([y[0, 1, :3].flip(0), y[0, 1, 3:]]))
    torch.testing.assert_close(reverse(found, lengths), y)
    torch.testing.assert_close(reverse(y), y.flip(-2))
    for rnn in (LinearRNN(4, 6), torch.nn.GRU(4, 6, batch_first=True)):
        read = Backward(rnn)
        h = read(y, lengths)
        assert h.shape == (2, 3, 5, 6)
        for i, j in ((0, 1), (1, 0)):
            n = lengths[i, j]
            alone = rnn(y[None, i, j, :n].flip(-2))[0].flip(-2)[0]
            torch.testing.assert_close(h[i, j, :n], alone)
            torch.testing.assert_close(read(y[i, j, :n]), alone)


# --- all guides ----------------------------------------------------------------------------------


def exact(guide):
    def pair(num_inputs=0, size=None):
        model = lgssm(num_inputs=num_inputs, size=size)
        return model, guide(model)

    return pair


def learned(guide):
    return lambda num_inputs=0, size=None: (
        lgssm(num_inputs=num_inputs, size=size),
        guide(k, D, num_inputs, size=size),
    )


PAIRS = {
    **{guide.__name__: exact(guide) for guide in (Exact, ExactFilter)},
    **{guide.__name__: learned(guide) for guide in LEARNED},
}


@pytest.fixture(params=PAIRS)
def make(request):
    return PAIRS[request.param]


def test_what_does_not_count_reaches_no_number_and_no_gradient(make):
    # NaN in padding and where x is missing, against any other numbers there
    programs = make(num_inputs=2)
    arguments, seen = data(num_inputs=2, lengths=True, observed=True)
    found = []
    for fill in (torch.nan, 7.0):
        filled = {name: value.clone() for name, value in arguments.items()}
        filled["x"][~seen] = fill
        filled["inputs"][~own(arguments)] = filled["inputs"][:, 0] = fill
        torch.manual_seed(1)
        loss = BetaELBO(max_plate_nesting=1).differentiable_loss(*programs, **filled)
        found.append([loss, *gradients(loss, torch.nn.ModuleList(programs))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


def test_svi_finds_every_parameter(make):
    programs = make(num_inputs=2)
    twins = copy.deepcopy(programs)
    before = values(*programs)
    arguments, _ = data(num_inputs=2, lengths=True, observed=True)
    SVI(*programs, Adam({"lr": 0.01}), BetaELBO(max_plate_nesting=1)).step(**arguments)
    assert not any(torch.equal(a, b) for a, b in zip(before, values(*programs), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, values(*twins), strict=True))


def test_exact_guides_own_nothing():
    model = lgssm()
    for guide in (Exact(model), ExactFilter(model)):
        assert not list(guide.parameters()) and not guide.state_dict()


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_runs_on_a_device_of_its_own_without_a_sync(make):
    # A tensor on the meta device has no values: reading one raises, and so does a mix of devices.
    model, guide = (program.to("meta") for program in make(num_inputs=2))
    arguments, _ = data(num_inputs=2, lengths=True, observed=True)
    arguments = {name: value.to("meta") for name, value in arguments.items()}
    with pyro.validation_enabled(False):
        objective = BetaELBO(kl="sampled", max_plate_nesting=1)
        loss = objective.differentiable_loss(model, guide, **arguments)
        loss.backward()
        answers = [model.log_evidence(**arguments), *model.smooth(**arguments)]
    assert {answer.device.type for answer in (loss, *answers)} == {"meta"}


def test_single_precision(make):
    model, guide = (program.float() for program in make())
    terms = BetaELBO(max_plate_nesting=1).terms(model, guide, rows(B, T, D).float())
    assert terms.log_likelihood["x"].dtype == terms.kl["z"].dtype == torch.float32
    assert model(num=2, num_steps=3).dtype == torch.float32


def test_size_is_a_scale(make):
    x = rows(B, T, D)
    for program in make(size=10 * B):
        trace = poutine.trace(program).get_trace(x)
        assert {trace.nodes[n]["scale"] for n in ("z", "x") if n in trace.nodes} == {10.0}
    for program in make(size=B - 1):
        with pytest.raises(ValueError, match=f"x has {B} rows, more than size={B - 1}"):
            program(x)


def test_sequential_objective_has_the_terms_of_each_step(make):
    programs = make(num_inputs=2)
    arguments, _ = data(num_inputs=2, lengths=True, observed=True)
    terms = SequentialELBO(kl="sampled").terms(*programs, **arguments)
    torch.testing.assert_close(terms.reconstruction_by_time.sum(), terms.reconstruction)
    torch.testing.assert_close((terms.reconstruction_by_time - terms.kl_by_time).sum(), terms.elbo)


# --- arguments that are none ---------------------------------------------------------------------


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(make, wrong):
    arguments, message = WRONG[wrong]
    x = rows(B, T, D)
    for program in make():
        with pytest.raises(ValueError, match=message):
            program(**{"x": x, **arguments(x)})


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_wrong_inputs(make, wrong):
    inputs, message = WRONG_INPUTS[wrong]
    for program in make(num_inputs=2):
        with pytest.raises(ValueError, match=message):
            program(rows(B, T, D), inputs=inputs(rows(B, T, 2)))


def test_simulation_of_unknown_length():
    with pytest.raises(ValueError, match="num_steps should be given"):
        LGSSM(k, D)(num=3)


@pytest.mark.parametrize("make", [LGSSM, *LEARNED])
@pytest.mark.parametrize("sizes", [(0, 3), (2, 0), (2.0, 3), (2, 3, -1)])
def test_sizes_that_are_none(make, sizes):
    with pytest.raises(ValueError, match="should be a positive whole number"):
        make(*sizes)


def test_z_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"z should have shape \(..., 2\)"):
        LGSSM(k, D).decode(rows(B, T, 3))
