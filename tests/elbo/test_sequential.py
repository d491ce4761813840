"""SequentialELBO: of loops and of whole sequences, against Pyro's own classes and by hand."""

import itertools
from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from helpers.losses import assert_same, loss_and_grads
from helpers.oracles import mean_and_stderr, rows
from helpers.sequence_data import PARTICLES
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.poutine.messenger import Messenger
from torch.fx.experimental.proxy_tensor import make_fx

import pyproelbo as pe
from pyproelbo.schedules import Linear
from pyproelbo.sequences import (
    Autoregressive,
    IndependentSteps,
    MarkovChain,
    lengths_mask,
    unrolled,
)

B, T, D, K = 3, 4, 2, 2
LENGTHS = torch.tensor([4, 1, 3], device="cpu")
real, positive = programs.real, programs.positive


def data():
    return rows(B, T, D)


def own():
    """One mask for all programs, as one that is an argument of model and guide."""
    return own_on(torch.get_default_device())


@cache
def own_on(device):
    return lengths_mask(LENGTHS.to(device), T)


def weight(name, *shape):
    """A parameter that is nothing special."""
    return pyro.param(name, lambda: 0.5 * rows(*shape) + 0.1)


def normal(loc, name):
    return dist.Normal(loc, positive(name)).to_event(1)


def together(z, u):
    return torch.cat([z, u.expand(z.shape[:-1] + u.shape[-1:])], -1)


# --- programs: each as a loop and with whole sequences -----------------------------------------


def filtering(x, mask):
    """q(z_t | z_{t-1}, x_t): the programs of the seed's equations 9 and 10."""

    def step(z, u):
        return normal(together(z, u) @ weight("C", K + D, K), "q")

    with pyro.plate("data", B):
        first = step(torch.zeros(B, K), x[:, 0])
        pyro.sample("z", MarkovChain(first, step, inputs=x, mask=mask))


def filtering_loop(x, mask):
    z = torch.zeros(B, K)
    with pyro.plate("data", B):
        for t in pyro.markov(range(T)):
            loc = together(z, x[:, t]) @ weight("C", K + D, K)
            with poutine.mask(mask=mask[:, t]):
                z = pyro.sample(f"z_{t}", normal(loc, "q"))


def markov(x, mask):
    def step(z):
        return normal((z @ weight("A", K, K)).tanh(), "p")

    with pyro.plate("data", B):
        first = dist.Normal(torch.zeros(K), 1.0).to_event(1)
        z = pyro.sample("z", MarkovChain(first, step, T, mask=mask))
        emission = normal(z @ weight("H", K, D), "r")
        pyro.sample("x", IndependentSteps(emission, mask), obs=x)


def markov_loop(x, mask):
    prior = dist.Normal(torch.zeros(K), 1.0).to_event(1)
    with pyro.plate("data", B):
        for t in pyro.markov(range(T)):
            with poutine.mask(mask=mask[:, t]):
                z = pyro.sample(f"z_{t}", prior)
                pyro.sample(f"x_{t}", normal(z @ weight("H", K, D), "r"), obs=x[:, t])
            prior = normal((z @ weight("A", K, K)).tanh(), "p")


def data_first_loop(x, mask):
    """x_t is drawn from z_{t-1}, before z_t, some are missing, and the masks are made anew."""
    z = torch.zeros(B, K)
    with pyro.plate("data", B):
        for t in range(T):
            with poutine.mask(mask=mask[:, t] & (torch.arange(B) != t)):
                pyro.sample(f"x_{t}", normal(z @ weight("H", K, D), "r"), obs=x[:, t])
            with poutine.mask(mask=mask[:, t].clone()):
                z = pyro.sample(f"z_{t}", normal(z @ weight("A", K, K), "p"))


def masked_inside(x, mask, role="model"):
    """As Pyro's deep Markov model masks: the features, by slices of one mask."""
    z = torch.zeros(B, K)
    with pyro.plate("data", B):
        for t in pyro.markov(range(T)):
            here = mask[:, t : t + 1]
            if role == "guide":
                loc = together(z, x[:, t]) @ weight("C", K + D, K)
                z = pyro.sample(f"z_{t}", dist.Normal(loc, positive("q")).mask(here).to_event(1))
            else:
                loc = (z @ weight("A", K, K)).tanh()
                z = pyro.sample(f"z_{t}", dist.Normal(loc, positive("p")).mask(here).to_event(1))
                emission = dist.Normal(z @ weight("H", K, D), positive("r")).mask(here)
                pyro.sample(f"x_{t}", emission.to_event(1), obs=x[:, t])


def whole_past(x, mask):
    """p(z_t | z_0, ..., z_{t-1}) by a recurrent state, with inputs."""
    u = 0.1 * x.flip(-1)

    def step(s, u):
        return normal(together(s, u) @ weight("S", 3 + D, K), "p")

    with pyro.plate("data", B):
        chain = Autoregressive(torch.zeros(B, 3), step, remember, inputs=u, mask=mask)
        z = pyro.sample("z", chain)
        emission = normal(z @ weight("H", K, D), "r")
        pyro.sample("x", IndependentSteps(emission, mask), obs=x)


def remember(s, z, u):
    return (0.5 * s + together(z, u) @ weight("R", K + D, 3)).tanh()


def whole_past_loop(x, mask):
    u, s = 0.1 * x.flip(-1), torch.zeros(B, 3)
    with pyro.plate("data", B):
        for t in range(T):
            with poutine.mask(mask=mask[:, t]):
                prior = normal(together(s, u[:, t]) @ weight("S", 3 + D, K), "p")
                z = pyro.sample(f"z_{t}", prior)
                pyro.sample(f"x_{t}", normal(z @ weight("H", K, D), "r"), obs=x[:, t])
            s = remember(s.expand((*z.shape[:-1], 3)), z, u[:, t])


def two_sites(x, mask):
    """A second latent and a second observation in each step."""
    with pyro.plate("data", B):
        first = dist.Normal(torch.zeros(K), 1.0).to_event(1)
        z = pyro.sample("z", MarkovChain(first, lambda z: normal(0.5 * z, "p"), T, mask=mask))
        w = pyro.sample("w", IndependentSteps(dist.Normal(z.sum(-1), positive("pw")), mask))
        pyro.sample("x", IndependentSteps(normal(z + w.unsqueeze(-1), "r"), mask), obs=x)
        pyro.sample("y", IndependentSteps(dist.Normal(w, 1.0), mask), obs=x[..., 0])


def two_sites_guide(x, mask):
    with pyro.plate("data", B):
        first = normal(x[:, 0] @ weight("C", D, K), "q")
        pyro.sample("z", MarkovChain(first, lambda z: normal(z, "q"), T, mask=mask))
        pyro.sample("w", IndependentSteps(dist.Normal(x @ weight("w", D), positive("qw")), mask))


def subsampled(program):
    """Under a plate that stands for more sequences."""

    def run(*args):
        with poutine.scale(scale=7.0):
            program(*args)

    return run


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


def arguments(mask=None):
    return data(), own() if mask is None else mask


def started(*programs_):
    """All parameters there, so that their order does not matter."""
    for program in programs_:
        program(*arguments())


def bound(*args):
    """Programs without arguments, as the helpers of other tests call them."""
    return [lambda program=program: program(*arguments()) for program in args]


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


# --- which site belongs to which timestep -------------------------------------------------------


def static_and_named(x, mask, role="model"):
    """A latent of no timestep, and names of the user's own."""
    with pyro.plate("data", B):
        c = pyro.sample("c", dist.Normal(0.0, 1.0) if role == "model" else
                        dist.Normal(x.mean((1, 2)), positive("qc")))  # fmt: skip
        for t in range(T):
            loc = c if role == "model" else x[:, t, 0] * real("a")
            with poutine.mask(mask=mask[:, t]):
                z = pyro.sample(f"step{t}/z", dist.Normal(loc, positive(role)))
                if role == "model":
                    pyro.sample(
                        f"step{t}/x", normal(z.unsqueeze(-1).expand(B, D), "r"), obs=x[:, t]
                    )


def named(site):
    return int(site[4]) if site.startswith("step") else None


def test_users_own_names():
    model, guide = bound(static_and_named, lambda *args: static_and_named(*args, role="guide"))
    with pytest.raises(ValueError, match=r"site '.*' has no timestep in its name.*time="):
        pe.SequentialELBO().loss(model, guide)
    objective = pe.SequentialELBO(0.5, time=named, time_weights=[0.0, 1.0, 1.0, 1.0])
    loss, _ = loss_and_grads(objective, model, guide)
    terms = objective.last_terms
    assert terms.by_time.timeless == ("c",)
    assert terms.kl_by_time.shape == (T, B)
    kl = terms.kl_by_time[1:].sum() + terms.kl["c"].sum()
    assert loss == pytest.approx(-(terms.reconstruction - 0.5 * kl).item(), rel=1e-12)
    torch.testing.assert_close(terms.kl_by_time.sum() + terms.kl["c"].sum(), terms.shrinkage)
    sampled = loss_and_grads(pe.SequentialELBO(kl="sampled", time=named), model, guide)
    assert_same(sampled, loss_and_grads(Trace_ELBO(), model, guide))


def test_sites_of_one_timestep_and_plates_that_they_do_not_share():
    def model():
        for t in (2, 5):
            z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
            with pyro.plate(f"plate_{t}", 3):
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=rows(3))
                w = pyro.sample(f"w_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"y_{t}", dist.Normal(w, 1.0), obs=rows(3))

    def guide():
        for t in (2, 5):
            pyro.sample(f"z_{t}", dist.Normal(real("l"), positive("s")))
            with pyro.plate(f"plate_{t}", 3):
                pyro.sample(f"w_{t}", dist.Normal(real("lw"), positive("sw")))

    terms = pe.SequentialELBO().terms(model, guide)
    assert terms.time == (2, 5) and terms.kl_by_time.shape == (2,)
    for i, t in enumerate((2, 5)):
        kl = terms.kl[f"z_{t}"] + terms.kl[f"w_{t}"].sum()
        fit = terms.log_likelihood[f"x_{t}"].sum() + terms.log_likelihood[f"y_{t}"].sum()
        torch.testing.assert_close(terms.kl_by_time[i], kl)
        torch.testing.assert_close(terms.reconstruction_by_time[i], fit)


def test_steps_without_data_or_without_latent():
    """A sequence longer than the other, and a first observation without a latent."""

    def model(x, mask):
        pyro.sample("y_0", dist.Normal(0.0, 1.0), obs=x[0, 0, 0])
        for t in range(1, T):
            pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))

    def guide(x, mask):
        for t in range(1, T):
            pyro.sample(f"z_{t}", dist.Normal(1.0, 1.0))

    terms = pe.SequentialELBO().terms(*bound(model, guide))
    assert terms.time == (0, 1, 2, 3)
    torch.testing.assert_close(terms.kl_by_time, torch.tensor([0.0, 0.5, 0.5, 0.5]))
    assert terms.reconstruction_by_time[0] == terms.reconstruction
    assert not terms.reconstruction_by_time[1:].any()


# --- discrete latents ----------------------------------------------------------------------------


def hidden_markov(x, mask):
    logits = weight("logits", 2, 2)
    with pyro.plate("data", B):
        first = dist.Categorical(logits=torch.zeros(2))
        z = pyro.sample("z", MarkovChain(first, lambda z: dist.Categorical(logits=logits[z]), T,
                                         mask=mask))  # fmt: skip
        pyro.sample("x", IndependentSteps(normal(z.unsqueeze(-1) * weight("H", D), "r"), mask),
                    obs=x)  # fmt: skip


def hidden_markov_guide(x, mask):
    def step(z, u):
        return dist.Categorical(logits=u @ weight("U", D, 2) + weight("Z", 2, 2)[z])

    with pyro.plate("data", B):
        first = step(torch.zeros(B, dtype=torch.long), x[:, 0])
        pyro.sample("z", MarkovChain(first, step, inputs=x, mask=mask))


def exact_hidden_markov():
    """The ELBO of each sequence by the sum over all latent sequences."""
    x, mask = arguments()
    elbos = []
    guide = poutine.trace(hidden_markov_guide).get_trace(x, mask)
    for z in itertools.product(range(2), repeat=T):
        z = torch.tensor(z).expand(B, T)
        q = guide.nodes["z"]["fn"].log_prob(z)
        model = poutine.condition(hidden_markov, {"z": z})
        trace = poutine.trace(model).get_trace(x, mask)
        trace.compute_log_prob()
        own_q = torch.where(mask, 0.0, torch.tensor(2.0).log()).sum(-1)  # masked steps: any z
        joint = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
        elbos.append((q - own_q).exp() * (joint - q))
    return sum(elbos)


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_discrete_sequences_by_their_score(kl):
    """The gradient agrees with that of the sum over all sequences."""
    names = ("U", "Z", "logits", "H")
    model, guide = bound(hidden_markov, hidden_markov_guide)
    model(), guide()
    exact = exact_hidden_markov().sum()
    parameters = [pyro.param(name).unconstrained() for name in names]
    wanted = torch.autograd.grad(exact, parameters)
    objective = pe.SequentialELBO(
        kl=kl, num_particles=100, vectorize_particles=True, max_plate_nesting=1
    )
    losses, grads = [], []
    for _ in range(150):
        losses.append(objective.differentiable_loss(model, guide))
        grads.append(torch.autograd.grad(losses[-1], parameters))
    mean, error = mean_and_stderr(torch.stack(losses))
    assert (mean + exact).abs() < 4 * error
    for i, name in enumerate(names):
        mean, error = mean_and_stderr(torch.stack([g[i] for g in grads]))
        assert ((mean + wanted[i]).abs() < 4.5 * error + 1e-12).all(), name


def test_enumerated_loop():
    """A guide that enumerates each step: exact, by timestep."""
    model = unrolled(hidden_markov)
    guide = config_enumerate(unrolled(hidden_markov_guide))
    terms = pe.SequentialELBO(max_plate_nesting=1).terms(*bound(model, guide))
    assert terms.kl_by_time.shape == (T, B)
    total = (terms.reconstruction_by_time - terms.kl_by_time).sum(0)
    torch.testing.assert_close(total, exact_hidden_markov())


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_what_has_no_terms_by_time():
    def summed_out(x, mask):
        z = 0
        for t in pyro.markov(range(T)):
            z = pyro.sample(
                f"z_{t}", dist.Bernoulli(0.3 + 0.2 * z), infer={"enumerate": "parallel"}
            )
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[0, t, 0])

    def nothing(x, mask):
        pass

    def sequence_beside_enumerated(x, mask):
        k = pyro.sample("k_0", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample(
            "x", IndependentSteps(dist.Normal(k.unsqueeze(-1), torch.ones(T))), obs=x[0, :, 0]
        )

    def enumerated(x, mask):
        pyro.sample("k_0", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})

    def plain(x, mask):
        with pyro.plate("data", B):
            pyro.sample("z", dist.Normal(torch.zeros(T, K), 1.0).to_event(2))

    for model, guide, message in [
        (summed_out, nothing, "several timesteps but have one term together"),
        (markov_loop, AutoMultivariateNormal(poutine.block(markov_loop, hide_fn=lambda s: False)),
         "several timesteps but have one KL together"),
        (sequence_beside_enumerated, enumerated, "write its steps as sites of their own"),
        (markov, plain, "a sequence in the model, but not in the guide"),
        (nothing, nothing, "no site has a timestep"),
        (markov_loop, nothing, "the guide has no such site"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pe.SequentialELBO(max_plate_nesting=1).loss(model, guide, *arguments())


@pytest.mark.parametrize("loop", [markov_loop, unrolled(markov)])
def test_autoguides_of_loops(loop):
    model = bound(loop)[0]
    guide = AutoNormal(model)
    guide()
    terms = pe.SequentialELBO(max_plate_nesting=1).terms(model, guide)
    assert terms.kl_by_time.shape == (T, B)
    torch.testing.assert_close(terms.kl_by_time.sum(), terms.shrinkage)


def test_autoguides_of_whole_sequences():
    """The ELBO of Trace_ELBO, without steps."""
    model = bound(markov)[0]
    for auto in (AutoNormal, AutoMultivariateNormal):
        guide = auto(model)
        guide()
        ours = loss_and_grads(pe.BetaELBO(max_plate_nesting=1), model, guide)
        assert_same(ours, loss_and_grads(Trace_ELBO(max_plate_nesting=1), model, guide))
        with pytest.raises(ValueError, match=r"site 'z' is a sequence.*unrolled\(model\)"):
            pe.SequentialELBO(max_plate_nesting=1).loss(model, guide)


def test_an_auxiliary_site_beside_a_sequence():
    """log q of the auxiliary site counts, so that the KL of the sequence has no steps."""

    def guide(x, mask):
        with pyro.plate("data", B):
            q = dist.Normal(real("a"), positive("sa"))
            a = pyro.sample("z_aux", q, infer={"is_auxiliary": True})
            first = normal(a.unsqueeze(-1).expand(*a.shape, K), "q")
            pyro.sample("z", MarkovChain(first, lambda z: normal(z, "q"), T, mask=mask))

    programs_ = bound(markov, guide)
    ours = loss_and_grads(pe.BetaELBO(max_plate_nesting=1), *programs_)
    assert_same(ours, loss_and_grads(Trace_ELBO(max_plate_nesting=1), *programs_))
    with pytest.raises(ValueError, match="its KL has no steps"):
        pe.SequentialELBO(max_plate_nesting=1).loss(*programs_)


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
