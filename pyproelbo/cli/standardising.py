"""Data on any scale: standardised for the nets, and as given for the likelihood."""

from typing import NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.distributions.transforms import AffineTransform

from pyproelbo.cli.rows import InMemory, Rows, features
from pyproelbo.datasets import Files
from pyproelbo.models.base import NamedModule
from pyproelbo.models.vae import GaussianLikelihood
from pyproelbo.sequences import lengths_mask

_SIZES = (1e-15, 1e15)  # of standard deviations: the squares of smaller ones are 0 in float32


class Scaling(NamedTuple):
    """The standardisation of data: (x - shift) / scale.

    Attributes:
        shift: (D,), the means of the features.
        scale: (D,), their standard deviations; 1 for a constant feature.
    """

    shift: Tensor
    scale: Tensor

    @staticmethod
    def of(data: Rows) -> "Scaling":
        """From rows (N, D), in one pass over files, or sequences (N, T, D) at the steps that count.

        Raises:
            ValueError: for a feature whose variation is lost to rounding, or too large or too small
                to be squared.
        """
        scale, shift, dtype = _of_files(data) if isinstance(data, Files) else _in_memory(data)
        resolution = torch.finfo(dtype).eps * shift.abs()
        constant = scale <= 1e-3 * resolution
        for d in (~constant & (scale < 16 * resolution)).nonzero().flatten().tolist():
            raise ValueError(
                f"feature {d} of the data varies by {scale[d]:.2g} about {shift[d]:.8g}, too "
                f"little for the digits of {dtype}: subtract its mean before you save it"
            )
        least, most = _SIZES
        for d in (~constant & ((scale < least) | (scale > most))).nonzero().flatten().tolist():
            raise ValueError(
                f"feature {d} of the data has a standard deviation of {scale[d]:.2g}, which should "
                f"be from {least:g} to {most:g}: give it in another unit"
            )
        return Scaling(shift.to(dtype), torch.where(constant, 1.0, scale).to(dtype))

    @staticmethod
    def none(size: int) -> "Scaling":
        """The identity for ``size`` features."""
        return Scaling(torch.zeros(size), torch.ones(size))


class ScaledLikelihood(GaussianLikelihood):
    r"""x_d ~ N(shift_d + scale_d loc_d, (scale_d s)^2): loc (..., D) and s for standardised x.

    The density refers to x as given, log N((x - shift) / scale; loc, s^2) - sum_d log scale_d.
    """

    def __init__(self, scaling: Scaling) -> None:
        super().__init__()
        self.register_buffer("data_shift", scaling.shift.clone())
        self.register_buffer("data_scale", scaling.scale.clone())

    def forward(self, loc: Tensor) -> TorchDistribution:
        """N(shift + scale loc, (scale s)^2), of event shape (D,), for loc (..., D)."""
        mean = self.data_shift + self.data_scale * loc
        return dist.Normal(mean, self.data_scale * self.scale).to_event(1)


class ScaledGuide(NamedModule):
    """A guide of data as given, whose nets see standardised data.

    Args:
        guide: for standardised data.
    """

    def __init__(self, guide: nn.Module, scaling: Scaling) -> None:
        super().__init__()
        self.guide = guide
        self.register_buffer("data_shift", scaling.shift.clone())
        self.register_buffer("data_scale", scaling.scale.clone())

    def posterior(self, x: Tensor, *args: Tensor, **kwargs: Tensor) -> TorchDistribution:
        """q(z | x), for x in the form that the inner guide takes."""
        return self.guide.posterior(self.standardised(x), *args, **kwargs)  # type: ignore[operator]

    def forward(self, x: Tensor, *args: Tensor, **kwargs: Tensor) -> object:
        """The guide's program."""
        return self.guide(self.standardised(x), *args, **kwargs)

    def standardised(self, x: Tensor) -> Tensor:
        """The data that the inner guide sees."""
        return (x - self.data_shift) / self.data_scale  # type: ignore[operator]


class Standardised(constraints.Constraint):
    """All real numbers, mapped from standardised ones: pseudo-inputs learn at a common pace."""

    event_dim = 0

    def __init__(self, guide: ScaledGuide) -> None:
        self.guide = guide  # not its tensors, which move to other devices

    def check(self, value: Tensor) -> Tensor:
        """Whether each number is finite: of the shape of ``value``."""
        return value.isfinite()


@transform_to.register(Standardised)
def _(constraint: Standardised) -> AffineTransform:
    return AffineTransform(constraint.guide.data_shift, constraint.guide.data_scale)  # type: ignore[arg-type]


def _in_memory(data: InMemory) -> tuple[Tensor, Tensor, torch.dtype]:
    """Standard deviation and mean of each feature, in float64, and the type of the data."""
    x = features(data)
    seen = x.double() if isinstance(data, Tensor) else x.double()[_counts(data)]
    return *torch.std_mean(seen, 0, correction=0), x.dtype


def _of_files(data: Files) -> tuple[Tensor, Tensor, torch.dtype]:
    """The same in one pass: the moments of batches are merged."""
    num, mean, squares, dtype = 0, torch.zeros(()), torch.zeros(()), torch.get_default_dtype()
    for batch in data:
        x, dtype = batch.double(), batch.dtype
        variance, center = torch.var_mean(x, 0, correction=0)
        share, apart = len(x) / (num + len(x)), center - mean
        squares = squares + len(x) * variance + num * share * apart**2
        mean = mean + share * apart
        num += len(x)
    return (squares / num).sqrt(), mean, dtype


def _counts(data: dict[str, Tensor]) -> Tensor:
    """The steps of sequences that count, bool (N, T)."""
    if "observed" in data:  # which excludes padding
        return data["observed"]
    num, steps = data["x"].shape[:2]
    if "lengths" in data:
        return lengths_mask(data["lengths"], steps)
    return torch.ones(num, steps, dtype=torch.bool)
