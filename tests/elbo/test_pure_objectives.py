"""An objective is a function of its Terms and its weights: of nothing that has been run before."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from pyro.infer import config_enumerate

import pyproelbo as pe
from pyproelbo.schedules import Linear
from pyproelbo.sequences import Emission, MarkovChain

OBJECTIVES = {
    "beta": lambda: pe.BetaELBO(Linear(0.2, 1.0, steps=10)),
    "beta, particles": lambda: pe.BetaELBO(0.7, num_particles=3),
    "capacity": lambda: pe.CapacityELBO(0.5, gamma=3.0),
    "free bits": lambda: pe.FreeBitsELBO(0.8),
    "surgery": lambda: pe.SurgeryELBO(None),
    "total correlation": lambda: pe.TotalCorrelationELBO(2.0, 3.0, 0.5),
    "importance weighted": lambda: pe.ImportanceWeightedELBO(4),
    "importance weighted, at once": lambda: pe.ImportanceWeightedELBO(4, vectorize_particles=True),
    "doubly reparameterised": lambda: pe.ImportanceWeightedELBO(4, "doubly_reparameterised"),
    "renyi": lambda: pe.RenyiELBO(0.5, 4),
    "wake-sleep": lambda: pe.ReweightedWakeSleepELBO(4),
}


def normal(num, size=None, shift=0.0):
    """A latent for each of ``num`` data, which stand for ``size``."""
    x, size = rows(num, 2) + shift, size or num

    def plate():
        return pyro.plate("data", size, subsample=torch.arange(num), dim=-1)

    def model():
        with plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide():
        scale = pyro.param("scale", torch.tensor(0.7))
        with plate():
            pyro.sample("z", dist.Normal(0.4 * x, scale).to_event(1))

    return model, guide


def nested():
    """Data in a plate of groups, which have a latent each."""
    x = rows(3, 4)

    def model():
        with pyro.plate("groups", 3, dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("members", 4, dim=-1):
                pyro.sample("x", dist.Normal(u, 0.5), obs=x)

    def guide():
        with pyro.plate("groups", 3, dim=-2):
            pyro.sample("u", dist.Normal(0.3 * x.mean(1, keepdim=True), 0.8))

    return model, guide


def scored(num):
    """A latent whose draws have no gradient."""

    def model():
        with pyro.plate("data", num):
            z = pyro.sample("z", dist.Poisson(2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(num))

    def guide():
        rate = pyro.param("rate", torch.tensor(1.5))
        with pyro.plate("data", num):
            pyro.sample("z", dist.Poisson(rate))

    return model, guide


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_in_between_changes_it(name):
    objective, other = OBJECTIVES[name](), nested()
    model, guide = normal(5, 20)
    terms = objective.terms(model, guide)
    before = objective.objective(terms)

    objective.terms(*normal(3, 3, shift=4.0))
    if name not in ("total correlation", "importance weighted, at once"):
        objective.terms(*other)
    assert objective.objective(terms) == before
    assert OBJECTIVES[name]().objective(terms) == before  # and one that has run nothing
    assert objective.records.all() == {}

    objective.loss_and_grads(*normal(7, 14, shift=-1.0))
    objective.step = 0
    assert objective.objective(terms) == before
    assert copy.deepcopy(objective).objective(terms) == before


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_leaves_no_record(name):
    objective = OBJECTIVES[name]()
    objective.loss_and_grads(*normal(5, 20))
    terms, known = objective.terms(*normal(6, 12)), objective.records.all().copy()
    objective.objective(terms)
    assert all(objective.records[key] is value for key, value in known.items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_of_stored_terms_it_is_what_the_step_returned(name):
    objective = OBJECTIVES[name]()
    loss = objective.loss_and_grads(*normal(5, 20))
    objective.step = 0
    if name == "total correlation":
        with pytest.raises(ValueError, match="detached"):
            objective.objective(objective.last_terms)
    else:
        assert objective.objective(objective.last_terms).item() == pytest.approx(-loss)


def test_weights_are_those_of_the_plate_of_the_terms():
    """By hand, for rows that stand for four each: the plate is none of the objective's."""
    model, guide = normal(5, 20)
    terms = pe.BetaELBO(num_particles=6, kl="sampled").terms(model, guide)
    log_w = (terms.log_likelihood["x"] + terms.log_prior["z"] - terms.log_q["z"]).reshape(6, 5) / 4
    expected = 4 * (log_w.logsumexp(0) - torch.tensor(6.0).log()).sum()
    found = pe.ImportanceWeightedELBO(6).objective(terms)
    torch.testing.assert_close(found, expected)


def test_terms_know_their_plates_and_draws():
    model, guide = normal(5, 20)
    terms = pe.BetaELBO(num_particles=2, vectorize_particles=True).terms(model, guide)
    (plate,) = (plate for plate in terms.plates["z"] if plate.name == "data")
    assert (plate.dim, plate.size, plate.full_size) == (-1, 5, 20)
    assert terms.plates["x"] == terms.plates["z"] and terms.drawn == {"z"}
    assert terms.scales == {"z": (4.0, 4.0), "x": (4.0,)} and not terms.scored
    assert terms.draws[0]["z"] is terms.latents[0]["z"].value
    assert terms.detach().draws == () and terms.detach().plates == terms.plates


def test_graphs_of_other_gradients_are_refused():
    doubly = pe.ImportanceWeightedELBO(3, "doubly_reparameterised")

    class Twice(pe.TermsELBO):
        def objective(self, terms):
            return doubly.objective(terms)

    with pytest.raises(ValueError, match="terms that it has computed itself"):
        Twice(num_particles=3).loss_and_grads(*normal(4))
    doubly = pe.ImportanceWeightedELBO(3)
    model, guide = normal(4)
    gradients = []
    for objective in (Twice(num_particles=3), pe.ImportanceWeightedELBO(3)):
        pyro.set_rng_seed(3)
        objective.loss_and_grads(model, guide)
        leaf = pyro.param("scale").unconstrained()
        gradients.append(leaf.grad.clone())
        leaf.grad = None
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="those of an expectation"):
        Twice(num_particles=3).loss_and_grads(*scored(4))


def test_terms_of_an_enumerated_guide_have_no_weights():
    model, guide = scored(3)
    guide = config_enumerate(poisson_as_categorical(guide))
    terms = pe.BetaELBO(kl="sampled").terms(poisson_as_categorical(model), guide)
    assert terms.enumerated == {"z"} and not terms.drawn
    with pytest.raises(ValueError, match="the guide enumerates"):
        pe.ImportanceWeightedELBO(2).objective(terms)


def poisson_as_categorical(program):
    class Categorical(pyro.poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] == "z":
                msg["fn"] = dist.Categorical(torch.tensor([0.2, 0.5, 0.3])).expand([3])

    return Categorical()(program)


def test_terms_that_do_not_tell_if_latents_depend_on_each_other():
    def model():
        with pyro.plate("data", 4):
            for name in ("a", "b"):
                pyro.sample(name, dist.Normal(0.0, 1.0))

    def guide():
        with pyro.plate("data", 4):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    terms, watched = pe.BetaELBO().terms(model, guide), pe.SurgeryELBO(None)
    with pytest.raises(ValueError, match="do not record whether the guide draws one"):
        watched.surgery(terms)
    assert watched.terms(model, guide).conditional == {"b"}
    one = pe.SurgeryELBO(None, site="a")
    assert one.surgery(terms).average_kl.isfinite()


def test_two_guides_of_one_objective_keep_their_structure():
    """One draws b given a, the other does not: the surgery of either is what it is by itself."""

    def model():
        with pyro.plate("data", 4):
            for name in ("a", "b"):
                pyro.sample(name, dist.Normal(0.0, 1.0))

    def independent():
        with pyro.plate("data", 4):
            for name in ("a", "b"):
                pyro.sample(name, dist.Normal(rows(4), 0.5))

    def chained():
        with pyro.plate("data", 4):
            a = pyro.sample("a", dist.Normal(rows(4), 0.5))
            pyro.sample("b", dist.Normal(a, 0.5))

    objective = pe.SurgeryELBO(None)
    terms = {guide: objective.terms(model, guide) for guide in (independent, chained)}
    for guide in (chained, independent, chained):
        alone = pe.SurgeryELBO(None).surgery(terms[guide], guide)
        assert objective.surgery(terms[guide], guide) == alone


def test_log_evidence_of_a_filter_is_no_factor():
    def model(x):
        with pyro.plate("data", len(x)):
            walk = MarkovChain(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.5), num_steps=3)
            z = pyro.sample("z", walk)
            pyro.sample("x", Emission(lambda z: dist.Normal(z, 1.0), z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            walk = MarkovChain(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.5), num_steps=3)
            pyro.sample("z", walk)

    objective = pe.ParticleFilterELBO(8)
    terms = objective.terms(model, guide, rows(5, 3))
    assert not terms.factors and terms.factor == 0
    assert objective.objective(terms) == terms.log_evidence["z"].sum() == terms.elbo
