"""The networks of models and guides."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from pyproelbo.models.base import check_sizes


def mlp(
    num_inputs: int,
    hidden: Sequence[int],
    num_outputs: int,
    activation: Callable[[], nn.Module] = nn.SiLU,
) -> nn.Sequential:
    """Linear layers with an activation between them: (..., num_inputs) -> (..., num_outputs).

    Args:
        hidden: the width of each hidden layer; with none the net is linear.
        activation: what makes a module to put between them.
    """
    widths = [num_inputs, *hidden, num_outputs]
    check_sizes(**{f"width {i} of the net": width for i, width in enumerate(widths)})
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out), activation()]
    return nn.Sequential(*layers[:-1])
