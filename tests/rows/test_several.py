"""Draws made at once are what each is by itself; where they are not, they are made one by one."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyproelbo as pe
from pyproelbo._rows.several import obstacle

N, K = 12, 3


def normal_model(decode, K=K):
    """z ~ N(0, I), x ~ N(decode(z), I), of K dimensions each, and a guide that is nearly right."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.4 * x, 0.8).to_event(1))

    return model, guide


def joins_data():
    """A latent of the guide that is drawn given another and the data, joined as they are."""
    A = rows(K + 1, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(v, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], K), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 0.5).to_event(1))
            pyro.sample("v", dist.Normal(torch.cat([z, x], -1) @ A, 0.8).to_event(1))

    return model, guide


def batch_norm():
    """As many features as rows: what is a row alone is a feature among several draws."""
    norm = nn.BatchNorm1d(N)
    norm.running_mean.copy_(rows(N))
    norm.running_var.copy_(rows(N).square() + 0.5)
    up, down = nn.Linear(K, N), nn.Linear(N, K)
    return normal_model(nn.Sequential(up, norm, down).eval())


def random_state():
    """A program whose numbers change by themselves cannot be tried: it is looped."""
    return normal_model(lambda z: z + 0.1 * torch.randn(()))


MIXING = {
    "softmax": lambda: normal_model(lambda z: torch.softmax(z, 1)),
    "cumsum": lambda: normal_model(lambda z: z.cumsum(1)),
    "column": lambda: normal_model(lambda z: z[:, 1].unsqueeze(-1) + z),
    "sort": lambda: normal_model(lambda z: z + z.sort(0).values),
    "norm": lambda: normal_model(lambda z: z / z.norm()),
    "mean": lambda: normal_model(lambda z: z - z.mean()),
    "mean of rows": lambda: normal_model(lambda z: z - z.mean(0)),
    "reshape": lambda: normal_model(lambda z: z.reshape(N, K) * 2),
    "flip": lambda: normal_model(lambda z: z.flip(0)),
    "joins data": joins_data,
    "BatchNorm": batch_norm,
}
RIGHT = {
    "softmax": lambda: normal_model(lambda z: torch.softmax(z, -1)),
    "cumsum": lambda: normal_model(lambda z: z.cumsum(-1)),
    "column": lambda: normal_model(lambda z: z[..., 1].unsqueeze(-1) + z),
    "norm": lambda: normal_model(lambda z: z / z.norm(dim=-1, keepdim=True)),
}
QUIET = {"progress": False}


def reports(model, guide, x, **options):
    """The numbers of every report that draws several times."""
    options = {**QUIET, **options}
    found = {
        "evidence": pe.evidence(model, guide, x, num_samples=5, **options).log_evidence,
        "psis": pe.psis(model, guide, x, num_samples=25, **options).khat,
        "decompositions": pe.decompositions(
            model, guide, x, num_samples=5, evidence=torch.zeros(N), **options
        ).elbo.value,
    }
    if "v" not in poutine.trace(guide).get_trace(x):  # v is drawn given z
        gap = pe.inference_gap(model, guide, x, steps=2, num_particles=3, num_samples=5, **options)
        found["inference_gap"] = gap.best_elbo
    return {name: torch.as_tensor(value) for name, value in found.items()}


@pytest.mark.parametrize("name", MIXING)
def test_reports_loop_where_draws_at_once_are_others(name):
    """What is drawn one by one on demand is what is drawn by default, but for rounding."""
    model, guide = MIXING[name]()
    x = rows(N, K)
    expected = reports(model, guide, x, chunk=1)
    with pytest.warns(pe.LoopedWarning, match="one by one.*count dims from the right"):
        found = reports(model, guide, x)
    for report, value in found.items():
        torch.testing.assert_close(value, expected[report], rtol=1e-10, atol=1e-10, msg=report)


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_no_note_where_they_are_the_same(name):
    model, guide = RIGHT[name]()
    x = rows(N, K)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pe.LoopedWarning)
        several = pe.evidence(model, guide, x, num_samples=400, **QUIET)
        one = pe.evidence(model, guide, x, num_samples=400, chunk=1, **QUIET)
    error = (several.stderr.square() + one.stderr.square()).sqrt()
    assert ((several.log_evidence - one.log_evidence).abs() < 5 * error).all()


@pytest.mark.slow
def test_evidence_is_right():
    """z.cumsum(1): the exact posterior as guide finds log p(x) at every draw."""
    L = torch.ones(K, K).tril()
    x = rows(N, K)
    covariance = L @ L.mT + torch.eye(K)
    P = torch.linalg.inv(torch.eye(K) + L.mT @ L)
    model, _ = MIXING["cumsum"]()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ L @ P, P))

    exact = dist.MultivariateNormal(torch.zeros(K), covariance).log_prob(x)
    with pytest.warns(pe.LoopedWarning):
        importance = pe.evidence(model, guide, x, num_samples=30, **QUIET)
        annealed = pe.evidence(
            model, guide, x, method=pe.Annealed(3, 2, num_pilot=4), num_samples=2, **QUIET
        )
        checked = pe.check(model, guide, x, num_samples=30, **QUIET)
    for found in (importance.log_evidence, annealed.log_evidence, checked.psis.log_evidence):
        torch.testing.assert_close(found, exact)
    assert checked.decompositions.elbo.value == pytest.approx(exact.mean().item())
    assert checked.surgery.elbo == pytest.approx(exact.mean().item(), abs=1e-9)


@pytest.mark.slow
def test_a_check_notes_it_once_at_the_line_of_the_caller():
    model, guide = MIXING["softmax"]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pe.check(model, guide, rows(N, K), num_samples=25, batch_size=6, **QUIET)
    notes = [w for w in caught if w.category is pe.LoopedWarning]
    assert len(notes) == 1 and notes[0].filename == __file__
    assert "site 'x' has another" in str(notes[0].message)


def test_calibration_is_of_single_draws():
    """The exact posterior, of which half the variance comes by u.flip(1)."""

    def simulate(num=300):
        with pyro.plate("data", num):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z, 1.0).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            pyro.sample("z", dist.Normal(x / 2 + u.flip(1) / 2, 0.5).to_event(1))

    with pytest.warns(pe.LoopedWarning):
        found = pe.calibration(model, guide, simulate, num_samples=50)
    assert found.dims == ("z[0]", "z[1]", "z[2]", "distance to a reference point")
    assert found.notes == []


@pytest.mark.parametrize("objective", [
    lambda **kwargs: pe.ImportanceWeightedELBO(4, **kwargs),
    lambda **kwargs: pe.RenyiELBO(0.5, 4, **kwargs),
    lambda **kwargs: pe.ReweightedWakeSleepELBO(4, **kwargs),
    lambda **kwargs: pe.BetaELBO(num_particles=4, **kwargs),
])  # fmt: skip
@pytest.mark.parametrize("name", ["softmax", "joins data"])
def test_objectives_loop_likewise_at_their_first_step(objective, name):
    """At the random numbers of looped particles, with their value, from the first step on."""
    model, guide = MIXING[name]()
    x = rows(N, K)
    looped, vectorised = (objective(vectorize_particles=v) for v in (False, True))
    with pytest.warns(pe.LoopedWarning) as caught:
        vectorised.loss(model, guide, x)
        pyro.set_rng_seed(3)
        found = [vectorised.loss(model, guide, x) for _ in range(3)]
    pyro.set_rng_seed(3)
    assert found == [looped.loss(model, guide, x) for _ in range(3)] and len(caught) == 1
    with pytest.warns(pe.LoopedWarning):  # of other programs it is asked anew
        vectorised.loss(*MIXING["cumsum"](), x)


def test_another_guide_at_the_same_address_is_tried():
    """A function that is gone is not taken for the one that follows it."""
    objective = pe.BetaELBO(num_particles=2, vectorize_particles=True)
    x = rows(N, K)
    for _ in range(3):
        objective.loss(*RIGHT["softmax"](), x)
        with pytest.warns(pe.LoopedWarning):
            objective.loss(*MIXING["softmax"](), x)


def test_methods_are_tried_once():
    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.programs, self.calls = RIGHT["softmax"](), 0

        def model(self, x):
            self.calls += 1
            self.programs[0](x)

        def guide(self, x):
            self.programs[1](x)

    vae, x = VAE(), rows(N, K)
    objective = pe.BetaELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    calls = []
    for _ in range(3):
        before = vae.calls
        objective.loss(vae.model, vae.guide, x)
        calls.append(vae.calls - before)
    assert calls == [5, 1, 1]  # of all, of one, of two, of each of the two; then of all


def test_the_trial_leaves_no_trace():
    """Not in random numbers, modules, buffers or the parameter store."""
    norm = nn.BatchNorm1d(K)
    drop = nn.Dropout(0.5)
    model, guide = normal_model(lambda z: drop(norm(z.reshape(-1, K)).reshape(z.shape)))
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    torch_state = torch.get_rng_state()
    assert obstacle(model, guide, (rows(N, K),), {}) is None  # in eval mode they are functions
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert norm.training and drop.training and not pyro.get_param_store().keys()
    for name, value in norm.state_dict().items():
        assert torch.equal(value, state[name])


def test_modules_that_a_program_reaches_by_itself_are_evaluated():
    """No nn.Module is given, and its running means stay as they are."""
    norm = nn.BatchNorm1d(K)
    model, guide = normal_model(lambda z: norm(z.reshape(-1, K)).reshape(z.shape))
    x = rows(N, K)
    found = pe.evidence(model, guide, x, num_samples=5, **QUIET)
    assert norm.num_batches_tracked == 0 and norm.training
    norm.eval()
    expected = pe.evidence(model, guide, x, num_samples=5, **QUIET)
    torch.testing.assert_close(found.log_evidence, expected.log_evidence)


def test_every_site_is_compared():
    """A value that no density depends on: pyro.deterministic, of which from_svi tells."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            pyro.deterministic("share", torch.softmax(z, 1), event_dim=1)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    _, guide = normal_model(torch.clone)
    x = rows(N, K)
    assert obstacle(model, guide, (x,), {}) == "site 'share' has another value"
    with pytest.warns(pe.LoopedWarning):
        tree = pe.from_svi(model, guide, (x,), num_samples=20, progress=False)
    share = torch.as_tensor(tree.posterior.z.values).softmax(-1)
    torch.testing.assert_close(torch.as_tensor(tree.posterior.share.values), share)


def test_rounding_of_float32_is_no_difference():
    torch.set_default_dtype(torch.float32)
    net = nn.Sequential(nn.Linear(K, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, K))
    model, guide = normal_model(lambda z: 10 * net(z))
    assert obstacle(model, guide, (rows(300, K).float(),), {}) is None


def test_a_random_program_is_looped():
    model, guide = random_state()
    assert "another" in obstacle(model, guide, (rows(N, K),), {})


def test_a_call_of_a_pyro_module_keeps_no_sample_of_a_trial():
    """Within it PyroSamples are made once: a trial, or a run that finds the nesting, is not it."""

    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, objective):
            def model():
                w = self.w
                with pyro.plate("data", N):
                    pyro.sample("x", dist.Normal(w, 1.0), obs=rows(N))

            def guide():
                pyro.sample("w", dist.Normal(0.3, 0.1))

            return objective.terms(model, guide)

    for many in ({"vectorize_particles": True}, {}):
        terms = Net()(pe.BetaELBO(num_particles=3, **many))
        assert terms.log_prior.keys() == {"w"} and terms.log_prior["w"].numel() == 3


@pytest.mark.parametrize("programs", [MIXING["softmax"], RIGHT["softmax"]])
def test_captured_steps_loop_as_eager_ones(programs):
    """Whether programs are looped is found at the first step, and holds in its graph."""
    model, _ = programs()
    x = rows(N, K)
    backend = pe.Capture(backend="eager")
    losses = []
    for options in ({}, {"compile": backend}):
        a = nn.Parameter(torch.tensor(0.4))

        def trained(x, a=a):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(a * x, 0.8).to_event(1))

        objective = pe.BetaELBO(num_particles=3, vectorize_particles=True, **options)
        optimiser = torch.optim.SGD([a], 1e-2)
        pyro.set_rng_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pe.CaptureWarning)
            warnings.simplefilter("ignore", pe.LoopedWarning)
            found = []
            for _ in range(5):
                optimiser.zero_grad()
                loss = objective.differentiable_loss(model, trained, x)
                loss.backward()
                optimiser.step()
                objective.loss(*RIGHT["cumsum"](), x)  # of others: the graph stays
                found.append(loss.detach())
        losses.append(torch.stack(found))
        if objective._captured is not None:
            structures = objective._captured._structures.values()
            assert sum(len(structure.graphs) for structure in structures) == 1
    torch.testing.assert_close(*losses)


def test_a_guide_that_is_made_at_its_first_call_has_pyros_random_numbers():
    """The trial comes after the first run, which draws where the guide starts."""
    x = rows(N, K)
    model, _ = RIGHT["softmax"]()
    losses = []
    for make in (pe.BetaELBO, Trace_ELBO):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        options = {"kl": "sampled"} if make is pe.BetaELBO else {}
        elbo = make(num_particles=3, vectorize_particles=True, max_plate_nesting=1, **options)
        guide = AutoDiagonalNormal(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
        losses.append([svi.step(x) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_a_flow_without_an_inverse_is_made_anew():
    """Its density is known only at its own draws: they are made again of their noise."""
    flow = dist.transforms.planar(K)
    model, _ = RIGHT["softmax"]()

    def guide(x):
        base = dist.Normal(0.4 * x, 0.8).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    def mixing(x):
        base = dist.Normal(0.4 * x, 0.8).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.TransformedDistribution(base, [flow]))
            pyro.sample("u", dist.Normal(z.cumsum(1).sum(-1), 1.0), infer={"is_auxiliary": True})

    args = (rows(N, K),)
    assert obstacle(model, guide, args, {}) is None
    assert "log-density" in str(obstacle(model, mixing, args, {}))
