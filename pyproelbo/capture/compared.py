"""Whether two ways to make a step agree."""

import torch

from pyproelbo.capture.graph import Computed, Graph
from pyproelbo.capture.structure import CannotCapture


def check(step: Computed, expected: Computed, near: float) -> None:
    """
    Args:
        near: the largest difference allowed, relative to their size.

    Raises:
        CannotCapture: if the two differ by more than rounding.
    """
    norms = [x.norm().to(expected.loss) for x in expected.gradients]
    total = torch.stack([expected.loss.new_zeros(()), *norms]).nan_to_num().norm()
    for ours, theirs in zip(
        (step.loss, *step.gradients), (expected.loss, *expected.gradients), strict=True
    ):
        least = 100 * torch.finfo(theirs.dtype).eps * total  # of a gradient that should be 0
        rtol = max(near, 1e-9 if theirs.dtype == torch.float64 else 1e-3)
        size = rtol * theirs.nan_to_num().norm() + least
        if ours.dtype != theirs.dtype or not torch.allclose(
            ours, theirs, rtol=rtol, atol=float(size), equal_nan=True
        ):
            raise CannotCapture(
                "its graph does not compute what the program does: does the program change by "
                "itself from step to step, by a counter or a cache, say?"
            )


def nearness(graph: Graph) -> float:
    """A bound on the rounding errors of a graph.

    Raises:
        CannotCapture: for gradients that need the loss scaled before the backward pass.
    """
    layouts = (node.meta.get("layout") for node in graph.module.graph.nodes)
    dtypes = {layout.dtype for layout in layouts if layout is not None}
    if torch.float16 in dtypes:
        raise CannotCapture(
            "it computes in float16, where gradients vanish unless the loss is scaled before the "
            "backward pass, which a graph is not: use bfloat16"
        )
    return 10 * torch.finfo(torch.bfloat16).eps if torch.bfloat16 in dtypes else 0.0
