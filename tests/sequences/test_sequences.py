"""Distributions of sequences: their laws, over every family and form of them."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from pyro import poutine
from torch import nn
from torch.distributions import biject_to

from pyproelbo._distributions.family import (
    concatenate_distributions,
    stack_distributions,
    unstack_distributions,
)
from pyproelbo.sequences import (
    Autoregressive,
    IndependentSteps,
    MarkovChain,
    lengths_mask,
    unrolled,
)

B, T, K, U = 3, 5, 2, 4


def inputs():
    return rows(B, T, U)


def weights(*shape):
    return (rows(*shape) + 0.1).requires_grad_()


def _normal(A):
    return lambda z: dist.Normal((z @ A).tanh(), 0.5).to_event(1)


def markov(**options):
    A = weights(K, K)
    chain = MarkovChain(dist.Normal(torch.zeros(B, K), 1.0).to_event(1), _normal(A), T, **options)
    return chain, [A]


def markov_of_scalars(**options):
    a = weights(1)
    initial = dist.Normal(torch.zeros(B), 1.0)
    return MarkovChain(initial, lambda z: dist.Normal(a * z, 0.3), T, **options), [a]


def markov_with_inputs(**options):
    A, C = weights(K, K), weights(U, K)

    def transition(z, u):
        return dist.Normal(z @ A + u @ C, (u[..., :1]).exp()).to_event(1)

    initial = dist.Normal(torch.zeros(K), 1.0).to_event(1)
    return MarkovChain(initial, transition, inputs=inputs(), **options), [A, C]


def markov_of_full_covariance(**options):
    A, L = weights(K, K), torch.tensor([[1.0, 0.0], [0.4, 0.3]])
    initial = dist.MultivariateNormal(torch.zeros(B, K), torch.eye(K))
    return (
        MarkovChain(initial, lambda z: dist.MultivariateNormal(z @ A, scale_tril=L), T, **options),
        [A],
    )


def markov_of_positive(**options):
    a = weights(1)
    initial = dist.Gamma(torch.full((B, K), 2.0), 1.0).to_event(1)

    def transition(z):
        return dist.Gamma(1.0 + z * a.exp(), 1.0 + z).to_event(1)

    return MarkovChain(initial, transition, T, **options), [a]


def markov_of_log_normals(**options):
    a = weights(1)
    initial = dist.LogNormal(torch.zeros(B, K), 1.0).to_event(1)
    return MarkovChain(initial, lambda z: dist.LogNormal(a * z.log(), 0.5).to_event(1), T,
                       **options), [a]  # fmt: skip


def hidden_markov(**options):
    logits = weights(3, 3)
    initial = dist.Categorical(logits=torch.zeros(B, 3))
    return MarkovChain(initial, lambda z: dist.Categorical(logits=logits[z]), T, **options), [
        logits
    ]


def autoregressive(**options):
    torch.manual_seed(3)
    cell, loc = nn.GRUCell(K, 6), nn.Linear(6, K)

    def step(s):
        return dist.Normal(loc(s), 0.5).to_event(1)

    def advance(s, z):
        return cell(z, s)

    return Autoregressive(torch.zeros(B, 6), step, advance, T, **options), [
        loc.weight,
        cell.bias_hh,
    ]


def autoregressive_with_inputs(**options):
    A, C = weights(U + K, 6), weights(6 + U, 2)

    def step(s, u):
        return dist.Bernoulli(logits=torch.cat([s, u], -1) @ C).to_event(1)

    def advance(s, z, u):
        return (0.5 * s + torch.cat([z, u], -1) @ A).tanh()

    return Autoregressive(torch.zeros(6), step, advance, inputs=inputs(), **options), [A, C]


def independent(**options):
    loc = weights(B, T, K)
    return IndependentSteps(dist.Normal(loc, 0.5).to_event(1), **options), [loc]


def independent_of_bits(**options):
    logits = weights(B, T)
    return IndependentSteps(dist.Bernoulli(logits=logits), **options), [logits]


FORMS = {
    f.__name__: f
    for f in (
        markov,
        markov_of_scalars,
        markov_with_inputs,
        markov_of_full_covariance,
        markov_of_positive,
        markov_of_log_normals,
        hidden_markov,
        autoregressive,
        autoregressive_with_inputs,
        independent,
        independent_of_bits,
    )
}
LENGTHS = (5, 1, 3)


def own_steps():
    return lengths_mask(torch.tensor(LENGTHS), T)


def gradients(value, parameters):
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.fixture(params=FORMS)
def make(request):
    return FORMS[request.param]


def test_shapes(make):
    d, _ = make()
    z = d.sample()
    assert d.batch_shape == (B,) and d.event_shape[0] == T == d.num_steps
    assert z.shape == d.batch_shape + d.event_shape
    assert d.sample((2,)).shape == (2, *z.shape)
    assert d.log_prob(d.sample((2,))).shape == (2, B)
    assert d.log_prob_by_time(z).shape == (B, T)
    larger = d.expand((4, B))
    assert larger.sample().shape == (4, *z.shape)
    assert larger.log_prob(larger.sample()).shape == (4, B)
    torch.testing.assert_close(larger.log_prob(z.expand(4, *z.shape)), d.log_prob(z).expand(4, B))
    assert d.support.check(z).all()
    if not d.support.is_discrete:
        assert biject_to(d.support).inv(z).isfinite().all()


def test_density_is_that_of_the_steps(make):
    """All steps at once, against a loop of single ones."""
    d, _ = make()
    z = d.sample()
    given, by_time = z.unbind(-d.event_dim), []

    def draw(t, step):
        by_time.append(step.log_prob(given[t]))
        return given[t]

    d.walk(draw)
    torch.testing.assert_close(d.log_prob_by_time(z), torch.stack(by_time, -1))
    torch.testing.assert_close(d.log_prob(z), sum(by_time))


def test_density_of_the_own_sample(make):
    """What is kept of the sampling gives the numbers and gradients of a fresh evaluation."""
    d, parameters = make()
    z = d()
    again = z.detach().clone()
    torch.testing.assert_close(d.log_prob(z), d.log_prob(again))
    with torch.no_grad():
        z = d()
    kept, fresh = d.log_prob(z).sum(), d.log_prob(z.clone()).sum()
    assert kept.requires_grad  # though it was drawn without
    for a, b in zip(gradients(kept, parameters), gradients(fresh, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_sample_is_differentiable_where_the_steps_are(make):
    d, parameters = make()
    z = d()
    assert z.requires_grad == d.has_rsample
    assert not d.sample().requires_grad
    if d.has_rsample:
        assert any(g.abs().sum() > 0 for g in gradients(z.sum(), parameters))
    else:
        with pytest.raises(NotImplementedError, match="reparameterised"):
            d.rsample()


def test_seed_gives_the_sample_of_the_loop(make):
    d, _ = make()
    torch.manual_seed(5)
    z = d.sample()
    torch.manual_seed(5)
    with torch.no_grad():
        looped = d.joined(d.walk(lambda t, step: step()))
    if not isinstance(d, IndependentSteps):  # these are drawn in one call
        assert torch.equal(z, looped)


def test_masked_steps_add_nothing(make):
    """To density and gradients; NaN there does not matter."""
    mask = own_steps()
    d, parameters = make(mask=mask)
    full, same = make()
    z = full.sample()
    by_time = d.log_prob_by_time(z)
    expected = torch.where(mask, full.log_prob_by_time(z), 0.0)
    assert not by_time[~mask].any()
    torch.testing.assert_close(by_time, expected)
    if z.is_floating_point():
        z = torch.where(mask.reshape(mask.shape + (1,) * (d.event_dim - 1)), z, torch.nan)
        torch.testing.assert_close(d.log_prob(z), expected.sum(-1))
    found, wanted = gradients(d.log_prob(z).sum(), parameters), gradients(expected.sum(), same)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_unrolled_is_the_same_program(make):
    """Sites z_0, z_1, ... with the density of z, sampled as the loop samples."""
    d, _ = make(mask=own_steps())

    def model(value=None):
        with pyro.plate("data", B):
            return pyro.sample("z", make(mask=own_steps())[0], obs=value)

    z = d.sample()
    trace = poutine.trace(unrolled(model)).get_trace(z)
    trace.compute_log_prob()
    by_time = torch.stack([trace.nodes[f"z_{t}"]["log_prob"] for t in range(T)], -1)
    torch.testing.assert_close(by_time, d.log_prob_by_time(z))
    assert "z" not in trace.nodes and torch.equal(trace.nodes["_RETURN"]["value"], z)
    torch.manual_seed(1)
    sampled = unrolled(model)()
    torch.manual_seed(1)
    if not isinstance(d, IndependentSteps):
        assert torch.equal(sampled, model())
    with pyro.plate("particles", 2, dim=-2):
        larger = unrolled(model)()
    assert larger.shape in {(2, *z.shape), (1, *z.shape)}


def test_probabilities_of_all_sequences_sum_to_one():
    logits = weights(2, 2)
    chain = MarkovChain(
        dist.Categorical(torch.tensor([0.3, 0.7])), lambda z: dist.Categorical(logits=logits[z]), 4
    )
    every = torch.tensor(list(itertools.product(range(2), repeat=4)))
    probabilities = chain.log_prob(every).exp()
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))
    draws = chain.sample((20_000,)) @ (2 ** torch.arange(3, -1, -1))
    found = torch.bincount(draws, minlength=16) / len(draws)
    error = (probabilities * (1 - probabilities) / len(draws)).sqrt()
    assert ((found - probabilities).abs() < 4 * error).all()


def test_states_are_those_of_the_recurrence():
    d, _ = autoregressive()
    z, cell_states = d.sample(), d.states(d.sample())
    assert cell_states.shape == (B, T, 6) and not cell_states[:, 0].any()
    step = d.steps(z.clone())
    torch.testing.assert_close(
        step.base_dist.loc[:, 1], d._step_of(d._next_of(d._state, z[:, 0])).base_dist.loc
    )


STEPS = {
    "Normal": dist.Normal(rows(3, 4), 1.0),
    "scalar parameter": dist.Normal(rows(3, 4), 0.3).to_event(0),
    "event": dist.Normal(rows(3, 4, 2), 1.0).to_event(1),
    "two event dims": dist.Normal(rows(3, 4, 2, 2), 1.0).to_event(2),
    "scale_tril": dist.MultivariateNormal(rows(3, 4, 2), scale_tril=torch.eye(2)),
    "covariance": dist.MultivariateNormal(rows(3, 4, 2), torch.eye(2)),
    "precision": dist.MultivariateNormal(rows(3, 4, 2), precision_matrix=torch.eye(2)),
    "Categorical": dist.Categorical(logits=rows(3, 4, 5)),
    "OneHotCategorical": dist.OneHotCategorical(probs=rows(3, 4, 5).softmax(-1)),
    "Bernoulli": dist.Bernoulli(rows(3, 4).sigmoid()),
    "Gamma": dist.Gamma(rows(3, 4).exp(), 1.0),
    "LogNormal": dist.LogNormal(rows(3, 4), 1.0),
    "Dirichlet": dist.Dirichlet(rows(3, 4, 2).exp()),
    "Laplace of events": dist.Laplace(rows(3, 4, 2), 1.0).to_event(1),
    "transformed": dist.TransformedDistribution(
        dist.Normal(rows(3, 4, 2), 1.0).to_event(1), [dist.transforms.ExpTransform()]
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_stacking(name):
    d = STEPS[name]
    parts = unstack_distributions(d)
    value = d.sample()
    assert [p.batch_shape for p in parts] == [(3,)] * 4
    for part, step in zip(parts, value.unbind(1), strict=True):
        assert type(part) is type(d) and part.event_shape == d.event_shape
        assert part.log_prob(step).shape == (3,)
    torch.testing.assert_close(stack_distributions(parts).log_prob(value), d.log_prob(value))
    halves = concatenate_distributions(
        [stack_distributions(parts[:1]), stack_distributions(parts[1:])]
    )
    torch.testing.assert_close(halves.log_prob(value), d.log_prob(value))


def test_what_cannot_be_stacked():
    normal = dist.Normal(torch.zeros(3), 1.0)
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), normal)
    affine = [
        dist.TransformedDistribution(normal, dist.transforms.AffineTransform(0.0, scale))
        for scale in (1.0, 2.0)
    ]
    for parts, message in [
        ([normal, dist.Laplace(torch.zeros(3), 1.0)], "one family, got Normal and Laplace"),
        ([mixture, mixture], "MixtureSameFamily has no parameters"),
        (affine, "or different transforms"),
    ]:
        with pytest.raises(ValueError, match=message):
            stack_distributions(parts)


def test_bad_input():
    normal = dist.Normal(torch.zeros(K), 1.0).to_event(1)
    step = _normal(torch.eye(K))
    holes = torch.tensor([True, False, True])
    for make_bad, message in [
        (lambda: MarkovChain(normal, step), "at least one step.*got none"),
        (lambda: MarkovChain(normal, step, 0), "at least one step.*0 from num_steps"),
        (lambda: MarkovChain(normal, step, 3, inputs=inputs()), "3 from num_steps, 5 from inputs"),
        (lambda: MarkovChain(normal, step, mask=holes), "True up to the length"),
        (lambda: MarkovChain(normal.expand((7,)), step, mask=own_steps()), "do not broadcast"),
        (lambda: MarkovChain(normal, lambda z: dist.Normal(z, 1.0), 3)(), "any leading dims"),
        (lambda: MarkovChain(normal, lambda z: normal.expand((7,)), 3)(), "any leading dims"),
        (
            lambda: MarkovChain(normal, lambda z: dist.Laplace(z, 1.0).to_event(1), 3)(),
            "one family, got Normal and Laplace",
        ),
        (lambda: MarkovChain(normal, step, 3).log_prob(torch.zeros(4, K)), r"shape \(..., 3, 2\)"),
        (lambda: MarkovChain(normal, step, 3).log_prob(torch.full((3, K), torch.nan)), "holds NaN"),
        (lambda: IndependentSteps(normal), "rightmost batch dim"),
        (lambda: IndependentSteps(normal.expand((3, T)), own_steps()[:, :2]), "a value for each"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_bad()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([1, 6]), "from 1 to the number of steps, 5, got values from 1 to 6"),
        (torch.tensor([0, 5]), "leave empty sequences out"),
        (torch.tensor([1.0]), "whole numbers"),
        (torch.tensor([True]), "whole numbers"),
    ],
)
def test_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        lengths_mask(lengths, T)
    expected = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    assert torch.equal(own_steps(), expected)
