"""Guides of the linear-Gaussian model: learned ones, and what holds of all."""

import copy

import pyro
import pytest
import torch
from helpers.lgssm import lgssm
from helpers.modules import values
from helpers.oracles import (
    gradients,
    rows,
)
from helpers.sequence_data import WRONG, WRONG_INPUTS, B, D, T, data, k, own
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam
from torch.distributions import MultivariateNormal

from pyproelbo import BetaELBO, SequentialELBO
from pyproelbo.guides.lgssm import Exact, ExactFilter, Filtering, MeanField, Smoothing
from pyproelbo.guides.sequences import Backward, LinearRNN, reverse
from pyproelbo.models.lgssm import LGSSM

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
    def pair(num_inputs=0, dataset_size=None):
        model = lgssm(num_inputs=num_inputs, dataset_size=dataset_size)
        return model, guide(model)

    return pair


def learned(guide):
    return lambda num_inputs=0, dataset_size=None: (
        lgssm(num_inputs=num_inputs, dataset_size=dataset_size),
        guide(k, D, num_inputs, dataset_size=dataset_size),
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
    for program in make(dataset_size=10 * B):
        trace = poutine.trace(program).get_trace(x)
        assert {trace.nodes[n]["scale"] for n in ("z", "x") if n in trace.nodes} == {10.0}
    for program in make(dataset_size=B - 1):
        with pytest.raises(ValueError, match=f"x has {B} rows, more than dataset_size={B - 1}"):
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
