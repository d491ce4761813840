"""Steps that do not depend on each other."""

from functools import cached_property

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyproelbo._distributions.family import unstack_distributions
from pyproelbo._distributions.row_noise import Noise, draw, draws_by_row
from pyproelbo.sequences.base import SequenceDistribution


class IndependentSteps(SequenceDistribution):
    r"""p(x_0, ..., x_{T-1}) = prod_t p(x_t), given all else: emissions, and mean-field guides.

    >>> import torch, pyro.distributions as dist
    >>> emission = IndependentSteps(dist.Bernoulli(torch.full((2, 7, 88), 0.1)).to_event(1))
    >>> emission.batch_shape, emission.event_shape
    (torch.Size([2]), torch.Size([7, 88]))

    Args:
        base: the distribution of all steps, batch shape (..., T), event shape E.
        mask: which steps count, bool (..., T), in any pattern: False for padding and for
            observations that are missing. All count if None.

    Raises:
        ValueError: if ``base`` has no batch dim for time, or ``mask`` has another shape.
    """

    def __init__(
        self,
        base: TorchDistribution,
        mask: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not base.batch_shape:
            raise ValueError(
                "base should have time as its rightmost batch dim, got batch shape (): for "
                "features of one step use .to_event(1), not .to_event(2)"
            )
        if mask is not None and mask.shape[-1:] != base.batch_shape[-1:]:
            raise ValueError(
                f"mask should have shape (..., {base.batch_shape[-1]}), a value for each step, "
                f"got {tuple(mask.shape)}"
            )
        batch_shape = base.batch_shape
        if mask is not None:
            batch_shape = torch.broadcast_shapes(batch_shape, mask.shape)
            base = base.expand(batch_shape)
        self._base = base
        super().__init__(base, batch_shape[:-1], batch_shape[-1], mask, validate_args)

    def steps(self, value: Tensor) -> TorchDistribution:
        """``base``, whatever the value."""
        return self._base

    def start(self) -> None:
        """None: no step has a state."""
        return None

    def step(self, t: int, state: Tensor | None) -> TorchDistribution:
        """p(x_t), whatever the state."""
        return self._by_step[t]

    def advance(self, t: int, state: Tensor | None, z: Tensor) -> None:
        """None, as at the start."""
        return None

    @property
    def base(self) -> TorchDistribution:
        """The distribution of all steps, batch shape (..., T)."""
        return self._base

    @cached_property
    def _by_step(self) -> list[TorchDistribution]:
        return unstack_distributions(self._base)

    def _draw(self) -> Tensor:
        return self._base()

    def _expanded(self, batch_shape: torch.Size) -> "IndependentSteps":
        shape = (*batch_shape, self.num_steps)
        mask = None if self.step_mask is None else self.step_mask.expand(shape)
        return IndependentSteps(self._base.expand(shape), mask, self._validate_args)


@draws_by_row(IndependentSteps)
def _independent_steps(d: IndependentSteps, noise: Noise) -> Tensor:
    return draw(d.base, noise.within(0, 1))
