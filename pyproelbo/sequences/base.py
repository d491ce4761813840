r"""Distributions of whole sequences.

A sequence-valued site has time as the leftmost dim of its event: batch shape (...), the plates,
and event shape (T, \*E). Its density is the product of the steps',

    log p(z_0, ..., z_{T-1}) = sum_t log p(z_t | z_0, ..., z_{t-1}),

and the density of every step is kept.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.distributions import Categorical, constraints, transform_to

from pyproelbo._distributions.family import parameters
from pyproelbo._distributions.layers import innermost
from pyproelbo._distributions.row_noise import Noise, draw, draws_by_row

Shape = Sequence[int]  # torch.Size, or a tuple or list of numbers


def lengths_mask(lengths: Tensor, num_steps: int) -> Tensor:
    """The steps of each sequence that are not padding: t < length.

    Args:
        lengths: the number of steps of each sequence, whole numbers from 1 to T, shape (...).
        num_steps: T.

    Returns:
        A bool tensor of shape (..., T).

    Raises:
        ValueError: for other lengths; they are checked only while Pyro's validation is on.
    """
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths should be whole numbers, got {lengths.dtype}")
    if is_validation_enabled() and not ((lengths >= 1) & (lengths <= num_steps)).all():
        raise ValueError(
            f"lengths should be from 1 to the number of steps, {num_steps}, got values from "
            f"{lengths.min()} to {lengths.max()}: leave empty sequences out, and pad x to the "
            "longest"
        )
    return torch.arange(num_steps, device=lengths.device) < lengths.unsqueeze(-1)


class SequenceDistribution(TorchDistribution):
    """A distribution of sequences z_0, ..., z_{T-1} with access to single steps.

    Args:
        first: the distribution of a single step, for its event shape E and its support.
        batch_shape: of the sequences.
        num_steps: T.
        mask: which steps count, bool (..., T); all if None. A step that does not count adds nothing
            to a density or a KL, nor to their gradients, whatever its value, even NaN.

    Attributes:
        step_mask: the mask, expanded.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # type: ignore[assignment]
    has_enumerate_support = False

    def __init__(
        self,
        first: TorchDistribution,
        batch_shape: Shape,
        num_steps: int,
        mask: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        event_shape = (num_steps, *first.event_shape)
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args)
        self._first = first
        self.has_rsample: bool = first.has_rsample
        self.step_mask = None if mask is None else mask.expand((*batch_shape, num_steps))

    @property
    def num_steps(self) -> int:
        """T."""
        return self.event_shape[0]

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """The support of a step, at each of the T steps."""
        return constraints.independent(self._first.support, 1)

    def expand(self, batch_shape: Shape, _instance: object = None) -> "SequenceDistribution":
        """The same distribution with a larger batch shape; itself if the shape is unchanged."""
        batch_shape = torch.Size(batch_shape)
        return self if batch_shape == self.batch_shape else self._expanded(batch_shape)

    @abstractmethod
    def _expanded(self, batch_shape: torch.Size) -> "SequenceDistribution":
        """The same distribution with a larger batch shape."""

    @abstractmethod
    def steps(self, value: Tensor) -> TorchDistribution:
        """The distribution of each step given the steps of ``value`` before it.

        Args:
            value: a sequence, (..., T, *E).

        Returns:
            A distribution of batch shape (..., T) and event shape E.
        """

    @abstractmethod
    def start(self) -> Tensor | None:
        """The state before the first step: a tensor (..., H), or None for no state."""

    @abstractmethod
    def step(self, t: int, state: Tensor | None) -> TorchDistribution:
        """The distribution of z_t given the state, which may have further batch dims."""

    @abstractmethod
    def advance(self, t: int, state: Tensor | None, z: Tensor) -> Tensor | None:
        """The state before step t + 1, given z_t."""

    def walk(self, draw: Callable[[int, TorchDistribution], Tensor]) -> list[Tensor]:
        """The values of the steps, one by one.

        Args:
            draw: from t and the distribution of z_t given the steps before, to z_t.
        """
        state, values, batch_shape = self.start(), [], self.batch_shape
        for t in range(self.num_steps):
            z = draw(t, self.step(t, state))
            values.append(z)
            # plates and enumeration around this sequence may have enlarged it
            batch_dim = z.dim() - self._first.event_dim
            batch_shape = torch.broadcast_shapes(batch_shape, z.shape[:batch_dim])
            state = self.advance(t, state, z.expand(batch_shape + z.shape[batch_dim:]))
        return values

    def joined(self, values: list[Tensor]) -> Tensor:
        """The sequence of its steps' values."""
        if len({value.shape for value in values}) > 1:  # some may be enumerated
            values = list(torch.broadcast_tensors(*values))
        return torch.stack(values, -self.event_dim)

    def _draw(self) -> Tensor:
        """One sample with the batch shape, differentiable where the steps are."""
        return self.joined(self.walk(lambda t, step: step()))

    def log_prob_by_time(self, value: Tensor, steps: TorchDistribution | None = None) -> Tensor:
        """log p(z_t | z_0, ..., z_{t-1}) of every step, (..., T), zero where masked.

        Args:
            value: a sequence, (..., T, *E).
            steps: ``self.steps(value)``, if already computed.
        """
        steps = self.steps(value) if steps is None else steps
        return self.masked(steps.log_prob(self.filled(value)))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z_0, ..., z_{T-1}), (...): the sum over the steps that count."""
        return self.log_prob_by_time(value).sum(-1)

    def masked(self, by_time: Tensor) -> Tensor:
        """``by_time`` (..., T) with zeros at steps that do not count."""
        return by_time if self.step_mask is None else torch.where(self.step_mask, by_time, 0.0)

    def placeholder(self) -> Tensor:
        """A sequence that is not drawn, where any will do: no random numbers are used."""
        d = innermost(self._first)
        like = getattr(d, parameters(d)[0])
        dtype = torch.long if isinstance(d, Categorical) else like.dtype
        return _feasible(self._first.support, like.new_zeros(self.shape(), dtype=dtype))

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Sequences sample_shape + (..., T, *E), as differentiable functions of the parameters."""
        if not self.has_rsample:
            raise NotImplementedError("the steps of this sequence cannot be reparameterised")
        return self(sample_shape)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Sequences sample_shape + (..., T, *E), without a gradient."""
        with torch.no_grad():
            return self(sample_shape)

    def __call__(self, sample_shape: Shape = ()) -> Tensor:
        """As :meth:`rsample` where the steps can be reparameterised, else as :meth:`sample`."""
        if len(sample_shape):
            return self.expand(torch.Size(sample_shape) + self.batch_shape)()
        value = self._draw()
        return value if self.has_rsample else value.detach()

    def filled(self, value: Tensor) -> Tensor:
        """``value``, checked, with harmless values in steps that do not count.

        Raises:
            ValueError: for a wrong shape, and for NaN in a step that counts.
        """
        if self._validate_args and value.shape[value.dim() - self.event_dim :] != self.event_shape:
            raise ValueError(
                f"a sequence should have shape (..., {', '.join(map(str, self.event_shape))}), "
                f"time first, got {tuple(value.shape)}"
            )
        mask = self.step_mask
        if mask is not None:
            mask = mask.reshape(mask.shape + (1,) * (self.event_dim - 1))
            value = torch.where(mask, value, _feasible(self._first.support, value))
        if self._validate_args and value.isnan().any():
            raise ValueError(
                "a sequence holds NaN in a step that counts: mask the steps that are missing"
            )
        return value


@draws_by_row(SequenceDistribution)
def _sequence(d: SequenceDistribution, noise: Noise) -> Tensor:
    def of_step(t: int, step: TorchDistribution) -> Tensor:
        is_whole = step.batch_shape == d.batch_shape
        return draw(step if is_whole else step.expand(d.batch_shape), noise.within(t))

    value = d.joined(d.walk(of_step))
    return value if d.has_rsample else value.detach()


def _feasible(support: constraints.Constraint | None, like: Tensor) -> Tensor:
    """Values in a support; zeros where nothing is known about it, as for discrete ones."""
    zeros = torch.zeros_like(like)
    try:
        return transform_to(support)(zeros)  # type: ignore[arg-type]
    except NotImplementedError:
        return zeros


def broadcast_batch(*shapes: Shape) -> torch.Size:
    """The batch shape of parts of a sequence.

    Raises:
        ValueError: if they do not broadcast.
    """
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        raise ValueError(
            f"the parts of a sequence have batch shapes {[tuple(s) for s in shapes]}, which do "
            "not broadcast: give them the shape of the plates"
        ) from error


def check_steps(num_steps: int | None, inputs: Tensor | None, mask: Tensor | None) -> int:
    """T, from whichever argument has it.

    Raises:
        ValueError: if none has it, if they differ, or if T is 0.
    """
    given = {
        "num_steps": num_steps,
        "inputs": None if inputs is None else inputs.shape[-2],
        "mask": None if mask is None else mask.shape[-1],
    }
    known = {name: value for name, value in given.items() if value is not None}
    if len(set(known.values())) != 1 or min(known.values()) < 1:
        raise ValueError(
            "a sequence needs at least one step, and a single number of steps: got "
            + (", ".join(f"{value} from {name}" for name, value in known.items()) or "none")
            + "; give num_steps, or inputs of shape (..., T, U)"
        )
    return next(iter(known.values()))
