"""The observations of a latent sequence, step by step."""

from collections.abc import Callable

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyproelbo.sequences.chains import Autoregressive
from pyproelbo.sequences.independent import IndependentSteps


class Emission(IndependentSteps):
    r"""p(x_0, ..., x_{T-1} | z) = prod_t p(x_t | z_t, s_t, u_t), a function of one step.

    The same distribution as ``IndependentSteps(emit(z))``. Since it has the function, it can also
    be evaluated for one step at other z, as in a particle filter.

    >>> import torch, pyro.distributions as dist
    >>> decode = torch.nn.Linear(3, 88)
    >>> x = Emission(lambda z: dist.Bernoulli(logits=decode(z)).to_event(1), torch.zeros(5, 7, 3))
    >>> x.batch_shape, x.event_shape
    (torch.Size([5]), torch.Size([7, 88]))

    Args:
        emit: from z_t, and s_t and u_t if given, to the distribution of x_t. It
            should work for any leading dims.
        z: the latent sequence, (..., T, k).
        states_of: the prior of z, if its state s_t is to be passed to ``emit``.
        inputs: u of shape (..., T, U).
        mask: which x_t count, bool (..., T), in any pattern. All if None.

    Raises:
        ValueError: for shapes that do not match.
    """

    def __init__(
        self,
        emit: Callable[..., TorchDistribution],
        z: Tensor,
        states_of: Autoregressive | None = None,
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.emit, self.z, self.states_of, self.inputs = emit, z, states_of, inputs
        given = [z]
        if states_of is not None:
            given.append(states_of.states(z))
        if inputs is not None:
            given.append(inputs.expand(z.shape[:-1] + inputs.shape[-1:]))
        super().__init__(emit(*given), mask, validate_args)

    def at(self, t: int, z: Tensor, state: Tensor | None) -> TorchDistribution:
        """p(x_t | z_t, s_t, u_t) for z_t (..., k) and the prior's state at t."""
        given = [z]
        if self.states_of is not None:
            assert state is not None
            given.append(state)
        if self.inputs is not None:
            u = self.inputs[..., t, :]
            given.append(u.expand(z.shape[:-1] + u.shape[-1:]))
        return self.emit(*given)

    def _expanded(self, batch_shape: torch.Size) -> "Emission":
        event = self.z.shape[-2:]
        mask = None if self.step_mask is None else self.step_mask.expand((*batch_shape, event[0]))
        z = self.z.expand((*batch_shape, *event))
        return Emission(self.emit, z, self.states_of, self.inputs, mask, self._validate_args)
