"""Draws of a guide with their log-densities, as many at once as the programs allow."""

from collections.abc import Container, Mapping
from typing import cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import infer_discrete
from pyro.poutine.runtime import InferDict, Message
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from pyproelbo._arviz.layout import Layout
from pyproelbo._backend.pyro_private import sites_of
from pyproelbo._distributions.closed_form import as_tensor
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.levels import LevelDraws, NoLevelsError, Placed, places
from pyproelbo._rows.noise import RowNoise
from pyproelbo._rows.runs import Runs, Use
from pyproelbo._rows.support import check_weighable
from pyproelbo._rows.values import row_axis
from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.masked_latents import warn_of_masks
from pyproelbo._terms.masks import counted, mask_of
from pyproelbo._terms.roles import is_delta, is_drawn
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.traces import PARTICLES, Program, Site, Traces

ByGroup = dict[str, dict[str, Tensor]]  # by group and site, (num, *plates, *event)

_FRAMES = ("plates", "cond_indep_stack")
_DENSITIES = ("log_likelihood", "log_prior", "log_q", "factors")


class GuideDraws:
    """A model and a guide, with their arguments.

    Attributes:
        model: that model.
        nesting: the number of dims of the programs' plates.
        latents: the model's latents, including those that it enumerates.
        layouts: the dims of a draw, by group and site. The groups are "posterior" (the latents and
            deterministic sites), "log_likelihood", "log_prior", "log_q", "factors" (as in
            :class:`~pyproelbo.Terms`) and "data".

    Raises:
        ValueError: for latents that the guide lacks, subsampled plates and scaled densities.
    """

    def __init__(
        self, model: Program, guide: Program, args: tuple, kwargs: dict, seed: int
    ) -> None:
        self.model, self._args, self._kwargs = model, args, kwargs
        self._guide = poutine.infer_config(guide, config_fn=_not_enumerated)
        self._batch = Batch(args, kwargs, 0, 0)
        self._runs = Runs(model, self._guide, self._batch, seed)
        self._first = first = self._runs.first
        _check_scales(first)
        self.nesting: int = first.plate_nesting

        sites = Sites.of(first)
        sites.check_observed()
        warn_of_masks(sites)
        self.latents = (*sites.latents, *sites.enumerated)
        self._device = _device(first)
        self._enumerates, self._data = bool(sites.enumerated), sites.data
        self._values = tuple(n for n, s in first.model_sites.items() if self._is_value(n, s))
        found = self._found(first)
        drawn = self._drawn(first).model_sites
        self.layouts = {"data": {n: Layout.of_value(site) for n, site in sites.data.items()}}
        # infer_discrete's sites have lost plates
        frames = {n: {k: first.model_sites[n][k] for k in _FRAMES} for n in self._values}
        self.layouts["posterior"] = {
            n: Layout.of_value(cast(Site, {**drawn[n], **frames[n]})) for n in self._values
        }
        for group in _DENSITIES:
            self.layouts[group] = {
                key: Layout.of_log_prob(value, self._sites(group, key))
                for key, value in found[group].items()
            }
        stats = ["lp", "log_q", "log_weight", *(["log_factor"] if found["factors"] else [])]
        self.layouts["sample_stats"] = dict.fromkeys(stats, Layout((), torch.Size()))
        self._masked = self._left_out()

    def data(self) -> dict[str, Tensor]:
        """The observed values, (*plates, *event), NaN where a mask leaves them out."""
        sites = self._data
        values = {name: torch.as_tensor(site["value"]) for name, site in sites.items()}
        masks = {
            name: as_tensor(mask_of(site)).to(values[name].device) for name, site in sites.items()
        }
        found, counts = (self._laid_out("data", part, 1) for part in (values, masks))
        return {name: _with_nan(value[0], counts[name][0]) for name, value in found.items()}

    def draw(self, draws: range) -> ByGroup:
        """The draws of the guide with these indices, and the log-densities there.

        There are several only where :meth:`at_once` allows it.
        """
        (traces,) = self._runs.traces(None, draws, Use.POSTERIOR)
        return self._read(traces, len(draws))

    def at(self, values: Mapping[str, Tensor], num: int) -> ByGroup:
        """The same where the guide draws these values, by site (num, *shape)."""
        with Placed(places(values, self._first, num)):
            return self._read(self._runs.run(num), num)

    def rows_of_drawn(self, plate: str | None) -> dict[str, tuple[torch.Size, int | None]]:
        """For each site that the guide draws, the shape and the dim of a plate, from the right.

        Args:
            plate: its name; None where all data are one row.
        """
        found = {}
        for name, site in self._first.guide_sites.items():
            if is_drawn(site):
                of_rows = next((p for p in site["plates"] if p.name == plate), None)
                found[name] = site["value"].shape, row_axis(site, of_rows)
        return found

    def check_weighable(self) -> None:
        """Raise a ValueError where draws cannot be weighted."""
        check_weighable(Sites.of(self._first))

    def levels(self) -> LevelDraws | None:
        """Draws by level; None where there are no levels."""
        try:
            return LevelDraws(self.model, self._guide, self._batch, None, self._runs.seed)
        except NoLevelsError:
            return None

    def noise(self, draws: range, use: Use) -> RowNoise:
        """Within it programs use the random numbers of draws with these indices."""
        return RowNoise(None, 0, draws, self._runs.seed, use)

    def simulate(self, draws: range, latents: Mapping[str, Tensor] | None = None) -> ByGroup:
        """Draws of the model and of the data: "posterior" and "data".

        Args:
            draws: their indices.
            latents: the values of the latents in each draw; None to draw them from the prior.
        """
        num, use = len(draws), Use.PRIOR if latents is None else Use.PREDICTIVE
        program = Simulate(self._data)(self.model)
        if latents is not None:
            program = poutine.condition(program, data=self.as_drawn(latents, self.nesting))
        try:
            with self.noise(draws, use):
                nodes = sites_of(self._traced(self._several(program, num)))
        except NotImplementedError as error:
            error.add_note(
                "leave what the model cannot draw, its prior or its data, out of groups="
            )
            raise
        return {
            group: self._laid_out(group, {n: nodes[n]["value"] for n in nodes if n in names}, num)
            for group, names in (("posterior", self._values), ("data", self._data))
        }

    def as_drawn(self, latents: Mapping[str, Tensor], nesting: int) -> dict[str, Tensor]:
        """Draws of latents (num, ...) in the shapes of programs with ``nesting`` dims of plates."""
        layouts = self.layouts["posterior"]
        return {n: layouts[n].as_drawn(x.to(self._device), nesting) for n, x in latents.items()}

    def at_once(self, chunk: int | None, num_samples: int, elements: int) -> int:
        """The number of draws to make at once: one, unless several equal single draws.

        Args:
            chunk: the largest number; None for as many as have about ``elements`` numbers.
        """
        if chunk is None:
            layouts = (layout for part in self.layouts.values() for layout in part.values())
            chunk = elements // max(1, sum(layout.numel for layout in layouts))
        chunk = max(1, min(chunk, num_samples))
        return chunk if chunk == 1 or self._runs.at_once else 1

    def _drawn(self, traces: Traces) -> Traces:
        """The same draws with values of the latents that the model enumerates, given the rest."""
        if not self._enumerates:
            return traces
        num = traces.num_particles
        # conditioned, not replayed, for infer_discrete also draws what is in no such trace
        known = {n: traces.guide_sites[n]["value"] for n in self.latents if n in traces.guide_sites}
        program = poutine.condition(self._several(self.model, num), data=known)
        free = -1 - self.nesting - (num > 1)
        model = self._traced(infer_discrete(program, first_available_dim=free))
        return Traces(model, traces.guide, self.nesting, num)

    def _found(self, traces: Traces) -> ByGroup:
        terms = terms_of(traces, "sampled")
        return {group: dict(getattr(terms, group)) for group in _DENSITIES}

    def _read(self, traces: Traces, num: int) -> ByGroup:
        nodes = self._drawn(traces).model_sites
        values = {n: nodes[n]["value"] for n in nodes if n in self._values}
        found = {"posterior": values, **self._found(traces)}
        draws = {group: self._laid_out(group, part, num) for group, part in found.items()}
        draws["sample_stats"] = self._stats(draws, num)
        for key, masked in self._masked.items():
            log_p = draws["log_likelihood"]
            log_p[key] = log_p[key].masked_fill(masked, torch.nan)
        return draws

    def _stats(self, draws: ByGroup, num: int) -> dict[str, Tensor]:
        """The joint log-densities of each draw."""
        zero = torch.zeros(num, dtype=torch.float64, device="cpu")

        def total(group: str) -> Tensor:
            parts = draws[group].values()
            return sum((v.reshape(num, -1).sum(1, dtype=zero.dtype).cpu() for v in parts), zero)

        log_q, log_factor = total("log_q"), total("factors")
        lp = total("log_likelihood") + total("log_prior") + log_factor
        stats = {"lp": lp, "log_q": log_q, "log_weight": lp - log_q}
        return stats | ({"log_factor": log_factor} if draws["factors"] else {})

    def _left_out(self) -> dict[str, Tensor]:
        """Where masks leave out all data of a log-likelihood, (*plates), by key."""
        left_out = {}
        for key, layout in self.layouts["log_likelihood"].items():
            sites, plates = self._sites("log_likelihood", key), set(layout.plates)
            if all(site["plates"] == plates for site in sites):
                parts = (layout.by_draw(_counts(site), 1, self.nesting)[0] for site in sites)
                left_out[key] = torch.stack([part == 0 for part in parts]).all(0)
        return left_out

    def _laid_out(self, group: str, values: Mapping[str, Tensor], num: int) -> dict[str, Tensor]:
        layouts = self.layouts[group]
        if values.keys() != layouts.keys():
            raise ValueError(
                f"some draws have the sites {sorted(layouts)}, others {sorted(values)}: a data "
                "set needs the same in all; make the sites of model and guide the same in each run"
            )
        if group in _DENSITIES:
            values = {n: _by_plates(v, layouts[n], self.nesting) for n, v in values.items()}
        return {n: layouts[n].by_draw(v, num, self.nesting) for n, v in values.items()}

    def _several(self, program: Program, num: int) -> Program:
        if num == 1:
            return program
        return pyro.plate(PARTICLES, num, dim=-1 - self.nesting)(program)

    def _traced(self, program: Program) -> poutine.Trace:
        return poutine.trace(program).get_trace(*self._args, **self._kwargs)

    def _sites(self, group: str, key: str) -> list[Site]:
        """The sites that a key of Terms names: the guide's in ``log_q``, otherwise the model's."""
        nodes = self._first.guide_sites if group == "log_q" else self._first.model_sites
        return [nodes[n] for n in ([key] if key in nodes else key.split("+"))]

    def _is_value(self, name: str, site: Site) -> bool:
        """Whether a site of the model is a latent, or a function of latents."""
        return is_delta(site) if site["is_observed"] else name in self.latents


def _by_plates(log_prob: Tensor, layout: Layout, nesting: int) -> Tensor:
    """A density summed over the dims of its batch that belong to no plate."""
    plates = {plate.dim for plate in layout.plates}
    loose = [dim for dim in range(-min(nesting, log_prob.dim()), 0) if dim not in plates]
    return log_prob.sum(loose, keepdim=True) if loose else log_prob


def _not_enumerated(site: object) -> InferDict:
    """Draw here what the guide enumerates in training."""
    return {"enumerate": None}  # type: ignore[typeddict-item]


class Simulate(UnconditionMessenger):
    """Draw the data, and leave deterministic sites unchanged."""

    def __init__(self, data: Container[str | None]) -> None:
        super().__init__()
        self._data = data

    def _pyro_sample(self, msg: Message) -> None:
        if msg.get("name") in self._data:
            super()._pyro_sample(msg)


def _device(traces: Traces) -> torch.device | None:
    """The device of a program's values."""
    return next((s["value"].device for s in traces.sites if isinstance(s["value"], Tensor)), None)


def _with_nan(value: Tensor, counts: Tensor) -> Tensor:
    """NaN where a value does not count, which converts integers to floating point."""
    if counts.all():
        return value
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    return value.masked_fill(~counts, torch.nan)


def _counts(site: Site) -> Tensor:
    """1 where a site counts, 0 where a mask leaves it out."""
    return scale_and_mask(site["log_prob"].new_ones(()), mask=counted(site))


def _check_scales(traces: Traces) -> None:
    for site in traces.sites:
        for plate in site["plates"]:
            if plate.size != plate.full_size:
                raise ValueError(
                    f"plate {plate.name!r} has {plate.size} of {plate.full_size} rows, but a "
                    "posterior is for all data: call from_svi with all rows, and without "
                    "subsample_size in model and guide"
                )
        scale = torch.as_tensor(site["scale"])
        if not torch.allclose(scale, torch.ones_like(scale)):
            raise ValueError(
                f"site {site['name']!r} has its density scaled by {site['scale']}, but ArviZ takes "
                "log-densities unscaled: remove poutine.scale, and loops over a part of the data, "
                "from model and guide"
            )
