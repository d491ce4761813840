"""Names that torch, Pyro and Lightning do not promise: each is there, and each in one place."""

import ast
import inspect
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.graphs import graph_of
from helpers.programs import enumerated_site
from helpers.vae import Guide, Model
from pyro import poutine
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.quasirandom import SobolEngine

import pyproelbo as pe
from pyproelbo._backend import (
    captures,
    kept_samples,
    opaque,
    packed_graph,
    pools,
    pyro_private,
    rng,
    torch_private,
)
from pyproelbo._backend.autograd import holdable, is_holdable, some_leaves_of, through

ROOT = Path(__file__).parents[2]


def test_pyro_handlers():
    with poutine.block() as handler:
        assert pyro_private.handlers()[-1] is handler
    assert not pyro_private.handlers()


def test_pyro_parameters_in_store():
    value = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    assert pyro_private.parameters_in_store()["scale"] is value.unconstrained()


def test_pyro_names_of_modules():
    class Part(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = PyroParam(torch.tensor(1.0))

    whole = PyroModule("whole")
    whole.part = Part()
    assert pyro_private.name_of(whole) == "whole"
    pyro_private.rename(whole, "whole", "other")
    assert [pyro_private.name_of(m) for m in (whole, whole.part)] == ["other", "other.part"]


def test_pyro_replay_and_record():
    trace = poutine.trace(lambda: pyro.sample("z", dist.Normal(0.0, 1.0))).get_trace()
    message = {**trace.nodes["z"], "value": None, "done": False, "infer": {}}
    pyro_private.replay(poutine.replay_messenger.ReplayMessenger(trace), message)
    assert message["value"] is trace.nodes["z"]["value"] and message["done"]
    recorder = poutine.trace_messenger.TraceMessenger()
    with recorder:
        pyro_private.record(recorder, trace.nodes["z"])
    assert "z" in recorder.trace.nodes


def test_pyro_masks_and_deterministic_sites():
    mask = torch.tensor([True, False])
    assert pyro_private.mask_of(dist.Normal(torch.zeros(2), 1.0).mask(mask)) is mask
    trace = poutine.trace(lambda: pyro.deterministic("d", torch.ones(2))).get_trace()
    assert pyro_private.is_deterministic(trace.nodes["d"])


def test_pyro_enumeration():
    site = enumerated_site()
    assert pyro_private.is_enumerated(site) and pyro_private.runs_of(site) == 1
    symbol, packed = pyro_private.symbol_of(site), site["packed"]["log_prob"]
    assert symbol in pyro_private.dims_of(packed)
    assert pyro_private.dims_of(pyro_private.pack(site["log_prob"], site)) == symbol + "a"
    assert pyro_private.dims_of(pyro_private.with_dims(torch.ones(2), "x")) == "x"
    assert pyro_private.common_scale([2.0, torch.tensor(2.0)]) == 2.0
    for scales, words in (([1.0, 2.0], "share a common"), ([torch.ones(2)], "one scale")):
        with pytest.raises(ValueError, match=words):
            pyro_private.common_scale(scales)


def test_pyro_straight_through_draws():
    d = dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), probs=torch.tensor([0.3]))
    assert hasattr(d.rsample(), pyro_private.SOFT)


def test_pyro_kept_samples():
    class Net(PyroModule):
        def __init__(self):
            super().__init__("net")
            self.w = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self):
            first = self.w
            kept = list(kept_samples.samples_kept())
            with kept_samples.samples_forgotten():
                pass
            return first == self.w, kept

    net = Net()
    is_same, kept = net()
    assert is_same and kept == [(net, ["net.w"])]


def test_torch_directions_of_sobol_points():
    directions, points = (
        torch_private.sobol_directions(),
        SobolEngine(5).draw(4, dtype=torch.float64),
    )
    found = [0, directions[0], directions[0] ^ directions[1], directions[1]]  # as Gray's code goes
    expected = (points * 2**torch_private.SOBOL_BITS).numpy()
    for ours, theirs in zip(found, expected, strict=True):
        assert (np.broadcast_to(ours, SobolEngine.MAXDIM)[:5] == theirs).all()


def test_torch_gradient_of_gamma():
    a = torch.tensor([0.5, 3.0], requires_grad=True)
    value = torch.tensor([0.3, 2.0])
    torch_private.gradient_of_gamma(a, value).sum().backward()
    q, eps = torch.special.gammainc(a.detach(), value), 1e-5
    low, high = (torch.from_numpy(_gammaincinv((a + s * eps).detach(), q)) for s in (-1, 1))
    torch.testing.assert_close(a.grad, (high - low) / (2 * eps), rtol=1e-5, atol=1e-7)


def _gammaincinv(a, q):
    from scipy.special import gammaincinv

    return gammaincinv(a.cpu().numpy(), q.cpu().numpy())


def test_torch_registered_kls():
    pair = torch.distributions.Normal, torch.distributions.Normal
    assert pair in torch_private.registered_kls()


def test_torch_validation_of_distributions():
    d = dist.Normal(0.0, 1.0, validate_args=True)
    assert torch_private.is_validated(d)
    torch_private.validate(d, False)
    assert d.log_prob(torch.tensor(torch.nan)).isnan()


def test_torch_memory():
    x = torch.zeros(4)
    assert torch_private.memory_of(x) == torch_private.memory_of(x[2:])
    assert torch_private.memory_of(x) != torch_private.memory_of(x.clone())


def test_torch_versions():
    x = torch.zeros(2)
    before = torch_private.version_of(x)
    x.add_(1)
    assert torch_private.version_of(x) > before


def test_torch_modules_and_hooks():
    linear = nn.Linear(2, 1)
    assert [set(held) for held in torch_private.tensors_held(linear)] == [{"weight", "bias"}, set()]
    assert all(name in vars(linear) for name in torch_private.HELD[:3])
    assert not any(torch_private.hooks_of(linear))
    linear.register_forward_hook(lambda *_: None)
    linear.register_full_backward_hook(lambda *_: None)
    linear.register_forward_pre_hook(lambda *_: None)
    assert sum(map(len, torch_private.hooks_of(linear))) == 3
    assert len(torch_private.GLOBAL_HOOKS) == 4
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert sum(len(hooks) for hooks, _ in torch_private.GLOBAL_HOOKS) == 1
    handle.remove()
    assert not torch_private.with_hooks([linear.weight, linear.bias])
    linear.weight.register_hook(lambda g: g)
    linear.bias.register_post_accumulate_grad_hook(lambda _: None)
    assert torch_private.with_hooks([linear.weight, linear.bias]) == [linear.weight, linear.bias]


def test_torch_autograd():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    seen = []
    y = x.square().sum()
    y.register_hook(lambda _: seen.append(torch_private.keeps_graph()))
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [True, False]
    ours = torch_private.scaled([x, x + 1], torch.tensor(2.0))
    assert [tuple(each.tolist()) for each in ours] == [(2.0, 4.0), (4.0, 6.0)]


def test_a_gradient_through_some_variables_alone():
    phi, theta = (torch.tensor(v, requires_grad=True) for v in (0.7, 2.0))
    first = holdable(phi * 1.5)
    second = holdable(first * phi)  # drawn given the first
    assert is_holdable(first) and not is_holdable(first * 2)
    value = theta * first.square() + second * phi
    through(value, [first, second]).backward()
    # d value / d first = 2 theta first, with second as it is; d value / d second = phi
    expected = 2 * theta * first * 1.5 + phi * (first + phi * 1.5)
    torch.testing.assert_close(phi.grad, expected.detach())
    assert theta.grad is None and some_leaves_of([value]) != []


def test_plain_results_with_and_without_torchs_own():
    class Lazy(torch.Tensor):
        __torch_function__ = torch_private.PLAIN_RESULTS

    class Other(torch.Tensor):
        __torch_function__ = classmethod(torch_private._plain_results)

    for kind in (Lazy, Other):
        x = torch.tensor(1.0).as_subclass(kind)
        assert type(x + 1) is torch.Tensor and float(x * 2) == 2.0


def test_captures_are_seen():
    seen = []

    def f(x):
        seen.append(captures.is_captured())
        return x * 2

    f(torch.ones(2))
    make_fx(f)(torch.ones(2))
    torch.fx.symbolic_trace(f)
    assert seen == [False, True, True]


def test_a_compiled_function_refuses_to_run_while_a_step_is_recorded():
    double = torch.compile(lambda x: x * 2, backend="eager")
    x = torch.ones(2)
    assert torch.equal(double(x), 2 * x)
    with pytest.raises(RuntimeError, match="FX"):
        graph_of(double, x)
    assert torch.equal(double(x), 2 * x)


def test_pools_of_processes_can_be_renewed():
    with ProcessPoolExecutor(3) as pool:
        again = pools.renewed(pool)
        assert again is not None and pools.workers_of(pool) == pools.workers_of(again) == 3
        again.shutdown()
    with ThreadPoolExecutor(1) as threads:
        assert pools.renewed(threads) is None


def test_generators_are_put_aside():
    import random

    import numpy as np

    def drawn():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    rng.begin(3)
    before = rng.state()
    first = drawn()
    with rng.put_aside(seed=8):
        inside = drawn()
    with rng.put_aside(seed=8):
        assert drawn() == inside
    second = drawn()
    rng.restore(before)
    assert (drawn(), drawn()) == (first, second) and inside not in (first, second)


# what is not there breaks what needs it, and nothing else

WITHOUT = """
import warnings
import sys, torch, pyro, pyro.distributions as dist
sys.modules["pyproelbo._backend.tracing"] = None  # as where an import in it fails
import pyproelbo as pe
from pyproelbo.sequences import MarkovChain
for name in dir(pe):
    if name not in ("lightning", "cli"):
        getattr(pe, name)
x = torch.randn(5, 3)
def model():
    with pyro.plate("data", 5):
        z = pyro.sample("z", MarkovChain(dist.Normal(0., 1.), lambda z: dist.Normal(z, 1.),
                                         num_steps=3))
        pyro.sample("x", dist.Normal(z, 1.).to_event(1), obs=x)
def guide():
    scale = pyro.param("scale", torch.tensor(0.5))
    with pyro.plate("data", 5):
        pyro.sample("z", MarkovChain(dist.Normal(0., scale), lambda z: dist.Normal(z, scale),
                                     num_steps=3))
pe.BetaELBO().loss_and_grads(model, guide)
objective = pe.BetaELBO(compile=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    losses = [objective.loss_and_grads(model, guide) for _ in range(4)]
words = [str(w.message) for w in caught if issubclass(w.category, pe.CaptureWarning)]
assert len(words) == 1 and "_backend.tracing" in words[0] and "compile=False" in words[0], words
assert all(abs(loss) < 1e4 for loss in losses) and objective.step == 4
print("done")
"""


def test_without_torchs_experimental_parts_only_compile_is_missing():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def test_importing_imports_nothing_experimental():
    script = (
        "import sys, torch; before = {*sys.modules}; import pyro; import pyproelbo as pe; "
        "pe.BetaELBO(compile=True); pe.surgery; pe.sequences; pe.VampPrior; "
        "ours = [n for n in {*sys.modules} if n.startswith('pyproelbo._backend')]; "
        "assert not {'pyproelbo._backend.tracing', 'pyproelbo._backend.operations'} & {*ours}, ours"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_packed_graphs_have_names_for_what_pickle_would_look_for():
    """It takes the first module that holds torch's memory formats, such as one of the user's."""
    graph = make_fx(lambda x: torch.ones_like(x, memory_format=torch.preserve_format))(
        torch.ones(2)
    )
    nodes, _ = packed_graph.packed(graph)
    kinds = [node.kwargs["memory_format"] for node in nodes if "memory_format" in node.kwargs]
    assert kinds == ["torch.preserve_format"]
    again = packed_graph.unpacked(pickle.loads(pickle.dumps(nodes)))
    assert again.code.strip() == graph.code.strip()


def test_opaque_functions_outside_of_captures_are_themselves():
    assert opaque.opaque(lambda x: (x + 1,), torch.ones(1))[0] == 2


def test_captured_steps_still_find_what_they_need():
    objective = pe.BetaELBO(compile=pe.Capture(backend="eager"))
    module = objective(Model(), Guide())
    for _ in range(3):
        module(torch.randn(4, 3)).backward()
    assert objective.step == 3


# each in one place

SOURCES = [
    path
    for folder in ("pyproelbo", "models", "guides")
    for path in (ROOT / folder).rglob("*.py")
    if "_backend" not in path.parts
]
# of classes that torch and Pyro have made to be derived from
OF_BASES = {
    "_validate_args", "_validate_sample", "_get_checked_instance", "_load_from_state_dict",
    "_get_optim_args", "_state_waiting_to_be_consumed", "_pyro_sample", "_pyro_post_sample",
}  # fmt: skip
PYTHONS = {"_replace", "_asdict", "_make", "_fields", "_getframe"}
SELF = {"self", "cls", "super"}


def defined_here(trees):
    """Names that the library itself gives to functions, classes, fields and attributes."""
    names = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def test_private_names_are_in_the_backend_alone():
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    own, found = defined_here(trees), []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and node.module:
                root, *parts = node.module.split(".")
                names = [*parts, *(alias.name for alias in node.names)]
                if root in ("torch", "pyro") and any(
                    name.startswith("_") or name == "experimental" for name in names
                ):
                    found.append((where, node.module))
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
                continue
            if node.attr.startswith("__") or node.attr in own:
                continue
            holder = node.value
            is_own = isinstance(holder, ast.Name) and holder.id in SELF
            is_super = isinstance(holder, ast.Call) and getattr(holder.func, "id", "") == "super"
            if node.attr in OF_BASES and (is_own or is_super):
                continue
            if node.attr in PYTHONS:
                continue
            found.append((where, node.attr))
    assert not found, found


@pytest.mark.parametrize("name", sorted(OF_BASES))
def test_what_subclasses_use_is_there(name):
    bases = (torch.distributions.Distribution, nn.Module, pyro.optim.PyroOptim)
    bases += (poutine.replay_messenger.ReplayMessenger, poutine.trace_messenger.TraceMessenger)
    optim = pyro.optim.Adam({"lr": 0.1})
    held = [dist.Normal(0.0, 1.0), optim, *bases]
    assert any(hasattr(base, name) for base in held), name
    if name == "_get_checked_instance":
        assert "_instance" in inspect.signature(bases[0]._get_checked_instance).parameters
