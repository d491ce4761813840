"""The networks of models and guides, and normal distributions of their outputs."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyproelbo.models.base import check_sizes

# from the sizes of the input, the hidden layers and the output; if the output is None, the net ends
# in its last hidden layer
Net = Callable[[int, Sequence[int], int | None], nn.Module]


def mlp(
    num_inputs: int,
    hidden: Sequence[int],
    num_outputs: int | None,
    activation: Callable[[], nn.Module] = nn.SiLU,
) -> nn.Sequential:
    """Linear layers with an activation between them: (..., num_inputs) -> (..., num_outputs).

    Args:
        hidden: the width of each hidden layer; with none the net is linear.
        num_outputs: None for a net that ends in its last hidden layer.
        activation: makes the module between layers.
    """
    return _net(num_inputs, hidden, num_outputs, lambda n, m: (nn.Linear(n, m), activation()))


def gated_mlp(num_inputs: int, hidden: Sequence[int], num_outputs: int | None) -> nn.Sequential:
    """Gated layers h -> (W h + b) * sigmoid(V h + c), then a linear one.

    From (..., num_inputs) to (..., num_outputs). A layer's W and V are one matrix, (W, V), which
    makes it one product. The gates are those of Dauphin et al. (2017), "Language Modeling with
    Gated Convolutional Networks", eq. 1; Tomczak & Welling (2018), "VAE with a VampPrior", use them
    in dense layers.

    Args: as for :func:`mlp`.
    """
    return _net(num_inputs, hidden, num_outputs, lambda n, m: (nn.Linear(n, 2 * m), nn.GLU()))


def _net(
    num_inputs: int,
    hidden: Sequence[int],
    num_outputs: int | None,
    layer: Callable[[int, int], Sequence[nn.Module]],
) -> nn.Sequential:
    """Hidden layers, each of modules that ``layer`` makes from two sizes, and a linear one."""
    widths = [num_inputs, *hidden]
    outputs = [] if num_outputs is None else [num_outputs]
    check_sizes(**{f"width {i} of the net": width for i, width in enumerate(widths + outputs)})
    modules = [module for n, m in pairwise(widths) for module in layer(n, m)]
    return nn.Sequential(*modules, *(nn.Linear(widths[-1], m) for m in outputs))


class Joined(nn.Module):
    """A net of several inputs: a first hidden layer for each, then the other layers for all.

    From (..., num_inputs[0]), (..., num_inputs[1]), ... to (..., num_outputs); leading dims
    broadcast, after the first layer. With no hidden layer it is linear in all inputs.

    Args:
        num_inputs: the sizes of the inputs.
        hidden: the width of each hidden layer; the first is that of each input's own layer.
        net: makes the parts from their sizes: :func:`mlp` or :func:`gated_mlp`.
    """

    def __init__(
        self, num_inputs: Sequence[int], hidden: Sequence[int], num_outputs: int, net: Net = mlp
    ) -> None:
        super().__init__()
        own, joint = hidden[:1], hidden[1:]
        self.own = nn.ModuleList(net(num, own, None) for num in num_inputs)
        self.joint = net(sum([*own] * len(num_inputs) or num_inputs), joint, num_outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """(..., num_inputs[0]), (..., num_inputs[1]), ... -> (..., num_outputs)."""
        parts = [layer(x) for layer, x in zip(self.own, inputs, strict=True)]
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return self.joint(torch.cat([part.expand(*shape, -1) for part in parts], -1))


class DiagonalNormal(nn.Module):
    """N(loc, diag(scale)^2) from loc and log scale, (..., k) each: event shape (k,).

    Args:
        log_scale: the limits at which the log scale is clamped; None for none. Tomczak & Welling
            (2018), "VAE with a VampPrior", use (-3.0, 1.0) in their code: log variances from -6 to
            2.
    """

    def __init__(self, log_scale: tuple[float, float] | None = None) -> None:
        super().__init__()
        if log_scale is not None and not log_scale[0] < log_scale[1]:
            raise ValueError(f"log_scale should be the least and the greatest, got {log_scale}")
        self.log_scale = log_scale

    def forward(self, loc: Tensor, log_scale: Tensor) -> TorchDistribution:
        """For loc and log_scale (..., k): batch shape (...), event shape (k,)."""
        if self.log_scale is not None:
            log_scale = log_scale.clamp(*self.log_scale)
        return dist.Normal(loc, log_scale.exp()).to_event(1)
