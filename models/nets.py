"""The networks of models and guides."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from pyproelbo.models.base import check_sizes


def mlp(num_inputs: int, hidden: Sequence[int], num_outputs: int) -> nn.Sequential:
    """Linear layers with SiLU between them: (..., num_inputs) -> (..., num_outputs).

    Args:
        hidden: the width of each hidden layer; with none the net is linear.
    """
    widths = [num_inputs, *hidden, num_outputs]
    check_sizes(**{f"width {i} of the net": width for i, width in enumerate(widths)})
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
