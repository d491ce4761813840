"""Large products of matrices by oneDNN, for float32 on x86 CPUs.

torch takes MKL's, which on processors that are not Intel's leaves half of the speed of AVX-512
unused: on an AMD EPYC oneDNN takes 0.39 ms where MKL takes 0.79 (128 x 784 times 784 x 400, one
thread). ``torch.backends.mkldnn.flags(enabled=False)`` around the first steps switches this off.
"""

import copy
from math import prod

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_LEAST = 2**22  # multiplications, from which the call of one more function is worth it
_mm, _addmm = torch.ops.aten.mm.default, torch.ops.aten.addmm.default


def with_fast_products(module: GraphModule) -> GraphModule:
    """The same graph, with its large products of matrices by oneDNN where torch has it."""
    is_x86 = "AVX" in torch.backends.cpu.get_cpu_capability()
    if not (is_x86 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # pyright: ignore
        return module
    large = [n for n in module.graph.nodes if n.target in (_mm, _addmm) and _is_large(n)]
    if not large:
        return module
    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        if node.target in (_mm, _addmm) and _is_large(node):
            bias = node.args[0] if node.target is _addmm else None
            with module.graph.inserting_before(node):
                args = (*node.args[-2:], bias)
                product = module.graph.call_function(torch.ops.pyproelbo.product.default, args)
            product.meta = node.meta
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)
    module.recompile()
    return module


def _is_large(node: Node) -> bool:
    """Whether a product is one of large float32 matrices on the CPU, and nothing besides."""
    layout, left = (x.meta["layout"] for x in (node, node.args[-2]))  # type: ignore[union-attr]
    is_float = layout.dtype == torch.float32 and layout.device.type == "cpu"
    return is_float and not node.kwargs and prod(layout.shape) * left.shape[1] >= _LEAST


_library = torch.library.Library("pyproelbo", "FRAGMENT")
_library.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    row = bias if bias is not None and bias.dim() == 1 and len(bias) == b.shape[1] else None
    product = torch.ops.mkldnn._linear_pointwise(a, b.t(), row, "none", [], "")
    return product if row is bias else product.add_(bias)


_library.impl("product", _product, "CPU")


@torch.library.register_fake("pyproelbo::product", lib=_library)
def _like_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])
