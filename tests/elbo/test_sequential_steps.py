"""Which site belongs to which timestep, and latents that are discrete or an autoguide's."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.losses import assert_same, loss_and_grads
from helpers.oracles import mean_and_stderr, rows
from helpers.sequential_programs import (
    B,
    D,
    K,
    T,
    arguments,
    bound,
    markov,
    markov_loop,
    normal,
    positive,
    real,
    weight,
)
from pyro import poutine
from pyro.infer import Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyproelbo as pe
from pyproelbo.sequences import (
    IndependentSteps,
    MarkovChain,
    unrolled,
)

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


@pytest.mark.slow
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
        (sequence_beside_enumerated, enumerated, "write its steps as separate sites"),
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
