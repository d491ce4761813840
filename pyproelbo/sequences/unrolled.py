"""A sequence-valued site as a loop over its steps."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import pyro
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyproelbo._backend.sites import Site
from pyproelbo.sequences.base import SequenceDistribution

P = ParamSpec("P")
T = TypeVar("T")


def unrolled(program: Callable[P, T]) -> Callable[P, T]:
    """The same program as a loop: a sequence-valued site ``z`` becomes ``z_0``, ``z_1``, ...

    Each step is sampled from its distribution given earlier steps, and masked as the sequence is. A
    program written with whole sequences can thus be used where only sites of single steps are
    supported; the numbers are the same.

    >>> import pyro.distributions as dist
    >>> from pyproelbo.sequences import MarkovChain
    >>> def model():
    ...     walk = MarkovChain(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.1), num_steps=3)
    ...     return pyro.sample("z", walk)
    >>> list(poutine.trace(unrolled(model)).get_trace().stochastic_nodes)
    ['z_0', 'z_1', 'z_2']
    """
    return _Unroll()(program)


class _Unroll(Messenger):
    def _pyro_sample(self, msg: Site) -> None:
        fn = msg["fn"]
        if msg["done"] or not isinstance(fn, SequenceDistribution):
            return
        observed = [None] * fn.num_steps
        if msg["is_observed"]:
            observed = fn.filled(msg["value"]).unbind(-fn.event_dim)

        def draw(t: int, step: TorchDistribution) -> Tensor:
            name, infer = f"{msg['name']}_{t}", msg["infer"].copy()
            mask: bool | Tensor = True if fn.step_mask is None else fn.step_mask[..., t]
            with poutine.mask(mask=mask):
                return pyro.sample(name, step, obs=observed[t], infer=infer)

        values = fn.walk(draw)
        if not msg["is_observed"]:
            msg["value"] = fn.joined(values)
        msg["done"] = msg["stop"] = True
