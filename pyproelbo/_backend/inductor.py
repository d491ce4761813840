"""torch's inductor, such that a compiled graph draws the random numbers of an eager one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyproelbo._backend import decompositions, products

# of torch 2.6 some draw other numbers, or return nothing; the next one that was tried is 2.11
_MAKES_LIBRARIES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
_IN_ORDER = {"fallback_random": True, "reorder_for_locality": False}


def compiled(
    graph: GraphModule, inputs: Sequence[Tensor], options: Mapping[str, object]
) -> Callable[[list[Tensor]], list[Tensor]]:
    """A compiled function of the list of the graph's inputs.

    Its random numbers come from torch's generators, by torch's functions, in the order of the
    graph.

    Args:
        options: as of ``torch.compile(options=...)``.
    """
    import torch._inductor  # takes a second, which only this needs

    with _own_parts():
        run = torch._inductor.compile(graph, list(inputs), options={**_IN_ORDER, **options})
    return lambda tensors: run(*tensors)  # type: ignore[operator, return-value]


def compiled_library(
    graph: GraphModule, inputs: Sequence[Tensor], options: Mapping[str, object], path: str
) -> None:
    """The same as a library without Python, which :func:`library` loads.

    Args:
        inputs: tensors of the shapes, strides and dtypes of the inputs, on their devices.
        path: of the library, which ends in ".so", in a folder of its own.

    Raises:
        NotImplementedError: where torch's libraries cannot be relied upon.
    """
    if not _MAKES_LIBRARIES:
        raise NotImplementedError("libraries are made of torch 2.11 or later")
    import torch._inductor
    from torch._subclasses import FakeTensorMode

    fake = FakeTensorMode()
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, x in zip(places, inputs, strict=True):
        node.meta["val"] = fake.from_tensor(x)
    settings = {**_IN_ORDER, **options, "aot_inductor.output_path": path}
    with _own_parts():
        torch._inductor.aot_compile(graph, tuple(inputs), options=settings)
    library = Path(path)
    for operations in library.parent.glob("*.wrapper.json"):  # which are no part of inductor
        operations.rename(library.with_suffix(".json"))  # where the library looks for them


def library(path: str, device: torch.device) -> Callable[[list[Tensor]], list[Tensor]]:
    """The function that :func:`compiled_library` has left."""
    runners = torch._C._aoti  # pyright: ignore
    if device.type == "cpu":
        return runners.AOTIModelContainerRunnerCpu(path, 1).run
    return runners.AOTIModelContainerRunnerCuda(path, 1, str(device)).run


@contextmanager
def _own_parts() -> Iterator[None]:
    """With torch's functions where inductor has its own, which draw other numbers.

    And with oneDNN's products, called as what they are, and decompositions that are faster.
    """
    from torch._inductor import decomposition, lowering

    known, lowerings = decomposition.decompositions, lowering.lowerings
    others = (torch.ops.aten.bernoulli.default, torch.ops.aten.randint.default)
    hidden = {op: known.pop(op) for op in others if op in known}
    own = decompositions.own(known)
    replaced = {op: known[op] for op in own}
    try:
        known.update(own)
        for op in hidden:
            lowering.make_fallback(op, warn=False)  # a warning that is an error where CI is set
        lowerings[products.OPERATION] = products.lowered
        lowering.add_needs_realized_inputs(products.OPERATION)
        yield
    finally:
        for op in hidden:
            lowerings.pop(op, None)
        known.update(hidden | replaced)  # type: ignore[arg-type]
        lowerings.pop(products.OPERATION)
        lowering.needs_realized_inputs.discard(products.OPERATION)
