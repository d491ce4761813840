"""The deep Markov model and its guides: the laws of sequences, and their equations by hand."""

import itertools

import pytest
import torch
from helpers.modules import at_random
from helpers.oracles import rows
from helpers.sequence_data import B, D, T, k
from helpers.sequence_laws import LIKELIHOODS, SequenceLaws, arguments_of, known_at
from torch.nn import functional as F

from pyproelbo.guides.dmm import Bidirectional, Filtering, MeanField, Smoothing
from pyproelbo.models.dmm import DMM, GatedTransition

GUIDES = [Smoothing, Filtering, Bidirectional, MeanField]
H = 6


def small(likelihood="Gaussian", num_latents=k, num_features=D, dataset_size=None):
    return DMM(num_latents, num_features, (5,), 4, LIKELIHOODS[likelihood](), dataset_size)


PAIRS = {
    f"{guide.__name__}, {likelihood}": (guide, likelihood)
    for guide, likelihood in zip(GUIDES, itertools.cycle(LIKELIHOODS), strict=False)
}


@pytest.fixture(params=PAIRS)
def make(request):
    guide, likelihood = PAIRS[request.param]

    def pair(num_latents=k, num_features=D, dataset_size=None):
        sizes = num_latents, num_features
        return small(likelihood, *sizes, dataset_size), guide(*sizes, H, dataset_size=dataset_size)

    return pair


class TestDMM(SequenceLaws):
    """All laws."""


# --- the model -----------------------------------------------------------------------------------


def affine(layer, x):
    return x @ layer.weight.mT + layer.bias


def two_layers(net, x):
    return affine(net[2], affine(net[0], x).relu())


def moves_to(transition, z):
    """The mean and the scale of z_t given one z_{t-1}: Krishnan et al. (2017), section 5."""
    g = two_layers(transition.gate, z).sigmoid()
    h = two_layers(transition.proposal, z)
    loc = (1 - g) * affine(transition.linear, z) + g * h
    return loc, F.softplus(affine(transition.raw_scale, h.relu()))


def test_gated_transition_by_hand():
    (transition,) = at_random(GatedTransition(3, 5))
    z = rows(2, 4, 3)
    p = transition(z)
    assert p.batch_shape == (2, 4) and p.event_shape == (3,)
    loc, scale = moves_to(transition, z)
    torch.testing.assert_close(p.mean, loc)
    torch.testing.assert_close(p.stddev, scale)


def test_transition_starts_as_a_mixture_of_the_identity_and_a_net():
    transition, z = GatedTransition(3, 5), rows(4, 3)
    torch.testing.assert_close(transition.linear(z), z)
    lower, upper = (torch.stack([z, transition.proposal(z)]).sort(0).values).unbind()
    assert ((lower < transition(z).mean) & (transition(z).mean < upper)).all()


def test_prior_by_hand():
    (model,) = at_random(small())
    z = rows(B, T, k)
    expected = torch.zeros(B, T)
    for n in range(B):
        past = model.start
        for t in range(T):
            expected[n, t] = torch.distributions.Normal(*moves_to(model.transition, past)).log_prob(
                z[n, t]
            ).sum()  # fmt: skip
            past = z[n, t]
    torch.testing.assert_close(model.prior(T).log_prob_by_time(z), expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_emission_by_hand(likelihood):
    (model,) = at_random(small(likelihood))
    z = rows(B, T, k)
    output = two_layers(model.emission, z)
    expected = output.sigmoid() if likelihood == "Bernoulli" else output
    torch.testing.assert_close(model.decode(z).mean, expected)
    with pytest.raises(ValueError, match=r"z should have shape \(..., 2\)"):
        model.decode(rows(B, T, 3))


def test_likelihood_is_bernoulli_by_default():
    assert isinstance(DMM(k, D).likelihood, LIKELIHOODS["Bernoulli"])


# --- what a step of a guide knows ----------------------------------------------------------------

KNOWN = {  # of x, and of z, at step t
    Smoothing: (lambda s, t: s >= t, lambda s, t: s == t - 1),
    Filtering: (lambda s, t: s <= t, lambda s, t: s == t - 1),
    Bidirectional: (lambda s, t: s >= 0, lambda s, t: s == t - 1),
    MeanField: (lambda s, t: s >= 0, lambda s, t: s < 0),
}


@pytest.mark.parametrize("t", [0, 3, T - 1])
@pytest.mark.parametrize("make", GUIDES)
def test_what_a_step_of_a_guide_knows(make, t):
    (guide,) = at_random(make(k, D, H))
    for found, known in zip(known_at(guide, t), KNOWN[make], strict=True):
        assert torch.equal(found, known(torch.arange(T), t))


@pytest.mark.parametrize("make", GUIDES)
def test_what_a_step_of_a_guide_knows_of_what_is_observed(make):
    """A missing x_t is no x_t of 0; in the padding nothing is known."""
    (guide,) = at_random(make(k, D, H))
    x, z = rows(B, T, D), rows(B, T, k)
    x[:, 3] = 0
    observed = torch.ones(B, T, dtype=torch.bool)
    observed[:, 3] = False
    found, expected = (guide.posterior(x, observed=o).log_prob(z) for o in (observed, None))
    assert (found != expected).all()


# --- guides by hand ------------------------------------------------------------------------------


def read(gru, x):
    """What a GRU has read of one sequence whose steps are all there, (T, H)."""
    y = torch.cat([x, torch.ones(len(x), 1)], -1)
    return gru(y.unsqueeze(0))[0][0]


@pytest.mark.parametrize("make", GUIDES)
def test_posterior_by_hand(make):
    """The combiners of Krishnan et al. (2017), section 4."""
    (guide,) = at_random(make(k, D, H))
    x, z = rows(B, T, D), rows(B, T, k)
    q = guide.posterior(x).steps(z)
    nets = [reader.rnn for reader in guide.read_sequence]
    for n in range(B):
        forward, backward = read(nets[0], x[n]), read(nets[-1], x[n].flip(0)).flip(0)
        if make is MeanField:
            c, to_normal = forward + backward, guide.to_normal
        else:
            past = torch.cat([guide.start[None], z[n, :-1]])
            past, to_normal = affine(guide.combine.past, past).tanh(), guide.combine.to_normal
            c = {
                Filtering: (past + forward) / 2,
                Smoothing: (past + backward) / 2,
                Bidirectional: (past + forward + backward) / 3,
            }[make]
        loc, raw = affine(to_normal.linear, c).split(k, -1)
        torch.testing.assert_close(q.mean[n], loc)
        torch.testing.assert_close(q.stddev[n], F.softplus(raw))


def test_any_recurrent_net():
    for rnn in (torch.nn.LSTM, torch.nn.RNN):
        model = small()
        guide = Smoothing(k, D, H, rnn=lambda n, h, rnn=rnn: rnn(n, h, batch_first=True))
        arguments, _ = arguments_of(model, lengths=True)
        assert guide.posterior(**arguments).event_shape == (T, k)
        assert isinstance(guide.read_sequence[0].rnn, rnn)


@pytest.mark.parametrize("make", [DMM, *GUIDES])
@pytest.mark.parametrize("sizes", [(0, 3), (2, 0), (2.0, 3)])
def test_sizes_that_are_none(make, sizes):
    with pytest.raises(ValueError, match="should be a positive whole number"):
        make(*sizes)
