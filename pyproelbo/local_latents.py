"""The latents of which every datum has its own, and whether they have an aggregate posterior."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from torch.distributions import Normal

from pyproelbo.batches import Batch
from pyproelbo.collect import terms_of
from pyproelbo.data_plate import check_all_in_plate, check_densities, chosen, data_plate
from pyproelbo.dependencies import DATA, parents
from pyproelbo.marginals import is_factorised, marginals
from pyproelbo.terms import Latent
from pyproelbo.traces import Plate, Program, Traces, run


@dataclass(frozen=True)
class LocalLatents:
    """Which latents an aggregate posterior is of, and what is known of their distributions.

    Attributes:
        keys: those of ``Terms.latents``.
        dim: that of the plate over the data, counted from the right.
        plate: the name of that plate.
        dims: a label for each dimension, such as "z[0]".
        is_mean_field: whether the guide draws none of them given another.
        has_marginals: whether each dimension has a known distribution given x.
        has_factorised_prior: whether, in addition, the dimensions are independent in the prior.
        is_gaussian: whether all dimensions are independent and normal given x.
    """

    keys: tuple[str, ...]
    dim: int
    plate: str
    dims: tuple[str, ...]
    is_mean_field: bool
    has_marginals: bool
    has_factorised_prior: bool
    is_gaussian: bool


def local_latents(
    model: Program,
    guide: Program,
    batch: Batch,
    site: str | Sequence[str] | None = None,
    plate: str | None = None,
) -> LocalLatents:
    """Find out by running model and guide on one batch.

    Args:
        site: a latent, several, or None for all.
        plate: the plate over the data; None where there is only one that it can be.

    Raises:
        ValueError: where the latents have no density q(z | x_n) for each datum that can be
            evaluated at any z, or no prior that is the same for all data; the message says why.
    """
    if isinstance(poutine.unwrap(guide), GuideMessenger):
        raise ValueError(
            "the density of a guide messenger at a given z is not to be had: write the guide as a "
            "function or a module"
        )
    terms = terms_of(run_once(model, guide, batch))
    found = chosen(terms, site)
    data = data_plate({key: latent.plates for key, latent in found.items()}, plate, batch.size)
    check_all_in_plate(terms, data, batch.size)
    check_densities(found, data, terms)

    keys, latents = tuple(found), list(found.values())
    names = {latent.name for latent in latents}
    given = parents(guide, batch.args, batch.kwargs)
    for key, latent in found.items():
        if others := given[latent.name] - names - {DATA}:
            raise ValueError(
                f"the guide draws {key!r} given {_listed(others)}, so that q({key} | x) by itself "
                "is not known: choose those sites as well"
            )
    sites = {name for key in keys for name in terms.groups[key]}
    prior_given = parents(model, batch.args, batch.kwargs)
    for name in sites & set(prior_given):
        if batch.size > 1 and DATA in prior_given[name]:
            raise ValueError(
                f"the prior of {name!r} depends on the data: there is no one p(z) to hold the "
                "aggregate posterior against"
            )
        if others := prior_given[name] - sites - {DATA}:
            raise ValueError(
                f"the model draws {name!r} given {_listed(others)}, so that p({name}) by itself "
                "is not known: choose those sites as well"
            )

    is_mean_field = not any(given[name] & names for name in names)
    has_marginals = is_mean_field and all(marginals(latent.q) is not None for latent in latents)
    return LocalLatents(
        keys,
        data.dim,
        data.name,
        tuple(dim for key, latent in found.items() for dim in _labels(key, latent, data)),
        is_mean_field,
        has_marginals,
        has_marginals
        and not any(prior_given.get(name, set()) & sites for name in sites)
        and all(latent.p is not None and is_factorised(latent.p) for latent in latents),
        has_marginals
        and all(is_factorised(z.q) and isinstance(marginals(z.q), Normal) for z in latents),
    )


def run_once(model: Program, guide: Program, batch: Batch) -> Traces:
    """One run of both on a batch.

    Raises:
        ValueError: for a guide that enumerates, and for NaN that the programs do not take.
    """
    try:
        runs = run(model, guide, batch.args, batch.kwargs)
    except ValueError as error:
        if batch.has_nan():
            raise ValueError(
                f"data hold NaN in rows {batch.start} to {batch.start + batch.size - 1}, which the "
                "model or the guide does not take: remove or fill in those rows"
            ) from error
        raise
    marks = (mark for site in runs[0].guide_sites.values() for mark in site["infer"])
    if len(runs) > 1 or "_enumerate_dim" in marks:
        raise ValueError(
            "the guide enumerates its discrete latents, but an aggregate posterior is of samples: "
            "take config_enumerate or infer={'enumerate': ...} off the guide"
        )
    return runs[0]


def _labels(key: str, latent: Latent, plate: Plate) -> list[str]:
    """z for a scalar, z[0], z[1] ... for a vector, z[0,0] ... for inner plates or a matrix."""
    shape = list(latent.value.shape)
    del shape[latent.value.dim() + plate.dim - len(latent.q.event_shape)]
    if not shape:
        return [key]
    labels = [""]
    for size in shape:
        labels = [f"{label},{i}" for label in labels for i in range(size)]
    return [f"{key}[{label[1:]}]" for label in labels]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
