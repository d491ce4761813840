"""torch's inductor, such that a compiled graph draws the random numbers of an eager one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx import GraphModule


def compiled(
    graph: GraphModule, inputs: Sequence[Tensor], options: Mapping[str, object]
) -> Callable[..., list[Tensor]]:
    """A compiled function of the graph's inputs.

    Its random numbers come from torch's generators, by torch's functions, in the order of the
    graph.

    Args:
        options: as of ``torch.compile(options=...)``.
    """
    import torch._inductor  # takes a second, which only this needs

    from pyproelbo._backend.products import with_fast_products

    in_order = {"fallback_random": True, "reorder_for_locality": False}
    with _own_sampling():
        graph = with_fast_products(graph)
        run = torch._inductor.compile(graph, list(inputs), options={**in_order, **options})
    return run  # type: ignore[return-value]


@contextmanager
def _own_sampling() -> Iterator[None]:
    """With torch's functions where inductor has its own, which draw other numbers."""
    from torch._inductor import decomposition, lowering

    decompositions = decomposition.decompositions
    others = (torch.ops.aten.bernoulli.default, torch.ops.aten.randint.default)
    hidden = {op: decompositions.pop(op) for op in others if op in decompositions}
    try:
        for op in hidden:
            lowering.make_fallback(op, warn=False)  # a warning that is an error where CI is set
        yield
    finally:
        for op in hidden:
            lowering.lowerings.pop(op, None)
        decompositions.update(hidden)  # type: ignore[arg-type]
