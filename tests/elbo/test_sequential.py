"""SequentialELBO: of loops and of whole sequences, against Pyro's own classes and by hand."""

import itertools
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.losses import assert_same, loss_and_grads
from helpers.oracles import mean_and_stderr
from helpers.sequence_data import PARTICLES
from helpers.sequential_programs import (
    B,
    T,
    arguments,
    bound,
    data,
    data_first_loop,
    filtering,
    filtering_loop,
    markov,
    markov_loop,
    masked_inside,
    own,
    subsampled,
    two_sites,
    two_sites_guide,
    whole_past,
    whole_past_loop,
)
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch.fx.experimental.proxy_tensor import make_fx

import pyproelbo as pe
from pyproelbo.schedules import Linear
from pyproelbo.sequences import (
    unrolled,
)

PAIRS = {  # model and guide with whole sequences, and as loops
    "markov": (markov, filtering, markov_loop, filtering_loop),
    "whole past": (whole_past, filtering, whole_past_loop, filtering_loop),
    "scaled": (*map(subsampled, (markov, filtering, markov_loop, filtering_loop)),),
    "unrolled": (markov, filtering, unrolled(markov), unrolled(filtering)),
    "unrolled past": (whole_past, filtering, unrolled(whole_past), filtering_loop),
}
LOOPS = {
    "markov": (markov_loop, filtering_loop),
    "masked inside": (masked_inside, partial(masked_inside, role="guide")),
    "whole past": (whole_past_loop, filtering_loop),
    "data first": (data_first_loop, filtering_loop),
    "unrolled": (unrolled(markov), unrolled(filtering)),
    "scaled": (subsampled(markov_loop), subsampled(filtering_loop)),
}


def started(*programs_):
    """All parameters there, so that their order does not matter."""
    for program in programs_:
        program(*arguments())


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("name", LOOPS)
def test_sampled_is_trace_elbo(name, particles):
    """Value and gradient at the same seed."""
    model, guide = bound(*LOOPS[name])
    options = {"max_plate_nesting": 1, **PARTICLES[particles]}
    ours = loss_and_grads(pe.SequentialELBO(kl="sampled", **options), model, guide)
    assert_same(ours, loss_and_grads(Trace_ELBO(**options), model, guide))


@pytest.mark.parametrize("name", ["markov", "masked inside", "whole past", "scaled"])
def test_closed_form_is_trace_mean_field_elbo(name):
    model, guide = bound(*LOOPS[name])
    objective = pe.SequentialELBO(max_plate_nesting=1)
    ours = loss_and_grads(objective, model, guide)
    assert objective.last_terms.analytic == {f"z_{t}" for t in range(T)}
    assert_same(ours, loss_and_grads(TraceMeanField_ELBO(max_plate_nesting=1), model, guide))


@pytest.mark.parametrize("kl", ["auto", "analytic", "sampled"])
@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("name", PAIRS)
def test_whole_sequences_are_the_loop(name, particles, kl):
    """Loss, gradients and all terms by time."""
    started(*PAIRS[name])
    objective = pe.SequentialELBO(kl=kl, max_plate_nesting=1, **PARTICLES[particles])
    results, terms = [], []
    for model, guide in (PAIRS[name][:2], PAIRS[name][2:]):
        results.append(loss_and_grads(objective, *bound(model, guide)))
        terms.append(objective.last_terms)
    assert_same(*results)
    whole, loop = terms
    assert whole.time == loop.time == tuple(range(T))
    torch.testing.assert_close(whole.kl_by_time, loop.kl_by_time)
    torch.testing.assert_close(whole.reconstruction_by_time, loop.reconstruction_by_time)
    for part in ("elbo", "reconstruction", "shrinkage", "energy", "entropy"):
        torch.testing.assert_close(getattr(whole, part), getattr(loop, part))
    assert whole.kl_by_time.shape == {"one": (T, B)}.get(particles, (T, 2, B))


@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize(
    "programs_", [*(v[:2] for v in PAIRS.values()), (two_sites, two_sites_guide), *LOOPS.values()]
)
def test_terms_by_time_sum_to_the_elbo(programs_, kl):
    model, guide = bound(*programs_)
    for particles in PARTICLES.values():
        objective = pe.SequentialELBO(kl=kl, max_plate_nesting=1, **particles)
        terms = objective.terms(model, guide)
        n = terms.num_particles
        torch.testing.assert_close(terms.reconstruction_by_time.sum() / n, terms.reconstruction)
        torch.testing.assert_close(terms.kl_by_time.sum() / n, terms.shrinkage)
        pyro.set_rng_seed(4)
        loss = objective.loss(model, guide)
        pyro.set_rng_seed(4)
        assert loss == pytest.approx(pe.BetaELBO(kl=kl, max_plate_nesting=1, **particles).loss(
            model, guide), rel=1e-10)  # fmt: skip


@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize("name", PAIRS)
def test_padding_adds_nothing(name, kl):
    """Terms are 0 there, and what is in x changes neither loss nor gradients."""
    results = []
    for padding in (0.0, 1e3):
        mask = own()
        x = torch.where(mask.unsqueeze(-1), data(), padding)
        for model, guide in (PAIRS[name][:2], PAIRS[name][2:]):
            objective = pe.SequentialELBO(kl=kl, max_plate_nesting=1)
            started(model, guide)
            results.append(
                loss_and_grads(objective, partial(model, x, mask), partial(guide, x, mask))
            )
            terms = objective.last_terms
            assert not terms.kl_by_time[~mask.mT].any()
            assert not terms.reconstruction_by_time[~mask.mT].any()
            assert torch.equal(terms.by_time.mask, mask.mT)
    for result in results[1:]:
        assert_same(result, results[0])


def test_which_steps_count():
    for model, guide in LOOPS.values():
        by_time = pe.SequentialELBO(max_plate_nesting=1).terms(*bound(model, guide)).by_time
        assert torch.equal(by_time.mask, own().mT)
        missing = own() & (torch.arange(T) != torch.arange(B)[:, None])
        observed = missing if model is data_first_loop else own()
        assert torch.equal(by_time.observed, observed.mT)


def test_a_shorter_sequence_alone():
    """The terms of a padded sequence are those of the sequence by itself."""
    x, mask = arguments()
    objective = pe.SequentialELBO(max_plate_nesting=1)
    started(markov, filtering)
    pyro.set_rng_seed(0)
    terms = objective.terms(markov, filtering, x, mask)
    poisoned = torch.where(mask.unsqueeze(-1), x, torch.nan)
    pyro.set_rng_seed(0)

    def guide(x, mask):
        filtering(x.nan_to_num(), mask)  # a guide's net has to read something

    again = objective.terms(markov, guide, poisoned, mask)
    torch.testing.assert_close(again.elbo, terms.elbo)
    torch.testing.assert_close(again.reconstruction_by_time, terms.reconstruction_by_time)


@pytest.mark.slow
def test_closed_form_has_the_expectation_of_the_sampled_and_less_variance():
    model, guide = bound(markov, filtering)
    elbos, slopes = {}, {}
    for kl in ("auto", "sampled"):
        objective = pe.SequentialELBO(
            kl=kl, max_plate_nesting=1, num_particles=4000, vectorize_particles=True
        )
        pyro.set_rng_seed(2)
        terms = objective.terms(model, guide)
        elbos[kl] = (terms.reconstruction_by_time - terms.kl_by_time).sum((0, 2))
        one = pe.SequentialELBO(kl=kl, max_plate_nesting=1)
        slopes[kl] = torch.stack(
            [loss_and_grads(one, model, guide, seed=seed)[1]["C"] for seed in range(300)]
        )
    for draws in (elbos, slopes):
        (a, s), (b, r) = (mean_and_stderr(draws[kl]) for kl in ("auto", "sampled"))
        assert ((a - b).abs() < 4 * (s**2 + r**2).sqrt()).all()
        assert draws["auto"].var(0).sum() < draws["sampled"].var(0).sum()


class Weighted(Messenger):
    """Multiplies the scale of latent sites: beta and the weights of timesteps by other means."""

    def __init__(self, weight_of):
        super().__init__()
        self.weight_of = weight_of

    def _pyro_sample(self, msg):
        if not msg["is_observed"] and not poutine.util.site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.weight_of(int(msg["name"].split("_")[1]))


@pytest.mark.parametrize(
    ("kl", "particles"),  # TraceMeanField_ELBO cannot vectorise
    [("auto", "one"), ("auto", "looped"), *(("sampled", name) for name in PARTICLES)],
)
def test_weights(kl, particles):
    """beta times a weight for each timestep, on loops and on whole sequences."""
    by_time = [0.3, 0.0, 2.0, 1.0, 9.0]
    options = {"max_plate_nesting": 1, **PARTICLES[particles]}
    wrapped = [Weighted(lambda t: 0.5 * by_time[t])(p) for p in bound(markov_loop, filtering_loop)]
    pyros = TraceMeanField_ELBO if kl == "auto" else Trace_ELBO
    expected = loss_and_grads(pyros(**options), *wrapped)
    for weights in (by_time, torch.tensor(by_time), lambda t: by_time[t]):
        for model, guide in PAIRS["markov"][:2], PAIRS["markov"][2:]:
            objective = pe.SequentialELBO(0.5, kl, time_weights=weights, **options)
            found = loss_and_grads(objective, *bound(model, guide))
            assert_same(found, expected)
    terms = objective.last_terms
    assert terms.elbo.item() == pytest.approx(terms.reconstruction.item() - terms.shrinkage.item())


def test_schedule_counts_steps():
    objective = pe.SequentialELBO(Linear(0.0, 1.0, steps=4), max_plate_nesting=1)
    for beta in (0.0, 0.25, 0.5):
        loss, _ = loss_and_grads(objective, *bound(markov, filtering))
        terms = objective.last_terms
        expected = terms.reconstruction - beta * terms.shrinkage
        assert loss == pytest.approx(-expected.item(), rel=1e-12)


# --- the rest ------------------------------------------------------------------------------------


def test_other_objectives_take_whole_sequences():
    started(markov, filtering)
    for make in (pe.BetaELBO, lambda **k: pe.FreeBitsELBO(0.1, **k)):
        objective = make(max_plate_nesting=1)
        whole = loss_and_grads(objective, *bound(markov, filtering))
        assert objective.last_terms.analytic == {"z"}
        with pytest.raises(ValueError, match="take those of a SequentialELBO"):
            _ = objective.last_terms.kl_by_time
        if make is pe.BetaELBO:
            loop = loss_and_grads(objective, *bound(markov_loop, filtering_loop))
            assert_same(whole, loop)


def test_trace_elbo_takes_whole_sequences():
    started(markov, filtering)
    whole = loss_and_grads(Trace_ELBO(max_plate_nesting=1), *bound(markov, filtering))
    loop = loss_and_grads(Trace_ELBO(max_plate_nesting=1), *bound(markov_loop, filtering_loop))
    assert_same(whole, loop)


def test_masks_made_twice():
    """Equal masks that are different tensors: the closed form where they agree."""

    def guide(x, mask):
        filtering(x, mask.clone())

    def guide_loop(x, mask):
        filtering_loop(x, mask.clone())

    started(markov, filtering)
    objective = pe.SequentialELBO(max_plate_nesting=1)
    expected = loss_and_grads(objective, *bound(markov, filtering))
    for programs_ in ((markov, guide), (markov_loop, guide_loop)):
        assert_same(loss_and_grads(objective, *bound(*programs_)), expected)
        assert objective.last_terms.analytic


def test_masks_that_differ():
    """Where they do not agree, log q and log p count each where its own mask says."""

    def guide(x, mask):
        filtering(x, torch.ones_like(mask))

    def guide_loop(x, mask):
        filtering_loop(x, torch.ones_like(mask))

    started(markov, filtering)
    for kl in ("auto", "sampled"):
        objective = pe.SequentialELBO(kl=kl, max_plate_nesting=1)
        whole = loss_and_grads(objective, *bound(markov, guide))
        assert_same(whole, loss_and_grads(objective, *bound(markov_loop, guide_loop)))
    assert_same(whole, loss_and_grads(Trace_ELBO(max_plate_nesting=1), *bound(markov, guide)))


@pytest.mark.parametrize("particles", ["one", "vectorised"])
def test_capture(particles):
    """make_fx captures loss and gradients in one graph that equals eager at the same seed."""
    started(markov, filtering)
    x, mask = arguments()
    objective = pe.SequentialELBO(
        Linear(0.0, 1.0, 10), time_weights=[1.0, 0.5, 1.0, 2.0], max_plate_nesting=1,
        **PARTICLES[particles],
    )  # fmt: skip
    parameters = [p.unconstrained() for p in map(pyro.param, ("C", "q", "A", "p", "H", "r"))]

    def step(x):
        loss = objective.differentiable_loss(markov, filtering, x, mask)
        return loss, torch.autograd.grad(loss, parameters)

    with pyro.validation_enabled(False):
        graph = make_fx(step)(x)
        assert not any("_local_scalar_dense" in str(node.target) for node in graph.graph.nodes)
        objective.step = 0
        pyro.set_rng_seed(1)
        loss, grads = graph(x)
        pyro.set_rng_seed(1)
        expected, wanted = step(x)
    assert torch.equal(loss, expected)
    for a, b in zip(grads, wanted, strict=True):
        assert torch.equal(a, b)


def test_bad_input():
    for kwargs, message in [
        ({"beta": -1.0}, "beta should not be negative"),
        ({"time_weights": [-1.0]}, "time_weights should be a sequence"),
        ({"time_weights": [float("nan")]}, "time_weights should be a sequence"),
        ({"time_weights": 2.0}, "time_weights should be a sequence"),
        ({"time_weights": [1.0, 2.0]}, "a weight for each timestep up to 3, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            pe.SequentialELBO(max_plate_nesting=1, **kwargs).loss(*bound(markov, filtering))


def test_nan_in_what_counts():
    x, mask = arguments()
    x[0, 1, 0] = torch.nan
    for model, guide in ((markov, filtering), (markov_loop, filtering_loop)):
        with pytest.raises(ValueError, match=r"NaN|nan"):
            pe.SequentialELBO(max_plate_nesting=1).loss(model, guide, x, mask)


def test_lengths_of_runs_that_differ():
    lengths = itertools.count(1)

    def model(*args):
        for t in range(model.length):
            pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))

    def guide(*args):
        model.length = next(lengths)
        model()

    with pytest.raises(ValueError, match="different timesteps"):
        pe.SequentialELBO(num_particles=2).loss(model, guide)
