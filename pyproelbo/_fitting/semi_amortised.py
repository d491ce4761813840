"""A guide that improves an encoder's posteriors by a few gradient steps for each datum."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, cast

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyproelbo._backend import rng
from pyproelbo._backend.kept_samples import samples_forgotten
from pyproelbo._backend.pyro_private import (
    dims_aside,
    handlers,
    site_is_subsample,
    sites_of,
)
from pyproelbo._backend.sites import Site
from pyproelbo._distributions.layers import innermost
from pyproelbo._distributions.natural_gradient import Unconstrained
from pyproelbo._distributions.path_only import PathOnly
from pyproelbo._distributions.sharing import not_sharing
from pyproelbo._messages.arguments import check_counts, check_positive
from pyproelbo._rows.dependencies import DATA, parents
from pyproelbo._rows.noise import RowNoise
from pyproelbo._rows.runs import Use
from pyproelbo._rows.several import may_be_at_once
from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.roles import is_drawn
from pyproelbo._terms.terms import add_terms
from pyproelbo._terms.traces import PARTICLES, Program, run

Families = dict[str, Unconstrained]  # of latents, by name
Values = dict[str, list[Tensor]]  # of the parameters of each


class _Found(NamedTuple):
    """What is known about the programs once they have run.

    Attributes:
        names: the latents that are improved.
        nesting: how deep plates are.
        at_once: whether several draws may be made at once.
    """

    names: list[str]
    nesting: int
    at_once: bool


class SemiAmortised(nn.Module):
    r"""A guide that improves its posteriors for the given data before it draws from them.

    From the parameters lambda_0 of q(z | x) that ``guide`` gives, mapped to the whole real line,

        lambda_k = lambda_{k-1} + rate F^{-1} grad L(lambda_{k-1}),  k = 1, ..., num_steps,

    with the ELBO L in nats, it draws from q(z; lambda_K). F is the Fisher information for normal,
    log-normal and multivariate normal distributions, and makes the rate unitless: at 1 the mean of
    a normal posterior with the right variance is found in one step. For other families F is 1. No
    step is longer than three standard deviations, or than 1 in the logarithm of one. Gradients of
    an objective go through the steps. The guide learns starting points from which they lead to good
    posteriors, and the model is trained with these better posteriors (Kim, Wiseman, Miller, Sontag
    & Rush 2018, "Semi-amortized variational autoencoders").

    It can replace a guide in objectives and reports. Their bounds remain bounds on log p(x), for z
    is drawn from the same q that is scored:

    >>> import torch
    >>> from pyproelbo import evidence
    >>> from pyproelbo.guides.ppca import Diagonal
    >>> from pyproelbo.models.ppca import PPCA
    >>> model, x = PPCA(1, 3), torch.randn(50, 3)
    >>> guide = SemiAmortised(model, Diagonal(1, 3), num_steps=5)
    >>> better, encoder = (evidence(model, q, x).elbo.mean() for q in (guide, guide.guide))
    >>> bool(better > encoder)
    True

    It improves the latents with reparameterised draws whose distribution depends on the data. If
    that distribution also depends on another latent, its parameters change with that latent's draw:
    a step then changes an offset added to them. Each step costs one run of model and guide with its
    gradient, and in training another gradient through each of these.

    Args:
        model: not a part of this module; its parameters are not the guide's.
        guide: with a posterior for each datum, as from an encoder.
        num_steps: K; with 0 it is ``guide``.
        rate: the step size.
        num_samples: draws for each gradient of L, whose variance is 0 where q is the posterior
            (Roeder, Wu & Duvenaud 2017). Few draws and a high rate leave q away from its optimum,
            by more than the steps gain where the guide is good already. In training mode the draws
            come from torch's generator; in eval mode, and in reports, each row always has the same
            draws, and q is a function of its data.

    Raises:
        ValueError: for a guide that is a messenger, and, when it is called, for one without a
            latent that depends on the data, and for such a latent that has no
            reparameterised draws or is of a family whose parameters are not known.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        num_steps: int = 5,
        rate: float = 0.3,
        num_samples: int = 8,
    ) -> None:
        super().__init__()
        check_counts(num_samples=num_samples)
        check_positive(rate=rate)
        check_counts(least=0, num_steps=num_steps)
        if isinstance(poutine.unwrap(guide), GuideMessenger):
            raise ValueError(
                f"guide should be a function or a module of the data, got {type(guide).__name__}, "
                "whose posteriors are parameters: these need no further steps"
            )
        self._model = (model,)  # hidden from nn.Module
        self.guide = guide
        self.num_steps, self.rate, self.num_samples = num_steps, rate, num_samples
        self._found: _Found | None = None

    def forward(self, *args: object, **kwargs: object) -> object:
        """Improve the posteriors for these data, and draw from them."""
        if not self.num_steps:
            return self.guide(*args, **kwargs)
        with _OneSubsample(), _Added(*self._improvements(args, kwargs)):
            return self.guide(*args, **kwargs)

    def _improvements(self, args: tuple, kwargs: dict) -> tuple[Families, Values]:
        """The offsets to the values of each latent's distribution."""
        has_graph = torch.is_grad_enabled()
        sites, families, added = self._start(args, kwargs)
        for step in range(self.num_steps):
            with _apart(), torch.enable_grad():
                change = {
                    n: [torch.zeros_like(v).requires_grad_() for v in added[n]] for n in added
                }
                guide = _Added(families, added, change)
                elbo = self._elbo(guide(self.guide), args, kwargs, step)
                flat = [value for values in change.values() for value in values]
                gradients = torch.autograd.grad(
                    elbo, flat, create_graph=has_graph, materialize_grads=True
                )
            with torch.set_grad_enabled(has_graph):
                rest = iter(gradients)
                for name, values in added.items():
                    own = [_unscaled(next(rest), sites[name]) for _ in values]
                    steps = families[name].uphill(guide.made[name], own)
                    pairs = zip(values, steps, strict=True)
                    added[name] = [v + self.rate * _mean_like(v, s) for v, s in pairs]
        return families, added

    def _elbo(self, guide: Program, args: tuple, kwargs: dict, step: int) -> Tensor:
        """The ELBO at the draws of a step, in nats."""
        assert self._found is not None
        _, nesting, at_once = self._found
        draws = range(step * self.num_samples, (step + 1) * self.num_samples)
        found = []
        for part in [draws] if at_once else [range(s, s + 1) for s in draws]:
            with self._noise(part):
                runs = run(
                    self._model[0],
                    guide,
                    args,
                    kwargs,
                    num_particles=len(part),
                    max_plate_nesting=nesting,
                )
            terms = add_terms([terms_of(traces) for traces in runs])
            found.append(terms.data_fit - terms.shrinkage)
        return sum(found[1:], start=found[0]) / len(found)

    def _start(self, args: tuple, kwargs: dict) -> tuple[dict[str, Site], Families, Values]:
        """The guide's sites, the families of those that are improved, and offsets of zero."""
        with _apart(), torch.no_grad(), self._noise(range(1)):
            sites = sites_of(poutine.trace(self.guide).get_trace(*args, **kwargs))
            if self._found is None:
                self._found = self._find(sites, args, kwargs)
        families, added = {}, {}
        for name in self._found.names:
            try:
                family = families[name] = Unconstrained(sites[name]["fn"])
                values = family.values(sites[name]["fn"])
            except (ValueError, RuntimeError) as error:
                kind = type(innermost(sites[name]["fn"])).__name__
                raise ValueError(
                    f"latent {name!r} has a distribution, {kind}, whose parameters are not known "
                    "and cannot be improved: take a normal distribution, or another of torch's"
                ) from error
            added[name] = [torch.zeros_like(value) for value in values]
        return sites, families, added

    def _find(self, sites: Mapping[str, Site], args: tuple, kwargs: dict) -> "_Found":
        programs = self._model[0], self.guide, args, kwargs
        names = self._to_improve(sites, args, kwargs)
        with rng.put_aside():
            first = run(*programs)[0]
            at_once = self.num_samples > 1 and may_be_at_once(*programs, first)
        return _Found(names, first.plate_nesting, at_once)

    def _to_improve(self, sites: Mapping[str, Site], args: tuple, kwargs: dict) -> list[str]:
        found = parents(self.guide, args, kwargs)
        names = [name for name in found if DATA in found[name] and is_drawn(sites[name])]
        if not names:
            raise ValueError(
                "guide has no latent whose distribution depends on the data, and there is nothing "
                "to improve for each datum: use it as it is, or, where it has parameters for each "
                "datum, train it further"
            )
        for name in names:
            if not sites[name]["fn"].has_rsample:
                raise ValueError(
                    f"latent {name!r} has no reparameterised draws, whose gradients would improve "
                    "its distribution: SemiAmortised is for continuous latents. Where it is "
                    "discrete, let the model enumerate it, and the guide leave it out"
                )
        return names

    def _noise(self, draws: range) -> AbstractContextManager:
        """The noise of a gradient's draws, by their indices."""
        report = next((h for h in reversed(handlers()) if isinstance(h, RowNoise)), None)
        if report is None and self.training:
            return nullcontext()
        plate, start = (None, 0) if report is None else (report.plate, report.start)
        return RowNoise(plate, start, draws, 0, Use.IMPROVED)


@contextmanager
def _apart() -> Iterator[None]:
    """Hide what runs within from outer handlers, except the rows that a plate draws."""
    hidden = poutine.block(hide_fn=lambda msg: not _draws_rows(cast(Site, msg)))
    with not_sharing(), dims_aside(), samples_forgotten(), hidden:
        yield


def _draws_rows(site: Site) -> bool:
    """Whether a site is the subsample of a plate of the program."""
    return site_is_subsample(site) and site["name"] != PARTICLES


def _mean_like(like: Tensor, steps: Tensor) -> Tensor:
    """The mean over dims of draws that the parameters of a distribution do not have."""
    return steps.sum_to_size(like.shape) * (like.numel() / steps.numel())


def _unscaled(gradient: Tensor, site: Site) -> Tensor:
    """The gradient without the scale that the plates of a site give its density."""
    scale = site["scale"]
    if isinstance(scale, Tensor):
        dims = gradient.dim() - len(site["fn"].batch_shape)
        scale = torch.where(scale == 0, 1.0, scale)
        return gradient / (scale[(..., *(None,) * dims)] if scale.dim() else scale)
    return gradient / (scale or 1.0)


class _OneSubsample(Messenger):
    """All runs within see the rows that the first has drawn; outer handlers see only that one."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if _draws_rows(msg) and msg["name"] in self._known:
            msg["value"], msg["stop"] = self._known[msg["name"]], True

    def _pyro_post_sample(self, msg: Site) -> None:
        if _draws_rows(msg):
            self._known[msg["name"]] = msg["value"]


class _Added(Messenger):
    """Within it, offsets are added to the values of the latents' distributions.

    Args:
        change: zeros, added to the values of the distribution that is drawn from but not of the one
            that is scored: gradients for them have no variance where q is the posterior.

    Attributes:
        made: the distributions, without the change.
    """

    def __init__(self, families: Families, added: Values, change: Values | None = None) -> None:
        super().__init__()
        self._families, self._added, self._change = families, added, change
        self.made: dict[str, TorchDistribution] = {}

    def _pyro_sample(self, msg: Site) -> None:
        name = msg["name"]
        if name not in self._families:
            return
        family = self._families[name]
        values = [
            v + more for v, more in zip(family.values(msg["fn"]), self._added[name], strict=True)
        ]
        msg["fn"] = self.made[name] = family.made_of(values)
        if self._change is not None:
            changed = [v + more for v, more in zip(values, self._change[name], strict=True)]
            msg["fn"] = PathOnly(family.made_of(changed), self.made[name])
