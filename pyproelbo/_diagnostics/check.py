"""One question of a fit: is the posterior good, and if not, what is wrong?"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pyproelbo._evidence.decompositions import Decompositions, decompositions
from pyproelbo._evidence.psis import Psis, psis
from pyproelbo._results.result import Result, Section
from pyproelbo._results.tables import Row, Table
from pyproelbo._rows.batches import Arguments, ReportData
from pyproelbo._rows.dependencies import ignores_data
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.report_data import batches_of
from pyproelbo._surgery.surgery import COLLAPSED, Surgery, surgery
from pyproelbo._terms.traces import Program

if TYPE_CHECKING:
    import xarray

Verdict = Literal["fine", "doubtful", "bad"]
_WORST_FIRST: tuple[Verdict, ...] = ("bad", "doubtful", "fine")

SHARES = (0.01, 0.1)  # of the data, that may have a large k-hat: beyond, doubtful and bad
GAPS = (0.5, 3.0)  # nats per datum that the ELBO may lack: beyond, doubtful and bad
LEAST_ESS = 50.0  # of the median datum: below, log p(x) is uncertain


class Finding(NamedTuple):
    """What one diagnostic says, in a sentence."""

    verdict: Verdict
    text: str


@dataclass(frozen=True, eq=False, repr=False)
class Check(Result):
    """Whether a fit can be trusted, and why.

    Attributes:
        decompositions: the ELBO in every form, and how far it is from log p(x).
        psis: Pareto k-hat of each datum.
        surgery: where the KL goes; None where there is no aggregate posterior to tell.
        skipped: why not.
        is_amortised: whether the guide computes its posterior from the data that it is called with;
            otherwise it is that of the data that it was fitted to.
    """

    decompositions: Decompositions
    psis: Psis
    surgery: Surgery | None
    skipped: str = ""
    is_amortised: bool = True

    @property
    def findings(self) -> list[Finding]:
        """What each diagnostic says."""
        return list(_findings(self))

    @property
    def notes(self) -> list[str]:
        """The texts of the findings."""
        return [finding.text for finding in self.findings]

    @property
    def verdict(self) -> Verdict:
        """The worst of the findings."""
        found = {finding.verdict for finding in self.findings}
        return next(verdict for verdict in _WORST_FIRST if verdict in found)

    def as_json(self) -> dict[str, object]:
        """The verdict and what it rests on."""
        parts = self.decompositions
        return {
            "verdict": self.verdict,
            "findings": [finding._asdict() for finding in self.findings],
            "elbo": parts.elbo.value,
            "log_evidence": parts.log_evidence.value,
            "posterior_kl": parts.posterior_kl.value,
            "khat": self.psis.khat.tolist(),
            "joint_khat": self.psis.joint_khat,
        }

    def to_xarray(self) -> "xarray.DataTree":
        """An ``xarray.DataTree``: the verdict and its findings, and each part's own dataset.

        The groups are "decompositions", "psis" and, where it is known, "surgery". ``findings`` and
        the ``verdicts`` on them have the dim "finding"; the verdict on all is an attribute.
        """
        import xarray

        findings = {
            "findings": ("finding", self.notes),
            "verdicts": ("finding", [finding.verdict for finding in self.findings]),
        }
        attributes: dict[str, object] = {"verdict": self.verdict, "skipped": self.skipped}
        attributes["is_amortised"] = int(self.is_amortised)
        groups = {"/": xarray.Dataset(findings, attrs=attributes)}
        groups |= {name: part.to_xarray() for name, part in self._parts.items()}
        return xarray.DataTree.from_dict(groups)

    @property
    def _parts(self) -> dict[str, Result]:
        parts = {"decompositions": self.decompositions, "psis": self.psis, "surgery": self.surgery}
        return {name: part for name, part in parts.items() if part is not None}

    def _table(self) -> Table:
        rows = [Row(finding.verdict, (), finding.text) for finding in self.findings]
        return Table(f"Verdict: {self.verdict}", rows)

    def _sections(self) -> list[Section]:
        """Those of the parts, then the findings with the verdict on each."""
        parts = [section for part in self._parts.values() for section in part._sections()]
        return [*parts, Section(self._table())]


def _findings(check: Check) -> Iterator[Finding]:
    bad = float((check.psis.khat >= check.psis.threshold).double().mean())
    level = f"Pareto k-hat is above {check.psis.threshold:.2f} for {bad:.1%} of the data"
    few, some = SHARES
    if bad <= few:
        yield Finding("fine", f"{level}: importance weights of q can be trusted.")
    elif bad <= some:
        yield Finding("doubtful", f"{level}: do not trust what q says of those.")
    else:
        yield Finding(
            "bad",
            f"{level}: q misses what matters of their posterior. "
            + (
                "Train the guide longer, or take a richer family."
                if check.is_amortised
                else "It is not computed from the data, but that of those which the guide was "
                "fitted to, in their order: if these are others, fit it to them; else train it "
                "longer, or take a richer family."
            ),
        )
    gap = check.decompositions.posterior_kl.value
    missing = f"The ELBO lacks {gap:.2f} nats per datum to log p(x)"
    small, large = GAPS
    if gap < small:
        yield Finding("fine", f"{missing}.")
    else:
        verdict: Verdict = "doubtful" if gap < large else "bad"
        yield Finding(
            verdict, f"{missing}: pe.inference_gap tells if family or encoder is to blame."
        )
    ess = float(check.psis.effective_sample_size.median())
    if ess < LEAST_ESS:
        yield Finding(
            "doubtful",
            f"log p(x) itself is uncertain, and rather larger: the effective sample size is "
            f"{ess:.0f} of {check.psis.num_samples:,} (median).",
        )
    if check.surgery is not None:
        collapsed = check.surgery.average_kl < COLLAPSED
        for note in check.surgery.notes:
            yield Finding("doubtful" if collapsed else "fine", note)


def check(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    num_samples: int = 1000,
    plate: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Check:
    """Run the diagnostics that take seconds, and say in words: fine, doubtful or bad.

    The verdict is the worst of the findings:

    - Pareto k-hat above its threshold for at most 1% of the data is fine, for at most 10%
      doubtful, for more bad;
    - an ELBO that lacks less than 0.5 nats per datum to log p(x) is fine, less than 3 doubtful,
      more bad;
    - an effective sample size below 50, for the median datum, makes log p(x) doubtful;
    - an average KL below 0.1 nats per datum is a collapse, and doubtful.

    The threshold of k-hat, min(1 - 1 / log10 S, 0.7), is from Vehtari, Simpson, Gelman, Yao &
    Gabry (2024), "Pareto smoothed importance sampling". All other numbers are ours, and rules of
    thumb: judge by the values, which the :class:`Check` has, where an application knows better.
    No verdict can count what no draw of q has found, as a mode of the posterior that q misses.

    Args:
        model, guide, data, arguments, plate, batch_size, seed, progress: as :func:`evidence`. Give
            data that the fit has not seen, some hundreds or thousands.
        num_samples: draws for each datum.

    Raises:
        ValueError: as :func:`psis`.

    >>> import torch
    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> x = torch.randn(50, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> check(ppca, Exact(ppca), x, num_samples=100).findings[0].verdict
    'fine'
    """
    options: dict[str, Any] = {"plate": plate, "batch_size": batch_size, "seed": seed}
    options |= {"arguments": arguments, "progress": progress}
    with evaluating(model, guide):  # one report, which notes nothing twice
        tails = psis(model, guide, data, num_samples=num_samples, **options)
        forms = decompositions(model, guide, data, num_samples=num_samples, **options)
        first = next(iter(batches_of(model, guide, data, batch_size, arguments)))
        amortised = not ignores_data(guide, first.args, first.kwargs)
        try:
            return Check(forms, tails, surgery(model, guide, data, **options), "", amortised)
        except ValueError as error:
            return Check(forms, tails, None, str(error), amortised)
