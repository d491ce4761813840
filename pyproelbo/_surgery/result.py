"""The result of a surgery: its table, its notes, its xarray.Dataset."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyproelbo._results.result import Result
from pyproelbo._results.tables import Row, Table, row

if TYPE_CHECKING:
    import xarray

COLLAPSED = 0.1  # nats of average KL, below which z is taken to carry no information about x


@dataclass(frozen=True, eq=False, repr=False)
class Surgery(Result):
    """The ELBO of a data set and the parts of its KL: nats per datum, means over N data.

    These hold exactly, whatever the Monte Carlo error: ``elbo = reconstruction + factor -
    mutual_information - marginal_kl - other_kl``; ``average_kl = mutual_information +
    marginal_kl``; ``marginal_kl = total_correlation + dimension_wise_kl``.

    Attributes:
        elbo: the evidence lower bound.
        reconstruction: E_q[log p(x | z)].
        average_kl: (1/N) sum_n KL(q(z | x_n) || p(z)).
        mutual_information: I(n; z), the information in a code about the index of its datum; at most
            ``log_n``.
        marginal_kl: KL(q(z) || p(z)), the part of the average KL that belongs to no single datum.
        log_n: log N.
        kl_per_dim: (K,), (1/N) sum_n KL(q(z_k | x_n) || p(z_k)); None like the next three.
        marginal_kl_per_dim: (K,), KL(q(z_k) || p(z_k)).
        total_correlation: KL(q(z) || prod_k q(z_k)), how far the dimensions of the aggregate
            posterior are from independent. None where q(z_k | x) is not known, as for a flow.
        dimension_wise_kl: sum_k KL(q(z_k) || p(z_k)). None, like ``kl_per_dim`` and
            ``marginal_kl_per_dim``, also where the prior's dimensions are not independent.
        active_units: (K,), whether the posterior mean of a dimension varies over the data with
            a variance above 0.01 (Burda et al. 2016). None for a latent without a mean.
        num_data: N.
        num_samples: draws of the guide per datum.
        stderr: the Monte Carlo standard error of each of the above, by name, from the draws of the
            guide at these data, and from the choice of the data at whose draws q(z) is evaluated; 0
            where nothing was sampled.
        other_kl: the KL of latents of single data that ``site`` leaves out.
        global_kl: KL(q(w) || p(w)) / N of latents w that all data share, minus the log-likelihood
            of observations that belong to no single datum; 0 where there are none. The ELBO is then
            ``reconstruction + factor
            - mutual_information - marginal_kl - other_kl - global_kl``.
        num_globals: the number of draws of w over which all numbers are means; 0 where there are
            none.
        factor: log-factors of ``pyro.factor``.
        dims: the labels of the K dimensions, such as "z[0]".
        codes: (N, K), one draw of z for each datum, in the order of the data.
        given: latents u that z is conditional on. ``average_kl`` is then (1/N) sum_n E KL(q(z |
            x_n, u) || p(z | u)), ``mutual_information`` I(n; z | u) and ``marginal_kl`` E KL(q(z |
            u) || p(z | u)); all other values by dimension, except ``active_units``, are None.
        num_points: the number of data, of N, at whose draws q(z) is evaluated; None for all.
    """

    elbo: float
    reconstruction: float
    average_kl: float
    mutual_information: float
    marginal_kl: float
    log_n: float
    kl_per_dim: Tensor | None
    marginal_kl_per_dim: Tensor | None
    total_correlation: float | None
    dimension_wise_kl: float | None
    active_units: Tensor | None
    num_data: int
    num_samples: int
    stderr: Mapping[str, float | Tensor]
    other_kl: float = 0.0
    global_kl: float = 0.0
    num_globals: int = 0
    factor: float = 0.0
    dims: tuple[str, ...] = ()
    codes: Tensor = field(default_factory=lambda: torch.empty(0, 0), repr=False)
    given: tuple[str, ...] = ()
    num_points: int | None = None

    @property
    def notes(self) -> list[str]:
        """Remarks on the posterior, in sentences; empty where nothing stands out."""
        return _notes(self)

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset``: each number by its name, its standard error as ``<name>_stderr``.

        Values by dimension have the dim "latent_dim", with ``dims`` as coordinates.
        """
        import xarray

        values: dict[str, Any] = {}
        for name in (*SCALARS, "log_n", *VECTORS, "active_units"):
            value = getattr(self, name)
            if value is None:
                continue
            dims = ("latent_dim",) if isinstance(value, Tensor) else ()
            units = {} if name == "active_units" else {"units": "nats per datum"}
            values[name] = (dims, np.asarray(value), units)
            if name in self.stderr:
                values[f"{name}_stderr"] = (dims, np.asarray(self.stderr[name]), units)
        attributes = {
            "num_data": self.num_data,
            "num_samples": self.num_samples,
            "num_points": self.num_points or self.num_data,
        }
        return xarray.Dataset(values, {"latent_dim": list(self.dims)}, attributes)

    def _table(self) -> Table:
        shown = [(label, name) for label, name in _TABLE if getattr(self, name) is not None]
        shown = [line for line in shown if line[1] not in _RARE or getattr(self, line[1])]
        if self.dimension_wise_kl is None and self.total_correlation is not None:
            # which is then not a part of the marginal KL
            shown = [line for line in shown if line[1] != "total_correlation"]
            shown.append(("total correlation of q(z)", "total_correlation"))
        rows = [
            row(
                label,
                getattr(self, name),
                float(self.stderr.get(name, 0.0)),
                f"(log N = {self.log_n:.4f})" if name == "mutual_information" else "",
            )
            for label, name in shown
        ]
        if (active := self.active_units) is not None:
            rows.append(Row("active units", (f"{int(active.sum()):,} of {len(active):,}",)))
        given = f" given {', '.join(self.given)}" if self.given else ""
        given += f" over {self.num_globals} draws of the global latents" * bool(self.num_globals)
        of = f"{self.num_data:,} data, draws: {self.num_samples:,}"
        if _is_of_some(self):
            of += f", q(z) at those of {self.num_points:,} data"
        return Table(f"ELBO surgery{given}, nats per datum ({of})", rows)


SCALARS = (
    "elbo",
    "reconstruction",
    "average_kl",
    "mutual_information",
    "marginal_kl",
    "total_correlation",
    "dimension_wise_kl",
    "other_kl",
    "global_kl",
    "factor",
)
VECTORS = ("kl_per_dim", "marginal_kl_per_dim")
_TABLE = (
    ("ELBO", "elbo"),
    ("  reconstruction", "reconstruction"),
    ("  factor", "factor"),
    ("  average KL", "average_kl"),
    ("    mutual information", "mutual_information"),
    ("    marginal KL", "marginal_kl"),
    ("      total correlation", "total_correlation"),
    ("      dimension-wise KL", "dimension_wise_kl"),
    ("  KL of other latents", "other_kl"),
    ("  KL of global latents / N", "global_kl"),
)
_RARE = ("factor", "other_kl", "global_kl")  # shown where they are not 0


def _is_of_some(result: Surgery) -> bool:
    """Whether q(z) is not evaluated at the draws of all data."""
    return (result.num_points or result.num_data) < result.num_data


def _notes(result: Surgery) -> list[str]:
    return _of_posterior(result) + _of_points(result)


def _of_points(result: Surgery) -> list[str]:
    if not _is_of_some(result):
        return []
    return [
        f"q(z) is evaluated at the draws of {result.num_points:,} of the {result.num_data:,} data, "
        "as a sum over all data. The errors of what follows from it include the choice of these "
        "data; they halve with four times as many pairs."
    ]


def _of_posterior(result: Surgery) -> list[str]:
    notes = []
    active, kl = result.active_units, result.average_kl
    if result.num_data == 1:
        return ["A single datum has no aggregate posterior."]
    if result.given and kl < COLLAPSED:
        return [
            f"Given {', '.join(result.given)}, q(z | x) is nearly the prior for every x: z carries "
            "no further information about x."
        ]
    if kl < COLLAPSED or (active is not None and not active.any()):
        notes.append(
            "Posterior collapse: q(z | x) is nearly the same for every x, so that z tells nothing "
            "about x. Let beta rise from 0 (schedules.Linear), give free bits (FreeBitsELBO), or a "
            "decoder that needs z more."
        )
        return notes
    if active is not None and not active.all():
        names = [result.dims[i] for i in (~active).nonzero().flatten().tolist()]
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        notes.append(
            f"{len(names)} of {len(active)} dimensions are inactive ({shown}): their posterior "
            "mean does not vary with x."
        )
    if result.mutual_information > result.log_n - 0.1:
        notes.append(
            "Mutual information is at its bound log N: each z identifies its datum. Any further "
            "KL goes into the marginal KL."
        )
    if result.marginal_kl > max(0.5 * kl, 1.0):
        notes.append(
            "Most of the KL is marginal: the codes of all data together are not distributed as "
            "the prior, and the decoder has not learned from draws like the prior's. A learned "
            "prior would fit them."
        )
    return notes
