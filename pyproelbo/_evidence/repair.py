"""For each datum the cheapest posterior that its importance weights find nothing against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyproelbo._evidence.annealed import Annealed
from pyproelbo._evidence.modes import STARTS
from pyproelbo._evidence.moments import NARROW
from pyproelbo._evidence.pareto import LEAST
from pyproelbo._evidence.repair_jobs import Jobs, Part, data_until
from pyproelbo._evidence.repair_settings import Settings
from pyproelbo._evidence.repair_steps import WAYS
from pyproelbo._messages.arguments import check_counts, check_positive, check_shared
from pyproelbo._results.numbers import share
from pyproelbo._results.per import Per, dim, num_rows
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Row, Table
from pyproelbo._rows.batches import Arguments, ReportData
from pyproelbo._rows.evaluating import constant, evaluating
from pyproelbo._rows.passes import bar, by_part
from pyproelbo._rows.report_data import rows_of
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray

FAILED = "failed"
_ORDER = ("guide", *WAYS, FAILED)


@dataclass(frozen=True, eq=False, repr=False)
class Repair(Result):
    r"""Draws of the posterior of each datum, by the cheapest of several ways that passes.

    The ways are, from the cheapest on:

    - "guide": draws of q(z | x_n), weighted by p(x_n, z) / q(z | x_n);
    - "family": the same of the member of the guide's family with the highest ELBO for this datum;
    - "correlated": of the best Gaussian with any covariance, over z put on the whole real line;
    - "modes": of a mixture of such Gaussians, one at each mode that is known, for data with a mode
      to which no draws of the way before come;
    - "annealed": chains of annealed importance sampling from the last of these Gaussians
      (:class:`~pyproelbo.Annealed`), resampled, and then moved on by Hamiltonian Monte Carlo;
    - "mixture": draws of q and of the prior, half of each, by deterministic mixture weights. It
      stands in place of the others where a latent is discrete: there the guide does not pass, for
      its weights do not tell of a value that it hardly draws.

    A way passes where all of this holds of its S draws:

    - their k-hat can be used (:class:`Psis`), and their effective sample size is at least 50;
    - no latent's weighted draws are wider than the draws by a factor above 1.3 (:class:`Moments`);
    - log p(x_n) by them is not smaller, by more than 4 standard errors, than by draws of the prior,
      or by a way before with weights that can be used;
    - they come to all modes to which log p(x_n, z) ascends from 16 draws of the prior, but for
      those more than 10 nats below the highest;
    - of annealing, moves are accepted (30% of them), and two halves of the chains have the same
      means, within 4 standard errors.

    A datum's draws are those of the first way that passes, resampled by their smoothed weights, so
    that all have equal weight. Where none passes the method is "failed", and they are those of the
    way with the smallest k-hat: no posterior to rely on.

    **What passing does not say.** Draws that never leave one mode of several have good weights, and
    only the prior tells, in two ways. A part m of the posterior's mass that is missing makes log
    p(x_n) too small by -log(1 - m): by log 2 where it is half. ``sees_modes`` is true where 4 S
    draws of the prior would tell that, which takes a good share of them to explain the datum: few
    latents, or a likelihood that is not sharp. And an ascent finds a mode if it begins in its
    basin: of a mode whose basin has a share b of the prior 16 miss about (1 - b)^16, 1% where b is
    a quarter, a fifth where it is a tenth. They are not made where the prior is improper, or a
    latent discrete, nor where the guide draws another thing than the model's latents on the whole
    real line. Where neither can tell, "passes" is said of the modes that draws come to; a mode that
    is narrow for its prior, as those of many latents, may be missed by both.

    Attributes:
        draws: of each latent of the model, by site: (S, N, ...), with the data in the dim after
            the draws; where a row is the data set (S, ...), as the model has the latent.
        method: "guide", "family", "correlated", "modes", "annealed", "mixture" or "failed", (N,),
            an array.
        khat_before: k-hat of the guide's weights, (N,).
        khat_after: k-hat of the weights of what the draws are from, (N,).
        effective_sample_size: how many draws of the posterior know its means and variances as well,
            (N,): of the least well known of them, or by the weights alone where that is smaller.
            The mean of a latent with standard deviation sd has about the standard error sd /
            sqrt(effective_sample_size). From 1 to S; of annealing to 200, its chains.
        cost: seconds that were spent on a datum: its share in those of its batches, (N,).
        seconds: the same by way, of all data; "prior" for the draws of the prior, "search" for the
            ascents.
        is_finished: where a way has passed, or all have been tried, (N,): false where time ran out.
        sees_modes: where draws of the prior would show that half of the posterior is missing, (N,).
        num_samples: S.
        per: what a row is: a "datum"; or the "data set", where a latent is global, and N is 1.
        num_ascents: how many have looked for modes, for each datum.
        left_out: ways that are none for these programs, and why.
        drawn: the same draws by the sites of the guide, (S, N, ...), for :func:`from_svi`.
        plate: the name of the plate over the data; None where a row is the data set.
    """

    draws: Mapping[str, Tensor]
    method: np.ndarray
    khat_before: Tensor
    khat_after: Tensor
    effective_sample_size: Tensor
    cost: Tensor
    seconds: Mapping[str, float]
    is_finished: Tensor
    sees_modes: Tensor
    num_samples: int
    per: Per = "datum"
    num_ascents: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)
    drawn: Mapping[str, Tensor] = field(default_factory=dict)
    plate: str | None = None

    @property
    def passes(self) -> Tensor:
        """Where a way has passed, (N,)."""
        return torch.from_numpy(self.method != FAILED)

    @property
    def notes(self) -> list[str]:
        """What the draws are worth, in sentences; none where nothing stands out."""
        notes = []
        if (failed := float((~self.passes).double().mean())) > 0:
            of = "No way" if self.per == "data set" else f"For {share(failed)} of the data no way"
            notes.append(f"{of} passes: these draws are not to be relied on (method 'failed').")
        if not self.is_finished.all():
            num = int((~self.is_finished).sum())
            of = "" if self.per == "data set" else f" for {num:,} of them"
            notes.append(f"Time ran out{of} before all ways were tried: take a larger max_time.")
        blind = self.passes & ~self.sees_modes
        if blind.any():
            of = "" if self.per == "data set" else f" of {share(float(blind.double().mean()))}"
            of += "" if self.per == "data set" else " of the data"
            how = "cannot be seen"
            if self.num_ascents:
                how = f"is known by {self.num_ascents} ascents from draws of the prior alone"
            notes.append(
                f"Whether a mode of the posterior{of} is missed {how}: too few draws of the prior "
                "explain the data."
            )
        notes += [f"{name!r} is left out: {why}." for name, why in self.left_out.items()]
        return notes

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dim "datum" or "data_set", without the draws."""
        import xarray

        columns: dict[str, tuple[Any, str]] = {
            "method": (self.method, ""),
            "khat_before": (self.khat_before.numpy(), "1"),
            "khat_after": (self.khat_after.numpy(), "1"),
            "effective_sample_size": (self.effective_sample_size.numpy(), "draws"),
            "cost": (self.cost.numpy(), "s"),
            "is_finished": (self.is_finished.numpy(), ""),
            "sees_modes": (self.sees_modes.numpy(), ""),
        }
        rows = dim(self.per)
        values = {n: (rows, v, {"units": u} if u else {}) for n, (v, u) in columns.items()}
        attributes = {"num_samples": self.num_samples, "num_ascents": self.num_ascents}
        return xarray.Dataset(values, attrs={**attributes, "per": self.per})

    def _table(self) -> Table:
        rows = []
        for name in _ORDER:
            num, spent = int((self.method == name).sum()), self.seconds.get(name)
            if num or spent:
                k = self.khat_after[torch.from_numpy(self.method == name)]
                largest = f"(largest k-hat {k.max():.2f})" if num else ""
                rows.append(Row(name, (num, None if spent is None else f"{spent:.1f}"), largest))
        for name, label in (("prior", "draws of the prior"), ("search", "ascents to modes")):
            if spent := self.seconds.get(name):
                rows.append(Row(label, (None, f"{spent:.1f}")))
        of = num_rows(self.per, len(self.method))
        title = f"Posteriors repaired ({of}, draws: {self.num_samples:,})"
        return Table(title, rows, ("by", "data" if self.per == "datum" else "rows", "seconds"))


def repair(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    num_samples: int = 1000,
    methods: Sequence[str] | None = None,
    max_time: float | None = None,
    steps: int = 500,
    lr: float | None = None,
    num_particles: int = 10,
    annealed: Annealed | None = None,
    plate: str | None = None,
    batch_size: int = 256,
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Repair:
    """Draws of the posterior of each datum, by the cheapest way that passes (see :class:`Repair`).

    The guide's own draws are weighed for all data first. Each next way is then tried with the data
    that have not passed, and with no others; those that lack a mode and nothing else wait for
    "modes". Where all data are one row, "family" fits the guide's
    own parameters, and puts them back. Model and guide stay as they are.

    What is finished is not lost: Ctrl-C returns it, with an :class:`~pyproelbo.UnfinishedWarning`;
    an error has it as its attribute ``repair``.

    Args:
        model, guide, data, arguments, plate, batch_size, chunk, seed, progress: as
            :func:`evidence`. ``batch_size`` changes nothing where the programs take some of the
            data as they take all; where they do not, as AutoGuides with parameters for each datum,
            data that have not passed are repaired together with the others of their batch.
        num_samples: S, draws of each row, and of each way.
        methods: the ways after the guide, in their order: some of "family", "correlated", "modes",
            "annealed" and "mixture". By default the first four, and "mixture" where a latent is
            discrete. One that is none for these programs is left out, and the notes say why.
        max_time: seconds after which no further batch is repaired; the rest is what it is by then
            (``is_finished``). The guide's draws are weighed for all data in any case. By default
            there is no limit.
        steps, lr, num_particles: of Adam for "family", as :func:`inference_gap`; "correlated", and
            each Gaussian of "modes", take as many steps and particles.
        annealed: how chains are annealed; by default with 50 temperatures.

    Raises:
        ValueError: as :func:`evidence`; for fewer than 25 samples, for a ``max_time`` that is not
            positive, for ``methods`` of another name, and for a guide that draws nothing.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Diagonal
    >>> x = torch.randn(20, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> repaired = repair(ppca, Diagonal(2, 5), x)
    >>> repaired.passes.all(), repaired.draws["z"].shape
    (tensor(True), torch.Size([1000, 20, 2]))
    """
    check_counts(LEAST, num_samples=num_samples)
    check_counts(steps=steps, num_particles=num_particles)
    check_positive(lr=0.1 if lr is None else lr, max_time=1 if max_time is None else max_time)
    check_shared(plate, seed, arguments, chunk)
    _check_methods(methods)
    if annealed is not None and not isinstance(annealed, Annealed):
        raise ValueError(f"annealed should be pe.Annealed(...), got {annealed!r}")
    unit, batches = rows_of(model, guide, data, batch_size, arguments, plate)
    how = Annealed(num_temperatures=50) if annealed is None else annealed
    counts = num_samples, steps, num_particles, lr, how
    jobs = Jobs(
        Settings(model, guide, unit, *counts, chunk, seed), batches, methods, max_time, NARROW
    )

    def of_next(parts: list[Part] | None, job: Any) -> list[Part]:
        return [*(parts or []), *job.run()]

    def result(parts: list[Part], _: bool) -> Repair:
        return _result(parts, jobs, num_samples, unit.per)

    with evaluating(model, guide, seed=seed), constant(model, guide):
        return by_part(bar(iter(jobs), "repair", progress), of_next, result, "repair", data_until)


def _check_methods(methods: Sequence[str] | None) -> None:
    names = () if methods is None else methods
    is_list = isinstance(names, list | tuple)
    if not is_list or any(not isinstance(n, str) or n not in WAYS for n in names):
        raise ValueError(f"methods should be some of {list(WAYS)}, in a list, got {methods!r}")


def _result(parts: list[Part], jobs: Jobs, num_samples: int, per: Per) -> Repair:
    """Each row as the last part that has it says."""
    first = [part for part in parts if part.name == "guide"]
    draws = {n: torch.cat([part.draws[n] for part in first], 1) for n in first[0].draws}
    khat, ess = (torch.cat([getattr(p, n) for p in first]) for n in ("khat", "ess"))
    passes = torch.cat([part.passes for part in first])
    names = np.full(len(khat), "guide", dtype=f"<U{max(map(len, _ORDER))}")
    before = khat.clone()
    for part in parts:
        if part.name != "guide":
            for name, values in part.draws.items():
                draws[name][:, part.rows] = values
            khat[part.rows], ess[part.rows], passes[part.rows] = part.khat, part.ess, part.passes
            names[part.rows.numpy()] = part.name
    names[~passes.numpy()] = FAILED
    num = len(khat)
    seen, cost = jobs.sees_modes(num), jobs.cost(num)
    is_finished = passes | jobs.is_exhausted(num)
    drawn, draws = draws, {name: draws[name] for name in jobs.sites}
    if per == "data set":
        draws = {name: value[:, 0] for name, value in draws.items()}
    return Repair(
        draws,
        names,
        before,
        khat,
        ess,
        cost,
        dict(jobs.seconds),
        is_finished,
        seen,
        num_samples,
        per,
        STARTS if jobs.is_searched else 0,
        dict(jobs.left_out),
        drawn,
        jobs.plate,
    )
