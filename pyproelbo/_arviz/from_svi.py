"""A fit in ArviZ's groups, as an ``xarray.DataTree``."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pyro
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyproelbo._arviz.by_level import LevelPosterior, by_level
from pyproelbo._arviz.corrected import Correction, check_enough, common_plate
from pyproelbo._arviz.fit import ByGroup, GuideDraws
from pyproelbo._arviz.predictions import Predictions
from pyproelbo._arviz.repaired import check_repaired, posterior_of
from pyproelbo._arviz.variables import Columns, Labels, dataset, variables_of
from pyproelbo._backend import rng
from pyproelbo._evidence.linear_response import LinearResponse, check_response
from pyproelbo._evidence.pareto import LEAST
from pyproelbo._evidence.repair_result import Repair
from pyproelbo._messages.arguments import check_counts, check_seed
from pyproelbo._messages.warn import warn
from pyproelbo._rows.dependencies import ignores_data
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.passes import UnfinishedWarning, bar
from pyproelbo._rows.runs import in_chunks
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray

GroupName = Literal[
    "posterior",
    "log_likelihood",
    "log_prior",
    "log_q",
    "sample_stats",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
]
GROUPS: tuple[GroupName, ...] = get_args(GroupName)


class SkippedWarning(UserWarning):
    """A group could not be made, and is left out; the message gives the reason."""


_NATS = ("log_likelihood", "log_prior", "log_q", "sample_stats")
_LAYOUTS = {"prior": "posterior", "posterior_predictive": "data", "prior_predictive": "data"}
_ELEMENTS = 2**22  # numbers drawn at once


def from_svi(
    model: Program,
    guide: Program,
    args: tuple = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    num_samples: int = 1000,
    groups: Collection[GroupName] = GROUPS,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, ArrayLike] | None = None,
    time: str | None = "time",
    constant_data: Mapping[str, ArrayLike | Tensor] | None = None,
    elbo_trace: ArrayLike | None = None,
    predictions: tuple | Mapping[str, object] | None = None,
    corrected: bool = False,
    linear_response: LinearResponse | None = None,
    repaired: Repair | None = None,
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> "xarray.DataTree":
    r"""A fit in ArviZ's groups: an ``xarray.DataTree``.

    ``posterior``
        z ~ q(z | x): the model's latents and what it computes as ``pyro.deterministic``.
    ``log_likelihood``
        log p(x | z) of each observed site by elements of its plates; NaN where masked. A discrete
        latent that the model enumerates is summed out.
    ``log_prior``, ``log_q``
        log p(z) of each latent, log q of each site of the guide, including auxiliary ones, which
        carry the joint density of AutoGuides.
    ``sample_stats``
        ``lp`` = log p(x, z), ``log_q`` = log q(z | x), and ``log_weight`` = lp - log_q, whose mean
        is the ELBO; ``log_factor``, the part of lp that ``pyro.factor`` adds, if any.
    ``posterior_predictive``, ``prior``, ``prior_predictive``
        x ~ p(x | z) at the posterior's draws; z and x from the model only.
    ``predictions``
        x, and what the model computes as ``pyro.deterministic``, at the new arguments of the model
        that ``predictions`` holds.
    ``observed_data``, ``constant_data``, ``elbo_trace``
        x; what ``constant_data`` holds; ``elbo`` by training step.

    Log-densities are in nats and float64. The dims are "chain" (of length one), "draw", the plates
    by name, then the dims of an event. Sites ``z_0``, ``z_1``, ... of a loop are one variable ``z``
    with a further dim, after the plates, named after the ``pyro.plate`` that the loop runs over, or
    ``time``; likewise the first dim of a whole sequence (:mod:`pyproelbo.sequences`).

    Several draws are made at once, as vectorised particles, only if each has the numbers that it
    has on its own: two draws are tried. Discrete latents that the guide enumerates are drawn from
    it, those that the model enumerates from their posterior given the others, by
    ``pyro.infer.infer_discrete``. Modules are evaluated in eval mode; their mode, Pyro's parameter
    store and torch's generators are restored. Nothing drawn is lost: Ctrl-C returns it, with an
    :class:`~pyproelbo.UnfinishedWarning`; an error has it as its attribute ``from_svi``.

    The tree has the attribute ``is_amortised``: whether the guide computes its posterior from the
    arguments that it is called with.

    ArviZ 1 takes the result as it is; for ArviZ 0.23 convert it by ``arviz.from_datatree``.

    Args:
        model: a Pyro program.
        guide: its fitted guide.
        args: the arguments of both: all data, not a minibatch.
        kwargs: likewise.
        num_samples: S, the number of draws from the posterior, and from the prior.
        groups: the groups to make. A group takes S times the memory of one value of its variables:
            for large data leave out those that are not needed, predictive ones first.
        dims: names for the dims of a variable's events, which are those other than draws, plates
            and time; for ``constant_data`` all dims. By default ``z_dim_0`` and so on.
        coords: labels for the elements of a dim.
        time: the name of the dim of steps; None to keep every site a variable.
        constant_data: tensors or arrays by name, such as covariates.
        predictions: arguments of the model, a tuple or a mapping of keyword arguments, such as new
            covariates, without the data: ``(X_new,)`` for ``model(X, y=None)``. Latents shared by
            all data keep the posterior's draws; those in all plates of the data, which belong to
            single data, are drawn by the model. ``coords`` of those plates refer to the data of the
            fit.
        elbo_trace: the ELBO of each training step, minus the losses of ``SVI.step``.
        corrected: whether to correct the draws to the posterior: they are resampled by their
            smoothed weights p(x, z) / q(z | x), row by row where all is in one plate, and level by
            level (as in :func:`evidence`) where a program has both global latents and latents of
            single data; 20 draws are then made of the latter for each draw. Predictions use these
            draws. ``sample_stats`` has "lp" and "log_q" at them, and the attributes "corrected" and
            the largest "khat", but no weights. Where k-hat is large the draws are unreliable, and a
            :class:`~pyproelbo.CorrectionWarning` is given.
        linear_response: the result of :func:`linear_response` for the same fit: its means, sds and
            covariances become the group "linear_response". The draws are still from q.
        repaired: the result of :func:`repair` for these programs and all of these data: the draws
            are then its first ``num_samples``, row by row. ``sample_stats`` has "lp" and "log_q" at
            them, and the attributes "corrected" and the largest "khat".
        chunk: the largest number of draws made at once: memory beyond the result grows with it. By
            default as many as make about four million numbers.
        seed: of the draws. The result depends on it, but not on ``chunk`` or the state of random
            number generators, except for latents that the model enumerates and for distributions
            that can only be drawn for all draws at once.
        progress: whether to show a progress bar, on a terminal.

    Raises:
        ValueError: for subsampled plates and scaled densities, which do not represent all data; for
            latents that the guide lacks; for sites that differ between draws; for names and
            coordinates that do not match.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> ppca = PPCA(num_latents=2, num_features=5)
    >>> tree = from_svi(ppca, Exact(ppca), (torch.randn(20, 5),), dims={"x": ["feature"]})
    >>> tree.posterior_predictive.x.dims
    ('chain', 'draw', 'data', 'feature')
    """
    import xarray

    _check(args, num_samples, groups, chunk, seed)
    check_response(linear_response)
    check_repaired(repaired, num_samples, corrected)
    with evaluating(model, guide, seed=seed):
        fit = GuideDraws(model, guide, args, dict(kwargs or {}), seed)
        amortised = not ignores_data(guide, args, dict(kwargs or {}))
        parts = list(in_chunks(num_samples, fit.at_once(chunk, num_samples, _ELEMENTS), 1))
        new = None if predictions is None else Predictions(fit, *_called_with(predictions))
        rng.begin(seed)  # for random numbers that RowNoise does not provide
        columns = _columns(fit, groups, time, num_samples, new is not None, corrected)
        if new is not None:
            columns["predictions"] = Columns(variables_of(new.layouts, time), num_samples)
        observed = Columns(variables_of(fit.layouts["data"], time), 1)
        observed.put(0, {name: value[None] for name, value in fit.data().items()})
        tree = partial(
            _tree,
            observed=observed,
            groups=groups,
            labels=Labels.of(dims or {}, coords or {}),
            new_rows=() if new is None else new.rows,
            constant_data=constant_data or {},
            elbo_trace=elbo_trace,
            amortised=amortised,
        )
        correction, draw, khat = None, fit.draw, None
        if corrected:
            check_enough(num_samples)
            fit.check_weighable()
            levels = None if common_plate(columns) else fit.levels()
            if levels is None:
                correction = Correction(seed)
            else:
                posterior = by_level(levels, num_samples, seed, progress)
                draw, khat = partial(_draw_at, fit, posterior), posterior.khat
        if repaired is not None:
            posterior = posterior_of(repaired, fit, num_samples)
            draw, khat = partial(_draw_at, fit, posterior), posterior.khat
        chunks = partial(bar, parts, progress=progress)
        try:
            _fill(fit, draw, new, columns, chunks, correction, skips=set(groups) == set(GROUPS))
        except KeyboardInterrupt:
            if not (finished := _finished(columns, correction)):
                raise
            draws = ", ".join(f"{part.num_filled} of {n}" for n, part in finished.items())
            warn(f"interrupted: there are these draws and no others: {draws}", UnfinishedWarning)
            columns = finished
        except Exception as error:
            if finished := _finished(columns, correction):
                error.from_svi = tree(finished)  # type: ignore[attr-defined]
                error.add_note("the attribute `from_svi` of this error has the draws before")
            raise
    found = tree(columns)
    if linear_response is not None:
        found["linear_response"] = xarray.DataTree(linear_response.to_xarray())
    if khat is None and correction is not None:
        khat = correction.khat
    if khat is not None and "sample_stats" in found:
        found["sample_stats"].attrs |= {"corrected": 1, "khat": khat}
    return found


def _finished(columns: Mapping[str, Columns], correction: Correction | None) -> dict[str, Columns]:
    """The groups that have draws; those of the posterior have equally many, at the same z.

    If they should be corrected and are too few for that, there are none.
    """
    of_posterior = [part for group, part in columns.items() if group in ("posterior", *_NATS)]
    num = min((part.num_filled for part in of_posterior), default=0)
    for part in of_posterior:
        part.cut(num)
    for part in columns.values():
        part.cut(part.num_filled)
    if correction is not None and not correction.is_done:
        if num < LEAST:
            return {}
        correction(columns)
    return {group: part for group, part in columns.items() if part.num_filled}


def _tree(
    columns: Mapping[str, Columns],
    observed: Columns,
    groups: Collection[str],
    labels: Labels,
    new_rows: Iterable[str],
    constant_data: Mapping[str, ArrayLike | Tensor],
    elbo_trace: ArrayLike | None,
    amortised: bool,
) -> "xarray.DataTree":
    """The requested groups, and "predictions" where they are in the columns."""
    import xarray

    arrays = {
        group: [
            (labels.without(new_rows) if group == "predictions" else labels).drawn(
                v, part.values[v.name]
            )
            for v in part.variables
        ]
        for group, part in columns.items()
        if group in (*groups, "predictions")
    }
    if "observed_data" in groups:
        arrays["observed_data"] = [
            labels.fixed(v, observed.values[v.name][0]) for v in observed.variables
        ]
    arrays["constant_data"] = [labels.constant(n, v) for n, v in constant_data.items()]
    if elbo_trace is not None:
        arrays["elbo_trace"] = [labels.array("elbo", _trace(elbo_trace), ("step",))]
    labels.check(arrays)

    attrs = _attributes()
    tree = xarray.DataTree.from_dict(
        {group: dataset(part, attrs) for group, part in arrays.items() if part}
    )
    tree.attrs = attrs | {"is_amortised": int(amortised)}
    return tree


def _columns(
    fit: GuideDraws,
    groups: Collection[str],
    time: str | None,
    num_samples: int,
    predicts: bool,
    corrects: bool,
) -> dict[str, Columns]:
    """Room for the draws of the groups that have any, and for the posterior if others need it."""
    wanted = set(groups)
    if predicts or "posterior_predictive" in wanted:
        wanted.add("posterior")
    if corrects:
        wanted |= {"posterior", *_NATS}
    columns = {}
    for group in GROUPS:
        if group in wanted and group != "observed_data":
            layouts = fit.layouts[_LAYOUTS.get(group, group)]
            dtype = torch.float64 if group in _NATS else None
            columns[group] = Columns(variables_of(layouts, time), num_samples, dtype)
    return columns


def _draw_at(fit: GuideDraws, posterior: LevelPosterior, draws: range) -> ByGroup:
    return fit.at(posterior.at(draws), len(draws))


def _fill(
    fit: GuideDraws,
    draw: Callable[[range], ByGroup],
    predictions: Predictions | None,
    columns: dict[str, Columns],
    chunks: Callable[[str], Iterable[range]],
    correction: Correction | None,
    skips: bool,
) -> None:
    """Draw the posterior, then the predictions at it, then the prior: each from its own numbers.

    The posterior's draws are therefore the same whatever else is requested.

    Args:
        draw: the posterior's draws with given indices.
        skips: whether to leave out the prior where the model cannot draw it.
    """
    of_posterior = [group for group in ("posterior", *_NATS) if group in columns]
    if of_posterior:
        for numbers in chunks("posterior"):
            draws = draw(numbers)
            for group in of_posterior:
                columns[group].put(numbers.start, draws[group])
    if correction is not None:
        correction(columns)

    def latents(numbers: range) -> dict[str, Tensor]:
        values = columns["posterior"].by_site
        return {name: values[name][numbers.start : numbers.stop] for name in fit.latents}

    if "posterior_predictive" in columns:
        for numbers in chunks("posterior predictive"):
            drawn = fit.simulate(numbers, latents(numbers))["data"]
            columns["posterior_predictive"].put(numbers.start, drawn)
    if predictions is not None:
        for numbers in chunks("predictions"):
            drawn = predictions.draw(numbers, latents(numbers))
            columns["predictions"].put(numbers.start, drawn)
    of_prior = {"prior": "posterior", "prior_predictive": "data"}
    of_prior = {group: part for group, part in of_prior.items() if group in columns}
    if not of_prior:
        return
    try:
        for numbers in chunks("prior"):
            draws = fit.simulate(numbers)
            for group, part in of_prior.items():
                columns[group].put(numbers.start, draws[part])
    except (ValueError, RuntimeError, NotImplementedError) as error:
        if not skips:
            raise
        for group in of_prior:
            del columns[group]
        warn(
            f"the groups {', '.join(of_prior)} are left out, since the model cannot make all of "
            f"their draws: {str(error).partition(chr(10))[0]}. Where draws of the prior are not "
            "valid parameters, give it a valid support; or name the groups in groups=",
            SkippedWarning,
        )


def _called_with(arguments: tuple | Mapping[str, object]) -> tuple[tuple, dict[str, object]]:
    if isinstance(arguments, Mapping):
        return (), dict(arguments)
    if not isinstance(arguments, tuple):
        raise ValueError(
            "predictions should be a tuple of the model's arguments, or a mapping of keyword "
            f"arguments, got {type(arguments).__name__}: pass (X,) for a single one"
        )
    return arguments, {}


def _attributes() -> dict[str, str]:
    return {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "pyproelbo",
        "creation_library_version": version("pyproelbo"),
        "creation_library_language": "Python",
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
    }


def _trace(elbo_trace: ArrayLike) -> np.ndarray:
    values = np.asarray(elbo_trace, dtype=float)
    if values.ndim != 1:
        raise ValueError(
            "elbo_trace should be a sequence of numbers, one for each training step, got shape "
            f"{values.shape}"
        )
    return values


def _check(
    args: object, num_samples: object, groups: Collection[str], chunk: object, seed: object
) -> None:
    if not isinstance(args, tuple):
        raise ValueError(
            "args should be a tuple, the arguments of model and guide, got "
            f"{type(args).__name__}: pass (x,) for a single one"
        )
    check_counts(num_samples=num_samples, chunk=1 if chunk is None else chunk)
    if isinstance(groups, str) or not groups or set(groups) - set(GROUPS):
        raise ValueError(f"groups should name some of {list(GROUPS)}, got {groups!r}")
    check_seed(seed)
