"""The result on the noise of a gradient, by term and estimator."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from pyproelbo._results.numbers import share, with_error
from pyproelbo._results.result import Result, Section
from pyproelbo._results.tables import Cell, Number, Row, Table

if TYPE_CHECKING:
    import xarray

_LOWER = 0.8  # how much less noise is worth a sentence
_MOST = 0.5
WHOSE = {
    "model": "the model's parameters",
    "guide": "the guide's parameters",
    "shared": "what model and guide share",
    "all": "all parameters",
}
_LABELS = {
    "log_likelihood": "log-likelihood of",
    "factors": "log-factor",
    "guide_log_likelihood": "guide's log-likelihood of",
    "log_evidence": "log-evidence by",
    "kl": "KL of",
    "log_prior": "  log-prior of",
    "log_q": "  log q of",
    "rest": "what is in no term",
}
_HOW = {
    "auto": "kl='auto', the default, with the closed-form KL of",
    "sampled": "kl='sampled'",
    "path": "the path gradient, ImportanceWeightedELBO(1, gradient='path')",
    "score": "the score function of all draws",
}


class _Gain(NamedTuple):
    """The ratio of an estimator's noise to another's in the g-th parameters, with its error."""

    name: str
    other: str
    g: int
    ratio: float
    error: float


@dataclass(frozen=True, eq=False, repr=False)
class GradientNoise(Result):
    r"""Signal and noise of the gradient of an objective, by its terms.

    With g_t the gradient of term t at one draw (and, for minibatches, at one choice of rows), and g
    = sum_t g_t the gradient of the objective,

        signal_t = |E g_t|^2,    noise_t = E |g_t - E g_t|^2,    snr_t = (signal_t / noise_t)^(1/2),
        share_t = E (g_t - E g_t)^T (g - E g) / E |g - E g|^2.

    Noise is the trace of the covariance: for a mean of K draws it is K times smaller. Terms are
    correlated: their noises do not add up to that of the total. Their shares add up to 1; a share
    is negative where a term cancels noise of others. Norms are Euclidean, in the *unconstrained*
    parameters as they are, and depend on their units: compare terms and estimators, not the
    parameters of two programs.

    Arrays are (E, G, T), for estimators, groups of parameters and terms. NaN marks a term that the
    estimator does not have.

    Attributes:
        estimators: how the gradient is estimated, see :func:`gradient_noise`.
        parameters: "model", "guide", "shared" by both, as far as there are any, and "all".
        terms: T pairs of a kind and a site: "log_likelihood" of data, "kl" of a latent, which is
            the sum of its parts "log_prior" and "log_q" where it is sampled, "factors", and so on;
            the last is "total".
        within: for each term the key of the KL that it is a part of; None if it is part of none.
        signal: as above, estimated without bias; a small one may therefore be negative.
        noise: likewise.
        snr: the square root of their ratio; 0, with an unknown error, for a negative signal, which
            is lost in the noise; infinite without noise.
        share: as above.
        of_rows: the part of ``noise`` that the choice of rows adds, where it is random; else None.
            A larger minibatch lowers it; more draws do not.
        signal_stderr, noise_stderr, snr_stderr, share_stderr, of_rows_stderr: Monte Carlo errors:
            a jackknife that leaves out groups of draws in turn.
        ratio: the total noise of each estimator divided by that of ``baseline``, from the same
            draws, (E, G), with its error ``ratio_stderr``.
        baseline: an estimator.
        analytic: the latents whose KL has a valid closed form, which "auto" uses.
        num_samples: the number of independent gradients.
        batch_size: rows of each; None for all.
        is_elbo: whether these are estimators of the ELBO's gradient; otherwise objectives, by name.
    """

    estimators: tuple[str, ...]
    parameters: tuple[str, ...]
    terms: tuple[tuple[str, str], ...]
    within: tuple[str | None, ...]
    signal: Tensor
    noise: Tensor
    snr: Tensor
    share: Tensor
    of_rows: Tensor | None
    signal_stderr: Tensor
    noise_stderr: Tensor
    snr_stderr: Tensor
    share_stderr: Tensor
    of_rows_stderr: Tensor | None
    ratio: Tensor
    ratio_stderr: Tensor
    baseline: str
    analytic: tuple[str, ...]
    num_samples: int
    batch_size: int | None
    is_elbo: bool = True

    @property
    def labels(self) -> tuple[str, ...]:
        """The terms in words."""
        words = ((_LABELS.get(kind, kind), site) for kind, site in self.terms)
        return tuple(f"{of} {site}".rstrip() for of, site in words)

    @property
    def notes(self) -> list[str]:
        """What to do about the noise, in a sentence; empty where nothing would lower it by much."""
        return [note for note in (self._advice(), self._about_rows()) if note is not None]

    def _advice(self) -> str | None:
        """The estimator with the least noise, if clearly less than the usual one."""
        if not self.is_elbo:
            return None
        others = [name for name in self.estimators if name != self.baseline]
        found = [self._gain(name, self.baseline) for name in others]
        if not any(found) and self.baseline == "auto":  # as against Pyro's Trace_ELBO
            found = [self._gain("auto", "sampled")]
        gains = [gain for gain in found if gain is not None]
        if not gains:
            return None
        best, other, g, ratio, error = min(gains, key=lambda gain: gain.ratio)
        how = _HOW[best] + (f" {', '.join(self.analytic)}" if best == "auto" else "")
        return (
            f"Take {how}: its gradient in {WHOSE[self.parameters[g]]} has "
            f"{with_error(ratio, error, 2)} times the noise that kl='{other}' has."
        )

    def _gain(self, name: str, other: str) -> "_Gain | None":
        """The parameters in which an estimator has the smallest fraction of another's noise.

        None if it has clearly less nowhere, or clearly more somewhere.
        """
        i, j = (self.estimators.index(each) for each in (name, other))
        ratio = self.ratio[i] / self.ratio[j]
        relative = [self.ratio_stderr[k] / self.ratio[k] for k in (i, j)]
        error = ratio * (relative[0].square() + relative[1].square()).nan_to_num().sqrt()
        ratio, error = ratio[:-1].nan_to_num(1.0, math.inf), error[:-1].nan_to_num()
        g = int(ratio.argmin())
        if ratio[g] + 2 * error[g] > _LOWER or (ratio - 2 * error > 1 / _LOWER).any():
            return None
        return _Gain(name, other, g, float(ratio[g]), float(error[g]))

    def _about_rows(self) -> str | None:
        """Whether the choice of rows makes most of the noise."""
        if self.of_rows is None:
            return None
        i = self.estimators.index(self.baseline)
        part = (self.of_rows[i, :-1, -1] / self.noise[i, :-1, -1]).nan_to_num()
        g = int(part.argmax())
        if part[g] < _MOST:
            return None
        return (
            f"The choice of rows makes {share(float(part[g]))} of the noise in "
            f"{WHOSE[self.parameters[g]]} ({self.baseline}): a larger minibatch lowers it, more "
            "draws or another estimator do not."
        )

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dims "estimator", "parameters" and "term"."""
        import xarray

        dims = ("estimator", "parameters", "term")
        units = {"signal": "nats^2", "noise": "nats^2", "snr": "1", "share": "1"}
        units |= {} if self.of_rows is None else {"of_rows": "nats^2"}
        values: dict[str, Any] = {
            name + end: (dims, getattr(self, name + end).numpy(), {"units": unit})
            for name, unit in units.items()
            for end in ("", "_stderr")
        }
        for name in ("ratio", "ratio_stderr"):
            values[name] = (dims[:2], getattr(self, name).numpy(), {"units": "1"})
        coordinates: dict[str, Any] = {
            "estimator": list(self.estimators),
            "parameters": list(self.parameters),
            "term": [f"{kind} {site}".rstrip() for kind, site in self.terms],
            "kind": ("term", [kind for kind, _ in self.terms]),
            "site": ("term", [site for _, site in self.terms]),
        }
        attributes = {"num_samples": self.num_samples, "baseline": self.baseline}
        attributes |= {} if self.batch_size is None else {"batch_size": self.batch_size}
        return xarray.Dataset(values, coordinates, attributes)

    def _table(self) -> Table:
        return self._sections()[0].table

    def _sections(self) -> list[Section]:
        groups = [g for g, name in enumerate(self.parameters) if name != "all"]
        tables = [self._table_of(g) for g in groups]
        return [*map(Section, tables[:-1]), Section(tables[-1], self.notes)]

    def _table_of(self, g: int) -> Table:
        """The noise of each term with its share, by estimator; then signal to noise."""
        rows = []
        for t, label in enumerate(self.labels):
            if not bool(
                (self.noise[:, g, t].nan_to_num() + self.signal[:, g, t].nan_to_num()).any()
            ):
                continue  # it does not depend on these parameters
            rows.append(Row(label, self._cells(g, t)))
        totals = ["of_rows"] * (self.of_rows is not None) + ["signal", "snr"]
        for name in totals if rows else ():
            rows.append(Row(_TOTALS[name], self._totals(name, g)))
        if not rows:
            rows.append(Row("no gradient", ()))
        heads = ("noise of", *(head for name in self.estimators for head in (name, "share")))
        whose = WHOSE[self.parameters[g]]
        of = "" if self.batch_size is None else f" of {self.batch_size:,} rows"
        title = f"Gradient in {whose}, nats^2 (gradients{of}: {self.num_samples:,})"
        return Table(title, rows, heads)

    def _cells(self, g: int, t: int) -> tuple[Cell, ...]:
        cells: list[Cell] = []
        for e in range(len(self.estimators)):
            if self.noise[e, g, t].isnan():
                cells += [None, None]
                continue
            cells.append(Number(float(self.noise[e, g, t]), float(self.noise_stderr[e, g, t])))
            part = float(self.share[e, g, t])
            cells.append(None if np.isnan(part) else share(part))
        return tuple(cells)

    def _totals(self, name: str, g: int) -> tuple[Cell, ...]:
        found, errors = (getattr(self, name + end)[:, g, -1] for end in ("", "_stderr"))
        pairs = zip(found.tolist(), errors.tolist(), strict=True)
        return tuple(cell for pair in pairs for cell in (Number(*pair), None))


_TOTALS = {
    "of_rows": "  by the choice of rows",
    "signal": "squared norm of the mean",
    "snr": "signal to noise",
}
