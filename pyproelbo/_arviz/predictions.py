"""Draws of the data at new arguments of the model, given the posterior's draws."""

from collections.abc import Mapping

import pyro
from pyro import poutine
from torch import Tensor

from pyproelbo._arviz.fit import GuideDraws, Simulate
from pyproelbo._arviz.layout import Layout
from pyproelbo._backend.pyro_private import sites_of
from pyproelbo._rows.runs import Use
from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.traces import PARTICLES, Site, Traces


class Predictions:
    """The predictions of a fitted model for data that it has not seen.

    Latents that all data of a fit share keep the posterior's draws. Those of single data, which are
    in all plates that the data are in, are drawn by the model: nothing is known about new data that
    the guide could use.

    Args:
        fit: of the model.
        args, kwargs: the model's arguments.

    Attributes:
        layouts: of what is drawn: the data, and what the model computes from them.
        rows: the plates that all data are in.

    Raises:
        ValueError: for a latent whose plates are not those of the data, but have other sizes than
            in the fit.
    """

    def __init__(self, fit: GuideDraws, args: tuple, kwargs: dict[str, object]) -> None:
        self._fit, self._args, self._kwargs = fit, args, kwargs
        of_data, of_latents = fit.layouts["data"], fit.layouts["posterior"]
        plates = [{plate.name for plate in layout.plates} for layout in of_data.values()]
        self.rows = rows = set.intersection(*plates) if plates else set[str]()

        def is_shared(name: str) -> bool:
            return not rows or not rows <= {plate.name for plate in of_latents[name].plates}

        self._shared = [name for name in fit.latents if is_shared(name)]
        one = fit.draw(range(1))["posterior"]
        trace = self._traced({n: one[n] for n in self._shared}, range(1))
        sites = Traces(trace, poutine.Trace(), 0, 1)
        found = sites.model_sites
        for name in self._shared:
            if name in found:
                _check_sizes(name, of_latents[name], found[name])
        names = [n for n, s in found.items() if n in of_data or _is_computed(n, s, fit)]
        self.layouts = {n: Layout.of_value(found[n]) for n in names}
        self._nesting = sites.plate_nesting

    def draw(self, draws: range, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One prediction for each of some draws of the latents: by site (num, *plates, *event)."""
        nodes = sites_of(self._traced({n: latents[n] for n in self._shared}, draws))
        return {
            name: layout.by_draw(nodes[name]["value"], len(draws), self._nesting)
            for name, layout in self.layouts.items()
        }

    def _traced(self, latents: Mapping[str, Tensor], draws: range) -> poutine.Trace:
        num = len(draws)
        nesting = self._fit.nesting if num == 1 else self._nesting
        values = self._fit.as_drawn(latents, nesting)
        program = poutine.condition(
            Simulate(self._fit.layouts["data"])(self._fit.model), data=values
        )
        if num > 1:
            program = pyro.plate(PARTICLES, num, dim=-1 - nesting)(program)
        with self._fit.noise(draws, Use.PREDICTIONS):
            return poutine.trace(program).get_trace(*self._args, **self._kwargs)


def _is_computed(name: str, site: Site, fit: GuideDraws) -> bool:
    return site["is_observed"] and is_delta(site) and name not in fit.latents


def _check_sizes(name: str, layout: Layout, site: Site) -> None:
    was = {plate.name: plate.size for plate in layout.plates}
    now = {plate.name: plate.size for plate in site["plates"]}
    for plate, size in was.items():
        if now.get(plate, size) != size:
            raise ValueError(
                f"predictions have {now[plate]} rows in plate {plate!r} of latent {name!r}, but "
                f"the fit that drew it has {size}: give the model as many"
            )
