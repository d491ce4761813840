"""The result of a repair, for each datum and for global latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from pyproelbo._evidence.repair_steps import WAYS
from pyproelbo._results.merging import rows_merged
from pyproelbo._results.numbers import share
from pyproelbo._results.per import Per, dim, num_rows
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Row, Table

if TYPE_CHECKING:
    import xarray

FAILED = "failed"
ORDER = ("guide", *WAYS, FAILED)


@dataclass(frozen=True, eq=False, repr=False)
class Repair(Result):
    r"""Draws from each datum's posterior, by the cheapest of several methods that passes.

    The methods are, in order of cost:

    - "guide": draws of q(z | x_n), weighted by p(x_n, z) / q(z | x_n);
    - "family": the same for the member of the guide's family with the highest ELBO for this datum;
    - "correlated": for the best Gaussian with any covariance, over z on the whole real line;
    - "modes": for a mixture of such Gaussians, one at each known mode, for data with a mode that no
      draws of the previous method reach;
    - "annealed": chains of annealed importance sampling from the last of these Gaussians
      (:class:`~pyproelbo.Annealed`), resampled, and then moved by Hamiltonian Monte Carlo;
    - "mixture": draws from q and from the prior, half of each, with deterministic mixture weights.
      It replaces the others where a latent is discrete: there the guide does not pass, as its
      weights do not reveal a value that it hardly draws.

    A method passes if its S draws meet all of these conditions:

    - their k-hat can be used (:class:`Psis`), and their effective sample size is at least 50;
    - no latent's weighted draws are wider than the draws by a factor above 1.3 (:class:`Moments`);
    - log p(x_n) by them is not smaller, by more than 4 standard errors, than by draws of the prior,
      or by an earlier method with usable weights;
    - they reach all modes found by ascents of log p(x_n, z) from 16 draws of the prior, except
      those more than 10 nats below the highest;
    - for annealing, at least 30% of moves are accepted, and two halves of the chains have the same
      means, within 4 standard errors.

    A datum's draws are those of the first method that passes, resampled by their smoothed weights
    to equal weight. Where none passes the method is "failed", and the draws are those of the method
    with the smallest k-hat: do not rely on them.

    **What passing does not show.** Draws that never leave one of several modes have good weights;
    only the prior can reveal the others, in two ways. If a fraction m of the posterior's mass is
    missing, log p(x_n) is too small by -log(1 - m): by log 2 for half. ``sees_modes`` is true where
    4 S draws of the prior would detect that, for which many of them must explain the datum: few
    latents, or a likelihood that is not sharp. And an ascent finds a mode if it starts in its
    basin: if the basin has a fraction b of the prior's mass, 16 ascents miss the mode with a
    probability of about (1 - b)^16, 1% for b = 1/4, a fifth for b = 1/10. There are no ascents
    where the prior is improper, a latent is discrete, or the guide draws anything but the model's
    latents on the whole real line. Where neither can detect a missing mode, "passes" refers only to
    the modes that draws reach. A mode that is narrow relative to the prior, as with many latents,
    may be missed by both, without any sign: ``sees_modes`` refers to modes like those that draws
    have reached.

    Attributes:
        draws: of each latent of the model, by site: (S, N, ...), with the data in the dim after the
            draws; where a row is the data set, (S, ...), with the latent's shape in the model.
        method: "guide", "family", "correlated", "modes", "annealed", "mixture" or "failed", (N,),
            an array.
        khat_before: k-hat of the guide's weights, (N,).
        khat_after: k-hat of the weights behind the draws, (N,).
        effective_sample_size: the number of posterior draws that would give its means and variances
            as accurately, (N,): for the least accurate of them, or by the weights alone where that
            is smaller. The mean of a latent with standard deviation sd has about the standard error
            sd / sqrt(effective_sample_size). From 1 to S; for annealing up to 200, its number of
            chains.
        cost: seconds spent on a datum: its share in the time of its batches, (N,).
        seconds: the same by method, for all data; "prior" for the draws of the prior, "search" for
            the ascents.
        is_finished: where a method has passed, or all have been tried, (N,): false where time ran
            out.
        sees_modes: where draws of the prior would show that half of the posterior is missing, (N,).
        num_samples: S.
        per: the meaning of a row: a "datum"; or the "data set", where a latent is global, and N is
            1.
        num_ascents: the number of ascents that looked for modes, for each datum.
        left_out: methods that do not apply to these programs, and why.
        drawn: the same draws by the sites of the guide, (S, N, ...), for :func:`from_svi`.
        plate: the name of the plate over the data; None where a row is the data set.
        of_globals: by level (``level="both"``) the same for the global latents, with one row;
            otherwise None. Draw s of a datum is then conditional on draw s of these,
            ``khat_before`` and ``khat_after`` belong to its weights given them, as means over 20 of
            their draws, and ``passes`` refers to it given them. ``effective_sample_size`` is for
            all its draws.
    """

    _options = ("num_samples", "per", "plate")

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
    of_globals: "Repair | None" = None

    @classmethod
    def _merged(cls, parts: Sequence[Any]) -> Self:
        def over_data(name: str) -> dict[str, Tensor]:
            of = [getattr(part, name) for part in parts]
            return {site: torch.cat([values[site] for values in of], 1) for site in of[0]}

        rows = [replace(part, draws={}, drawn={}, seconds={}, left_out={}) for part in parts]
        left_out: dict[str, str] = {}
        seconds: dict[str, float] = {}
        for part in parts:
            left_out |= part.left_out
            for method, value in part.seconds.items():
                seconds[method] = seconds.get(method, 0.0) + value
        return replace(
            rows_merged(rows),
            draws=over_data("draws"),
            drawn=over_data("drawn"),
            seconds=seconds,
            left_out=left_out,
            num_ascents=max(part.num_ascents for part in parts),
        )

    @property
    def passes(self) -> Tensor:
        """Where a method has passed, (N,)."""
        return torch.from_numpy(self.method != FAILED)

    @property
    def notes(self) -> list[str]:
        """Remarks on how reliable the draws are, in sentences; empty where nothing stands out."""
        notes = []
        if (failed := float((~self.passes).double().mean())) > 0:
            of = "No way" if self.per == "data set" else f"For {share(failed)} of the data no way"
            notes.append(f"{of} passes: do not rely on these draws (method 'failed').")
        if not self.is_finished.all():
            num = int((~self.is_finished).sum())
            of = "" if self.per == "data set" else f" for {num:,} of them"
            notes.append(f"Time ran out{of} before all ways were tried: take a larger max_time.")
        if self.of_globals is not None and not self.of_globals.passes.all():
            notes.append(
                "The global latents do not pass (method 'failed'): rely neither on their draws "
                "nor on those of the data, which are conditional on them."
            )
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
        if (w := self.of_globals) is not None:
            values |= {f"global_{n}": v for n, v in w.to_xarray().squeeze().data_vars.items()}
        attributes = {"num_samples": self.num_samples, "num_ascents": self.num_ascents}
        return xarray.Dataset(values, attrs={**attributes, "per": self.per})

    def _table(self) -> Table:
        rows = []
        for name in ORDER:
            num, spent = int((self.method == name).sum()), self.seconds.get(name)
            if num or spent:
                k = self.khat_after[torch.from_numpy(self.method == name)]
                largest = f"(largest k-hat {k.max():.2f})" if num else ""
                rows.append(Row(name, (num, None if spent is None else f"{spent:.1f}"), largest))
        for name, label in (("prior", "draws of the prior"), ("search", "ascents to modes")):
            if spent := self.seconds.get(name):
                rows.append(Row(label, (None, f"{spent:.1f}")))
        of, by = num_rows(self.per, len(self.method)), ""
        if (w := self.of_globals) is not None:
            by, spent = " by level", sum(w.seconds.values())
            k = f"(k-hat {float(w.khat_after):.2f})"
            rows.append(Row(f"global latents: {w.method[0]}", (None, f"{spent:.1f}"), k))
        title = f"Posteriors repaired{by} ({of}, draws: {self.num_samples:,})"
        return Table(title, rows, ("by", "data" if self.per == "datum" else "rows", "seconds"))
