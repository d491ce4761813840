"""The sites of two traces by their role in the ELBO."""

from typing import NamedTuple

from pyproelbo._backend.pyro_private import site_is_factor
from pyproelbo._terms.masks import counts_nowhere
from pyproelbo._terms.roles import is_data, is_delta, is_enumerated
from pyproelbo._terms.traces import Site, Traces

Names = tuple[str, ...]


class Sites(NamedTuple):
    """The sites of two traces by role; sites that add nothing (deterministic ones) are gone."""

    data: dict[str, Site]
    factors: dict[str, Site]
    latents: dict[str, Site]  # of the model, in the model's order
    enumerated: dict[str, Site]  # latents that the model sums out by itself
    guide: dict[str, Site]  # latents and auxiliary sites, in the guide's order
    observed: dict[str, Site]  # what the guide observes

    @classmethod
    def of(cls, traces: Traces) -> "Sites":
        guide = {n: s for n, s in traces.guide_sites.items() if not _is_deterministic(s)}
        observed = {n: s for n, s in guide.items() if is_data(s)}
        guide = {n: s for n, s in guide.items() if n not in observed}
        sites = cls({}, {}, {}, {}, guide, observed)
        for name, site in traces.model_sites.items():
            if site["is_observed"]:
                if site_is_factor(site) or (is_delta(site) and not counts_nowhere(site)):
                    sites.factors[name] = site  # a Delta's log-density, as some reparam's leave
                elif not _is_deterministic(site):
                    sites.data[name] = site
            elif name in guide:
                sites.latents[name] = site
            elif is_enumerated(site):
                sites.enumerated[name] = site
            elif not counts_nowhere(site):
                raise ValueError(
                    f"the model samples {name!r}, but the guide has no such site: sample it in "
                    "the guide, observe it, or, if it is discrete, enumerate it with "
                    "infer={'enumerate': 'parallel'}"
                )
        return sites

    def check_observed(self) -> None:
        """Check that what the guide observes is data of the model, not a latent.

        Raises:
            ValueError: where it is not, for example if model and guide are swapped.
        """
        for name in self.observed:
            if name in self.data or (name not in self.latents and (self.data or self.factors)):
                continue
            does = "draws" if name in self.latents else "does not have, as it has no data at all"
            raise ValueError(
                f"the guide observes {name!r}, which the model {does}: are model and guide "
                "swapped? What is observed belongs to the model"
            )


def _is_deterministic(site: Site) -> bool:
    """Whether this is a value put into the trace, as by pyro.deterministic."""
    return site["is_observed"] and counts_nowhere(site)
