"""The parameters of a model, number by number."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyproelbo._backend.pyro_private import sites_of
from pyproelbo._evidence.trained_guide import borrowed, leaves
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.modules import modules_of
from pyproelbo._rows.values import labels_of
from pyproelbo._terms.traces import Program, run

MOST = 10_000


class Hyperparameters(NamedTuple):
    """T numbers.

    Attributes:
        names: their labels, such as "scale" or "loc[0]".
        leaves: the unconstrained tensors that hold them.
        values: as in the model, (T,).
        slopes: derivatives of the values with respect to the unconstrained numbers, (T,).
    """

    names: tuple[str, ...]
    leaves: list[Tensor]
    values: Tensor
    slopes: Tensor


def hyperparameters_of(
    model: Program, guide: Program, batch: Batch, names: str | Sequence[str] | None
) -> Hyperparameters:
    """The named parameters of the model, None for all of them.

    They include those that take no gradients.

    Raises:
        ValueError: for an unknown name; for more than 10,000 numbers; for a parameter with a
            constraint that couples its elements.
    """
    found = _named(model, _trace(model, guide, batch))
    if names is None:
        chosen = list(found)
    else:
        chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    for name in chosen:
        if not found:
            raise ValueError(
                f"hyperparameters names {name!r}, but the model has no parameters: make what "
                "should vary a pyro.param, or an nn.Parameter, of the model"
            )
        if name not in found:
            raise ValueError(
                f"hyperparameters names {name!r}, but the model's parameters are {sorted(found)}: "
                "name one of those"
            )
    own = [found[name] for name in chosen]
    num = sum(leaf.numel() for leaf in own)
    if num > MOST:
        raise ValueError(
            f"the model has {num:,} hyperparameters, but more than {MOST:,} are too many: name "
            "some by hyperparameters=, or none by ()"
        )
    labels, values, slopes = [], [torch.zeros(0)], [torch.zeros(0)]
    with borrowed(own), torch.enable_grad():
        constrained = _constrained(_trace(model, guide, batch))
        for name, leaf in zip(chosen, own, strict=True):
            value = constrained.get(id(leaf), leaf)
            labels += labels_of(name, value.shape)
            values.append(value.detach().flatten())
            slopes.append(_slope(name, value, leaf).flatten())
    both = (torch.cat([x.double().cpu() for x in part]) for part in (values, slopes))
    return Hyperparameters(tuple(labels), own, *both)


def _trace(model: Program, guide: Program, batch: Batch) -> poutine.Trace:
    """The model's parameters, from a run on a draw of the guide."""
    with poutine.block():
        drawn = run(model, guide, batch.args, batch.kwargs)[0].guide
    with poutine.block(), poutine.trace(param_only=True) as tracing:
        poutine.replay(model, trace=drawn)(*batch.args, **batch.kwargs)
    return tracing.trace


def _params(trace: poutine.Trace) -> dict[str, Tensor]:
    return {n: s["value"] for n, s in sites_of(trace).items() if s["type"] == "param"}


def _leaf(value: Tensor) -> Tensor:
    return getattr(value, "unconstrained", lambda: value)()


def _constrained(trace: poutine.Trace) -> dict[int, Tensor]:
    """The constrained parameters of Pyro's store, by the unconstrained ones."""
    return {id(_leaf(value)): value for value in _params(trace).values()}


def _named(model: Program, trace: poutine.Trace) -> dict[str, Tensor]:
    """The leaves by name: from Pyro's store, then from the model's modules."""
    names = {id(_leaf(value)): name for name, value in reversed(_params(trace).items())}
    for module in modules_of(model)[:1]:
        names = {id(value): name for name, value in module.named_parameters()} | names
    own = leaves(model, trace)
    return {names[key]: value for key, value in own.items() if value.is_floating_point()}


def _slope(name: str, value: Tensor, leaf: Tensor) -> Tensor:
    """The derivative of each element with respect to that of the leaf.

    Raises:
        ValueError: where it depends on other elements too.
    """
    if value is leaf:
        return torch.ones_like(leaf)
    slope = torch.ones_like(leaf)
    is_free = value.shape == leaf.shape
    if is_free:
        weights = torch.arange(1.0, leaf.numel() + 1).to(leaf).sqrt().reshape(leaf.shape)
        slope, weighted = (
            torch.autograd.grad(value, leaf, w, retain_graph=True)[0]
            for w in (torch.ones_like(value), weights)
        )
        is_free = torch.allclose(weighted, weights * slope, rtol=1e-4)
    if not is_free:
        raise ValueError(
            f"hyperparameter {name!r} has a constraint that couples its elements, as a simplex "
            "does, and none can move alone: name others by hyperparameters="
        )
    return slope
