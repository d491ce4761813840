"""The best member of a guide's family for each datum, found by gradients."""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, constraints, transform_to

from pyproelbo._backend.pyro_private import site_is_subsample, sites_of
from pyproelbo._backend.sites import Site
from pyproelbo._distributions.family import Family
from pyproelbo._distributions.row_noise import Noise, draw, draws_by_row
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.dependencies import DATA, parents
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.evaluating import constant
from pyproelbo._rows.report_data import Unit
from pyproelbo._rows.runs import Use
from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.traces import Program


class Posteriors(Messenger):
    """Inside, the guide draws each latent from a distribution of its own for every datum.

    Args:
        guide: whose distributions are the family, and the first values of the parameters.
        batch: the data.

    Attributes:
        parameters: all of them, on the whole real line; to be optimised.

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
                    f"the guide draws {name!r} given its sample of {above}, so that what is best "
                    "for a datum is no distribution but a function: this is for guides whose "
                    "latents are independent given the data"
                )
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"latent {name!r} has no reparameterised draws, by whose gradients its "
                    "distribution would be fitted: this is for continuous latents"
                )
            self._free[name] = _Free.of(site["fn"])
        if not self._free:
            raise ValueError(
                "the guide draws no latent, so that there is no inference, and no gap of it: the "
                "ELBO is log p(x)"
            )

    @property
    def parameters(self) -> list[Tensor]:
        return [value for free in self._free.values() for value in free.values]

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self._free:
            msg["fn"] = self._free[msg["name"]].distribution()


class _Free(NamedTuple):
    """A distribution whose parameters are free: images of unconstrained ``values``."""

    family: Family
    transforms: list[Callable[[Tensor], Tensor]]
    values: list[Tensor]

    @classmethod
    def of(cls, d: Distribution) -> "_Free":
        family = Family.of(d)
        transforms = [transform_to(family.kind.arg_constraints[name]) for name in family.names]
        pairs = zip(transforms, family.tensors(d), strict=True)
        values = [t.inv(x.detach()).clone().requires_grad_() for t, x in pairs]
        return cls(family, transforms, values)

    def distribution(self) -> "PathOnly":
        """That of the values as they are."""
        pairs = zip(self.transforms, self.values, strict=True)
        tensors = [transform(value) for transform, value in pairs]
        drawn, density = tensors, (x.detach() for x in tensors)
        return PathOnly(self.family.made_of(drawn), self.family.made_of(density))


class PathOnly(TorchDistribution):
    """A distribution whose density has gradients in the value, but none in the parameters.

    The mean of the term that is left out is 0. Without it the gradient of the ELBO has no
    variance where q is the posterior (Roeder, Wu & Duvenaud 2017, "Sticking the landing").

    Args:
        drawn: what is drawn from.
        density: the same distribution, with its parameters detached.
    """

    has_rsample = True
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # type: ignore[assignment]

    def __init__(self, drawn: TorchDistribution, density: TorchDistribution) -> None:
        self.drawn, self.density = drawn, density
        super().__init__(drawn.batch_shape, drawn.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint | None:
        return self.drawn.support

    def expand(
        self, batch_shape: tuple[int, ...] | list[int], _instance: object = None
    ) -> "PathOnly":
        return PathOnly(self.drawn.expand(batch_shape), self.density.expand(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.drawn.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.density.log_prob(value)


@draws_by_row(PathOnly)
def _path_only(d: PathOnly, noise: Noise) -> Tensor:
    return draw(d.drawn, noise)


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

    Adam from the guide's own distributions on, with a learning rate that falls to 0.
    """
    posteriors = Posteriors(guide, batch)
    with constant(model, guide), torch.enable_grad():
        draws = RowDraws(model, posteriors(guide), batch, unit, seed)
        optimiser = torch.optim.Adam(posteriors.parameters, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for step in range(steps):
            optimiser.zero_grad()
            loss = -draws.at(range(num_samples), Use.FIT, step).log_weight.mean(0).sum()
            loss.backward(inputs=posteriors.parameters)
            optimiser.step()
            schedule.step()
    return posteriors
