"""Large products of matrices by oneDNN, for float32 on x86 CPUs.

torch takes MKL's, which on processors that are not Intel's leaves half of the speed of AVX-512
unused: on an AMD EPYC oneDNN takes 0.33 ms where MKL takes 0.75 (128 x 784 times 784 x 400, one
thread). ``torch.backends.mkldnn.flags(enabled=False)`` around the first steps switches this off.
"""

import copy
import os
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pyproelbo._backend.layouts import Layout

_mm, _addmm = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
# a call of oneDNN takes 10 us more, in which MKL makes so many multiplications more than it
_LEAST = 2**20
_LEAST_ON_INTEL = 2**22
_COPY = 40  # multiplications, in whose time oneDNN copies an element of a transposed left matrix


def with_fast_products(module: GraphModule) -> GraphModule:
    """The same graph, with its large products of matrices by oneDNN where torch has it."""
    is_x86 = "AVX" in torch.backends.cpu.get_cpu_capability()
    if not (is_x86 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # pyright: ignore
        return module
    if not any(map(_is_faster, module.graph.nodes)):
        return module
    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        if _is_faster(node):
            bias = node.args[0] if node.target is _addmm else None
            row = bias if bias is None or _layout(bias).shape == _layout(node).shape[1:] else None
            with module.graph.inserting_before(node):
                product = module.graph.call_function(OPERATION, (*node.args[-2:], row))
                if bias is not row:
                    product = module.graph.call_function(torch.ops.aten.add.Tensor, (product, bias))
            product.meta = node.meta
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)
    module.recompile()
    return module


def _layout(node: Any) -> Layout:
    return node.meta["layout"]


def _is_faster(node: Node) -> bool:
    """Whether a node is a product of float32 matrices, large enough for oneDNN."""
    if node.target not in (_mm, _addmm) or node.kwargs:
        return False
    layout, left = _layout(node), _layout(node.args[-2])
    if layout.dtype != torch.float32 or layout.device.type != "cpu":
        return False
    is_copied = left.stride[1] != 1
    work = prod(layout.shape) * left.shape[1] - _COPY * is_copied * prod(left.shape)
    return work >= (_LEAST_ON_INTEL if _is_intel() else _LEAST)


@cache
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not on Linux
        return "AuthenticAMD" not in os.environ.get("PROCESSOR_IDENTIFIER", "")


_library = torch.library.Library("pyproelbo", "FRAGMENT")
_library.define("product(Tensor a, Tensor b, Tensor? row) -> Tensor")
OPERATION = torch.ops.pyproelbo.product.default


def _product(a: Tensor, b: Tensor, row: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), row, "none", [], "")


_library.impl("product", _product, "CPU")


@torch.library.register_fake("pyproelbo::product", lib=_library)
def _like_product(a: Tensor, b: Tensor, row: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def lowered(a: Any, b: Any, row: Any) -> Any:
    """The operation in inductor, whose own products by oneDNN are of constant matrices alone."""
    from torch._inductor import ir, lowering
    from torch._inductor.mkldnn_ir import LinearUnary, _create_output_node

    realized = ir.ExternKernel.realize_input
    columns = realized(lowering.permute(b, [1, 0]))
    inputs = [ir.ExternKernel.require_contiguous(realized(a)), columns]
    constants = ["none", [-1], ""] if row is not None else [None, "none", [-1], ""]
    layout = ir.FixedLayout(a.get_device(), a.get_dtype(), [a.get_size()[0], b.get_size()[1]])
    kernel = LinearUnary(layout, inputs if row is None else [*inputs, realized(row)], constants)
    return ir.TensorBox.create(_create_output_node(kernel))
