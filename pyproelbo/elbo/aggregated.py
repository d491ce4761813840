"""The base of objectives that estimate the aggregate posterior from a minibatch."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Unpack, get_args

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Distribution

from pyproelbo._backend.pyro_private import sites_of
from pyproelbo._rows.dependencies import DATA, parents
from pyproelbo._rows.plate import check_densities, chosen, data_plate
from pyproelbo._terms.collect import KL
from pyproelbo._terms.terms import Latent, Terms
from pyproelbo._terms.traces import Plate, Program
from pyproelbo.elbo.base import TermsELBO
from pyproelbo.elbo.known import Known
from pyproelbo.elbo.minibatch import Estimator, MinibatchSurgery, is_own_density, log_densities
from pyproelbo.elbo.options import Options
from pyproelbo.schedules import Schedule


class AggregatedELBO(TermsELBO):
    """An objective that estimates q(z), the mean of q(z | x_n) over all data, from a minibatch.

    Args:
        dataset_size: N, the number of all data. None takes it from the plate over the data: the
            full size of a plate that subsamples; otherwise the batch is taken for the whole.
        site: a latent, or several, whose joint q(z) is taken; None takes all.
        plate: the plate over the data, to be named where the latents share several. The dims of all
            other plates are dimensions of z.
        estimator: "stratified" or "weighted"; see :mod:`pyproelbo.elbo.minibatch`.
        kl, schedules, **kwargs: as in :class:`TermsELBO`.

    Raises:
        ValueError: for an invalid dataset_size or estimator. At the evaluation, for latents whose
            q(z | x_n) cannot be evaluated at any z for every datum: in no plate, masked,
            enumerated, drawn at several sites, drawn given a latent that is not chosen; for a scale
            other than the plate's N / B; for a batch of one.
    """

    additive = True
    needs_marginals: ClassVar[bool] = True  # a latent drawn given another has none

    def __init__(
        self,
        dataset_size: int | None,
        site: str | Sequence[str] | None,
        plate: str | None,
        estimator: Estimator,
        kl: KL,
        schedules: Mapping[str, float | Schedule] | None = None,
        **kwargs: Unpack[Options],
    ) -> None:
        super().__init__(kl=kl, schedules=schedules, **kwargs)
        if dataset_size is not None and (not isinstance(dataset_size, int) or dataset_size < 2):
            raise ValueError(
                f"dataset_size should be a whole number of at least 2, got {dataset_size!r}"
            )
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator should be one of {get_args(Estimator)}, got {estimator!r}")
        self.dataset_size = dataset_size
        self.site, self.plate = site, plate
        self.estimator: Estimator = estimator
        self._conditional = Known[frozenset[str]]()  # by guide, as first seen

    @property
    def last_surgery(self) -> MinibatchSurgery | None:
        """The surgery of the last training step, detached, on its device.

        With several particles, the mean over them.
        """
        return self.records["surgery"]

    def surgery(
        self, terms: Terms, guide: Program | None = None, *args: object, **kwargs: object
    ) -> MinibatchSurgery:
        """The parts of the chosen latents' KL, differentiable.

        Args:
            terms: from a training step, or from ``self.terms(model, guide, ...)``.
            guide, *args, **kwargs: from the same run. They are needed where the guide draws one of
                the latents given another: it then runs again for every pair of data, with the z of
                one and the x of the other.

        Raises:
            ValueError: where an estimate would be wrong; for several latents in terms of another
                objective, where it is not known whether the guide draws one given another.
        """
        keys, plate = self.chosen(terms)
        N = self.dataset_size or plate.full_size
        is_hierarchical = self._is_hierarchical(terms, keys)
        if is_hierarchical and guide is None:
            raise ValueError(
                f"the guide draws some of {list(keys)} given others, and has to run for "
                "every pair of data: call surgery(terms, guide, ...) with the guide's arguments"
            )
        q = []
        for latents in terms.latents:
            at_pairs = None
            if is_hierarchical and guide is not None:
                at_pairs = partial(_run_given, latents.values(), guide, args, kwargs)
            found = [latents[key] for key in keys]
            q.append(log_densities(found, plate.name, N, self.estimator, at_pairs=at_pairs))
        total_correlation = [z.joint - z.by_dim for z in q if z.by_dim is not None]

        average_kl = terms.mean(_sampled_kl(terms, keys)) / plate.full_size
        mutual_information = terms.mean([z.own - z.joint for z in q]) / plate.size
        marginal_kl = average_kl - mutual_information
        tc = terms.mean(total_correlation) / plate.size if total_correlation else None
        return MinibatchSurgery(
            terms.reconstruction / plate.full_size,
            average_kl,
            mutual_information,
            marginal_kl,
            tc,
            None if tc is None else marginal_kl - tc,
        )

    def chosen(self, terms: Terms) -> tuple[tuple[str, ...], Plate]:
        """The keys of ``terms.kl`` whose q(z) is taken, and their plate over the data.

        Raises:
            ValueError: where an estimate of it would be wrong.
        """
        latents = chosen(terms, self.site)
        plate = data_plate({name: z.plates for name, z in latents.items()}, self.plate)
        check_densities(latents, plate)
        if self.dataset_size and plate.full_size not in (plate.size, self.dataset_size):
            raise ValueError(
                f"dataset_size={self.dataset_size}, but plate {plate.name!r} has its {plate.size} "
                f"rows stand for {plate.full_size}: leave dataset_size out, or make the two agree"
            )
        return tuple(latents), plate

    def _particles(
        self, model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> Iterator[Terms]:
        for terms in super()._particles(model, guide, args, kwargs):
            conditional = self._conditional.of(guide)
            if conditional is None:
                conditional = self._checked_guide(terms, guide, args, kwargs)
                self._conditional.put(conditional, guide)
            yield replace(terms, conditional=conditional)

    def _is_hierarchical(self, terms: Terms, keys: Sequence[str]) -> bool:
        """Whether the guide draws one of the latents given another.

        Raises:
            ValueError: where the terms do not record it.
        """
        if len(keys) > 1 and terms.conditional is None:
            raise ValueError(
                f"these terms do not record whether the guide draws one of {list(keys)} given "
                f"another: compute them with this {type(self).__name__}, by terms(model, guide, "
                "...), or choose one latent by site="
            )
        return bool(terms.conditional and terms.conditional.intersection(keys))

    def _checked_guide(
        self, terms: Terms, guide: Program, args: tuple, kwargs: dict
    ) -> frozenset[str]:
        """Which of the chosen latents the guide draws given others of them.

        The guide is examined once, when it is first seen: a dependence whose weights are all zero
        at that time is not found.

        Raises:
            ValueError: where the estimates would be wrong for such a guide.
        """
        keys, _ = self.chosen(terms)
        names = {terms.latents[0][key].name for key in keys}
        found = parents(_with_own_buffers(guide), args, kwargs)
        conditional = set[str]()
        for key in keys:
            above = found[terms.latents[0][key].name] - {DATA}
            why = f"the guide draws {key!r} given its sample of {sorted(above)}"
            if above - names:
                raise ValueError(
                    f"{why}: q({key} | x) by itself is not known. Choose by site= latents that the "
                    "guide draws from the data alone, or, in SurgeryELBO, the latents above as "
                    "well; or use pyproelbo.surgery(..., given=...) over all data"
                )
            if above and self.needs_marginals:
                raise ValueError(
                    f"{why}: q(z_d | x) of its dimensions is not known. Choose by site= latents "
                    "that the guide draws from the data alone, or watch these with SurgeryELBO"
                )
            conditional |= {key} if above else set()
        if conditional:
            self._check_pairs(terms, guide, args, kwargs)
        return frozenset(conditional)

    def _check_pairs(self, terms: Terms, guide: Program, args: tuple, kwargs: dict) -> None:
        """Check that the guide gives a datum's own z the density with which it was drawn."""
        keys, plate = self.chosen(terms)
        latents = terms.latents[0]
        at_pairs = partial(_run_given, latents.values(), guide, args, kwargs)
        try:
            same = is_own_density([latents[key] for key in keys], plate.name, at_pairs)
        except (RuntimeError, LookupError) as error:
            raise ValueError(_NOT_AGAIN) from error
        if not same:
            raise ValueError(_NOT_AGAIN)


def _run_given(
    latents: Collection[Latent],
    guide: Program,
    args: tuple,
    kwargs: dict,
    values: Mapping[str, Tensor],
) -> dict[str, Distribution]:
    """The distributions of a guide that runs on given values of its sites.

    Other latents keep their values; nothing is drawn.
    """
    given = {latent.name: latent.value for latent in latents} | dict(values)
    program = poutine.condition(_with_own_buffers(guide), data=given)
    with poutine.block():
        nodes = sites_of(poutine.trace(program).get_trace(*args, **kwargs))
    return {name: nodes[name]["fn"] for name in values}


_NOT_AGAIN = (
    "the guide draws one of the latents given another, and therefore runs again on pairs of data. "
    "There, the density of a datum's own z at its own x differs from before. Let the guide "
    "broadcast over dims at the left of its plates, as for vectorised particles (expand before "
    "torch.cat), and draw random numbers by pyro.sample only: no dropout, no subsampling plate"
)


def _with_own_buffers(program: Program) -> Program:
    """A module that runs on copies of its buffers, whose running means would otherwise move."""
    if not isinstance(program, nn.Module):
        return program
    buffers = {name: buffer.clone() for name, buffer in program.named_buffers()}
    return partial(_call_with, program, buffers)


def _call_with(
    module: nn.Module, buffers: dict[str, Tensor], *args: object, **kwargs: object
) -> object:
    return torch.func.functional_call(module, buffers, args, kwargs)


def _sampled_kl(terms: Terms, keys: tuple[str, ...]) -> list[Tensor]:
    """log q(z | x) - log p(z) at the samples, scaled, also of a KL that is in closed form."""
    kl = [terms.kl[key] for key in keys if key not in terms.analytic]
    for key in terms.analytic.intersection(keys):
        for z in (latents[key] for latents in terms.latents):
            assert z.p is not None
            kl.append(z.scale * (z.q.log_prob(z.value) - z.p.log_prob(z.value)))
    return kl
