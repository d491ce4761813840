"""What is observed: its shape beside the site's, in the guide, and whose rows the data are."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import conjugate
from helpers.oracles import rows
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO

import pyproelbo as pe

N, D = 8, 3
QUIET = {"progress": False}


# --- shapes ------------------------------------------------------------------------------------


SHAPES = {  # of loc, event dims, plates from the right, of the value
    "a feature more, event": ((N, 1), 1, [N], (N,)),
    "a feature more, no plate": ((N, 1), 0, [], (N,)),
    "a feature more, all event": ((N, 1), 2, [], (N,)),
    "no plate": ((), 0, [], (N,)),
    "data in a column": ((N,), 0, [N], (N, 1)),
    "data in a row of an event": ((N, 1), 1, [N], (N, D)),
    "one datum each, many scored": ((N, 1), 0, [N], (N,)),
    "an event without dims": ((), 0, [N], (D, N)),
}


def program(loc, event, plates, value):
    x = rows(*value)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        frames = [pyro.plate(f"p{i}", n, dim=-1 - i) for i, n in enumerate(plates)]
        for frame in reversed(frames):
            frame.__enter__()
        try:
            pyro.sample("x", dist.Normal(rows(*loc) + z, 1.0).to_event(event), obs=x)
        finally:
            for frame in frames:
                frame.__exit__(None, None, None)

    return model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_values_that_would_be_scored_several_times(name, validated):
    """With Pyro's validation on, and off, where Pyro says nothing of most of them."""
    with (
        pyro.validation_enabled(validated),
        pytest.raises(ValueError, match=r"site 'x' has shape.*but its distribution|log_prob shape"),
    ):
        pe.BetaELBO().loss(*program(*SHAPES[name]))


@pytest.mark.parametrize("loc, event, plates, value", [
    ((N,), 0, [N], (N,)), ((), 0, [N], (N,)), ((1,), 0, [N], (N,)), ((N,), 0, [N], ()),
    ((N, D), 1, [N], (N, D)), ((D,), 1, [N], (N, D)), ((N, D), 1, [N], (D,)),
    ((D, N), 0, [N, D], (D, N)), ((D, N), 0, [N, D], (N,)), ((D, 1), 0, [N, D], (D, N)),
    ((N, D), 2, [], (N, D)), ((N, D), 2, [], (D,)),
])  # fmt: skip
def test_values_that_broadcast_up_to_their_site(loc, event, plates, value):
    model, guide = program(loc, event, plates, value)
    many = [{"num_particles": 3, "vectorize_particles": True}] if not event else []
    for kwargs in ({}, *many):
        pyro.set_rng_seed(0)
        ours = pe.BetaELBO(kl="sampled", max_plate_nesting=2, **kwargs).loss(model, guide)
        pyro.set_rng_seed(0)
        assert ours == pytest.approx(Trace_ELBO(max_plate_nesting=2, **kwargs).loss(model, guide))


def test_reports_refuse_shapes_too():
    x = rows(N)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.unsqueeze(-1), 1.0).to_event(1))

    for report in (pe.evidence, pe.psis, pe.surgery, pe.check, pe.decompositions):
        with pytest.raises(ValueError, match=r"shape \(8,\), but its distribution \(8, 1\)"):
            report(model, guide, x, **QUIET)


def test_a_guides_value_must_not_broadcast_the_models_site():
    """With validation off Pyro scores each z against all priors."""

    def model():
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(torch.zeros(N, 1), 1.0).to_event(1))

    def guide():
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(torch.zeros(N), 1.0))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="value of site 'z'"):
        pe.BetaELBO().loss(model, guide)


def test_a_plate_without_a_size_has_that_of_the_value():
    """As Pyro's tutorials write it."""
    x = rows(N)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data"):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide():
        pyro.sample("mu", dist.Normal(0.3, 1.0))

    for kwargs in ({}, {"num_particles": 3, "vectorize_particles": True}):
        pyro.set_rng_seed(0)
        ours = pe.BetaELBO(kl="sampled", max_plate_nesting=1, **kwargs).loss(model, guide)
        pyro.set_rng_seed(0)
        assert ours == pytest.approx(Trace_ELBO(max_plate_nesting=1, **kwargs).loss(model, guide))
    assert pe.BetaELBO().terms(model, guide).log_likelihood["x"].shape == (N,)
    tree = pe.from_svi(model, guide, num_samples=5, **QUIET)
    assert tree.log_likelihood.x.shape == (1, 5, N)


# --- what the guide observes -------------------------------------------------------------------


def regressed(x, t):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("t", dist.Bernoulli(0.5), obs=t)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def with_regressor(x, t):
    """The exact posterior, beside a regressor of t on x."""
    with pyro.plate("data", len(x)):
        loc = pyro.param("a", torch.tensor(0.3)) * x
        pyro.sample("t", dist.Bernoulli(logits=loc), obs=t, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def data():
    x = rows(N)
    return x, (x > 0.2).double()


def exact():
    return dist.Normal(0.0, 2**0.5).log_prob(data()[0]) + torch.tensor(0.5).log()


@pytest.mark.parametrize("ours, theirs", [
    (pe.BetaELBO(kl="sampled"), Trace_ELBO()), (pe.BetaELBO(kl="sampled"), TraceGraph_ELBO()),
    (pe.FreeBitsELBO(0.0, kl="sampled"), Trace_ELBO()),
    (pe.SurgeryELBO(None, kl="sampled"), Trace_ELBO()),
    (pe.ImportanceWeightedELBO(1), RenyiELBO(alpha=0.0, num_particles=1)),
])  # fmt: skip
def test_as_a_loss_it_is_pyros(ours, theirs):
    """The gradient is that of log q(t): of a Bernoulli Pyro adds what it would if t were drawn."""
    losses = [_at_seed(objective, *data()) for objective in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1])
    pyro.clear_param_store()
    ours.loss_and_grads(regressed, with_regressor, *data())
    x, t = data()
    a = torch.tensor(0.3, requires_grad=True)
    (gradient,) = torch.autograd.grad(dist.Bernoulli(logits=a * x).log_prob(t).sum(), [a])
    torch.testing.assert_close(pyro.param("a").unconstrained().grad, gradient)


def _at_seed(objective, *args):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return objective.loss(regressed, with_regressor, *args)


def test_as_an_elbo_it_is_none_of_log_q():
    terms = pe.BetaELBO(kl="sampled").terms(regressed, with_regressor, *data())
    assert terms.kl.keys() == terms.log_q.keys() == {"z"}
    torch.testing.assert_close(terms.elbo, exact().sum())
    torch.testing.assert_close(terms.energy + terms.entropy, exact().sum())
    x, t = data()
    log_q = dist.Bernoulli(logits=0.3 * x).log_prob(t)
    torch.testing.assert_close(terms.guide_log_likelihood["t"], log_q)
    torch.testing.assert_close(terms.elbo - log_q.sum(), terms.data_fit - terms.shrinkage)
    many = pe.BetaELBO(kl="sampled", num_particles=3).terms(regressed, with_regressor, *data())
    torch.testing.assert_close(many.elbo, exact().sum())
    assert many.detach().guide_log_likelihood["t"].shape == (3, N)


def test_reports_leave_it_out():
    options = {"num_samples": 30, **QUIET}
    annealed = {"method": pe.Annealed(5), **options}
    for found in (
        pe.evidence(regressed, with_regressor, data(), **options).log_evidence,
        pe.psis(regressed, with_regressor, data(), **options).log_evidence,
        pe.evidence(regressed, with_regressor, data(), **annealed).log_evidence,
    ):
        torch.testing.assert_close(found, exact())
    forms = pe.decompositions(regressed, with_regressor, data(), **options)
    assert forms.elbo.value == pytest.approx(exact().mean().item())
    tree = pe.from_svi(regressed, with_regressor, data(), **options)
    weights = torch.as_tensor(tree.sample_stats.log_weight.values)
    torch.testing.assert_close(weights, exact().sum().expand_as(weights))
    assert set(tree.log_q.data_vars) == {"z"}


def test_a_condition_on_a_latent_of_both_is_data():
    """log p(x, v) of a latent that is held at v in model and guide, as they are."""

    def model(x):
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(0.0, 2.0))
            z = pyro.sample("z", dist.Normal(v, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(x, 0.1))
            pyro.sample("z", dist.Normal((x + v) / 2, 0.5**0.5))

    held = {"v": torch.linspace(-1, 1, N)}
    programs = [poutine.condition(program, data=held) for program in (model, guide)]
    x, _ = data()
    found = pe.evidence(*programs, x, num_samples=5, **QUIET).log_evidence
    expected = dist.Normal(0.0, 2.0).log_prob(held["v"])
    expected = expected + dist.Normal(held["v"], 2**0.5).log_prob(x)
    torch.testing.assert_close(found, expected)


def _report(name, x, *programs):
    return getattr(pe, name)(*programs, x, **QUIET)


def test_model_and_guide_swapped():
    """The guide observes what the model draws, or has nothing of."""
    model, guide = conjugate.model, conjugate.guide_of(0.7)

    def draws_x(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def simulate():
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("x", dist.Normal(z, 1.0))

    x, _ = data()
    names = ("evidence", "psis", "decompositions", "inference_gap", "check", "surgery")
    reports = [partial(_report, name, x) for name in names]
    reports += [
        lambda *p: pe.from_svi(*p, (x,), **QUIET),
        lambda *p: pe.calibration(*p, simulate),
    ]
    for report in reports:
        with pytest.raises(ValueError, match=r"the guide observes 'x'.*swapped"):
            report(guide, model)
        with pytest.raises(ValueError, match=r"the guide observes 'x', which the model draws"):
            report(draws_x, model)


# --- a datum is a row --------------------------------------------------------------------------


def in_event(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


def in_plates(order):
    def model(y):
        with order(pyro.plate("data", len(y), dim=-2), pyro.plate("dims", D, dim=-1)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    return model


class Outer:
    """Plates within each other."""

    def __init__(self, *plates):
        self.plates = plates

    def __enter__(self):
        for plate in self.plates:
            plate.__enter__()

    def __exit__(self, *args):
        for plate in reversed(self.plates):
            plate.__exit__(*args)


def guides(a=0.3):
    def event(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(a * y, 0.7).to_event(1))

    def plates(y):
        with pyro.plate("data", len(y), dim=-2), pyro.plate("dims", D, dim=-1):
            pyro.sample("z", dist.Normal(a * y, 0.7))

    return event, plates


@pytest.mark.parametrize("order", [
    Outer, lambda data, dims: Outer(dims, data)
], ids=["data outside", "data inside"])  # fmt: skip
@pytest.mark.parametrize("objective", [
    pe.BetaELBO(), pe.CapacityELBO(2.0, 1.0), pe.FreeBitsELBO(2.0), pe.FreeBitsELBO({"z": 1.0}),
])  # fmt: skip
def test_inner_plates_are_as_event_dims(order, objective):
    """The rows of the first argument tell which plate is over the data, however it is entered."""
    y, (event, plates) = rows(N, D), guides()
    found = []
    for model, guide in ((in_event, event), (in_plates(order), plates)):
        pyro.set_rng_seed(0)
        loss = torch.tensor(objective.loss(model, guide, y))
        terms = objective.terms(model, guide, y)
        found.append((loss, torch.tensor(terms.num_data), torch.tensor(terms.counts["z"])))
    torch.testing.assert_close(*found)
    assert found[0][1] == N


def test_without_arguments_it_is_the_outermost_plate():
    y, (_, guide) = rows(N, D), guides()
    model = in_plates(Outer)
    terms = pe.BetaELBO().terms(lambda: model(y), lambda: guide(y))
    assert terms.num_data == N


def test_a_plate_that_subsamples_is_over_the_data():
    def program(site):
        dims, data = pyro.plate("dims", D, dim=-2), pyro.plate("data", 100, 5, dim=-1)
        with dims, data:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if site:
                pyro.sample("y", dist.Normal(z, 1.0), obs=rows(D, 5))

    terms = pe.BetaELBO().terms(lambda: program(True), lambda: program(False))
    assert terms.num_data == 100


def test_global_latents_are_of_one_datum():
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    terms = pe.BetaELBO().terms(model, lambda y: pyro.sample("w", dist.Normal(0.0, 1.0)), rows(N))
    assert terms.num_data == 1


def test_sequences_of_any_length_are_no_repetition():
    """A time-homogeneous hidden Markov model has events of one step, and takes any number."""
    initial, transition = torch.zeros(2), torch.eye(2)
    emission = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
    hmm = dist.DiscreteHMM(initial, transition, emission)
    x = rows(N, 5)

    class Own(dist.TorchDistribution):
        """One of a package's own."""

        arg_constraints: dict = {}  # noqa: RUF012

        def __init__(self, batch_shape=()):
            super().__init__(torch.Size(batch_shape), torch.Size((1, 2)), validate_args=False)

        def expand(self, batch_shape, _instance=None):
            return Own(batch_shape)

        def log_prob(self, value):
            return -value.square().sum((-1, -2))

        @property
        def support(self):
            return dist.constraints.real_vector

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N):
            pyro.sample("x", hmm, obs=x)
            pyro.sample("y", Own(), obs=rows(N, 7, 2) + 0 * z.detach())

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(0)
    ours = pe.BetaELBO(kl="sampled").loss(model, guide)
    pyro.set_rng_seed(0)
    assert ours == pytest.approx(Trace_ELBO().loss(model, guide))
