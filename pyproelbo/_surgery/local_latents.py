"""The latents of single data, and whether they have an aggregate posterior."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyro import poutine
from pyro.poutine.guide import GuideMessenger

from pyproelbo._distributions.marginals import is_factorised, is_normal, marginals
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.dependencies import DATA, parents
from pyproelbo._rows.plate import check_all_in_plate, check_densities, chosen, data_plate
from pyproelbo._rows.runs import Runs
from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.roles import is_enumerated
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.terms import Latent, Terms
from pyproelbo._terms.traces import Plate, Program, Traces


@dataclass(frozen=True)
class LocalLatents:
    """The latents of an aggregate posterior, and what is known about their distributions.

    Attributes:
        keys: as in ``Terms.latents``.
        given: likewise, for the latents that everything is conditional on.
        dim: the dim of the plate over the data, counted from the right.
        plate: the name of that plate.
        dims: a label for each dimension, such as "z[0]".
        is_mean_field: whether the guide draws none of them, nor of the given ones, given another.
        has_marginals: whether each dimension has a known distribution given x, and nothing else
            is given.
        has_factorised_prior: whether, in addition, the dimensions are independent in the prior.
        is_gaussian: whether all dimensions are independent and normal given x.
    """

    keys: tuple[str, ...]
    given: tuple[str, ...]
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
    given: str | Sequence[str] | None = None,
) -> LocalLatents:
    """Find out by running model and guide on one batch.

    Args:
        site: a latent, several, or None for all.
        plate: the plate over the data; None where only one qualifies.
        given: a latent, or several, on which those are conditional.

    Raises:
        ValueError: where the latents have no density q(z | x_n) for each datum that can be
            evaluated at any z, or no common prior for all data; the message gives the reason.
    """
    if isinstance(poutine.unwrap(guide), GuideMessenger):
        raise ValueError(
            "the density of a guide messenger at a given z is not available: write the guide as a "
            "function or a module"
        )
    traces = checked(lambda: Runs(model, guide, batch, seed=0).first, batch)
    Sites.of(traces).check_observed()
    terms = terms_of(traces)
    found, base = _chosen(terms, site, given)
    every = base | found
    data = data_plate({key: latent.plates for key, latent in every.items()}, plate, batch.size)
    check_all_in_plate(terms, data, batch.size)
    check_densities(every, data)

    posterior = parents(guide, batch.args, batch.kwargs)
    prior = parents(model, batch.args, batch.kwargs)
    for part, cure in (
        (base, "name those sites in given= as well"),
        (every, "choose those sites as well, or condition on them by given="),
    ):
        _check_posterior(part, posterior, cure)
        _check_prior(part, prior, cure, terms, batch.size)

    latents = list(every.values())
    names = {latent.name for latent in latents}
    sites = {name for key in every for name in terms.groups[key]}
    is_mean_field = not any(posterior[name] & names for name in names)
    known = [marginals(latent.q) for latent in latents]
    has_marginals = is_mean_field and not base and all(q is not None for q in known)
    has_independent_priors = not any(prior.get(name, set()) & sites for name in sites)
    return LocalLatents(
        keys=tuple(found),
        given=tuple(base),
        dim=data.dim,
        plate=data.name,
        dims=tuple(dim for key, latent in found.items() for dim in labels(key, latent, data)),
        is_mean_field=is_mean_field,
        has_marginals=has_marginals,
        has_factorised_prior=has_marginals
        and has_independent_priors
        and all(latent.p is not None and is_factorised(latent.p) for latent in latents),
        is_gaussian=has_marginals
        and all(is_factorised(z.q) and is_normal(q) for z, q in zip(latents, known, strict=True)),
    )


def _chosen(
    terms: Terms, site: str | Sequence[str] | None, given: str | Sequence[str] | None
) -> tuple[dict[str, Latent], dict[str, Latent]]:
    """The latents of the surgery, and those that everything is conditional on.

    Raises:
        ValueError: where no latent is left, and for a latent that is both.
    """
    base = {} if given is None else chosen(terms, given)
    found = chosen(terms, site)
    if site is None:
        found = {key: latent for key, latent in found.items() if key not in base}
    if not found or found.keys() & base.keys():
        raise ValueError(
            f"given names {_listed(base)}, which leaves no latent for the surgery, or is in site "
            "as well: let site and given name different latents"
        )
    return found, base


def _check_posterior(
    latents: Mapping[str, Latent], posterior: Mapping[str, set[str]], cure: str
) -> None:
    """Check that q(z | x) of the latents is known: none is drawn given another.

    Raises:
        ValueError: for a latent drawn given another.
    """
    names = {latent.name for latent in latents.values()}
    for key, latent in latents.items():
        if others := posterior[latent.name] - names - {DATA}:
            raise ValueError(
                f"the guide draws {key!r} given {_listed(others)}, and q({key} | x) by itself is "
                f"not known: {cure}"
            )


def _check_prior(
    latents: Mapping[str, Latent],
    prior: Mapping[str, set[str]],
    cure: str,
    terms: Terms,
    num_rows: int,
) -> None:
    """Check that p(z) of the latents is known, and the same for all data.

    Raises:
        ValueError: where it depends on the data, or on another latent.
    """
    sites = {name for key in latents for name in terms.groups[key]}
    for name in sites & set(prior):
        if num_rows > 1 and DATA in prior[name]:
            raise ValueError(
                f"the prior of {name!r} depends on the data: there is no single p(z) to compare "
                "the aggregate posterior with"
            )
        if others := prior[name] - sites - {DATA}:
            raise ValueError(
                f"the model draws {name!r} given {_listed(others)}, and p({name}) by itself is not "
                f"known: {cure}"
            )


def checked(run: Callable[[], Traces], batch: Batch) -> Traces:
    """The traces of a run of both on a batch.

    Raises:
        ValueError: for a guide that enumerates, and for NaN that the programs do not accept.
    """
    try:
        traces = run()
    except ValueError as error:
        if batch.has_nan():
            raise ValueError(
                f"data hold NaN in rows {batch.start} to {batch.start + batch.size - 1}, which the "
                "model or the guide does not accept: remove or fill in those rows"
            ) from error
        raise
    if any(is_enumerated(site) for site in traces.guide_sites.values()):
        raise ValueError(
            "the guide enumerates its discrete latents, but an aggregate posterior needs samples: "
            "remove config_enumerate or infer={'enumerate': ...} from the guide"
        )
    return traces


def labels(key: str, latent: Latent, plate: Plate) -> list[str]:
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
