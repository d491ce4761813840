"""Simulation-based calibration: is the guide's uncertainty correct?"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import scipy
import torch
from torch import Tensor

from pyproelbo._diagnostics.amortised_ranks import amortised_ranks
from pyproelbo._diagnostics.ranks import DENSITIES, DISTANCE, Ranks
from pyproelbo._diagnostics.refits import Refit, refitted_ranks
from pyproelbo._messages.arguments import check_counts, check_executor, check_shared
from pyproelbo._results.merging import stamped
from pyproelbo._results.origin import Simulations
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Number, Row, Table
from pyproelbo._rows.batches import Arguments
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.origins import origin_here
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, eq=False, repr=False)
class Calibration(Result):
    r"""The ranks of the true z of simulated data among the guide's draws.

    With z and x drawn from the model, and draws z_1, ..., z_S of q(z | x), the rank of z among
    them is uniform on 0, ..., S in each dimension, if q is the posterior (Talts et al. 2018;
    for variational posteriors Yao et al. 2018, "Yes, but did it work?", section 3.2). The
    converse does not hold: q(z | x) = p(z) for all x is calibrated as well. Ranks of single
    dimensions do not detect correlations that q lacks. Three joint quantities do:

    - log p(x, z) and log p(x | z) (Modrak et al. 2023, "Simulation-based calibration checking for
      Bayesian computation");
    - the distance from z to a reference point that is independent of z given x (TARP: Lemos,
      Coogan, Hezaveh & Perreault-Levasseur 2023, "Sampling-based accuracy testing of posterior
      estimators for general inference"). The distribution function of its ranks is the expected
      coverage of regions of q around that point. If it is uniform whatever the point is, as a
      function of x, q is the posterior. Here the point is the true z of the next simulation, a draw
      from the prior: no other distribution has to be chosen. Each dimension is divided by the
      standard deviation of the true values, which removes units. Only continuous latents count. As
      this point does not depend on x, q(z | x) = p(z) passes here too; log p(x | z) detects it.

    Attributes:
        ranks: (rank + U) / (S + 1) with U uniform on [0, 1], (N, K): uniform on [0, 1] for the
            correct posterior.
        dims: the labels of the K quantities: dimensions of latents, such as "z[0]"; then, where
            the simulation draws all latents, "log p(x, z)" and "log p(x | z)"; then, where latents
            are continuous and N is above 1, "distance to a reference point".
        p_value: of the Kolmogorov-Smirnov test of each quantity for uniformity, (K,).
        num_samples: S.
        per: the meaning of a row: a "datum" of one simulation; or a "simulation" of all data and
            latents, to which the guide was fitted.
        ended: why the last :func:`fit` to each simulation stopped, N words, as in ``Fit.reason``,
            None for a simulation that did not call it; None if none did, as without a refit.
    """

    _options = ("dims", "num_samples", "per")

    ranks: Tensor
    dims: tuple[str, ...]
    p_value: Tensor
    num_samples: int
    per: Literal["datum", "simulation"] = "datum"
    ended: tuple[str | None, ...] | None = None

    @classmethod
    def _merged(cls, parts: Sequence[Any]) -> Self:
        ranks = torch.cat([part.ranks for part in parts])
        ended = [part.ended or (None,) * len(part.ranks) for part in parts]
        is_known = any(part.ended is not None for part in parts)
        return replace(
            parts[0],
            ranks=ranks,
            p_value=_uniformity(ranks),
            ended=sum(ended, ()) if is_known else None,
        )

    @property
    def is_converged(self) -> Tensor | None:
        """Which fits have stopped by themselves, (N,); None where that is not known.

        Ranks of a fit that has not converged show the optimiser's error, not that of the family.
        """
        if self.ended is None:
            return None
        return torch.tensor([r in (None, "converged") for r in self.ended], device="cpu")

    @property
    def bias(self) -> Tensor:
        """How many standard errors the mean rank lies above 1/2, (K,): q is too low if positive."""
        return (self.ranks.mean(0) - 0.5) * (12 * len(self.ranks)) ** 0.5

    @property
    def spread(self) -> Tensor:
        """How many standard errors the ranks' variance lies above 1/12, (K,).

        If positive, true values lie too often in the tails: q is too narrow.
        """
        variance = (self.ranks - 0.5).square().mean(0)
        return (variance - 1 / 12) * (180 * len(self.ranks)) ** 0.5

    @property
    def notes(self) -> list[str]:
        """What stands out most, by dimension, at a level of 1% for all of them together.

        Before it, how many fits have not converged.
        """
        found = self._unconverged()
        for d in (self.p_value < 0.01 / len(self.dims)).nonzero().flatten().tolist():
            bias, spread = float(self.bias[d]), float(self.spread[d])
            if self.dims[d] in DENSITIES:
                found.append(
                    f"Ranks of {self.dims[d]} are not uniform: q as a whole is wrong, as where it "
                    "has other correlations than the posterior."
                )
                continue
            if self.dims[d] == DISTANCE:
                found.append(
                    f"Ranks of the {DISTANCE} are not uniform: q as a whole is wrong, for its "
                    "regions do not hold the true z as often as they should."
                )
                continue
            if abs(bias) > abs(spread):
                word = "too low" if bias > 0 else "too high"
            else:
                word = "too narrow" if spread > 0 else "too wide"
            found.append(f"q of {self.dims[d]} is {word}.")
        return found

    def _unconverged(self) -> list[str]:
        reasons = Counter(r for r in self.ended or () if r not in (None, "converged"))
        if not reasons:
            return []
        why = ", ".join(f"{num} by {reason!r}" for reason, num in sorted(reasons.items()))
        return [
            f"{reasons.total()} of {len(self.ranks)} refits have not converged ({why}): their "
            "ranks describe the fit, not the family. Give pe.fit more time by max_time=, or "
            "another start."
        ]

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dims "datum" or "simulation", and "latent_dim"."""
        import xarray

        units = {"p_value": "1", "bias": "standard errors", "spread": "standard errors"}
        values: dict[str, Any] = {
            name: ("latent_dim", getattr(self, name).numpy(), {"units": unit})
            for name, unit in units.items()
        }
        values["ranks"] = ((self.per, "latent_dim"), self.ranks.numpy(), {"units": "1"})
        if self.is_converged is not None:
            values["is_converged"] = (self.per, self.is_converged.numpy())
        attributes = {"num_samples": self.num_samples, "per": self.per}
        return xarray.Dataset(values, {"latent_dim": list(self.dims)}, attributes)

    def _table(self) -> Table:
        draws = f"{self.num_samples:,}"
        columns = (self.p_value.tolist(), self.bias.tolist(), self.spread.tolist())
        rows = [
            Row(dim, (Number(p), Number(bias, decimals=2), Number(spread, decimals=2)))
            for dim, p, bias, spread in zip(self.dims, *columns, strict=True)
        ]
        return Table(
            f"Calibration on {rows_of(self)}, draws: {draws} (bias and spread in standard errors)",
            rows,
            ("quantity", "p-value", "bias", "spread"),
        )


def rows_of(result: Calibration) -> str:
    """The number of rows, in words."""
    words = {"datum": "simulated data", "simulation": "simulations, with a refit to each"}
    return f"{len(result.ranks):,} {words[result.per]}"


def calibration(
    model: Program,
    guide: Program,
    simulate: Callable[[], object],
    *,
    refit: Refit | Callable[..., object] | None = None,
    arguments: Arguments | None = None,
    num_samples: int = 200,
    plate: str | None = None,
    chunk: int | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool = True,
) -> Calibration:
    """The ranks of the true z of simulated data among the guide's draws (see :class:`Calibration`).

    A guide that computes its posterior from each datum is evaluated on one simulation of many data.
    Where a latent is global, or the guide is not amortised, such as an AutoGuide, give ``refit``:
    the guide is then fitted to one simulation after another, each with as many data as ``simulate``
    makes, and reset. This costs ``refit.num`` fits. It tests the guide as such a fit leaves it:
    without convergence ranks are not uniform, whatever the family. The notes state how many fits
    have not converged if ``Refit(fit=)`` calls :func:`fit`; for Adam, with a given number of steps,
    this is not known: check that twice the steps give the same ranks.

    With ``refit`` each element of each latent is ranked if there are at most 100 in all. Otherwise
    the first 10 of a latent in plates, whose elements are alike, and the first 100 of any other are
    ranked; log-densities and distances always include all elements.

    Args:
        model, guide: Pyro programs, called with what ``simulate`` returns.
        simulate: a Pyro program that draws latents, at the same sites, and data given them, which
            it returns in the form that model and guide take: a tensor, or several in a tuple or a
            mapping. For our models it is ``lambda: model(num=500)``. Without ``refit`` every datum
            has its own draw of everything. With it ``simulate`` is called twice for each
            simulation, first for the true values only.
        refit: a :class:`~pyproelbo.Refit`; or a function, short for ``Refit(fit=function)``. An
            AutoGuide that has never run always starts from its initial values at the first
            simulation.
        arguments: from what ``simulate`` returns to the arguments of the programs, where the two
            differ.
        num_samples: S, the number of draws of the guide for each row.
        plate: the plate over the data, where the latents share several; without ``refit`` only.
        chunk: the number of draws made at once, as vectorised particles.
        seed: for the simulations, the fits and the draws. The result does not depend on ``chunk``
            if all draws can be made by row.
        executor: as in :func:`evidence`: its workers compute some draws each, or a refit. Results
            of several seeds are of other simulations, and add up (:func:`merge`).
        progress: whether to show a progress bar, on a terminal.

    Nothing finished is lost: Ctrl-C returns the ranks among the draws made, or of the simulations
    finished, with an :class:`~pyproelbo.UnfinishedWarning`; an error has them as its attribute
    ``calibration``.

    Raises:
        ValueError: where guide and simulation have no latent in common, for ``num_samples``
            below 1, and for draws or densities that are NaN. Without ``refit``: for a latent in no
            plate, and for a guide that is not amortised. With it: for a guide without parameters,
            for ``plate``, for simulations of other shapes, and, except with ``Refit(fit=)``, for
            latents without reparameterised draws.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> ppca = PPCA(num_latents=2, num_features=5)
    >>> result = calibration(ppca, Exact(ppca), lambda: ppca(num=400))
    >>> result.dims[:3], result.notes
    (('z[0]', 'z[1]', 'log p(x, z)'), [])

    A mean that all data share, by refits:

    >>> import pyro, pyro.distributions as dist
    >>> def model(x=None):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", 5):
    ...         return pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
    >>> guide = pyro.infer.autoguide.AutoNormal(model)
    >>> refit = Refit(num=5, steps=20, lr=0.1)  # for quickness; 100 fits of 1,000 steps by default
    >>> calibration(model, guide, model, refit=refit, num_samples=99).ranks.shape
    torch.Size([5, 4])
    """
    check_counts(num_samples=num_samples)
    check_shared(plate, seed, arguments, chunk)
    check_executor(executor)
    if not (refit is None or isinstance(refit, Refit)):
        if not callable(refit):
            raise ValueError(f"refit should be a pe.Refit, or a function, got {refit!r}")
        refit = Refit(fit=refit)
    if refit is not None and plate is not None:
        raise ValueError(
            "plate is for rows that are data, but with refit a row is a simulation, got "
            f"{plate!r}: leave it out"
        )
    programs = model, guide, simulate, arguments
    with evaluating(model, guide, seed=seed):
        origin = origin_here()

        def result(ranks: Ranks) -> Calibration:
            found = Calibration(
                ranks.values,
                ranks.dims,
                _uniformity(ranks.values),
                ranks.num_samples,
                "datum" if refit is None else "simulation",
                ranks.ended,
            )
            return stamped(found, origin and Simulations((seed,), origin.programs))

        if refit is None:
            options = num_samples, plate, chunk, seed, executor, progress
            return amortised_ranks(*programs, *options, result)
        options = num_samples, chunk, seed, executor, progress
        return refitted_ranks(*programs, refit, *options, result)


def _uniformity(ranks: Tensor) -> Tensor:
    """The p-values of Kolmogorov-Smirnov tests of ranks (N, K)."""
    p_value = [scipy.stats.kstest(u, "uniform").pvalue for u in ranks.mT.numpy()]
    return torch.tensor(p_value, device="cpu")
