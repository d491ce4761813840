"""One weight for all latent sites, or one for each."""

from collections.abc import Mapping

from pyproelbo._terms.terms import Terms
from pyproelbo.schedules import Schedule, as_schedule

PerSite = float | Schedule | Mapping[str, float | Schedule]


class SiteWeights:
    """The schedule that weights each KL.

    Args:
        name: what to call the weight in messages.
        weight: a number or a schedule for all sites, or a mapping from site names to them.
        default: the weight of sites that a mapping does not name.

    Raises:
        ValueError: for a constant that is not a finite number.
    """

    def __init__(self, name: str, weight: PerSite, default: float) -> None:
        self._name = name
        self._sites = {}
        if isinstance(weight, Mapping):
            self._sites = {site: f"{name}[{site!r}]" for site in weight}
            self.schedules = {
                self._sites[s]: as_schedule(w, self._sites[s]) for s, w in weight.items()
            }
            weight = default
        else:
            self.schedules = {}
        self.schedules[name] = as_schedule(weight, name)

    def labels(self, terms: Terms) -> dict[str, str]:
        """The key in ``schedules`` of each KL's weight.

        Raises:
            ValueError: for a site that does not exist, and for different weights of latents that
                share one KL.
        """
        if not self._sites:
            return dict.fromkeys(terms.kl, self._name)
        known = {name for key, latents in terms.groups.items() for name in (key, *latents)}
        if unknown := [site for site in self._sites if site not in known]:
            raise ValueError(
                f"{self._name} names site {unknown[0]!r}, but the latent sites are "
                f"{sorted(known)}: name one of those"
            )
        labels = {}
        for key, latents in terms.groups.items():
            named = [key] if key in self._sites else list(latents)
            choices = [self._sites.get(site, self._name) for site in named or [key]]
            if len({self.schedules[choice] for choice in choices}) > 1:
                raise ValueError(
                    f"sites {list(latents)} share one KL, that of {key!r} in the guide, "
                    f"and need one {self._name}: give all of them the same, or give it "
                    f"to {key!r}"
                )
            labels[key] = choices[0]
        return labels
