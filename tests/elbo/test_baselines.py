"""Baselines of scores: no bias, over all draws that there can be; less variance; TraceGraph's."""

from contextlib import nullcontext
from itertools import pairwise, product

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured_fits import EAGER, assert_trained_alike, num_graphs, trained
from helpers.losses import assert_same, initialised, loss_and_grads
from helpers.oracles import mean_and_stderr, rows
from helpers.programs import positive, real
from pyro import poutine
from pyro.infer import TraceGraph_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger

import pyproelbo as pe
from pyproelbo.sequences import IndependentSteps

MODES = {"looped": {}, "vectorised": {"vectorize_particles": True}}


def levels(wrap=nullcontext, infer=None):
    """A global latent, an auxiliary one of the guide, and one of each of two data."""
    x = rows(2)

    def model():
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with pyro.plate("data", 2), wrap():
            b = pyro.sample("b", dist.Bernoulli((a - 0.4).sigmoid()))
            pyro.sample("x", dist.Normal(2 * b + a, 1.0), obs=x)

    def guide():
        a = pyro.sample("a", dist.Bernoulli(real("qa").sigmoid()))
        q = dist.Bernoulli((real("qu") + a).sigmoid())
        u = pyro.sample("u", q, infer={"is_auxiliary": True})
        with pyro.plate("data", 2), wrap():
            probs = (real("qb", 2) + u - a).sigmoid()
            pyro.sample("b", dist.Bernoulli(probs), infer=dict(infer or {}))

    return model, guide


def masked():
    return levels(lambda: poutine.mask(mask=torch.tensor([True, False])))


def scaled():
    return levels(lambda: poutine.scale(scale=2.5))


def beside_enumeration():
    return levels(infer={"enumerate": "parallel"})


def beside_sequential_enumeration():
    return levels(infer={"enumerate": "sequential"})


PROGRAMS = {f.__name__: f for f in (
    levels, masked, scaled, beside_enumeration, beside_sequential_enumeration,
)}  # fmt: skip


class Set(Messenger):
    """Gives the guide's sites the values of one run after the other; at the end q of those."""

    def __init__(self, runs):
        super().__init__()
        self._runs, self._taken = runs, dict.fromkeys(runs[0], -1)

    def _pyro_sample(self, msg):
        name = msg["name"]
        if name in self._taken and msg["value"] is None and not msg["infer"].get("enumerate"):
            self._taken[name] = (self._taken[name] + 1) % len(self._runs)
            value = self._runs[self._taken[name]][name]
            msg["value"], msg["done"] = value.expand(msg["fn"].shape()), True


def outcomes(enumerated):
    """All values of what is not enumerated, and the log-probability of each."""
    qa, qu, qb = (pyro.param(name).detach() for name in ("qa", "qu", "qb"))
    found = []
    for a, u, *b in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4):
        b = torch.stack(b)
        log_q = dist.Bernoulli(qa.sigmoid()).log_prob(a)
        log_q = log_q + dist.Bernoulli((qu + a).sigmoid()).log_prob(u)
        if not enumerated:
            log_q = log_q + dist.Bernoulli((qb + u - a).sigmoid()).log_prob(b).sum()
            found.append(({"a": a, "u": u, "b": b}, log_q))
        elif not b.any():
            found.append(({"a": a, "u": u}, log_q))
    return found


def gradients(model, guide, objective, one, other):
    together = {n: torch.stack([one[n], other[n]]) for n in one}
    together |= {n: together[n].reshape(2, 1) for n in ("a", "u")}
    with Set([together] if objective.vectorize_particles else [one, other]):
        return loss_and_grads(objective, model, guide)


def two(baselines="leave_one_out", kl="sampled", **kwargs):
    return pe.BetaELBO(
        0.3, kl=kl, num_particles=2, max_plate_nesting=1, baselines=baselines, **kwargs
    )


def moments(model, guide, objective, enumerated):
    """Mean and variance of the gradient of two particles, over all pairs of draws."""
    mean, square, draws = {}, {}, list(enumerate(outcomes(enumerated)))
    for (i, (one, log_q)), (j, (other, other_log_q)) in product(draws, repeat=2):
        if i <= j:
            _, grads = gradients(model, guide, objective, one, other)
            weight = (log_q + other_log_q).exp() * (1 + (i < j))
            for name, grad in grads.items():
                mean[name] = mean.get(name, 0.0) + weight * grad
                square[name] = square.get(name, 0.0) + weight * grad.square()
    return mean, sum((square[name] - mean[name].square()).sum() for name in mean)


@pytest.mark.filterwarnings("ignore:.*possibly invalid dependency")
@pytest.mark.parametrize(("name", "kl"), [
    *((name, "sampled") for name in PROGRAMS), ("levels", "auto"), ("beside_enumeration", "auto"),
])  # fmt: skip
def test_no_bias(name, kl):
    """Of two particles, at beta != 1: against the gradient where the guide enumerates all."""
    model, guide = initialised(PROGRAMS[name])
    exact = pe.BetaELBO(0.3, kl=kl, max_plate_nesting=1)
    _, expected = loss_and_grads(exact, model, config_enumerate(guide))
    mean, _ = moments(model, guide, two(kl=kl, vectorize_particles=True), "beside" in name)
    for site, grad in expected.items():
        torch.testing.assert_close(mean[site], grad, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*possibly invalid dependency")
@pytest.mark.parametrize("name", PROGRAMS)
def test_looped_particles_have_the_gradient_of_vectorised_ones(name):
    model, guide = initialised(PROGRAMS[name])
    draws = [draw for draw, _ in outcomes("beside" in name)]
    for one, other in list(pairwise(draws))[::2]:
        ours = gradients(model, guide, two(), one, other)
        assert_same(ours, gradients(model, guide, two(vectorize_particles=True), one, other))


def test_less_variance():
    """Of all pairs of draws, summed over parameters."""
    model, guide = initialised(levels)
    none, ours = (
        moments(model, guide, two(kind, vectorize_particles=True), False)[1]
        for kind in ("none", "leave_one_out")
    )
    assert ours < none / 4


def amortised(baseline):
    """A latent of each of five data that has a baseline, and one that is reparameterised."""
    net, data = torch.nn.Linear(1, 1), rows(5)

    def model():
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            y = pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(y, 1.0), obs=data)

    def guide():
        pyro.module("net", net)
        asked = {
            "net": {
                "nn_baseline": lambda x: net(x).squeeze(-1),
                "nn_baseline_input": data[:, None],
            },
            "value": {"baseline_value": real("b", 5)},
            "average": {"use_decaying_avg_baseline": True, "baseline_beta": 0.7},
        }
        options = {k: v for kind in baseline.split("+") for k, v in asked[kind].items()}
        with pyro.plate("data", 5):
            probs = real("q", 5).sigmoid()
            z = pyro.sample("z", dist.Bernoulli(probs), infer={"baseline": options})
            pyro.sample("y", dist.Normal(real("m", 5) + z, positive("s", 5)))

    return model, guide


KINDS = ["net", "value", "average", "net+average", "value+average"]


@pytest.mark.parametrize(("kind", "particles"), [
    *((kind, 1) for kind in KINDS), ("net", 3), ("value", 3),
])  # fmt: skip
def test_trains_as_trace_graph_does(kind, particles):
    """Losses, parameters and what baselines learn, step by step."""

    def of(objective):
        torch.manual_seed(0)
        losses, parameters = trained(lambda: amortised(kind), objective, 4)
        averages = [v for n, v in parameters.items() if n.startswith("__baseline")]
        kept = {n: v for n, v in parameters.items() if not n.startswith("__baseline")}
        return (losses, kept), averages

    objective = pe.BetaELBO(kl="sampled", num_particles=particles)
    (ours, _), (theirs, averages) = of(objective), of(TraceGraph_ELBO(num_particles=particles))
    assert_trained_alike(ours, theirs)
    for average in averages:
        torch.testing.assert_close(objective.averages.get_buffer("of_z"), average)
    assert len(averages) == ("average" in kind)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["net+average", "value+average", "leave_one_out"])
def test_captured_steps_are_eager_ones(kind, mode):
    def of(compile):
        torch.manual_seed(0)
        kwargs = {"num_particles": 2, "max_plate_nesting": 1, "compile": compile, **MODES[mode]}
        objective = pe.BetaELBO(0.3, **kwargs)
        programs = levels if kind == "leave_one_out" else lambda: amortised(kind)
        losses, parameters = trained(programs, objective)
        return objective, (losses, {**parameters, **objective.averages.state_dict()})

    (objective, ours), (_, theirs) = of(EAGER), of(False)
    assert_trained_alike(ours, theirs)
    assert num_graphs(objective) == 1


def test_ten_bernoullis():
    """Of eight particles: the mean gradient is that of all 1,024 values, the variance a tenth."""
    weights = torch.linspace(-2.0, 2.0, 10)

    def log_joint(z):
        prior = dist.Bernoulli(0.5).log_prob(z).sum(-1)
        return prior + dist.Normal(z @ weights, 1.0).log_prob(torch.tensor(3.0)) - 20.0

    def model():
        with pyro.plate("switches", 10):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        loc = (z * weights).sum(-1, keepdim=True).squeeze(-1)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(3.0))
        pyro.factor("constant", torch.tensor(-20.0))

    def guide():
        with pyro.plate("switches", 10):
            pyro.sample("z", dist.Bernoulli(real("q", 10).sigmoid()))

    initialised(lambda: (model, guide))
    z, q = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 10), pyro.param("q")
    log_q = dist.Bernoulli(q.sigmoid()).log_prob(z).sum(-1)
    (exact,) = torch.autograd.grad((log_q.exp() * (log_q - log_joint(z))).sum(), q)
    variance = {}
    for baselines in ("leave_one_out", "none"):
        objective = pe.BetaELBO(num_particles=8, baselines=baselines)
        grads = [loss_and_grads(objective, model, guide, seed)[1]["q"] for seed in range(80)]
        mean, error = mean_and_stderr(torch.stack(grads))
        assert ((mean - exact).abs() < 4 * error).all()
        variance[baselines] = torch.stack(grads).var(0).sum()
    assert 10 * variance["leave_one_out"] < variance["none"]


def test_vectorised_particles_move_one_average():
    """By the mean of their costs, whatever the loss is multiplied with."""
    model, guide = amortised("average")
    kwargs = {"kl": "sampled", "num_particles": 4, "vectorize_particles": True}
    for factor in (1.0, 1000.0):
        objective = pe.BetaELBO(max_plate_nesting=1, **kwargs)
        pyro.set_rng_seed(0)
        (factor * objective.differentiable_loss(model, guide)).backward()
        terms = objective.last_terms
        costs = sum(v for part in (terms.log_likelihood, terms.log_prior) for v in part.values())
        costs = costs - sum(terms.log_q.values())
        torch.testing.assert_close(objective.averages.get_buffer("of_z"), 0.3 * costs.mean(0))


def test_looped_particles_move_one_average():
    model, guide = amortised("average")
    objective = pe.BetaELBO(kl="sampled", num_particles=4)
    objective.loss_and_grads(model, guide)
    terms = objective.last_terms
    costs = sum(v for part in (terms.log_likelihood, terms.log_prior) for v in part.values())
    costs = costs - sum(terms.log_q.values())
    torch.testing.assert_close(objective.averages.get_buffer("of_z"), 0.3 * costs.mean(0))


def test_averages_are_in_the_state():
    model, guide = amortised("average")
    objective = pe.BetaELBO()
    objective.loss_and_grads(model, guide)
    other = pe.BetaELBO()
    other.load_state_dict(objective.state_dict())
    pyro.set_rng_seed(0)
    for each in (objective, other):
        each.loss_and_grads(model, guide)
    assert other.step == 2 and objective.averages.get_buffer("of_z").any()
    objective.load_state_dict(pe.BetaELBO().state_dict())
    assert objective.step == 0 and not objective.averages.state_dict()


def test_a_short_last_batch():
    """Its average starts from the mean of what is known."""

    def model(num):
        with pyro.plate("data", num):
            z = pyro.sample("z.local", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(num))

    def guide(num):
        with pyro.plate("data", num):
            options = {"use_decaying_avg_baseline": True}
            q = dist.Bernoulli(real("q").sigmoid())
            pyro.sample("z.local", q, infer={"baseline": options})

    objective = pe.BetaELBO()
    for num in (5, 2, 5):
        objective.loss_and_grads(lambda n=num: model(n), lambda n=num: guide(n))
        assert objective.averages.get_buffer("of_z/local").shape == (num,)


def test_no_average_of_what_is_no_number():
    model, guide = amortised("average")
    objective = pe.BetaELBO()
    (0.0 * objective.differentiable_loss(model, guide)).backward()
    assert not objective.averages.get_buffer("of_z").any()


def test_sequences_and_time():
    """Of a sequence of coins, by SequentialELBO: no bias."""
    x = rows(2, 3)

    def model():
        with pyro.plate("data", 2):
            q = dist.Bernoulli(torch.tensor([0.2, 0.5, 0.6]))
            z = pyro.sample("z", IndependentSteps(q))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", IndependentSteps(dist.Bernoulli(real("q", 2, 3).sigmoid())))

    initialised(lambda: (model, guide))
    q = pyro.param("q")
    kl = torch.distributions.kl_divergence(
        dist.Bernoulli(q.sigmoid()), dist.Bernoulli(torch.tensor([0.2, 0.5, 0.6]).expand(2, 3))
    )
    ones = dist.Normal(1.0, 1.0).log_prob(x) - dist.Normal(0.0, 1.0).log_prob(x)
    (exact,) = torch.autograd.grad((kl - q.sigmoid() * ones).sum(), q)
    spread = {}
    for baselines in ("leave_one_out", "none"):
        objective = pe.SequentialELBO(
            kl="sampled", time=lambda _: None, num_particles=4, vectorize_particles=True,
            max_plate_nesting=1, baselines=baselines,
        )  # fmt: skip
        grads = [loss_and_grads(objective, model, guide, seed)[1]["q"] for seed in range(150)]
        mean, error = mean_and_stderr(torch.stack(grads))
        assert ((mean - exact).abs() < 4 * error).all() and (error < 0.2).all()
        spread[baselines] = error.square().sum()
    assert spread["leave_one_out"] < spread["none"] / 3


@pytest.mark.parametrize(("options", "message"), [
    ({"nn": 3}, "should be a dict with keys of"),
    ("average", "should be a dict with keys of"),
    ({"nn_baseline": abs, "baseline_value": 3.0}, "give one of them"),
    ({"use_decaying_avg_baseline": True, "baseline_beta": 2.0}, "from 0 to 1, got 2.0"),
    ({"baseline_value": torch.zeros(3)}, r"shape of the site's log-density, \(5,\).* got \(3,\)"),
])  # fmt: skip
def test_bad_baselines(options, message):
    def guide():
        with pyro.plate("data", 5):
            q = dist.Bernoulli(real("q", 5).sigmoid())
            pyro.sample("z", q, infer={"baseline": options})

    def model():
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Bernoulli(0.4))

    with pytest.raises(ValueError, match=message):
        pe.BetaELBO().loss_and_grads(model, guide)
    with pytest.raises(ValueError, match="baselines should be one of"):
        pe.BetaELBO(baselines="mean")


def test_objectives_of_weights_say_that_they_have_their_own():
    def programs(infer):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Bernoulli(real("q", 5).sigmoid()), infer=infer)
        return z

    baseline = {"baseline": {"use_decaying_avg_baseline": True}}
    objective = pe.ImportanceWeightedELBO(2)
    with pytest.warns(pe.IgnoredOptionWarning, match="baselines of z do nothing here") as caught:
        for _ in range(3):
            objective.loss_and_grads(lambda: programs({}), lambda: programs(baseline))
    assert len(caught) == 1
    with pytest.raises(TypeError, match="baselines"):
        pe.ImportanceWeightedELBO(2, baselines="none")
