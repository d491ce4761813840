"""Captured steps: the numbers of eager ones, over all programs; and when they are refused."""

import copy
import itertools
import math
import pickle
import warnings
import weakref
from contextlib import contextmanager

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from pyro.infer import SVI
from torch import nn

import pyproelbo as pe
from pyproelbo.capture import LazyLoss
from pyproelbo.capture.cuda import CudaGraph
from pyproelbo.guides.dmm import Smoothing
from pyproelbo.guides.lgssm import Filtering
from pyproelbo.models.dmm import DMM
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.schedules import Linear

PROGRAMS = {**programs.REPARAMETERISED, **programs.SCORE_FUNCTION, **programs.ENUMERATED}
EAGER = pe.Capture(backend="eager")


def num_graphs(objective):
    return sum(len(known.graphs) for known in objective._captured._structures.values())


def trained(make, objective, steps=6):
    """Losses and parameters of a few steps of SVI."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    model, guide = make()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
    losses = [svi.step() for _ in range(steps)]
    return torch.tensor(losses), {n: x.detach().clone() for n, x in pyro.get_param_store().items()}


def assert_trained_alike(ours, theirs):
    (losses, parameters), (expected_losses, expected) = ours, theirs
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    assert parameters.keys() == expected.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


LOOPED = ["local_normal", "subsampled", "score_function", "guide_enumerated_chain", "AutoNormal"]
CASES = [
    *((name, {}) for name in PROGRAMS),
    *((name, {"num_particles": 2}) for name in LOOPED),
    *((name, {"num_particles": 2, "vectorize_particles": True}) for name in LOOPED),
]


@pytest.mark.parametrize(("name", "particles"), CASES)
def test_all_programs_train_as_eagerly(name, particles):
    """Captured, at the same seed, while beta rises: the same losses and parameters all along."""
    beta = Linear(0.1, 1.0, 5)
    objective = pe.BetaELBO(beta, compile=EAGER, **particles)
    ours = trained(PROGRAMS[name], objective)
    assert num_graphs(objective) == 1
    assert_trained_alike(ours, trained(PROGRAMS[name], pe.BetaELBO(beta, **particles)))


class Model(nn.Module):
    """With dropout, and a buffer that is a mask of the data."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.register_buffer("weight", torch.ones(3))

    def forward(self, x, scale=1.0, extra=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(z) * self.weight
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


class Guide(nn.Module):
    """With batch normalisation, whose buffers move with each step."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4)
        )

    def forward(self, x, scale=1.0, extra=None):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


OBJECTIVES = {
    "beta": pe.BetaELBO,
    "annealed": lambda **kwargs: pe.BetaELBO(Linear(0.0, 1.0, 10), **kwargs),
    "capacity": lambda **kwargs: pe.CapacityELBO(0.5, gamma=3.0, **kwargs),
    "free bits": lambda **kwargs: pe.FreeBitsELBO(0.8, **kwargs),
    "surgery": lambda **kwargs: pe.SurgeryELBO(100, **kwargs),
    "total correlation": lambda **kwargs: pe.TotalCorrelationELBO(
        beta=Linear(1.0, 4.0, 10), dataset_size=100, **kwargs
    ),
    "importance weighted": lambda **kwargs: pe.ImportanceWeightedELBO(3, **kwargs),
    "doubly reparameterised": lambda **kwargs: pe.ImportanceWeightedELBO(
        3, gradient="doubly_reparameterised", **kwargs
    ),
    "Renyi": lambda **kwargs: pe.RenyiELBO(0.5, num_particles=3, **kwargs),
    "wake-sleep": lambda **kwargs: pe.ReweightedWakeSleepELBO(3, **kwargs),
}


def batch(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, generator=generator, device="cpu")
    return x.to(torch.get_default_device())


def new_module(objective):
    pyro.set_rng_seed(5)
    return objective(Model(), Guide())


def fit(module, batches, after=lambda module, step: None):
    """Losses of steps of Adam."""
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    pyro.set_rng_seed(7)
    losses = []
    for step, x in enumerate(batches):
        loss = module(*x) if isinstance(x, tuple) else module(x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
        after(module, step)
    return torch.stack(losses)


def assert_same_modules(ours, theirs):
    for (name, value), expected in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10, msg=name)


def assert_fit_alike(make, batches, after=lambda module, step: None, compile=EAGER):
    """Fit a captured module and an eager one; return the former's objective."""
    ours, theirs = new_module(make(compile=compile)), new_module(make())
    torch.testing.assert_close(
        fit(ours, batches, after), fit(theirs, batches, after), rtol=1e-10, atol=1e-10
    )
    assert_same_modules(ours, theirs)
    assert ours.elbo.step == theirs.elbo.step == len(batches)
    assert ours.elbo.last_terms.elbo.item() == pytest.approx(theirs.elbo.last_terms.elbo.item())
    return ours.elbo


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_objectives_fit_as_eagerly(name):
    """As an nn.Module, with dropout and moving averages: what a step has left is the same too."""
    objective = assert_fit_alike(OBJECTIVES[name], [batch(6, seed=i) for i in range(6)])
    assert num_graphs(objective) == 1
    if name == "surgery":
        eager = pe.SurgeryELBO(100)
        module = new_module(eager)
        fit(module, [batch(6, seed=i) for i in range(6)])
        torch.testing.assert_close(tuple(objective.last_surgery), tuple(eager.last_surgery))


@pytest.mark.parametrize("name", ["annealed", "surgery"])
def test_compiled_by_inductor(name):
    objective = assert_fit_alike(
        OBJECTIVES[name], [batch(6, seed=i) for i in range(5)], compile=True
    )
    assert num_graphs(objective) == 1


def test_random_numbers_keep_their_order_when_compiled():
    """Sites of several kinds, of which inductor would move some."""
    objective = pe.BetaELBO(compile=True)
    ours = trained(programs.score_function, objective, steps=4)
    assert num_graphs(objective) == 1
    assert_trained_alike(ours, trained(programs.score_function, pe.BetaELBO(), steps=4))


def test_sequences_and_their_elbo_by_time():
    model, guide = LGSSM(2, 3), Filtering(2, 3)
    x = batch(4 * 5).reshape(4, 5, 3)

    def run(compile):
        torch.manual_seed(0)
        module = pe.SequentialELBO(Linear(0.0, 1.0, 5), compile=compile)(
            copy.deepcopy(model), copy.deepcopy(guide)
        )
        return fit(module, [x] * 6), module.elbo

    (ours, objective), (theirs, eager) = run(EAGER), run(False)
    assert num_graphs(objective) == 1
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    by_time = objective.last_terms.kl_by_time
    torch.testing.assert_close(by_time, eager.last_terms.kl_by_time)
    assert objective.last_terms.time == eager.last_terms.time


def test_graphs_of_sequences_do_not_grow_with_them():
    """Loops and recurrent nets are one operation each; compiled or not, steps are as eagerly."""
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph

    for num_steps in (6, 24):
        x = (batch(4 * num_steps) > 0).double().reshape(4, num_steps, 3)
        losses = []
        for compile in (pe.Capture(backend=backend), num_steps == 6, False):
            torch.manual_seed(0)
            model, guide = DMM(2, 3, hidden=(8,), transition=8), Smoothing(2, 3, hidden=8)
            losses.append(fit(pe.SequentialELBO(compile=compile)(model, guide), [x] * 5))
        torch.testing.assert_close(losses[0], losses[2], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(losses[1], losses[2], rtol=1e-10, atol=1e-10)
    assert sizes[0] == sizes[1]


def test_a_short_last_batch_has_its_own_graph():
    batches = [batch(num, seed=i) for i, num in enumerate((6, 6, 4) * 3)]
    assert num_graphs(assert_fit_alike(pe.BetaELBO, batches)) == 2


def test_modes_have_their_own_graphs():
    def after(module, step):
        module.train(step % 6 < 3)

    batches = [batch(6, seed=i) for i in range(14)]
    assert num_graphs(assert_fit_alike(pe.BetaELBO, batches, after)) == 2


def test_numbers_in_buffers_and_parameters_stay_live():
    def after(module, step):
        with torch.no_grad():
            module.model.weight.fill_(step)
            module.guide.encoder[0].weight.clamp_(-0.2, 0.2)

    batches = [batch(6, seed=i) for i in range(6)]
    assert num_graphs(assert_fit_alike(pe.BetaELBO, batches, after)) == 1


def test_a_replaced_tensor_is_noticed():
    def after(module, step):
        if step == 3:
            module.model.weight = torch.full((3,), 2.0)

    batches = [batch(6, seed=i) for i in range(8)]
    assert num_graphs(assert_fit_alike(pe.BetaELBO, batches, after)) == 2


def test_numbers_as_arguments():
    """Tensors are inputs; so are Python floats, from the second value on that is met."""
    tensors = [(batch(6), torch.tensor(1.0 + i)) for i in range(6)]
    assert num_graphs(assert_fit_alike(pe.BetaELBO, tensors)) == 1
    each = [(batch(6), 1.0 + i) for i in range(10)]
    assert num_graphs(assert_fit_alike(pe.BetaELBO, each)) == 1
    by_epoch = [(batch(6), 1.0 + i // 4) for i in range(12)]
    assert num_graphs(assert_fit_alike(pe.BetaELBO, by_epoch)) == 2
    whole = [(batch(6), 1 + i % 2) for i in range(8)]
    assert num_graphs(assert_fit_alike(pe.BetaELBO, whole)) == 2
    few = pe.Capture(backend="eager", max_graphs=2)
    with pytest.warns(pe.CaptureWarning, match="pass numbers as tensors"):
        assert_fit_alike(pe.BetaELBO, [(batch(6), 1 + i) for i in range(8)], compile=few)
    with pytest.warns(pe.CaptureWarning, match="max_graphs"):
        three = [(batch(6), 1 + i % 3) for i in range(8)]
        assert num_graphs(assert_fit_alike(pe.BetaELBO, three, compile=few)) == 2


def by_branch(w):
    return 1.0 if w > 2.0 else 2.0


def by_name(w):
    return {"1.0": 1.0, "2.0": 3.0}.get(f"{w}", 2.0)


def by_math(w):
    return 1.0 + math.sqrt(w)


def by_type(w):
    return w if isinstance(w, float) else 1.0


def by_numpy(w):
    return float(np.exp(w - 1.0))


def by_value(w):
    return 3.0 if w in {2.0, 3.0} else 1.0


def by_rounding(w):
    return 1.0 + round(w)


@pytest.mark.parametrize(
    "function", [by_branch, by_name, by_math, by_type, by_numpy, by_value, by_rounding]
)
def test_numbers_that_python_looks_at(function):
    """Each has a graph of its own then, and the numbers are right."""

    class Looking(Model):
        def forward(self, x, scale=1.0):
            super().forward(x, function(scale))

    def run(compile, values):
        pyro.set_rng_seed(5)
        module = pe.BetaELBO(compile=compile)(Looking(), Unscaled())
        return fit(module, [(batch(6), value) for value in values])

    for values in ([1.0, 2.0, 3.0] * 4, [1.0] * 3 + [2.0] * 3 + [3.0] * 3 + [1.0]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pe.CaptureWarning)
            torch.testing.assert_close(
                run(EAGER, values), run(False, values), rtol=1e-10, atol=1e-10
            )


class Unscaled(Guide):
    def forward(self, x, scale=1.0):
        super().forward(x)


def test_backward_passes():
    """Scaled, accumulated, repeated, and to an argument: gradients as in eager mode."""

    def gradients(compile):
        module = new_module(pe.BetaELBO(compile=compile))
        module.eval()
        for _ in range(3):
            module(batch(6).requires_grad_())
        pyro.set_rng_seed(2)
        x = batch(6).requires_grad_()
        y = (2.0 * x).sin()
        (3.0 * module(x)).backward()
        module(y).backward(retain_graph=True)
        loss = module(x)
        loss.backward(retain_graph=True)
        loss.backward()
        module.elbo.loss_and_grads(module.model, module.guide, x)
        assert module.elbo.step == 5
        return [p.grad for p in (*module.parameters(), x)]

    for ours, theirs in zip(gradients(EAGER), gradients(False), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_loss_is_taken_back_once():
    """As elsewhere in torch; its gradients become .grad without a copy, and leave with it."""
    module = new_module(pe.BetaELBO(compile=EAGER))
    for _ in range(2):
        module(batch(6))
    loss, weight = module(batch(6)), module.guide.encoder[0].weight
    before = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    loss.backward()
    torch.testing.assert_close(weight.grad, before)
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()
    gradient = weakref.ref(weight.grad)
    module.zero_grad()
    assert gradient() is None


def test_second_derivatives_are_refused():
    module = new_module(pe.BetaELBO(compile=EAGER))
    for _ in range(2):
        loss = module(batch(6))
    parameter = next(module.parameters())
    (grad,) = torch.autograd.grad(loss, parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_each_gradient_is_a_tensor_of_its_own():
    """Two parameters of one gradient, and one whose gradient is an expanded number."""

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(3))
            self.b = nn.Parameter(torch.zeros(3))

        def forward(self):
            pyro.factor("f", (self.a + self.b).sum())

    model = Sums()
    module = pe.BetaELBO(compile=EAGER)(model, lambda: None)
    for _ in range(4):
        module.zero_grad()
        module().backward()
        for p in (model.a, model.b):
            p.grad[0] += 1.0
    torch.testing.assert_close(model.a.grad, torch.tensor([0.0, -1.0, -1.0]))
    torch.testing.assert_close(model.b.grad, torch.tensor([0.0, -1.0, -1.0]))


def test_evaluation_stays_eager():
    module = new_module(pe.BetaELBO(compile=EAGER))
    for _ in range(4):
        with torch.no_grad():
            module(batch(6))
        module.elbo.loss(module.model, module.guide, batch(6))
    assert num_graphs(module.elbo) == 0 and module.elbo.step == 0


def test_a_cleared_parameter_store_is_noticed():
    def run(compile):
        model, guide = programs.local_normal()
        objective = pe.BetaELBO(compile=compile)
        losses = []
        for seed in (3, 4):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
            losses += [svi.step() for _ in range(6)]
        return torch.tensor(losses)

    torch.testing.assert_close(run(EAGER), run(False), rtol=1e-12, atol=1e-12)


def test_copies_have_no_graphs():
    module = new_module(pe.BetaELBO(compile=EAGER))
    for _ in range(3):
        module(batch(6))
    assert num_graphs(module.elbo) == 1
    for twin in (copy.deepcopy(module.elbo), pickle.loads(pickle.dumps(module.elbo))):
        assert num_graphs(twin) == 0
        assert twin._captured.options == EAGER


def refused(change, match, steps=6, svi=False):
    """A program that is changed, and then runs eagerly with one warning and the same numbers."""

    def run(compile):
        module = new_module(pe.BetaELBO(compile=compile))
        change(module)
        pyro.set_rng_seed(7)
        return torch.stack([module(batch(6)).detach() for _ in range(steps)]), module.elbo

    with pytest.warns(pe.CaptureWarning, match=match) as caught:
        ours, objective = run(EAGER)
    assert len(caught) == 1
    assert num_graphs(objective) == 0
    torch.testing.assert_close(ours, run(False)[0])


def decoder_of(function):
    def change(module):
        decoder = module.model.decoder
        module.model.decoder = Wrapped(decoder, function)

    return change


class Wrapped(nn.Module):
    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function
        self.calls, self.last = 0, torch.zeros(())

    def forward(self, z):
        return self.function(self, self.inner(z))


def branch(self, y):
    return y if y.sum() > 0 else 2.0 * y


def select(self, y):
    return y + y[y > 0].mean()


def count(self, y):
    self.calls += 1
    return y * self.calls


def remember(self, y):
    y = y + self.last
    self.last = y.mean().detach()
    return y


def numpy_noise(self, y):
    return y + np.random.rand()


def own_generator(self, y):
    return y + torch.randn((), generator=GENERATOR, device="cpu").to(y.device)


GENERATOR = torch.Generator(device="cpu")


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (branch, r"a number in a tensor is read.*at site.*|if y.sum\(\) > 0"),
        (select, r"makes a shape in test_capture.py, line \d+: return y \+ y\[y > 0\]"),
        (count, "Wrapped.calls changes within the step"),
        (remember, "Wrapped.last changes within the step"),
        (numpy_noise, r"generator of Python or of NumPy.*, line \d+: return y \+ np.random.rand"),
        (own_generator, "generator other than torch's"),
    ],
)
def test_what_cannot_be_captured_runs_eagerly(function, match):
    def seeded(module):
        np.random.seed(0)
        GENERATOR.manual_seed(0)
        decoder_of(function)(module)

    refused(seeded, match)


def test_parameters_with_hooks_run_eagerly():
    def change(module):
        module.model.decoder[0].weight.register_hook(lambda grad: grad.clamp(-1, 1))

    refused(change, "has a hook")


def test_other_arguments_and_handlers_run_eagerly():
    module = new_module(pe.BetaELBO(compile=EAGER))
    with pytest.warns(pe.CaptureWarning, match="one of its arguments is a ndarray"):
        for _ in range(3):
            module(batch(6), extra=np.ones(3))
    with pytest.warns(pe.CaptureWarning, match="effect handler ScaleMessenger"):
        for _ in range(3):
            with pyro.poutine.scale(scale=2.0):
                module(batch(6))
    assert num_graphs(module.elbo) == 0


def test_what_changes_unseen_is_found_by_the_check():
    """A number that no module holds: the graph keeps it, and the first replay shows that."""
    numbers = itertools.count(1)

    def change(module):
        def scaled(self, y):
            return y * next(numbers)

        decoder_of(scaled)(module)

    module = new_module(pe.BetaELBO(compile=EAGER))
    change(module)
    with pytest.warns(pe.CaptureWarning, match="does not compute what the program does"):
        for _ in range(4):
            module(batch(6))
    assert num_graphs(module.elbo) == 0


class Unseen:
    """A number in a slot, where nothing looks for it."""

    __slots__ = ("number",)


def test_a_check_that_fails_leaves_no_trace():
    """What it has run is undone, random numbers and moving averages."""
    hidden = Unseen()

    def run(compile):
        hidden.number = 1.0
        module = new_module(pe.BetaELBO(compile=compile))
        decoder_of(lambda self, y: hidden.number * y)(module)

        def after(module, step):
            hidden.number = 1.0 + (step > 0)

        return fit(module, [batch(6)] * 6, after), module

    with pytest.warns(pe.CaptureWarning, match="does not compute what the program does"):
        ours, module = run(EAGER)
    theirs, expected = run(False)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert_same_modules(module, expected)


def test_options_are_checked():
    for wrong in ({"backend": "none"}, {"check": -1}, {"max_graphs": 0}, {"max_nodes": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            pe.Capture(**wrong)
    with pytest.raises(ValueError, match="compile should be"):
        pe.BetaELBO(compile="yes")
    assert pe.BetaELBO(compile={"max_autotune": True})._captured.options.options["max_autotune"]


def test_a_backend_that_fails_leaves_the_graph():
    def backend(graph, inputs):
        raise RuntimeError("no compiler\nat all")

    def wrong(graph, inputs):
        return lambda *tensors: [2.0 * x for x in graph(*tensors)]

    for function, reason in ((backend, "no compiler$"), (wrong, "does not compute")):
        with pytest.warns(pe.CaptureWarning, match=f"runs uncompiled.*{reason}"):
            objective = assert_fit_alike(
                pe.BetaELBO, [batch(6)] * 5, compile=pe.Capture(backend=function)
            )
        assert num_graphs(objective) == 1
    large = pe.Capture(backend=backend, max_nodes=10)
    with pytest.warns(pe.CaptureWarning, match="runs uncompiled, for max_nodes is 10"):
        assert num_graphs(assert_fit_alike(pe.BetaELBO, [batch(6)] * 5, compile=large)) == 1


def test_lazy_losses():
    """SVI hands them on as they are; their numbers are those of eager steps."""
    lazy = pe.BetaELBO(compile=pe.Capture(backend="eager", lazy_loss=True))
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    svi = SVI(*programs.local_normal(), pyro.optim.Adam({"lr": 0.01}), lazy)
    losses = [svi.step() for _ in range(6)]
    assert isinstance(losses[0], float) and isinstance(losses[-1], LazyLoss)
    assert type(sum(losses)) is torch.Tensor
    expected, _ = trained(programs.local_normal, pe.BetaELBO())
    torch.testing.assert_close(torch.tensor([float(x) for x in losses]), expected)


class Recorded:
    """Stands for torch.cuda where there is no GPU: a graph that replays by running again."""

    def __init__(self):
        self.replays = 0

    def __call__(self):
        return self

    Stream = current_stream = CUDAGraph = __call__

    def wait_stream(self, other):
        pass

    @contextmanager
    def stream(self, stream):
        yield

    graph = stream

    def replay(self):
        self.replays += 1
        for output, x in zip(self.outputs, self.run(), strict=True):
            output.copy_(x)


def test_cuda_graph_reads_arguments_and_parameters_where_it_was_recorded(monkeypatch):
    """All but the recording itself, which needs a GPU."""
    recorded = Recorded()
    monkeypatch.setattr("pyproelbo.capture.cuda.cuda", recorded)

    def run(x, weight):
        return [x * weight, x + weight]

    x, weight = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
    graph = CudaGraph(run, [x], [weight])
    recorded.outputs, recorded.run = graph._outputs, lambda: run(*graph._places, weight)
    first = graph(torch.tensor([5.0, 6.0]), weight)
    weight.fill_(10.0)
    second = graph(torch.tensor([7.0, 8.0]), weight)
    assert [y.tolist() for y in first] == [[15.0, 18.0], [8.0, 9.0]]
    assert [y.tolist() for y in second] == [[70.0, 80.0], [17.0, 18.0]]
    assert recorded.replays == 2
    moved = graph(x, torch.tensor(2.0))
    assert [y.tolist() for y in moved] == [[2.0, 4.0], [3.0, 4.0]]
    assert recorded.replays == 2
