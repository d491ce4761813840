"""Captured steps are eager ones: of all programs and objectives, and as these change."""

import copy
import gc
import math
import pickle
import warnings
import weakref

import numpy as np
import pyro
import pytest
import torch
from helpers import programs
from helpers.captured_fits import (
    EAGER,
    OBJECTIVES,
    Guide,
    Model,
    assert_fit_alike,
    assert_trained_alike,
    batch,
    fit,
    new_module,
    num_graphs,
    runs_of,
    trained,
)
from pyro.infer import SVI
from torch import nn

import pyproelbo as pe
from pyproelbo.capture import graph
from pyproelbo.guides.dmm import Smoothing
from pyproelbo.guides.lgssm import Filtering
from pyproelbo.models.dmm import DMM
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.schedules import Linear

PROGRAMS = {**programs.REPARAMETERISED, **programs.SCORE_FUNCTION, **programs.ENUMERATED}
LOOPED = ["local_normal", "subsampled", "score_function", "guide_enumerated_chain", "AutoNormal"]
CASES = [
    *((name, {}) for name in PROGRAMS),
    *((name, {"num_particles": 2}) for name in LOOPED),
    *((name, {"num_particles": 2, "vectorize_particles": True}) for name in LOOPED),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "particles"), CASES)
def test_all_programs_train_as_eagerly(name, particles):
    """Captured, at the same seed, while beta rises: the same losses and parameters all along."""
    beta = Linear(0.1, 1.0, 5)
    objective = pe.BetaELBO(beta, compile=EAGER, **particles)
    ours = trained(PROGRAMS[name], objective)
    assert num_graphs(objective) == 1
    assert_trained_alike(ours, trained(PROGRAMS[name], pe.BetaELBO(beta, **particles)))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_inputs_of_a_graph_come_before_what_reads_them():
    objective = pe.BetaELBO(compile=EAGER)
    trained(programs.local_normal, objective)
    (runs,) = runs_of(objective)
    names = [node.op for node in runs.function.graph.nodes]
    num = names.count("placeholder")
    assert num > 0 and set(names[:num]) == {"placeholder"}


@pytest.mark.parametrize("is_on", [True, False])
def test_the_garbage_collector_is_paused_and_left_as_it_was(is_on, monkeypatch):
    seen, other = [], graph._other_generators

    def looked():
        seen.append(gc.isenabled())
        return other()

    monkeypatch.setattr(graph, "_other_generators", looked)
    was_on = gc.isenabled()
    (gc.enable if is_on else gc.disable)()
    try:
        fit(new_module(pe.BetaELBO(compile=EAGER)), [batch(6)] * 4)
        assert {*seen} == {False} and gc.isenabled() == is_on
    finally:
        (gc.enable if was_on else gc.disable)()


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


@pytest.mark.slow
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


@pytest.mark.slow
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
