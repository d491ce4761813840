"""The parameters of two programs: of the model, of the guide, and shared."""

from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from pyproelbo._evidence.trained_guide import leaves
from pyproelbo._rows.batches import Batch
from pyproelbo._terms.traces import Program, run


def parameters_by_program(model: Program, guide: Program, batch: Batch) -> dict[str, list[Tensor]]:
    """The unconstrained parameters that take gradients: "model", "guide" and "shared".

    They are those that SVI trains: from Pyro's store, and from modules that the programs are or
    register. An empty group is left out.

    Raises:
        ValueError: where there are none at all.
    """
    args, kwargs = batch.args, batch.kwargs
    is_messenger = isinstance(poutine.unwrap(guide), GuideMessenger)
    with poutine.block(), poutine.trace() as ran:  # a guide messenger runs the model inside
        draws = run(model, guide, args, kwargs)[0].guide if is_messenger else None
        if draws is None:
            guide(*args, **kwargs)
    with poutine.block(), poutine.trace(param_only=True) as alone:
        poutine.replay(model, trace=draws or ran.trace)(*args, **kwargs)
    of_model, of_guide = leaves(model, alone.trace), leaves(guide, ran.trace)
    shared = of_model.keys() & (set() if is_messenger else of_guide.keys())
    groups = {
        "model": [x for key, x in of_model.items() if key not in shared],
        "guide": [x for key, x in of_guide.items() if key not in of_model],
        "shared": [x for key, x in of_guide.items() if key in shared],
    }
    groups = {name: [x for x in group if x.requires_grad] for name, group in groups.items()}
    groups = {name: group for name, group in groups.items() if group}
    if not groups:
        raise ValueError(
            "model and guide have no parameters that take gradients: give one of them a "
            "pyro.param, or an nn.Parameter"
        )
    return groups
