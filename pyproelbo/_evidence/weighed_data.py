"""The data whose log-likelihoods can have weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.traces import PARTICLES, Plate, Traces


class WeighedData(NamedTuple):
    """Data by the elements of one plate, or of several.

    Attributes:
        keys: the log-likelihoods, and factors, by the names of their sites.
        plates: from the left.
    """

    keys: tuple[str, ...]
    plates: tuple[Plate, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the plates; (0,) where there are no data."""
        return tuple(plate.size for plate in self.plates) or (0,)

    def log_likelihood(self, traces: Traces) -> Tensor:
        """The log-likelihood of each datum, summed over the draws of a run, in nats: (N,)."""
        values = _by_key(traces)
        found = [_over_others(values[key], self.plates).flatten() for key in self.keys]
        return sum(found[1:], found[0])


def weighed_data(
    first: Traces, observed: str | Sequence[str] | None, plate: str | Sequence[str] | None
) -> WeighedData:
    """The data of the named observed sites, None for all of them, () for none.

    Args:
        plate: one of the plates that they share, or several; by default all.

    Raises:
        ValueError: for an unknown name, and for sites that share no plate.
    """
    values, terms = _by_key(first), terms_of(first, "sampled")
    keys = _chosen(values, list(terms.log_likelihood), observed)
    if not keys:
        if observed is None:
            raise ValueError(
                "the model should have data, by whose weights to differentiate, but observes "
                "none: name a factor that represents them by observed=, or leave them out by "
                "observed=()"
            )
        return WeighedData((), ())
    sites = [name for key in keys for name in key.split("+")]
    of_site = {n: {p.name: p for p in terms.plates[n] if p.name != PARTICLES} for n in sites}
    shared = set.intersection(*map(set, of_site.values()))
    names = sorted(shared) if plate is None else [plate] if isinstance(plate, str) else plate
    for name in names:
        if name not in shared:
            raise ValueError(
                f"plate names {name!r}, but the observed sites {sites} share {sorted(shared)}"
            )
    if not names:
        raise ValueError(
            f"the observed sites {sites} share no plate, and there is no datum to weight: put "
            "their data into a pyro.plate, name sites that share one by observed=, or leave the "
            "data out by observed=()"
        )
    plates = sorted({of_site[sites[0]][name] for name in names}, key=lambda plate: plate.dim)
    for key in keys:
        _check_dims(key, values[key], plates)
    return WeighedData(tuple(keys), tuple(plates))


def _by_key(traces: Traces) -> Mapping[str, Tensor]:
    terms = terms_of(traces, "sampled")
    return {**terms.log_likelihood, **terms.factors}


def _chosen(
    values: Iterable[str], data: list[str], observed: str | Sequence[str] | None
) -> list[str]:
    """The keys of the named sites."""
    if observed is None:
        return data
    names = [observed] if isinstance(observed, str) else list(observed)
    key_of = {name: key for key in values for name in key.split("+")}
    for name in names:
        if name not in key_of:
            raise ValueError(
                f"observed names {name!r}, but the observed sites are {sorted(key_of)}: name one "
                "of those"
            )
    keys = list(dict.fromkeys(key_of[name] for name in names))
    together = {name for key in keys for name in key.split("+")}
    if together != set(names):
        raise ValueError(
            f"observed names {names}, but the model sums out a latent of {sorted(together)} "
            "together: name all of these"
        )
    return keys


def _check_dims(key: str, value: Tensor, plates: Sequence[Plate]) -> None:
    for plate in plates:
        if value.dim() < -plate.dim or value.shape[plate.dim] != plate.size:
            raise ValueError(
                f"the log-likelihood of {key!r} is one number for all of plate {plate.name!r}, as "
                "a latent outside it is summed out: there is none for each datum. Leave the data "
                "out by observed=()"
            )


def _over_others(value: Tensor, plates: Sequence[Plate]) -> Tensor:
    """The sum over all dims except those of the plates."""
    kept = {value.dim() + plate.dim for plate in plates}
    others = [dim for dim in range(value.dim()) if dim not in kept]
    return value.sum(others) if others else value
