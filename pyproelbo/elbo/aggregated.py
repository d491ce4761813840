"""The base of objectives that estimate the aggregate posterior from a minibatch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor, nn
from torch.distributions import Distribution

from pyproelbo.collect import KL
from pyproelbo.dependencies import DATA, parents
from pyproelbo.elbo.base import TermsELBO
from pyproelbo.minibatch import Estimator, MinibatchSurgery, log_densities
from pyproelbo.schedules import Schedule
from pyproelbo.terms import Latent, Terms
from pyproelbo.traces import PARTICLES, Plate, Program


class AggregatedELBO(TermsELBO):
    """An objective that estimates q(z), the mean of q(z | x_n) over all data, from a minibatch.

    Args:
        dataset_size: N, the number of all data. None takes it from the plate over the data: of
            a plate that subsamples it is the full size; otherwise the batch is the whole.
        site: a latent, or several, whose joint q(z) is taken; None takes all.
        plate: the plate over the data, to be named where the latents share several. The dims
            of all others are dimensions of z.
        estimator: "stratified" or "weighted"; see :mod:`pyproelbo.minibatch`.
        kl, schedules, **kwargs: as in :class:`TermsELBO`.

    Attributes:
        last_surgery: the :class:`~pyproelbo.MinibatchSurgery` of the last training step,
            detached, on its device; with several particles their mean.

    Raises:
        ValueError: for a dataset_size or an estimator that cannot be. At the evaluation, for
            latents of which not every datum has a q(z | x_n) that can be taken at any z: in no
            plate, masked, enumerated, drawn at several sites, drawn given another latent; for a
            scale other than the plate's N / B; for a batch of one.
    """

    additive = True

    def __init__(
        self,
        dataset_size: int | None,
        site: str | Sequence[str] | None,
        plate: str | None,
        estimator: Estimator,
        kl: KL,
        schedules: Mapping[str, float | Schedule] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(kl=kl, schedules=schedules, **kwargs)
        if dataset_size is not None and (not isinstance(dataset_size, int) or dataset_size < 2):
            raise ValueError(
                f"dataset_size should be a whole number of at least 2, got {dataset_size!r}"
            )
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator should be one of {get_args(Estimator)}, got {estimator!r}")
        self.dataset_size = dataset_size
        self.site = (site,) if isinstance(site, str) else None if site is None else tuple(site)
        self.plate = plate
        self.estimator: Estimator = estimator
        self.last_surgery: MinibatchSurgery | None = None
        self._surgeries: list[MinibatchSurgery] | None = None  # of a training step's particles
        self._checked_guide: int | None = None  # its hash: no latent depends on another

    def surgery(self, terms: Terms) -> MinibatchSurgery:
        """The parts of the chosen latents' KL, differentiable.

        Args:
            terms: of a training step, or of ``self.terms(model, guide, ...)``.
        """
        keys, plate = self.chosen(terms)
        N = self.dataset_size or plate.full_size
        particles = [[latents[key] for key in keys] for latents in terms.latents]
        q = [log_densities(latents, plate.name, N, self.estimator) for latents in particles]
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
        keys = self._keys(terms)
        for key in keys:
            if not terms.latents or any(key not in latents for latents in terms.latents):
                raise ValueError(
                    f"the KL of {key!r} is not that of one sample: latents that are enumerated, "
                    "fixed to a value, or made of several random sites have no q(z) here. Choose "
                    "others by site="
                )
        latents = {key: terms.latents[0][key] for key in keys}
        plate = _data_plate(latents, self.plate)
        for key, latent in latents.items():
            _check_density(key, latent, plate, terms)
        if self.dataset_size and plate.full_size not in (plate.size, self.dataset_size):
            raise ValueError(
                f"dataset_size={self.dataset_size}, but plate {plate.name!r} has its "
                f"{plate.size} rows stand for {plate.full_size}: give it no dataset_size, or both "
                "the same"
            )
        return keys, plate

    def _particles(
        self, model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> Iterator[Terms]:
        self._surgeries = [] if torch.is_grad_enabled() else None
        for terms in super()._particles(model, guide, args, kwargs):
            if self._checked_guide != hash(guide):
                self._check_independent(terms, guide, args, kwargs)
                self._checked_guide = hash(guide)
            yield terms

    def _record(self, surgery: MinibatchSurgery) -> None:
        """Keep the surgery of a training step, with that of the step's other particles."""
        if self._surgeries is not None:
            detached = (None if value is None else value.detach() for value in surgery)
            self._surgeries.append(MinibatchSurgery._make(detached))
            parts = zip(*self._surgeries, strict=True)
            self.last_surgery = MinibatchSurgery._make(map(_mean, parts))

    def _keys(self, terms: Terms) -> tuple[str, ...]:
        if not terms.kl:
            raise ValueError("there is no latent site, and so no q(z)")
        if self.site is None:
            return tuple(terms.kl)
        owner = {z: key for key, latents in terms.groups.items() for z in latents}
        for name in self.site:
            if name not in terms.kl and name not in owner:
                raise ValueError(
                    f"site names {name!r}, but the latent sites are {sorted(terms.kl)}: name one "
                    "of those"
                )
            if name not in terms.kl:
                raise ValueError(
                    f"site names {name!r}, which has one KL together with "
                    f"{list(terms.groups[owner[name]])}: name {owner[name]!r}, that of all"
                )
        return tuple(dict.fromkeys(self.site))

    def _check_independent(self, terms: Terms, guide: Program, args: tuple, kwargs: dict) -> None:
        """The run's log q(z_i | x_j) has the z that it drew for x_j above z_i; there may be none.

        Asked of the guide as it is when it is first seen: a dependence whose weights are all
        zero then is not found.
        """
        keys, _ = self.chosen(terms)
        program = guide
        if isinstance(guide, nn.Module):  # on copies of its buffers: running means would move
            buffers = {name: buffer.clone() for name, buffer in guide.named_buffers()}
            program = partial(_call_with, guide, buffers)
        found = parents(program, args, kwargs)
        for key in keys:
            if above := sorted(found[terms.latents[0][key].name] - {DATA}):
                raise ValueError(
                    f"the guide draws {key!r} given its sample of {above}: then q(z | x_j) of one "
                    "datum's z takes a run of the guide on x_j, which a minibatch has not made. "
                    "Choose latents that the guide draws from the data alone by site=, or take "
                    "pyproelbo.surgery over all data"
                )


def _call_with(module: nn.Module, buffers: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return torch.func.functional_call(module, buffers, args, kwargs)


def _mean(values: tuple[Tensor | None, ...]) -> Tensor | None:
    known = [value for value in values if value is not None]
    return torch.stack(known).mean(0) if known else None


def _sampled_kl(terms: Terms, keys: tuple[str, ...]) -> list[Tensor]:
    """log q(z | x) - log p(z) at the samples, scaled, also of a KL that is in closed form."""
    kl = [terms.kl[key] for key in keys if key not in terms.analytic]
    for key in terms.analytic.intersection(keys):
        for value, q, p, _, scale, *_ in (latents[key] for latents in terms.latents):
            assert p is not None
            kl.append(scale * (q.log_prob(value) - p.log_prob(value)))
    return kl


def _data_plate(latents: dict[str, Latent], name: str | None) -> Plate:
    """The one plate that all the latents share."""
    plates = {
        key: {plate.name: plate for plate in latent.plates if plate.name != PARTICLES}
        for key, latent in latents.items()
    }
    for key, of_latent in plates.items():
        if not of_latent:
            raise ValueError(
                f"site {key!r} is in no plate: it is one for all data, and has no q(z | x) for "
                "each. Choose latents of single data by site="
            )
        if name is not None and name not in of_latent:
            raise ValueError(f"site {key!r} is in plates {sorted(of_latent)}, not in {name!r}")
    shared = set.intersection(*map(set, plates.values()))
    if name is None and not shared:
        raise ValueError(f"sites {sorted(plates)} are in no plate together: choose some by site=")
    if name is None and len(shared) > 1:
        raise ValueError(
            f"sites {sorted(plates)} are in plates {sorted(shared)}: name the one over the data by "
            "plate="
        )
    return next(iter(plates.values()))[name or shared.pop()]


def _check_density(key: str, latent: Latent, plate: Plate, terms: Terms) -> None:
    """It is that of one datum, times N / B in the model and in the guide."""
    layers = [d for d in (latent.q, latent.p) if d is not None]
    if latent.is_masked or any(isinstance(d, MaskedDistribution) for d in _layers(layers)):
        raise ValueError(f"site {key!r} is masked: its q(z) would count what the mask leaves out")
    scale = plate.full_size / plate.size
    size = math.prod(p.size for p in latent.plates if p.name != PARTICLES)
    alone = len(terms.groups[key]) == 1  # otherwise the count has no scale
    scales = [latent.scale, *([terms.counts[key] / size] if alone else [])]
    for found in scales:
        if isinstance(found, Tensor) or not math.isclose(found, scale, rel_tol=1e-6):
            raise ValueError(
                f"site {key!r} has its density scaled by {found}, where plate {plate.name!r} gives "
                f"{scale}: let only the plate over the data scale it, in model and guide"
            )


def _layers(distributions: list[Distribution]) -> Iterator[Distribution]:
    """The distributions and what they wrap."""
    for d in distributions:
        while d is not None:
            yield d
            d = getattr(d, "base_dist", None)
