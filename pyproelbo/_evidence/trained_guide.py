"""A guide that temporarily has the best parameters for one data set."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyproelbo._backend.pyro_private import sites_of
from pyproelbo._distributions.sharing import not_sharing, sharing
from pyproelbo._evidence.descent import descend
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.evaluating import store_put_back
from pyproelbo._rows.modules import modules_of
from pyproelbo._rows.report_data import Unit
from pyproelbo._rows.runs import Use
from pyproelbo._terms.roles import is_drawn
from pyproelbo._terms.traces import Program, Traces, run


def parameters_of(guide: Program, model: Program, batch: Batch) -> list[Tensor]:
    """The guide's unconstrained parameters, except those shared with the model."""
    with poutine.block(), poutine.trace(param_only=True) as both:
        traces = run(model, guide, batch.args, batch.kwargs)[0]
    with poutine.block(), poutine.trace(param_only=True) as alone:
        poutine.replay(model, trace=traces.guide)(*batch.args, **batch.kwargs)
    own, of_model = leaves(guide, both.trace), leaves(model, alone.trace)
    found = [value for key, value in own.items() if key not in of_model]
    keep_apart(found, of_model.values())
    return found


def keep_apart(parameters: Iterable[Tensor], others: Iterable[Tensor] = ()) -> None:
    """Give a parameter its own memory where it shares that of another, or of an earlier one.

    Pyro's AutoNormalMessenger starts in the memory of a prior's mean.
    """
    places = {value.data_ptr() for value in others}
    for value in parameters:
        if value.data_ptr() in places:
            value.data = value.data.clone()
        places.add(value.data_ptr())


@contextmanager
def trained(
    model: Program,
    guide: Program,
    batch: Batch,
    unit: Unit,
    parameters: list[Tensor],
    steps: int,
    num_samples: int,
    lr: float,
    seed: int,
) -> Iterator[None]:
    """Within it the guide has the parameters with the highest ELBO; its own are then restored.

    By Adam from the current ones, with a learning rate that falls to 0.

    Raises:
        ValueError: for a latent without reparameterised draws.
    """
    with borrowed(parameters):
        with torch.enable_grad():
            _fit(RowDraws(model, guide, batch, unit, seed), parameters, steps, num_samples, lr)
        with sharing():
            yield


@contextmanager
def borrowed(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within it they take gradients and may be changed; they are restored afterwards."""
    with _put_back(parameters):
        for value in parameters:
            value.requires_grad_(True)
        yield


@contextmanager
def trained_by(
    fit: Callable[..., object], model: Program, guide: Program, batch: Batch
) -> Iterator[None]:
    """Within it the guide is as ``fit``, called with a batch, leaves it; it is then restored.

    So are the parameter store and the buffers of modules. The model's do not change.
    """
    own = parameters_of(guide, model, batch)  # including those that it makes as it runs
    ids = {id(value) for value in own}
    others = [value for _, value in pyro.get_param_store().named_parameters()] + _tensors(model)
    others = [value for value in others if id(value) not in ids]
    with store_put_back(), _put_back([*own, *_tensors(guide), *others]):
        with _put_back(others), torch.enable_grad(), not_sharing():
            fit(*batch.args, **batch.kwargs)
        for module in (*modules_of(guide), *modules_of(model)):
            module.training = False
        with sharing():
            yield


def _tensors(program: Program) -> list[Tensor]:
    """The parameters and buffers of modules."""
    modules = modules_of(program)
    parameters = [value for module in modules for value in module.parameters(recurse=False)]
    return parameters + [value for module in modules for value in module.buffers(recurse=False)]


@contextmanager
def _put_back(values: Sequence[Tensor]) -> Iterator[None]:
    """Restore them afterwards, and whether they take gradients."""
    before = [(value.detach().clone(), value.requires_grad) for value in values]
    try:
        yield
    finally:
        with torch.no_grad():
            for value, (old, requires) in zip(values, before, strict=True):
                value.copy_(old)
                if value.is_leaf:
                    value.requires_grad_(requires)


def check_reparameterised(first: Traces) -> None:
    """Check that the guide's draws have gradients with respect to its parameters.

    Raises:
        ValueError: for a latent whose draws have none.
    """
    for name, site in first.guide_sites.items():
        if is_drawn(site) and not site["fn"].has_rsample:
            raise ValueError(
                f"latent {name!r} has no reparameterised draws, whose gradients would fit its "
                "distribution: this is for continuous latents. Where it is discrete, let the "
                "model enumerate it, and the guide leave it out"
            )


def _fit(
    draws: RowDraws, parameters: list[Tensor], steps: int, num_samples: int, lr: float
) -> None:
    check_reparameterised(draws.first)

    def loss(step: int) -> Tensor:
        with sharing():  # as parameters change from step to step
            return -draws.at(range(num_samples), Use.FIT, step).log_weight.mean(0).sum()

    descend(loss, parameters, steps, lr)


def leaves(program: Program, trace: poutine.Trace) -> dict[int, Tensor]:
    """The parameters of a program: from Pyro's store and from modules."""
    sites = (site for site in sites_of(trace).values() if site["type"] == "param")
    found = [getattr(s["value"], "unconstrained", lambda s=s: s["value"])() for s in sites]
    for module in modules_of(program):
        found += list(module.parameters(recurse=False))
    return {id(value): value for value in found if value.is_leaf}
