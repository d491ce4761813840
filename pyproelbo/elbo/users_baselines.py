"""Baselines as Pyro's TraceGraph_ELBO takes them: ``infer={"baseline": ...}`` of a guide's site."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypedDict, cast

import torch
from pyro.distributions.util import detach
from torch import Tensor, nn

from pyproelbo._backend.autograd import Context


class BaselineOptions(TypedDict, total=False):
    """The parts whose sum is a baseline.

    Keys:
        nn_baseline: a module, or a function, of ``nn_baseline_input``; it learns the mean cost by
            least squares. No gradient goes through the input.
        nn_baseline_input: its argument.
        baseline_value: instead of these two, the value itself, which learns in the same way.
        use_decaying_avg_baseline: whether to use a decaying average of the costs of earlier steps.
        baseline_beta: the part of this average that each step keeps.
    """

    nn_baseline: Callable[..., Tensor] | None
    nn_baseline_input: object
    baseline_value: Tensor | float | None
    use_decaying_avg_baseline: bool
    baseline_beta: float


def options_of(name: str, given: object) -> BaselineOptions | None:
    """The options of a site, None where they ask for no baseline.

    Raises:
        ValueError: for unknown options, and for two that exclude each other.
    """
    if given is None:
        return None
    known = BaselineOptions.__annotations__
    if not isinstance(given, Mapping) or not given.keys() <= known.keys():
        raise ValueError(
            f"the baseline of site {name!r} should be a dict with keys of {sorted(known)}, got "
            f"{sorted(map(str, given)) if isinstance(given, Mapping) else given!r}"
        )
    options = cast(BaselineOptions, given)
    net, value = options.get("nn_baseline"), options.get("baseline_value")
    if net is not None and value is not None:
        raise ValueError(
            f"the baseline of site {name!r} has both a baseline_value and an nn_baseline: give one "
            "of them"
        )
    beta = options.get("baseline_beta", 0.9)
    if not 0 <= beta <= 1:
        raise ValueError(f"baseline_beta of site {name!r} should be from 0 to 1, got {beta}")
    averages = options.get("use_decaying_avg_baseline", False)
    return options if averages or net is not None or value is not None else None


class DecayingAverages(nn.Module):
    """The decaying averages of the costs of sites, as buffers, which come with the first step."""

    def now(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """A copy of the average of a site, 0 at first.

        If the shape has changed, as at a short last batch, it starts from the mean of the old
        average.
        """
        key = _key(name)
        known = getattr(self, key, None)
        if known is None or known.shape != shape:
            start = like.new_zeros(()) if known is None else known.mean()
            self.register_buffer(key, start.detach().expand(shape).clone())
        return self.get_buffer(key).clone()

    def move(self, name: str, change: Tensor) -> None:
        """Add to the average of a site the elements of ``change`` that are finite."""
        with torch.no_grad():
            average = self.get_buffer(_key(name))
            if average.shape == change.shape:
                average.add_(torch.where(change.isfinite(), change, 0.0))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        *args: object,
        **kwargs: object,
    ) -> None:
        """As torch's; the buffers of the state replace all earlier ones."""
        for name, _ in list(self.named_buffers()):
            delattr(self, name)
        for name, value in state_dict.items():
            if name.startswith(prefix) and "." not in name[len(prefix) :]:
                self.register_buffer(name[len(prefix) :], torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _key(name: str) -> str:
    """The name of a site's buffer, without a dot and different from every method."""
    return "of_" + name.replace(".", "/")


class BaselineStep:
    """What the baselines of one training step share.

    Args:
        num_particles: over which the objective takes the mean.
        averages: updated by this step.
    """

    def __init__(self, num_particles: int, averages: DecayingAverages) -> None:
        self._num = num_particles
        self._averages = averages
        self._before: dict[tuple[str, torch.Size], Tensor] = {}
        self._factor: float | Tensor = 1.0

    def take_factor(self, gradient: Tensor) -> None:
        """The gradient with which the loss is back-propagated, as a GradScaler gives it."""
        self._factor = gradient

    @property
    def unit(self) -> float | Tensor:
        """The factor of minus a particle's cost in the gradient that comes back."""
        return self._factor / self._num

    def average(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """The average of a site's costs before this step, for all particles."""
        if (name, shape) not in self._before:
            self._before[name, shape] = self._averages.now(name, shape, like)
        return self._before[name, shape]

    def move_average(self, name: str, costs: Tensor, beta: float, dim: int | None) -> None:
        """What one particle, or all in a dim, add to (1 - beta) (mean cost - average before)."""
        if dim is not None:
            costs = costs.mean(dim)
        share = 1 if dim is not None else self._num
        before = self._before[name, costs.shape]
        self._averages.move(name, (1 - beta) / share * (costs - before))


def baselined(
    name: str,
    score: Tensor,
    options: BaselineOptions,
    step: BaselineStep,
    particle_dim: int | None,
) -> Tensor:
    """The score of a site, whose gradient is by the costs minus their baseline.

    On the way back the baseline learns: its gradient is that of the mean over particles of
    (cost - baseline)^2, summed over plates.

    Args:
        particle_dim: the dim of vectorised particles, which share one decaying average.

    Raises:
        ValueError: for a baseline whose shape is not that of the site's log-density.
    """
    baseline: Tensor = score.new_zeros(())
    move = None
    if options.get("use_decaying_avg_baseline", False):
        dim = particle_dim if particle_dim and score.dim() >= -particle_dim else None
        shape = score.shape if dim is None else score.select(dim, 0).shape
        average = step.average(name, shape, score)
        baseline = average if dim is None else average.unsqueeze(dim)
        beta = options.get("baseline_beta", 0.9)
        move = partial(step.move_average, name, beta=beta, dim=dim)
    net, value = options.get("nn_baseline"), options.get("baseline_value")
    if net is not None:
        value = net(detach(options.get("nn_baseline_input")))
    if value is not None:
        value = torch.as_tensor(value, dtype=score.dtype, device=score.device)
        try:
            value = value.expand(score.shape)
        except RuntimeError as error:
            raise ValueError(
                f"the baseline of site {name!r} should have the shape of the site's log-density, "
                f"{tuple(score.shape)}, or one that expands to it, got {tuple(value.shape)}"
            ) from error
        baseline = baseline + value
    return _Baselined.apply(score, baseline.expand(score.shape), step, move)  # type: ignore[return-value]


class _Compared(Context):
    step: BaselineStep
    move: Callable[[Tensor], None] | None


class _Baselined(torch.autograd.Function):
    """The identity of a score; adds the baseline to its gradient, minus the cost in a unit."""

    @staticmethod
    def forward(
        ctx: _Compared,
        score: Tensor,
        baseline: Tensor,
        step: BaselineStep,
        move: Callable[[Tensor], None] | None,
    ) -> Tensor:
        ctx.save_for_backward(baseline)
        ctx.step, ctx.move = step, move
        return score.view_as(score)

    @staticmethod
    def backward(ctx: _Compared, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (baseline,), unit, gradient = ctx.saved_tensors, ctx.step.unit, grads[0]
        less = gradient + unit * baseline
        if ctx.move is not None:
            ctx.move(-gradient.detach() / unit)
        return less, 2 * less if ctx.needs_input_grad[1] else None, None, None
