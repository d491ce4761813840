"""The variational recurrent network and its guides: the laws of sequences, and it by hand."""

import copy
import itertools

import pytest
import torch
from helpers.modules import at_random
from helpers.oracles import gradients, rows
from helpers.sequence_data import B, D, T, k
from helpers.sequence_laws import LIKELIHOODS, SequenceLaws, known_at
from pyro import poutine
from torch.distributions import Normal
from torch.nn import functional as F

from pyproelbo import SequentialELBO
from pyproelbo.guides.vrnn import Filtering, MeanField, Smoothing
from pyproelbo.models.vrnn import VRNN

GUIDES = [Filtering, Smoothing, MeanField]
INPUTS = {"": 0, "with inputs, ": 2}
H = 5


def small(likelihood="Gaussian", num_inputs=0, num_latents=k, num_features=D, dataset_size=None):
    return VRNN(
        num_latents, num_features, H, (4,), num_inputs, LIKELIHOODS[likelihood](), dataset_size
    )


def of(guide, num_inputs=0):
    """A model, and this guide of it."""
    model = small(num_inputs=num_inputs)
    return at_random(model, guide(model, 6))


PAIRS = {
    f"{guide.__name__}, {words}{likelihood}": (guide, num_inputs, likelihood)
    for (guide, (words, num_inputs)), likelihood in zip(
        itertools.product(GUIDES, INPUTS.items()),
        itertools.cycle(["Gaussian", "Bernoulli", "Bernoulli", "Gaussian"]),
        strict=False,
    )
}


@pytest.fixture(params=PAIRS)
def make(request):
    guide, num_inputs, likelihood = PAIRS[request.param]

    def pair(num_latents=k, num_features=D, dataset_size=None):
        model = small(likelihood, num_inputs, num_latents, num_features, dataset_size)
        return model, guide(model, 6)

    return pair


class TestVRNN(SequenceLaws):
    """All laws."""


# --- the model -----------------------------------------------------------------------------------


def net(layers, *parts):
    first, last = layers[0], layers[2]
    hidden = F.silu(torch.cat(parts, -1) @ first.weight.mT + first.bias)
    return hidden @ last.weight.mT + last.bias


def gru(cell, s, y):
    """torch's gated recurrent unit, by its equations."""
    r, i, n = (y @ cell.weight_ih.mT + cell.bias_ih).chunk(3)
    R, I, N = (s @ cell.weight_hh.mT + cell.bias_hh).chunk(3)  # noqa: E741
    gate = (i + I).sigmoid()
    return (1 - gate) * (n + (r + R).sigmoid() * N).tanh() + gate * s


def by_hand(model, z, inputs):
    """Of one sequence, the mean and the scale of z_t, the logits or the mean of x_t, and s_t."""
    s, steps = model.start, []
    for t in range(len(z)):
        u = [] if inputs is None else [inputs[t] if t > 0 else torch.zeros_like(inputs[0])]
        loc, raw = net(model.prior_net, s, *u).split(model.num_latents)
        steps.append((loc, F.softplus(raw), net(model.emission, z[t], s, *u), s))
        s = gru(model.cell, s, torch.cat([z[t], *u]))
    return [torch.stack(part) for part in zip(*steps, strict=True)]


@pytest.mark.parametrize("num_inputs", INPUTS.values())
def test_densities_by_hand(num_inputs):
    (model,) = at_random(small(num_inputs=num_inputs))
    x, z = rows(B, T, D), rows(B, T, k)
    inputs = rows(B, T, num_inputs).flip(0) if num_inputs else None
    program = poutine.condition(model, {"z": z})
    trace = poutine.trace(program).get_trace(x, inputs=inputs)
    p, emission = (trace.nodes[name]["fn"] for name in ("z", "x"))
    for n in range(B):
        loc, scale, output, states = by_hand(model, z[n], None if inputs is None else inputs[n])
        torch.testing.assert_close(p.states(z)[n], states)
        prior = Normal(loc, scale).log_prob(z[n]).sum(-1)
        torch.testing.assert_close(p.log_prob_by_time(z)[n], prior)
        fit = Normal(output, model.likelihood.scale).log_prob(x[n]).sum(-1)
        torch.testing.assert_close(emission.log_prob_by_time(x)[n], fit)


def test_inputs_count_from_the_second_on():
    """z_t and x_t know u_1, ..., u_t, and nothing knows u_0."""
    model, guide = of(Filtering, num_inputs=2)
    x, z, u = rows(B, T, D), rows(B, T, k), rows(B, T, 2)

    def terms(u):
        program = poutine.trace(poutine.condition(model, {"z": z}))
        nodes = program.get_trace(x, inputs=u).nodes
        parts = [nodes[name]["fn"].log_prob_by_time(value) for name, value in (("z", z), ("x", x))]
        return torch.stack([*parts, guide.posterior(x, inputs=u).log_prob_by_time(z)])

    start = terms(u)
    for t in range(T):
        other = u.clone()
        other[:, t] += 1.0
        changed = (terms(other) != start).any(1)
        assert (changed == ((torch.arange(T) >= t) & (t > 0))).all()


def test_it_remembers_all_of_the_past():
    model, z = small(), rows(B, T, k).requires_grad_()
    (gradient,) = torch.autograd.grad(model.prior(T).steps(z).mean[:, -1].sum(), z)
    assert (gradient[:, :-1] != 0).all() and not gradient[:, -1].any()


def test_previous_data_as_inputs():
    """The model of Chung et al. (2015): prior, emission and recurrence know x_0, ..., x_{t-1}."""
    (model,) = at_random(small(num_inputs=D))
    x, z = rows(B, T, D), rows(B, T, k)

    def emissions(x):
        previous = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x, inputs=previous)
        return [trace.nodes["z"]["fn"].steps(z).mean, trace.nodes["x"]["fn"].steps(x).mean]

    start = emissions(x)
    for t in range(T):
        other = x.clone()
        other[:, t] += 1.0
        for a, b in zip(emissions(other), start, strict=True):
            assert torch.equal((a != b).any(-1).all(0), torch.arange(T) > t)


def test_z_of_the_wrong_shape():
    model = small()
    with pytest.raises(ValueError, match=r"z should have shape \(..., 2\)"):
        model.decode(rows(B, T, 3), rows(B, T, H))


# --- what a step of a guide knows ----------------------------------------------------------------

KNOWN = {  # of x, and of z, at step t
    Filtering: (lambda s, t: s <= t, lambda s, t: s < t),
    Smoothing: (lambda s, t: s >= t, lambda s, t: s < t),
    MeanField: (lambda s, t: s >= 0, lambda s, t: s < 0),
}


@pytest.mark.parametrize("t", [0, 3, T - 1])
@pytest.mark.parametrize("make", GUIDES)
def test_what_a_step_of_a_guide_knows(make, t):
    _, guide = of(make)
    for found, known in zip(known_at(guide, t), KNOWN[make], strict=True):
        assert torch.equal(found, known(torch.arange(T), t))


# --- the guide and its model ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [Filtering, Smoothing])
@pytest.mark.parametrize("num_inputs", INPUTS.values())
def test_posterior_by_hand(make, num_inputs):
    model, guide = of(make, num_inputs)
    x, z = rows(B, T, D), rows(B, T, k)
    inputs = rows(B, T, num_inputs).flip(0) if num_inputs else None
    q = guide.posterior(x, inputs=inputs).steps(z)
    for n in range(B):
        u = None if inputs is None else inputs[n]
        features = [x[n], torch.ones(T, 1)]
        if u is not None:
            features.append(torch.cat([torch.zeros(1, num_inputs), u[1:]]))
        y = torch.cat(features, -1)
        if make is Smoothing:
            h = guide.read_sequence.rnn(y.flip(0)[None])[0][0].flip(0)
        else:
            h = guide.read_sequence.rnn(y[None])[0][0]
        *_, s = by_hand(model, z[n], u)
        past, linear = guide.combine.past, guide.combine.to_normal.linear
        c = ((s @ past.weight.mT + past.bias).tanh() + h) / 2
        loc, raw = (c @ linear.weight.mT + linear.bias).split(k, -1)
        torch.testing.assert_close(q.mean[n], loc)
        torch.testing.assert_close(q.stddev[n], F.softplus(raw))


@pytest.mark.parametrize("make", [Filtering, Smoothing])
def test_copies_stay_together(make):
    model, guide = of(make)
    twin, guide_of_twin = copy.deepcopy((model, guide))
    assert guide_of_twin.model is twin is not model and guide.model is model
    assert copy.deepcopy(guide).model is not model
    own = {id(parameter) for parameter in guide.parameters()}
    assert not own & {id(parameter) for parameter in model.parameters()}
    assert guide.state_dict().keys() == dict(guide.named_parameters()).keys()


@pytest.mark.parametrize("make", [Filtering, Smoothing])
def test_the_guide_trains_the_memory_that_it_shares(make):
    """The gradient of the start of the memory counts both uses: by finite differences."""
    model, guide = of(make)
    x, objective = rows(B, T, D), SequentialELBO(kl="sampled", max_plate_nesting=1)

    def loss():
        torch.manual_seed(1)
        return objective.differentiable_loss(model, guide, x)

    (analytic,) = gradients(loss(), torch.nn.ParameterList([model.start]))
    step = 1e-6
    for i in range(H):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                model.start[i] += sign * step
                sides.append(loss())
                model.start[i] -= sign * step
        difference = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(analytic[i], difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0), (2.0, 3), (2, 3, 0), (2, 3, 4, (5,), -1)])
def test_sizes_that_are_none(sizes):
    with pytest.raises(ValueError, match="should be a positive whole number"):
        VRNN(*sizes)


@pytest.mark.parametrize("make", GUIDES)
def test_hidden_of_no_size(make):
    with pytest.raises(ValueError, match="hidden should be a positive whole number"):
        make(small(), 0)
