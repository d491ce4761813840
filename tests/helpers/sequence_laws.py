"""What holds for every model of sequences with every guide of it: a contract to inherit.

A test module has a class that inherits ``SequenceLaws``, and a fixture ``make``: from k, D and
the size of the whole data to a model and a guide.
"""

import copy
import itertools

import pyro
import pytest
import torch
from helpers.draws import Drawn, at
from helpers.losses import captured, of_module
from helpers.modules import at_random, values
from helpers.oracles import gradients, mean_and_stderr, rows
from helpers.sequence_data import PARTICLES, WRONG, WRONG_INPUTS, B, D, T, data, k, own
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam
from torch import nn

import pyproelbo as pe
from pyproelbo.guides.dmm import MeanField
from pyproelbo.models.vae import BernoulliLikelihood, GaussianLikelihood
from pyproelbo.sequences import unrolled

LIKELIHOODS = {"Bernoulli": BernoulliLikelihood, "Gaussian": GaussianLikelihood}
EVERYTHING = {"lengths": True, "observed": True}


def of_kind(model, x):
    """x as the likelihood of a model has it: zeros and ones, or real; NaN stays NaN."""
    if isinstance(model.likelihood, BernoulliLikelihood):
        return torch.where(x.isnan(), x, (x > 0).to(x))
    return x


def arguments_of(model, lengths=False, observed=False):
    """Arguments of the programs; what does not count is NaN. And which x_t are there."""
    arguments, seen = data(model.num_inputs, lengths, observed)
    return {**arguments, "x": of_kind(model, arguments["x"])}, seen


def beginnings(arguments, num_steps):
    """The arguments of the first steps alone."""
    lengths = {"lengths": arguments["lengths"].clamp(max=num_steps)}
    cut = {name: value[:, :num_steps] for name, value in arguments.items() if name != "lengths"}
    return cut | lengths


@torch.no_grad()
def simulated(model, num_steps=4):
    """Arguments of the programs, with sequences x that the model has made."""
    arguments = beginnings(arguments_of(model, lengths=True)[0], num_steps)
    return {**arguments, "x": model(**{**arguments, "x": None, "num": B, "num_steps": num_steps})}


def step_by_step(guide):
    """A guide that draws z in the order of a loop: most do so by themselves."""
    if not isinstance(guide, MeanField):
        return guide
    return Drawn(lambda q: q.joined(q.walk(lambda t, step: step())))(guide)


def evaluated(objective, programs, model, guide, arguments, seed=1):
    """The loss, and the gradients of the programs' parameters."""
    pyro.set_rng_seed(seed)
    loss = objective.differentiable_loss(model, guide, **arguments)
    return [loss.detach(), *gradients(loss, nn.ModuleList(programs))]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def sequence(arguments, n):
    """The arguments of one sequence alone, without its padding: a batch of one."""
    arguments = dict(arguments)
    length = arguments.pop("lengths", torch.full((B,), T))[n]
    return {name: value[n : n + 1, :length] for name, value in arguments.items()}


def known_at(guide, t):
    """Which x, and which z, change the step at t of a guide's posterior: bool (T,) each."""
    x, z = rows(B, T, D), rows(B, T, k)

    def step(x, z):
        q = guide.posterior(x).steps(z)
        return torch.stack([q.mean, q.stddev])[:, :, t]

    start, ones = step(x, z), torch.eye(T)[..., None]
    return (
        torch.stack([(step(x + one, z) != start).any() for one in ones]),
        torch.stack([(step(x, z + one) != start).any() for one in ones]),
    )


@torch.no_grad()
def on_a_grid(model, guide, arguments, width=101, reach=6.0):
    """log p(x, z) and log q(z | x) of two steps at a grid of z_0 and z_1, (B, width^2) each.

    And the logarithm of the area of a cell.
    """
    line = torch.linspace(-reach, reach, width)
    z, joint, q = torch.cartesian_prod(line, line).unsqueeze(-1), [], []
    for n in range(len(arguments["x"])):
        one = {name: value[n].expand(len(z), -1, -1) for name, value in arguments.items()}
        trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(**one)
        trace.compute_log_prob()
        joint.append(trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"])
        q.append(guide.posterior(**one).log_prob(z))
    return torch.stack(joint), torch.stack(q), 2 * (line[1] - line[0]).log()


class SequenceLaws:
    """To be inherited by a class of tests."""

    @pytest.fixture
    def programs(self, make):
        return at_random(*make())

    # --- whole sequences, loops, and sequences alone ---------------------------------------------

    @pytest.mark.parametrize(
        ("kl", "setting"), [("auto", {}), ("auto", EVERYTHING), ("sampled", EVERYTHING)]
    )
    def test_whole_sequences_are_the_loop(self, programs, setting, kl):
        model, guide = programs
        arguments, _ = arguments_of(model, **setting)
        objective, results, terms = pe.SequentialELBO(kl=kl, max_plate_nesting=1), [], []
        for pair in ((model, step_by_step(guide)), (unrolled(model), unrolled(guide))):
            results.append(evaluated(objective, programs, *pair, arguments))
            terms.append(objective.last_terms)
            assert bool(objective.last_terms.analytic) == (kl == "auto")
        close(*results)
        close(terms[0].kl_by_time, terms[1].kl_by_time)
        close(terms[0].reconstruction_by_time, terms[1].reconstruction_by_time)
        assert terms[0].kl_by_time.shape == (T, B) and terms[0].time == tuple(range(T))

    @pytest.mark.parametrize("particles", PARTICLES)
    def test_trace_elbo(self, programs, particles):
        """Pyro's own class, on the loop and on whole sequences."""
        model, guide = programs
        arguments, _ = arguments_of(model, **EVERYTHING)
        options = {"max_plate_nesting": 1, **PARTICLES[particles]}
        for pair in ((unrolled(model), unrolled(guide)), (model, guide)):
            ours, theirs = (
                evaluated(objective, programs, *pair, arguments)
                for objective in (pe.SequentialELBO(kl="sampled", **options), Trace_ELBO(**options))
            )
            close(ours, theirs)

    @pytest.mark.parametrize("kl", ["auto", "sampled"])
    @pytest.mark.parametrize("particles", ["looped", "vectorised"])
    def test_a_sequence_has_the_terms_that_it_has_alone(self, programs, particles, kl):
        """Without the others, without padding and with one particle, at the same z."""
        model, guide = programs
        arguments, seen = arguments_of(model, **EVERYTHING)
        terms = pe.SequentialELBO(kl=kl, max_plate_nesting=1, **PARTICLES[particles]).terms(
            model, guide, **arguments
        )
        z = torch.stack([latents["z"].value for latents in terms.latents]).reshape(2, B, T, -1)
        assert not terms.kl_by_time.movedim(0, -1)[:, ~own(arguments)].any()
        assert not terms.reconstruction_by_time.movedim(0, -1)[:, ~seen].any()
        for p, n in itertools.product(range(2), range(B)):
            alone = sequence(arguments, n)
            length = alone["x"].shape[1]
            one = pe.SequentialELBO(kl=kl, max_plate_nesting=1).terms(
                model, at(guide, z[p, n : n + 1, :length]), **alone
            )
            for name in ("kl_by_time", "reconstruction_by_time"):
                close(getattr(terms, name)[:length, p, n], getattr(one, name)[:, 0])

    def test_posterior_of_any_batch(self, programs):
        model, guide = programs
        arguments, _ = arguments_of(model, **EVERYTHING)
        z = rows(B, T, k)
        whole = guide.posterior(**arguments).log_prob_by_time(z)
        square = {name: value.unflatten(0, (2, 2)) for name, value in arguments.items()}
        q = guide.posterior(**square)
        assert q.batch_shape == (2, 2) and q.event_shape == (T, k)
        close(q.log_prob_by_time(z.unflatten(0, (2, 2))).flatten(0, 1), whole)
        q = guide.posterior(**{name: value[1] for name, value in arguments.items()})
        assert q.batch_shape == ()
        close(q.log_prob_by_time(z[1]), whole[1])

    @pytest.mark.parametrize("kl", ["auto", "sampled"])
    def test_what_does_not_count_reaches_no_number_and_no_gradient(self, programs, kl):
        # NaN in padding and where x is missing, against any other numbers there
        arguments, seen = arguments_of(programs[0], **EVERYTHING)
        found = []
        for fill in (torch.nan, 7.0):
            filled = {name: value.clone() for name, value in arguments.items()}
            filled["x"][~seen] = fill
            if "inputs" in filled:
                filled["inputs"][~own(arguments)] = filled["inputs"][:, 0] = fill
            objective = pe.SequentialELBO(kl=kl, max_plate_nesting=1)
            found.append(evaluated(objective, programs, *programs, filled))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b) and a.isfinite().all()

    # --- what the ELBO is of ---------------------------------------------------------------------

    @pytest.mark.slow
    def test_evidence_and_elbo_by_quadrature(self, make):
        """Of a guide that was trained for a moment, so that its samples are of use."""
        model, guide = at_random(*make(num_latents=1, num_features=1))
        arguments = {"x": of_kind(model, rows(2, 2, 1))}
        if model.num_inputs:
            arguments["inputs"] = rows(2, 2, model.num_inputs)
        many = {"num_particles": 10, "vectorize_particles": True, "max_plate_nesting": 1}
        module = pe.SequentialELBO(**many)(model, guide)
        optimiser = torch.optim.Adam(guide.parameters(), lr=0.05)
        for _ in range(20):
            optimiser.zero_grad()
            module(**arguments).backward()
            optimiser.step()

        joint, log_q, area = on_a_grid(model, guide, arguments)
        assert ((log_q + area).logsumexp(-1).abs() < 1e-6).all()
        evidence = (joint + area).logsumexp(-1)
        elbo = ((log_q + area).exp() * (joint - log_q)).sum(-1)
        assert (elbo < evidence).all()

        found = pe.evidence(model, guide, arguments, num_samples=1000, chunk=1000, progress=False)
        assert ((found.log_evidence - evidence.cpu()).abs() < 4 * found.stderr).all()
        assert (found.stderr < 0.1).all() and (found.elbo < found.log_evidence).all()
        for kl in ("auto", "sampled"):
            terms = pe.SequentialELBO(**{**many, "kl": kl, "num_particles": 1000}).terms(
                model, guide, **arguments
            )
            draws = (terms.reconstruction_by_time - terms.kl_by_time).sum(0)
            mean, stderr = mean_and_stderr(draws)
            assert ((mean - elbo).abs() < 4 * stderr).all()

    def test_minibatches_are_unbiased(self, make):
        """The mean over all minibatches is the ELBO of the whole data, at the same z."""
        model, guide = at_random(*make(dataset_size=B))
        arguments, _ = arguments_of(model, **EVERYTHING)
        z, objective = rows(B, T, k), pe.SequentialELBO(max_plate_nesting=1)
        whole = objective.terms(model, at(guide, z), **arguments)
        losses = []
        for batch in itertools.combinations(range(B), 2):
            batch = torch.tensor(batch)
            part = {name: value[batch] for name, value in arguments.items()}
            terms = objective.terms(model, at(guide, z[batch]), **part)
            close(terms.kl_by_time, 2 * whole.kl_by_time[:, batch])
            close(terms.reconstruction_by_time, 2 * whole.reconstruction_by_time[:, batch])
            losses.append(objective.loss(model, at(guide, z[batch]), **part))
        assert sum(losses) / len(losses) == pytest.approx(-whole.elbo.item(), rel=1e-10)

    def test_more_sequences_than_the_whole(self, make):
        programs = make(dataset_size=B - 1)
        arguments, _ = arguments_of(programs[0])
        for program in programs:
            with pytest.raises(ValueError, match=f"x has {B} rows, more than dataset_size={B - 1}"):
                program(**arguments)

    # --- the programs as Pyro and torch take them ------------------------------------------------

    def test_simulates(self, make):
        model, _ = make(dataset_size=B)
        if model.num_inputs:
            assert model(inputs=rows(9, 6, model.num_inputs)).shape == (9, 6, D)
            with pytest.raises(ValueError, match="inputs should be given"):
                model(num=9, num_steps=6)
            return
        assert model(num=9, num_steps=6).shape == (9, 6, D)
        assert model(num_steps=6).shape == (1, 6, D)
        assert model(num=2, num_steps=6, lengths=torch.tensor([6, 2])).shape == (2, 6, D)
        with pytest.raises(ValueError, match="num_steps should be given"):
            model(num=3)

    def test_one_step(self, programs):
        model, guide = programs
        arguments, _ = arguments_of(model)
        first = {name: value[:, :1] for name, value in arguments.items()}
        terms = pe.SequentialELBO().terms(model, guide, **first)
        assert terms.time == (0,) and terms.kl_by_time.shape == (1, B)

    def test_predictive(self, programs):
        model, guide = programs
        arguments, _ = arguments_of(model, lengths=True)
        draws = Predictive(model, guide=guide, num_samples=5)(**arguments)
        assert draws["z"].shape == (5, B, T, k)
        new = {"inputs": rows(B, T, model.num_inputs)} if model.num_inputs else {"num": B}
        latent = {"z": draws["z"]}
        simulated = Predictive(model, latent)(num_steps=T, **new)
        assert simulated["x"].shape == (5, B, T, D) and simulated["x"].isfinite().all()

    @pytest.mark.slow
    def test_training(self, make):
        """Lowers the loss, and moves every parameter, but none of another instance."""
        programs, idle = at_random(*make()), make()
        arguments = simulated(programs[0])
        at_random(*programs)
        many = pe.SequentialELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)

        def loss():
            pyro.set_rng_seed(2)
            return many.loss(*programs, **arguments)

        start, before, still = loss(), values(*programs), values(*idle)
        svi = SVI(*programs, Adam({"lr": 0.02}), pe.SequentialELBO(max_plate_nesting=1))
        for _ in range(30):
            svi.step(**arguments)
        assert loss() < start - 1.0
        assert not any(torch.equal(a, b) for a, b in zip(before, values(*programs), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(still, values(*idle), strict=True))

    def test_svi_and_a_module_take_the_same_steps(self, programs):
        arguments, twins = simulated(programs[0]), copy.deepcopy(programs)
        objectives = [pe.SequentialELBO(max_plate_nesting=1) for _ in range(2)]
        pyro.set_rng_seed(3)
        svi = SVI(*programs, Adam({"lr": 0.02}), objectives[0])
        for _ in range(3):
            svi.step(**arguments)

        pyro.set_rng_seed(3)
        module = objectives[1](*twins)
        optimiser = torch.optim.Adam(module.parameters(), lr=0.02)
        for _ in range(3):
            optimiser.zero_grad()
            module(**arguments).backward()
            optimiser.step()
        close(values(*twins), values(*programs))

    def test_state_dict_goes_from_one_to_another(self, make, programs):
        others = make()
        arguments, _ = arguments_of(programs[0])
        for other, program in zip(others, programs, strict=True):
            other.load_state_dict(program.state_dict())
        objective = pe.SequentialELBO(max_plate_nesting=1)
        expected = evaluated(objective, programs, *programs, arguments)
        close(evaluated(objective, others, *others, arguments), expected)

    def test_single_precision(self, programs):
        model, guide = (program.float() for program in programs)
        arguments, _ = arguments_of(model, **EVERYTHING)
        arguments = {
            name: value.float() if value.is_floating_point() else value
            for name, value in arguments.items()
        }
        terms = pe.SequentialELBO().terms(model, guide, **arguments)
        assert terms.reconstruction_by_time.dtype == terms.kl_by_time.dtype == torch.float32

    # --- no wait for the device ------------------------------------------------------------------

    @pytest.mark.filterwarnings("ignore::UserWarning:torch")
    def test_runs_on_a_device_of_its_own_without_a_sync(self, programs):
        # A tensor on the meta device has no values: reading one raises, as a mix of devices does.
        arguments, _ = arguments_of(programs[0], **EVERYTHING)
        model, guide = (program.to("meta") for program in programs)
        arguments = {name: value.to("meta") for name, value in arguments.items()}
        with pyro.validation_enabled(False):
            for kl in ("auto", "sampled"):
                objective = pe.SequentialELBO(kl=kl, max_plate_nesting=1)
                loss = objective.differentiable_loss(model, guide, **arguments)
            loss.backward()
        assert loss.device.type == "meta"

    @pytest.mark.slow
    def test_capture(self, programs):
        """make_fx captures loss and gradients in one graph that equals eager at the same seed."""
        module = pe.SequentialELBO(max_plate_nesting=1)(*programs)
        arguments = beginnings(arguments_of(programs[0], **EVERYTHING)[0], 2)
        expected, wanted = of_module(module, **arguments)
        loss, grads = captured(module, **arguments)
        assert torch.equal(loss, expected)
        for ours, eager in zip(grads, wanted, strict=True):
            assert torch.equal(ours, eager)

    # --- arguments that are none -----------------------------------------------------------------

    @pytest.mark.parametrize("wrong", WRONG | WRONG_INPUTS)
    def test_wrong_arguments(self, make, wrong):
        programs = make()
        num_inputs = programs[0].num_inputs
        x = rows(B, T, D)
        if wrong in WRONG_INPUTS and num_inputs:
            inputs, message = WRONG_INPUTS[wrong]
            arguments = {"inputs": inputs(rows(B, T, num_inputs))}
        elif wrong in WRONG and not num_inputs:
            arguments, message = WRONG[wrong]
            arguments = arguments(x)
        else:
            return
        for program in programs:
            with pytest.raises(ValueError, match=message):
                program(**{"x": x, **arguments})
