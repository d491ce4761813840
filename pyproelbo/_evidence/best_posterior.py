"""The best member of a guide's family for each datum, found by gradients."""

from typing import NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

from pyproelbo._backend.pyro_private import site_is_subsample, sites_of
from pyproelbo._backend.sites import Site
from pyproelbo._distributions.natural_gradient import Unconstrained
from pyproelbo._distributions.path_only import PathOnly
from pyproelbo._evidence.descent import descend
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.dependencies import DATA, parents
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.evaluating import constant
from pyproelbo._rows.report_data import Unit
from pyproelbo._rows.runs import Use
from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.traces import Program


class Posteriors(Messenger):
    """Within it, the guide draws each latent from a separate distribution for every datum.

    Args:
        guide: it gives the family of distributions and the initial parameters.
        batch: the data.

    Attributes:
        parameters: all of them, on the whole real line, to be optimised.

    Raises:
        ValueError: for a guide that draws one latent given another, for a latent without
            reparameterised draws, and for a family whose parameters are not known.
    """

    def __init__(self, guide: Program, batch: Batch) -> None:
        super().__init__()
        trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
        sites = sites_of(trace)
        found = parents(guide, batch.args, batch.kwargs)
        self._free: dict[str, _Free] = {}
        for name in trace.stochastic_nodes:
            site = sites[name]
            if is_delta(site) or site_is_subsample(site):
                continue
            if above := sorted(found[name] - {DATA}):
                raise ValueError(
                    f"the guide draws {name!r} given its sample of {above}: the best choice for a "
                    "datum is then a function, not a distribution. This is for guides whose "
                    "latents are independent given the data"
                )
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"latent {name!r} has no reparameterised draws, whose gradients would fit its "
                    "distribution: this is for continuous latents"
                )
            self._free[name] = _Free.of(site["fn"])
        if not self._free:
            raise ValueError(
                "the guide draws no latent: without inference there is no gap, and the ELBO is "
                "log p(x)"
            )

    @property
    def parameters(self) -> list[Tensor]:
        return [value for free in self._free.values() for value in free.values]

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self._free:
            msg["fn"] = self._free[msg["name"]].distribution()


class _Free(NamedTuple):
    """A distribution whose parameters are free: images of unconstrained ``values``."""

    unconstrained: Unconstrained
    values: list[Tensor]

    @classmethod
    def of(cls, d: Distribution) -> "_Free":
        unconstrained = Unconstrained(d)
        values = unconstrained.values(d)
        return cls(unconstrained, [x.detach().clone().requires_grad_() for x in values])

    def distribution(self) -> "PathOnly":
        """The distribution at the current values."""
        at = [value.detach() for value in self.values]
        return PathOnly(self.unconstrained.made_of(self.values), self.unconstrained.made_of(at))


def fit_posteriors(
    model: Program,
    guide: Program,
    batch: Batch,
    unit: Unit,
    steps: int,
    num_samples: int,
    lr: float,
    seed: int,
) -> Posteriors:
    """The distributions of a guide's family with the highest ELBO, for each datum of a batch.

    By Adam, starting from the guide's own distributions, with a learning rate that falls to 0.
    """
    posteriors = Posteriors(guide, batch)
    with constant(model, guide), torch.enable_grad():
        draws = RowDraws(model, posteriors(guide), batch, unit, seed)

        def loss(step: int) -> Tensor:
            return -draws.at(range(num_samples), Use.FIT, step).log_weight.mean(0).sum()

        descend(loss, posteriors.parameters, steps, lr)
    return posteriors
