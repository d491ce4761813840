"""What a repair has found, for each datum, and for global latents."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyproelbo._evidence.repair_steps import WAYS
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
    real line. Where neither can tell, "passes" is said of the modes that draws come to. A mode that
    is narrow for its prior, as those of many latents, may be missed by both, and nothing says so:
    ``sees_modes`` is of modes like those that draws have come to.

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
        of_globals: by level (``level="both"``) the same of the global latents, of one row; None
            elsewhere. Draw s of a datum is then one given draw s of these, ``khat_before`` and
            ``khat_after`` are of its weights given them, means over 20 of their draws, and
            ``passes`` is said of it given them. ``effective_sample_size`` is of all draws of it.
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
    of_globals: "Repair | None" = None

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
        if self.of_globals is not None and not self.of_globals.passes.all():
            notes.append(
                "The global latents do not pass (method 'failed'): neither their draws are to be "
                "relied on, nor those of the data, which are given these."
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
