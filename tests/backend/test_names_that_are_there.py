"""Each name that torch, Pyro and Lightning do not promise, and that the library uses, by itself.

Where a release deprecates, moves or drops one, the test that has its name fails.
"""

import ast
import re
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import reduce
from importlib import import_module
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import enumerated_site
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn

pytestmark = pytest.mark.filterwarnings("error")

BACKEND = Path(__file__).parents[2] / "pyproelbo" / "_backend"
THEIRS = ("torch", "pyro", "lightning")

# by their modules: all under a private module, too
NAMES = [
    "torch._C._SetExcludeDispatchKeyGuard",
    "torch._C._aoti.AOTIModelContainerRunnerCpu",
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._C._disabled_torch_function_impl",
    "torch._C._len_torch_function_stack",
    "torch._C.DispatchKey.AutogradFunctionality",
    "torch._C.DisableTorchFunctionSubclass",
    "torch._GLOBAL_DEVICE_CONTEXT",
    "torch._foreach_mul",
    "torch._fused_adam_",
    "torch._fused_adamw_",
    "torch._fused_sgd_",
    "torch._inductor.aot_compile",
    "torch._inductor.compile",
    "torch._inductor.config.load_config",
    "torch._inductor.config.save_config_portable",
    "torch._inductor.decomposition.decompositions",
    "torch._inductor.ir.ExternKernel.realize_input",
    "torch._inductor.ir.ExternKernel.require_contiguous",
    "torch._inductor.ir.FixedLayout",
    "torch._inductor.ir.TensorBox.create",
    "torch._inductor.lowering.add_needs_realized_inputs",
    "torch._inductor.lowering.lowerings",
    "torch._inductor.lowering.make_fallback",
    "torch._inductor.lowering.needs_realized_inputs",
    "torch._inductor.lowering.permute",
    "torch._inductor.mkldnn_ir.LinearUnary",
    "torch._inductor.mkldnn_ir._create_output_node",
    "torch._inductor.runtime.cache_dir_utils.default_cache_dir",
    "torch._ops.OpOverload",
    "torch._standard_gamma_grad",
    "torch._subclasses.FakeTensorMode",
    "torch.distributions.Distribution._validate_sample",
    "torch.distributions.kl._KL_REGISTRY",
    "torch.fx._lazy_graph_module._LazyGraphModule",
    "torch.fx._symbolic_trace._is_fx_tracing_context",
    "torch.fx._symbolic_trace._is_fx_tracing_flag",
    "torch.fx._symbolic_trace.is_fx_symbolic_tracing",
    "torch.fx.experimental.proxy_tensor.get_proxy_mode",
    "torch.nn.modules.module._global_backward_hooks",
    "torch.nn.modules.module._global_backward_pre_hooks",
    "torch.nn.modules.module._global_forward_hooks",
    "torch.nn.modules.module._global_forward_pre_hooks",
    "torch.ops.aten._assert_async.msg",
    "torch.optim.optimizer._global_optimizer_post_hooks",
    "torch.optim.optimizer._global_optimizer_pre_hooks",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "pyro.distributions.util.scale_and_mask",
    "pyro.nn.module._MODULE_LOCAL_PARAMS",
    "pyro.ops.packed.pack",
    "pyro.poutine.replay_messenger.ReplayMessenger._pyro_sample",
    "pyro.poutine.runtime._DIM_ALLOCATOR._stack",
    "pyro.poutine.runtime._ENUM_ALLOCATOR",
    "pyro.poutine.runtime._PYRO_STACK",
    "pyro.poutine.runtime.effectful",
    "pyro.poutine.trace_messenger.TraceMessenger._pyro_post_sample",
    "pyro.poutine.util.site_is_factor",
    "pyro.poutine.util.site_is_subsample",
    "pyro.util.check_site_shape",
]
# before, and from then on, another one is asked
SINCE = {
    "torch.fx._symbolic_trace.is_fx_symbolic_tracing": (2, 11),
    "torch.fx._symbolic_trace._is_fx_tracing_context": (2, 14),
}
UNTIL = {"torch.fx._symbolic_trace._is_fx_tracing_flag": (2, 14)}


def found(path):
    """What a path from a module names."""
    parts = path.split(".")
    for num in range(len(parts), 0, -1):  # the longest part that is a module
        with suppress(ModuleNotFoundError):
            return reduce(getattr, parts[num:], import_module(".".join(parts[:num])))
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("path", NAMES)
def test_is_there(path):
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if not SINCE.get(path, (0,)) <= version < UNTIL.get(path, (99,)):
        pytest.skip("of other releases")
    found(path)


def deterministic_site():
    return poutine.trace(lambda: pyro.deterministic("d", torch.ones(2))).get_trace().nodes["d"]


def packed_log_prob():
    return enumerated_site()["packed"]["log_prob"]


def straight_through():
    d = dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), probs=torch.tensor([0.3]))
    return d.rsample()


def adam():
    return torch.optim.Adam([nn.Parameter(torch.ones(1))])


def mkldnn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    return torch.ops.mkldnn


def lightning_module():
    return pytest.importorskip("lightning.pytorch").LightningModule()


def fit_loop():
    pytorch = pytest.importorskip("lightning.pytorch")
    return pytorch.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False).fit_loop


def pool():
    return ProcessPoolExecutor(1)


def cluster_executor():
    return pytest.importorskip("distributed").cfexecutor.ClientExecutor(None)


# attributes of what has none but its own, and keys of dicts
ATTRIBUTES = {
    "_backward_hooks": [lambda: nn.Linear(2, 1), lambda: torch.ones(1)],
    "_backward_pre_hooks": [lambda: nn.Linear(2, 1)],
    "_buffers": [lambda: nn.Linear(2, 1)],
    "_cdata": [lambda: torch.ones(1).untyped_storage()],
    "_client": [cluster_executor],
    "_data_source": [fit_loop],
    "_deterministic": [lambda: deterministic_site()["infer"]],
    "_dim_to_symbol": [lambda: enumerated_site()["infer"]],
    "_enum_total": [lambda: enumerated_site("sequential")["infer"]],
    "_enumerate_dim": [lambda: enumerated_site()["infer"]],
    "_enumerate_symbol": [lambda: enumerated_site()["infer"]],
    "_forward_hooks": [lambda: nn.Linear(2, 1)],
    "_forward_pre_hooks": [lambda: nn.Linear(2, 1)],
    "_initargs": [pool],
    "_initializer": [pool],
    "_linear_pointwise": [mkldnn],
    "_mask": [lambda: dist.Normal(0.0, 1.0).mask(True)],
    "_max_workers": [pool],
    "_modules": [lambda: nn.Linear(2, 1)],
    "_mp_context": [pool],
    "_optimizer_step_post_hooks": [adam],
    "_optimizer_step_pre_hooks": [adam],
    "_parameters": [lambda: nn.Linear(2, 1)],
    "_params": [pyro.get_param_store],
    "_pred": [lambda: poutine.trace(lambda: None).get_trace()],
    "_post_accumulate_grad_hooks": [lambda: torch.ones(1)],
    "_pyro_context": [lambda: PyroModule("net")],
    "_pyro_dims": [packed_log_prob],
    "_pyro_name": [lambda: PyroModule("net")],
    "_pyro_params": [lambda: PyroModule("net")],
    "_pyro_samples": [lambda: PyroModule("net")],
    "_schema": [lambda: torch.ops.aten.add.Tensor],
    "_succ": [lambda: poutine.trace(lambda: None).get_trace()],
    "_trainer": [lightning_module],
    "_unquantize": [straight_through],
    "_validate_args": [lambda: dist.Normal(0.0, 1.0)],
    "_version": [lambda: torch.ones(1)],
}
HAVING = [(name, make) for name, makes in ATTRIBUTES.items() for make in makes]


@pytest.mark.parametrize(("name", "make"), HAVING, ids=[name for name, _ in HAVING])
def test_has_it(name, make):
    of = make()
    assert name in of if isinstance(of, dict) else hasattr(of, name)


# No other is used.


PYTHONS = {"_asdict", "_exit", "_fields", "_getframe"}


def is_private(path):
    parts = path.split(".")
    return parts[0] in THEIRS and any(
        part == "experimental" or (part.startswith("_") and not part.startswith("__"))
        for part in parts
    )


def dotted(node):
    """a.b.c of such an attribute, of a name; None for others."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def used(path):
    """The private names in a file: with their modules, and single ones."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    homes = dict(zip(THEIRS, THEIRS, strict=True))
    paths, own = set(), set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in THEIRS:
            for alias in node.names:
                homes[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.id if isinstance(node, ast.Name) else node.attr)
    singles = set()
    paths |= {*homes.values()}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            root, _, rest = (dotted(node) or "").partition(".")
            if root in homes:
                paths.add(f"{homes[root]}.{rest}")
            elif re.match("_[^_]", node.attr) and node.attr not in own | PYTHONS:
                singles.add(node.attr)
        if isinstance(node, ast.Constant) and re.fullmatch(r"_[a-zA-Z]\w*[a-z]", str(node.value)):
            singles.add(node.value)
    paths = {p for p in paths if is_private(p)}
    return {p for p in paths if not any(q.startswith(f"{p}.") for q in paths)}, singles


@pytest.mark.parametrize("path", sorted(BACKEND.glob("*.py")), ids=lambda path: path.stem)
def test_all_that_are_used_are_listed(path):
    paths, singles = used(path)
    listed = {p for p in paths if any(f"{p}.".startswith(f"{name}.") for name in NAMES)}
    listed |= {p for p in paths if any(name.startswith(f"{p}.") for name in NAMES)}
    listed |= {p for p in paths if p.rsplit(".", 1)[-1] in ATTRIBUTES}
    assert paths - listed == set()
    assert singles - {name.rsplit(".", 1)[-1] for name in NAMES} - {*ATTRIBUTES} == set()
