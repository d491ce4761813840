"""Which term of which site makes the gradient noisy, by estimator."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyproelbo._backend import rng
from pyproelbo._backend.rng import seed_of
from pyproelbo._diagnostics.gradient_moments import Gathered, Moments, Parameters, gathered
from pyproelbo._diagnostics.gradient_report import GradientNoise
from pyproelbo._diagnostics.gradient_rows import batches_without_end, rows_are_random
from pyproelbo._diagnostics.gradient_terms import (
    ELBOPieces,
    GradientTerm,
    Objective,
    ObjectivePieces,
    Source,
)
from pyproelbo._diagnostics.program_parameters import parameters_by_program
from pyproelbo._messages.arguments import check_counts, check_shared
from pyproelbo._rows.batches import Arguments, Batch, ReportData
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.passes import bar, by_part
from pyproelbo._rows.several import OneSubsample
from pyproelbo._terms.traces import Program

_LEAST = 20  # draws
_ROUNDING = 1e-13  # relative to what has been added up


def gradient_noise(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    objective: Objective | Mapping[str, Objective] | None = None,
    num_samples: int = 100,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> GradientNoise:
    """Which term of which site makes the gradient noisy (see :class:`GradientNoise`).

    The gradient is that of a training step at the current parameters, with one draw of the guide
    and in eval mode. By default it is the gradient of the ELBO, by the estimators

    - "auto": each KL in closed form where one is valid (``kl="auto"`` of objectives);
    - "sampled": log q - log p at the draw, as in Pyro's ``Trace_ELBO``;
    - "path": likewise, without the gradient of log q in q's own parameters, which is 0 on average
      (Roeder, Wu & Duvenaud 2017, "Sticking the Landing");
    - "score": the score function of all draws, even where these have gradients (Ranganath, Gerrish
      & Blei 2014, "Black Box Variational Inference"). Draws without gradients use it in all
      estimators.

    "auto" is left out where no KL has a closed form; "score" where no draw has a gradient, "path"
    where some draw has none; both where the guide enumerates, and for flows without an inverse,
    whose density is known only at their own draws. All use the same draws.

    Args:
        model, guide, arguments, progress: as in :func:`evidence`. Parameters are those that SVI
            trains; parameters of modules that a program calls without ``pyro.module`` are not
            included.
        data: as there, but given at once. Each gradient uses all of them, or a minibatch.
        objective: a :class:`TermsELBO` whose own gradient is analysed instead, with as many draws
            as it has particles, or several by name, side by side. A term's gradient is then
            multiplied by the derivative of the objective with respect to the term. What goes
            through the draws themselves, as a path gradient does, is "rest". The value of
            baselines, for example, shows in ``{"without": BetaELBO(num_particles=2,
            baselines="none"), "with": BetaELBO(num_particles=2)}``.
        num_samples: the number of independent gradients, at least 20.
        batch_size: rows of a random minibatch for each gradient, which is scaled by the plate; None
            for all data. Where a plate subsamples, its rows are random too. Two gradients are then
            taken at the same rows, which separates the noise of the rows from that of the draws.
        seed: for draws and rows.

    Memory: 22 gradients of each term, in float64. Ctrl-C leaves the report of the gradients that
        are finished.

    Raises:
        ValueError: for programs without parameters, for data that are given in several batches, for
            minibatches of a program with global latents whose plate does not give the number of all
            data, for a gradient that is not finite, and for programs whose sites change.

    >>> import torch
    >>> from pyproelbo.guides.ppca import Diagonal
    >>> from pyproelbo.models.ppca import PPCA
    >>> found = gradient_noise(PPCA(1, 3), Diagonal(1, 3), torch.randn(50, 3), progress=False)
    >>> found.estimators
    ('auto', 'sampled', 'path', 'score')
    >>> found.to_xarray().noise.sel(parameters="guide", term="total").dims
    ('estimator',)
    """
    check_counts(_LEAST, num_samples=num_samples)
    check_counts(batch_size=1 if batch_size is None else batch_size)
    check_shared(None, seed, arguments)
    objectives = _objectives(objective)
    batches = batches_without_end(model, guide, data, batch_size, arguments, seed)
    first = next(batches)
    with evaluating(model, guide, seed=seed), torch.enable_grad():
        groups = parameters_by_program(model, guide, first)
        parameters = Parameters(
            tuple(groups),
            [x for group in groups.values() for x in group],
            [sum(x.numel() for x in group) for group in groups.values()],
        )
        is_random = rows_are_random(model, guide, first, batch_size)
        source: Source = (
            ELBOPieces(model, guide, first)
            if objectives is None
            else ObjectivePieces(model, guide, objectives)
        )
        repeats = 2 if is_random else 1

        def of_next(state: _State | None, i: int) -> _State:
            return _after(state, i, next(batches), source, parameters, repeats, seed)

        def result(state: _State, _: bool) -> GradientNoise:
            return _result(state, source, parameters, is_random, batch_size)

        draws = bar(range(num_samples), "gradient noise", progress)
        return by_part(draws, of_next, result, "gradient_noise", _so_far, _is_enough)


class _State(NamedTuple):
    """What is known so far.

    Attributes:
        names: of the scalars.
        sums: as ``sums`` of the pieces, from the first draw.
    """

    names: tuple[str, ...]
    sums: dict[str, dict[GradientTerm, tuple[str, ...]]]
    gathered: Gathered | None


def _so_far(i: int) -> str:
    return f"{i + 1} gradients"


def _is_enough(state: _State) -> bool:
    return state.gathered is not None and state.gathered.num > 2


def _after(
    state: _State | None,
    i: int,
    batch: Batch,
    source: Source,
    parameters: Parameters,
    repeats: int,
    seed: int,
) -> _State:
    """What is known after the gradients at one more batch."""
    draws, one = list[Tensor](), OneSubsample()
    for k in range(repeats):
        rng.begin(seed_of(seed, i, k))
        with one:
            if repeats > 1 and not k:
                source.draw(batch)  # once: all estimators find the same rows
                rng.begin(seed_of(seed, i, k))
            scalars, sums = source(batch)
        state = state or _State(tuple(scalars), sums, None)
        if tuple(scalars) != state.names:
            changed = sorted({*scalars} ^ {*state.names})
            raise ValueError(
                "model and guide should have the same sites in each run for gradients to be "
                f"compared, but some runs have {changed}, and others do not"
            )
        draws.append(parameters.gradients(list(scalars.values())))
    assert state is not None
    return state._replace(gathered=gathered(state.gathered, draws, parameters))


def _objectives(
    objective: Objective | Mapping[str, Objective] | None,
) -> dict[str, Objective] | None:
    """The objectives by name; None for the ELBO.

    Raises:
        ValueError: for anything that is not an objective.
    """
    if objective is None:
        return None
    named = objective if isinstance(objective, Mapping) else {type(objective).__name__: objective}
    for name, each in named.items():
        if not (isinstance(name, str) and isinstance(each, Objective)):
            raise ValueError(
                "objective should be a TermsELBO, such as BetaELBO(), or several by name, got "
                f"{type(each).__name__}: Pyro's Trace_ELBO is BetaELBO(kl='sampled')"
            )
    if not named:
        raise ValueError("objective should name at least one TermsELBO, got none")
    return dict(named)


def _result(
    state: _State,
    source: Source,
    parameters: Parameters,
    is_random: bool,
    batch_size: int | None,
) -> GradientNoise:
    assert state.gathered is not None
    moments, without = state.gathered.moments(parameters)
    _check_finite(moments, state.names)
    sums = {name: _kept(rows, state.names, moments) for name, rows in state.sums.items()}
    terms = _in_order(sums.values())
    estimators = tuple(sums)
    baseline = estimators[0]
    coefficients = np.full((len(sums), len(terms) + 1, len(state.names)), 0.0)
    present = np.zeros((len(sums), 1, len(terms) + 1), dtype=bool)
    present[:, :, -1] = True
    for e, rows in enumerate(sums.values()):
        for term, names in rows.items():
            t = terms.index(term)
            present[e, 0, t] = True
            coefficients[e, t, [state.names.index(name) for name in names]] = 1.0
            if term.within is None:
                coefficients[e, -1] += coefficients[e, t]

    found = _numbers(moments, coefficients, present)
    left = [_numbers(each, coefficients, present) for each in without]
    errors = {name: _jackknife([each[name] for each in left], x) for name, x in found.items()}
    is_lost = (found["signal"] < 0) & (found["noise"] > 0)
    errors["snr"] = torch.where(is_lost, torch.nan, errors["snr"])
    of_rows = (found["of_rows"], errors["of_rows"]) if is_random else (None, None)
    return GradientNoise(
        estimators=estimators,
        parameters=(*parameters.names, "all"),
        terms=(*((term.kind, term.site) for term in terms), ("total", "")),
        within=(*(term.within for term in terms), None),
        signal=found["signal"],
        noise=found["noise"],
        snr=found["snr"],
        share=found["share"],
        of_rows=of_rows[0],
        signal_stderr=errors["signal"],
        noise_stderr=errors["noise"],
        snr_stderr=errors["snr"],
        share_stderr=errors["share"],
        of_rows_stderr=of_rows[1],
        ratio=found["ratio"],
        ratio_stderr=errors["ratio"],
        baseline=baseline,
        analytic=tuple(sorted(source.analytic)),
        num_samples=state.gathered.num,
        batch_size=batch_size,
        is_elbo=isinstance(source, ELBOPieces),
    )


def _numbers(m: Moments, c: np.ndarray, present: np.ndarray) -> dict[str, Tensor]:
    """The numbers of the result, from coefficients (E, T, pieces) of its terms."""

    def of_terms(products: np.ndarray) -> np.ndarray:
        found = np.einsum("etp,gpq,etq->egt", c, products, c)
        size = np.einsum("etp,gpp->egt", c, np.abs(products) + m.noise)
        found = np.where(np.abs(found) < _ROUNDING * size, 0.0, found)
        return np.where(present, found, np.nan)

    with np.errstate(all="ignore"):  # division by zero noise gives infinity or NaN
        signal, noise, of_rows = map(of_terms, m)
        common = np.einsum("etp,gpq,eq->egt", c, m.noise, c[:, -1])
        snr = np.sqrt(np.where(signal < 0, 0.0, signal) / noise)
        found = {
            "signal": signal,
            "noise": noise,
            "snr": snr,
            "share": np.where(present, common / noise[..., -1:], np.nan),
            "of_rows": of_rows,
            "ratio": noise[..., -1] / noise[:1, :, -1],
        }
    return {name: torch.as_tensor(x, device="cpu") for name, x in found.items()}


def _jackknife(left: list[Tensor], like: Tensor) -> Tensor:
    """The standard error, from the values without each group of draws; NaN where unknown."""
    if len(left) < 2:
        return torch.full_like(like, torch.nan)
    values = torch.stack(left)
    error = (values.var(0, correction=0) * (len(left) - 1)).sqrt()
    return torch.where(values.isinf().all(0), 0.0, error)  # infinite, whatever is left out


def _check_finite(moments: Moments, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: for gradients that are NaN or infinite.
    """
    finite = np.isfinite(np.diagonal(moments.noise[-1]))
    if not finite.all():
        bad = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
        raise ValueError(
            f"gradients of {', '.join(bad)} are NaN or infinite: look at the parameters and the "
            "data there"
        )


def _kept(
    rows: dict[GradientTerm, tuple[str, ...]], names: Sequence[str], moments: Moments
) -> dict[GradientTerm, tuple[str, ...]]:
    """The terms, without a rest that is only rounding."""
    used = [names.index(name) for part in rows.values() for name in part]
    size = np.diagonal(moments.noise[-1]) + np.abs(np.diagonal(moments.means[-1]))

    def is_rounding(term: GradientTerm) -> bool:
        own = size[[names.index(name) for name in rows[term]]].sum()
        return term.kind == "rest" and len(rows) > 1 and own <= 1e-9 * size[used].sum()

    return {term: part for term, part in rows.items() if not is_rounding(term)}


def _in_order(rows: Iterable[Iterable[GradientTerm]]) -> list[GradientTerm]:
    """All terms, with the parts of a KL after it."""
    found = list(dict.fromkeys(term for each in rows for term in each))
    tops = [term for term in found if term.within is None]
    return [t for top in tops for t in (top, *(s for s in found if top == ("kl", s.within, None)))]
