"""Leave-one-out cross-validation of a fit with global latents, from its draws."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyproelbo._evidence.pareto import pareto_smooth, threshold_of
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Table, row

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, eq=False, repr=False)
class Loo(Result):
    r"""How well the posterior given all other data predicts each datum.

    The draws z_s of q are weighted by

        r_si = p(z_s, x) / (q(z_s) p(x_i | z_s)),

    which corrects both for q, where it is not the posterior, and for the inclusion of datum i
    (Vehtari, Gelman & Gabry 2017; Magnusson et al. 2019, "Bayesian leave-one-out cross-validation
    for large data").

    Attributes:
        elpd: sum_i log p(x_i | x_{-i}), in nats.
        stderr: of elpd, from its spread over the data.
        num_effective: the effective number of parameters, sum_i log p(x_i | x) - elpd.
        pointwise: log p(x_i | x_{-i}), in the shape of the data's plates; NaN where masked.
        khat: Pareto k-hat of the weights for each datum, in the same shape; above the threshold
            its log density is unreliable.
        plates: the names of the dims of both.
        num_samples: the number of draws.
    """

    elpd: float
    stderr: float
    num_effective: float
    pointwise: np.ndarray
    khat: np.ndarray
    plates: tuple[str, ...] = ("datum",)
    num_samples: int = 1000

    @property
    def threshold(self) -> float:
        """The largest usable k-hat, as of :class:`~pyproelbo.Psis`."""
        return threshold_of(self.num_samples)

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dims of the plates."""
        import xarray

        nats = {"units": "nats"}
        values = {
            "elpd": ((), self.elpd, nats),
            "elpd_stderr": ((), self.stderr, nats),
            "num_effective": ((), self.num_effective, {"units": "parameters"}),
            "pointwise": (self.plates, self.pointwise, nats),
            "khat": (self.plates, self.khat, {"units": "1"}),
        }
        return xarray.Dataset(values)

    def _table(self) -> Table:
        num, bad = int(np.isfinite(self.pointwise).sum()), int((self.khat >= self.threshold).sum())
        worst = np.nanmax(self.khat)
        rows = [
            row("elpd", self.elpd, self.stderr),
            row("effective parameters", self.num_effective),
            row("largest k-hat", worst, None, f"({bad:,} of them bad)", decimals=2),
        ]
        return Table(f"Leave-one-out cross-validation, nats ({num:,} data)", rows)


def loo(tree: "xarray.DataTree", site: str | None = None) -> Loo:
    """Cross-validate what :func:`~pyproelbo.from_svi` returns (see :class:`Loo`).

    Args:
        tree: with the groups "posterior", "log_likelihood" and "sample_stats".
        site: the observed site, where there are several.

    Raises:
        ValueError: where a latent belongs to single data in the posterior of an amortised guide,
            which would compute another q(z | x) for a datum left out; where a latent has the same
            value in all draws; for a missing group or site.

    >>> import pyro, torch, pyro.distributions as dist, pyproelbo as pe
    >>> def model(x):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("mean", dist.Normal(x.mean(), len(x) ** -0.5))
    >>> result = loo(pe.from_svi(model, guide, (torch.randn(50),)))
    >>> 0 < result.num_effective < 3
    True
    """
    for group in ("posterior", "log_likelihood", "sample_stats"):
        if group not in tree.children:
            raise ValueError(
                f"tree should have the group {group!r}: leave it in from_svi's groups="
            )
    observed = tree["log_likelihood"].to_dataset()
    if site is None and len(observed) != 1:
        raise ValueError(f"site should be one of the observed sites {sorted(map(str, observed))}")
    if site is not None and site not in observed:
        raise ValueError(f"site should be one of {sorted(map(str, observed))}, got {site!r}")
    log_likelihood = observed[site or next(iter(observed))].transpose("chain", "draw", ...)
    plates = set(log_likelihood.dims) - {"chain", "draw"}
    posterior = tree["posterior"].to_dataset()
    for name, latent in tree["log_prior"].to_dataset().items() if "log_prior" in tree else ():
        shared = sorted(map(str, plates & set(latent.dims)))
        if shared and tree.attrs.get("is_amortised", 1):
            raise ValueError(
                f"latent {name!r} belongs to single data, in plate {shared[0]!r}, and the guide "
                "computes its posterior from the data: for a datum left out it would be another. "
                "Hold data out instead; cross-validation is for global latents, and for local "
                "latents of a guide that is not amortised"
            )
        if name in posterior and _is_point(posterior[name]):
            raise ValueError(
                f"latent {name!r} is the same in all draws, as with AutoDelta: a point does not "
                "show what it would be for other data. Draw the latent in the guide"
            )
    log_p = log_likelihood.values.reshape(-1, *log_likelihood.shape[2:])
    log_w = _log_weights(tree).reshape(-1, *[1] * (log_p.ndim - 1))
    seen = np.isfinite(log_p).all(0)
    filled = np.where(seen, log_p, 0.0)
    weights, khat = pareto_smooth(log_w - filled)
    pointwise = np.logaddexp.reduce(weights + filled, 0)
    whole = np.logaddexp.reduce(pareto_smooth(log_w)[0] + filled, 0)
    values = pointwise[seen]
    return Loo(
        float(values.sum()),
        float(values.std() * len(values) ** 0.5),
        float((whole - pointwise)[seen].sum()),
        np.where(seen, pointwise, np.nan),
        np.where(seen, khat, np.nan),
        tuple(map(str, log_likelihood.dims[2:])),
        len(log_p),
    )


def _log_weights(tree: "xarray.DataTree") -> np.ndarray:
    """The log-weights of the draws; none are left for draws already corrected by them."""
    stats = tree["sample_stats"].to_dataset()
    log_weight = stats["log_weight"].values
    return np.zeros_like(log_weight) if stats.attrs.get("corrected") else log_weight


def _is_point(draws: "xarray.DataArray") -> bool:
    """Whether a latent that is not discrete has the same value in all draws."""
    return draws.dtype.kind == "f" and bool((draws == draws.isel(chain=0, draw=0, drop=True)).all())
