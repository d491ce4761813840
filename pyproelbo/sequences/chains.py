"""Steps that depend on earlier ones: a chain, written as functions of one step."""

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyproelbo._backend.opaque import opaque
from pyproelbo._distributions.family import Family, concatenate_distributions, stack_distributions
from pyproelbo.sequences.base import SequenceDistribution, Shape, broadcast_batch, check_steps
from pyproelbo.sequences.loops import Loop, Tensors, plain

# from s_t, and u_t if there are inputs, to the distribution of z_t, its sample, and s_{t+1}
Drawing = Callable[..., tuple[TorchDistribution, Tensor, Tensor]]


class _Drawn(NamedTuple):
    """A sample, and the distributions from which its steps were drawn."""

    value: Tensor
    steps: TorchDistribution
    has_graph: bool


class _Chain(SequenceDistribution):
    """A sequence that is sampled step by step, and evaluated for all steps at once.

    The steps' distributions are kept when it is sampled: the density of that sample costs no second
    pass, and is the density at the parameters that drew it.
    """

    def __init__(
        self,
        first: TorchDistribution,
        inputs: Tensor | None,
        num_steps: int,
        mask: Tensor | None,
        loop: Loop,
        validate_args: bool | None,
    ) -> None:
        shapes = [first.batch_shape]
        shapes += [] if inputs is None else [inputs.shape[:-2]]
        shapes += [] if mask is None else [mask.shape[:-1]]
        batch_shape = broadcast_batch(*shapes)
        super().__init__(first.expand(batch_shape), batch_shape, num_steps, mask, validate_args)
        if self._validate_args and mask is not None and (mask[..., 1:] > mask[..., :-1]).any():
            raise ValueError(
                "the mask of a chain should be True up to the length of a sequence and False from "
                "there: later steps depend on all earlier ones. Mask the observations where some "
                "are missing"
            )
        self._inputs = None if inputs is None else inputs.expand(batch_shape + inputs.shape[-2:])
        self._loop = loop
        self._drawn: _Drawn | None = None

    @abstractmethod
    def _all_steps(self, value: Tensor) -> TorchDistribution:
        """The distributions of all steps, given the ``value`` of all."""

    def steps(self, value: Tensor) -> TorchDistribution:
        """p(z_t | ...) of every step; for the last drawn value, the distributions behind it."""
        drawn = self._drawn
        if drawn and drawn.value is value and (drawn.has_graph or not torch.is_grad_enabled()):
            return drawn.steps
        return self._all_steps(self.filled(value))

    @abstractmethod
    def _drawing(self) -> Drawing:
        """How a step is drawn, without reference to this chain, which allows compilation."""

    def _draw(self) -> Tensor:
        draw, family = self._drawing(), Family.of(self._first)

        def step(carry: Tensors, u: Tensors) -> tuple[Tensors, Tensors]:
            d, z, state = draw(*carry, *u[1:])
            return (state,), (z, *family.tensors(d))

        z = self._first()
        dims = [-self.event_dim, *family.dims]
        first = zip((z, *family.tensors(self._first)), dims, strict=True)
        columns = [[tensor.unsqueeze(dim)] for tensor, dim in first]
        if self.num_steps > 1:
            ticks = z.new_empty(self.num_steps - 1)  # there may be no inputs
            inputs = () if self._inputs is None else (self._inputs.movedim(-2, 0)[1:],)
            state = self.advance(0, self.start(), z)
            assert state is not None
            carry = (state,)
            loop = self._loop

            def steps(*tensors: Tensor) -> Tensors:
                return loop(step, tensors[:1], tensors[1:])[1]

            rest = opaque(steps, *carry, ticks, *inputs)
            for column, tensor, dim in zip(columns, rest, dims, strict=True):
                column.append(tensor.movedim(0, dim))
        value, *tensors = (torch.cat(c, dim) for c, dim in zip(columns, dims, strict=True))
        value = value if self.has_rsample else value.detach()
        self._drawn = _Drawn(value, family.made_of(tensors), torch.is_grad_enabled())
        return value

    @cached_property
    def _inputs_by_step(self) -> tuple[Tensor, ...]:
        return () if self._inputs is None else self._inputs.unbind(-2)

    def _input(self, t: int, batch_shape: torch.Size) -> tuple[Tensor, ...]:
        """u_t, with these batch dims; empty where there are no inputs."""
        if not self._inputs_by_step:
            return ()
        u = self._inputs_by_step[t]
        return (u.expand(batch_shape + u.shape[-1:]),)

    def _inputs_like(self, value: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """The inputs of all steps from ``start``, with the batch dims of ``value``."""
        if self._inputs is None:
            return ()
        inputs = self._inputs[..., start:, :]
        return (inputs.expand(value.shape[: value.dim() - self.event_dim] + inputs.shape[-2:]),)


def _checked(
    name: str, d: TorchDistribution, batch_shape: Shape, event_shape: Shape
) -> TorchDistribution:
    if d.batch_shape != batch_shape or d.event_shape != event_shape:
        raise ValueError(
            f"{name} should work for any leading dims: it should give a distribution of batch "
            f"shape {tuple(batch_shape)} and event shape {tuple(event_shape)}, got "
            f"{tuple(d.batch_shape)} and {tuple(d.event_shape)}"
        )
    return d


def _advanced(
    advance: Callable[..., Tensor], state: Tensor, z: Tensor, u: Tensors, event_dim: int
) -> Tensor:
    """s_{t+1}: ``advance`` is called with one batch dim, as recurrent cells expect."""
    batch_shape = z.shape[: z.dim() - event_dim]
    state = state.expand(batch_shape + state.shape[-1:])
    parts = (state, z, *u)
    if len(batch_shape) == 1:
        return advance(*parts)
    flat = [part.reshape(-1, *part.shape[len(batch_shape) :]) for part in parts]
    return advance(*flat).reshape(state.shape)


class MarkovChain(_Chain):
    r"""p(z_0, ..., z_{T-1}) = p(z_0) prod_{t > 0} p(z_t | z_{t-1}, u_t).

    Both functions describe one step. A density takes one call of ``transition`` for all steps at
    once, a sample one call for each step.

    >>> import torch, pyro.distributions as dist
    >>> walk = MarkovChain(
    ...     initial=dist.Normal(torch.zeros(3), 1.0).to_event(1),
    ...     transition=lambda z: dist.Normal(0.9 * z, 0.1).to_event(1),
    ...     num_steps=7,
    ... )
    >>> walk.sample((5,)).shape, walk.log_prob(walk.sample((5,))).shape
    (torch.Size([5, 7, 3]), torch.Size([5]))

    Args:
        initial: the distribution of z_0, batch shape (...), event shape E.
        transition: from z_{t-1}, or from z_{t-1} and u_t, to the distribution of z_t, of the
            family of ``initial``. It should work for any leading dims.
        num_steps: T; not needed with inputs.
        inputs: u of shape (..., T, U); u_0 is not used.
        mask: which steps count, bool (..., T): True up to a sequence's length. All if None.
        loop: the loop over a sample's steps: ``loops.plain``, ``loops.compiled``, which is faster
            where the steps are small and many, or ``loops.recomputed``, which takes less memory.

    Raises:
        ValueError: for shapes that do not match, no step at all, a mask with gaps, and families
            that differ.
    """

    def __init__(
        self,
        initial: TorchDistribution,
        transition: Callable[..., TorchDistribution],
        num_steps: int | None = None,
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
        loop: Loop = plain,
        validate_args: bool | None = None,
    ) -> None:
        self._transition = transition
        num_steps = check_steps(num_steps, inputs, mask)
        super().__init__(initial, inputs, num_steps, mask, loop, validate_args)

    def _expanded(self, batch_shape: torch.Size) -> "MarkovChain":
        return MarkovChain(
            self._first.expand(batch_shape),
            self._transition,
            self.num_steps,
            self._inputs,
            self.step_mask,
            self._loop,
            self._validate_args,
        )

    def start(self) -> None:
        """None: the first step has no past."""
        return None

    def step(self, t: int, state: Tensor | None) -> TorchDistribution:
        """p(z_t | z_{t-1}, u_t), with z_{t-1} as the state; p(z_0) if it is None."""
        if state is None:
            return self._first
        batch_shape = state.shape[: state.dim() - self._first.event_dim]
        step = self._transition(state, *self._input(t, batch_shape))
        return _checked("transition", step, batch_shape, self._first.event_shape)

    def advance(self, t: int, state: Tensor | None, z: Tensor) -> Tensor:
        """z_t, the state before the next step."""
        return z

    def _drawing(self) -> Drawing:
        transition, shapes = self._transition, (self.batch_shape, self._first.event_shape)

        def draw(z: Tensor, *u: Tensor) -> tuple[TorchDistribution, Tensor, Tensor]:
            step = _checked("transition", transition(z, *u), *shapes)
            z = step()
            return step, z, z

        return draw

    def _all_steps(self, value: Tensor) -> TorchDistribution:
        batch_shape = value.shape[: value.dim() - self.event_dim]
        first = stack_distributions([self._first.expand(batch_shape)])
        if self.num_steps == 1:
            return first
        past = value.narrow(-self.event_dim, 0, self.num_steps - 1)
        rest = self._transition(past, *self._inputs_like(value, start=1))
        shape = (*batch_shape, self.num_steps - 1)
        rest = _checked("transition", rest, shape, self._first.event_shape)
        return concatenate_distributions([first, rest])


class Autoregressive(_Chain):
    r"""p(z_0, ..., z_{T-1}) = prod_t p(z_t | s_t, u_t) with s_{t+1} = advance(s_t, z_t, u_t).

    The state s_t summarises z_0, ..., z_{t-1}, as in a recurrent net.

    >>> import torch, pyro.distributions as dist
    >>> cell = torch.nn.GRUCell(3, 8)
    >>> to_loc = torch.nn.Linear(8, 3)
    >>> z = Autoregressive(
    ...     state=torch.zeros(5, 8),
    ...     step=lambda s: dist.Normal(to_loc(s), 1.0).to_event(1),
    ...     advance=lambda s, z: cell(z, s),
    ...     num_steps=7,
    ... )
    >>> z.batch_shape, z.event_shape
    (torch.Size([5]), torch.Size([7, 3]))

    Args:
        state: s_0, of shape (..., H).
        step: from s_t, or s_t and u_t, to the distribution of z_t. It should work for any
            leading dims.
        advance: from s_t and z_t, or s_t, z_t and u_t, to s_{t+1}. It is called with one batch dim,
            and may thus be one of torch's recurrent cells.
        num_steps: T; not needed with inputs.
        inputs: u of shape (..., T, U).
        mask: which steps count, bool (..., T): True up to a sequence's length. All if None.
        loop: the loop over a sample's steps: ``loops.plain``, ``loops.compiled``, which is faster
            where the steps are small and many, or ``loops.recomputed``, which takes less memory.

    Raises:
        ValueError: for shapes that do not match, no step at all, and a mask with gaps.
    """

    def __init__(
        self,
        state: Tensor,
        step: Callable[..., TorchDistribution],
        advance: Callable[..., Tensor],
        num_steps: int | None = None,
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
        loop: Loop = plain,
        validate_args: bool | None = None,
    ) -> None:
        num_steps = check_steps(num_steps, inputs, mask)
        shapes = [state.shape[:-1]] + ([] if inputs is None else [inputs.shape[:-2]])
        shapes += [] if mask is None else [mask.shape[:-1]]
        state = state.expand(broadcast_batch(*shapes) + state.shape[-1:])
        self._state, self._step_of, self._next_of = state, step, advance
        u = () if inputs is None else (inputs[..., 0, :].expand((*state.shape[:-1], -1)),)
        super().__init__(step(state, *u), inputs, num_steps, mask, loop, validate_args)

    def _expanded(self, batch_shape: torch.Size) -> Self:
        return type(self)(
            self._state.expand(batch_shape + self._state.shape[-1:]),
            self._step_of,
            self._next_of,
            self.num_steps,
            self._inputs,
            self.step_mask,
            self._loop,
            self._validate_args,
        )

    def states(self, value: Tensor) -> Tensor:
        """s_0, ..., s_{T-1} of a sequence ``value`` (..., T, *E): (..., T, H)."""
        batch_shape = value.shape[: value.dim() - self.event_dim]
        states = [self._state.expand(batch_shape + self._state.shape[-1:])]
        for t, z in enumerate(value.unbind(-self.event_dim)[:-1]):
            states.append(self.advance(t, states[-1], z))
        return torch.stack(states, -2)

    def start(self) -> Tensor:
        """s_0, (..., H)."""
        return self._state

    def step(self, t: int, state: Tensor | None) -> TorchDistribution:
        """p(z_t | s_t, u_t)."""
        assert state is not None
        if state is self._state:
            return self._first
        batch_shape = state.shape[:-1]
        step = self._step_of(state, *self._input(t, batch_shape))
        return _checked("step", step, batch_shape, self._first.event_shape)

    def advance(self, t: int, state: Tensor | None, z: Tensor) -> Tensor:
        """s_{t+1} = advance(s_t, z_t, u_t), (..., H)."""
        assert state is not None
        event_dim = self._first.event_dim
        u = self._input(t, z.shape[: z.dim() - event_dim])
        return _advanced(self._next_of, state, z, u, event_dim)

    def _drawing(self) -> Drawing:
        step_of, next_of = self._step_of, self._next_of
        event_dim, shapes = self._first.event_dim, (self.batch_shape, self._first.event_shape)

        def draw(state: Tensor, *u: Tensor) -> tuple[TorchDistribution, Tensor, Tensor]:
            step = _checked("step", step_of(state, *u), *shapes)
            z = step()
            return step, z, _advanced(next_of, state, z, u, event_dim)

        return draw

    def _all_steps(self, value: Tensor) -> TorchDistribution:
        states = self.states(value)
        steps = self._step_of(states, *self._inputs_like(value))
        return _checked("step", steps, states.shape[:-1], self._first.event_shape)
