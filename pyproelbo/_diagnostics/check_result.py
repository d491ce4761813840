"""The result of a check: the reports that it has made, its findings and its verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from pyproelbo._diagnostics.findings import WORST_FIRST, Finding, Verdict, findings
from pyproelbo._evidence.decompositions import Decompositions
from pyproelbo._evidence.fisher import FisherDivergence
from pyproelbo._evidence.linear_response import LinearResponse
from pyproelbo._evidence.moments import Moments
from pyproelbo._evidence.psis import Psis
from pyproelbo._results.per import Per
from pyproelbo._results.result import Result, Section
from pyproelbo._results.tables import Row, Table
from pyproelbo._surgery.result import Surgery

if TYPE_CHECKING:
    import xarray

NO_SURGERY = (
    "the data are parts of a whole, whose q(z) is one: give the merged check the surgery of "
    "pe.surgery_part, by .with_surgery()"
)


@dataclass(frozen=True, eq=False, repr=False)
class Check(Result):
    """Whether a fit can be trusted, and why.

    Attributes:
        decompositions: the ELBO in every form, and how far it is from log p(x).
        psis: Pareto k-hat of each datum, or of the data set.
        moments: the errors of q's means and sds, by its weighted draws.
        surgery: the parts of the KL; None where there is no aggregate posterior.
        skipped: why ``surgery`` is None.
        is_amortised: whether the guide computes its posterior from the data that it is called with;
            otherwise its posterior belongs to the data that it was fitted to.
        fisher: the Fisher divergence of q, by gradients; None where a latent has no gradients.
        response: the linear response that was given; None where there was none.
        levels: for a program with global and local latents, Pareto k-hat and moments by level,
            "global" and "local"; empty for others.
    """

    decompositions: Decompositions
    psis: Psis
    moments: Moments
    surgery: Surgery | None
    skipped: str = ""
    is_amortised: bool = True
    levels: Mapping[str, tuple[Psis, Moments]] = field(default_factory=dict)
    fisher: FisherDivergence | None = None
    response: LinearResponse | None = None

    @classmethod
    def _merged(cls, parts: Sequence[Any]) -> Self:
        if len({str(part.response) for part in parts}) > 1:
            raise ValueError("results should have the same linear_response")
        fisher = [part.fisher for part in parts if part.fisher is not None]
        return cls(
            Decompositions._merged([part.decompositions for part in parts]),
            Psis._merged([part.psis for part in parts]),
            Moments._merged([part.moments for part in parts]),
            None,
            NO_SURGERY,
            is_amortised=all(part.is_amortised for part in parts),
            fisher=FisherDivergence._merged(fisher) if len(fisher) == len(parts) else None,
            response=parts[0].response,
        )

    def with_surgery(self, surgery: Surgery) -> "Check":
        """The same with a surgery, as of :func:`~pyproelbo.surgery_part`.

        Raises:
            ValueError: for a surgery of another number of data.
        """
        if surgery.num_data != self.decompositions.num_data:
            raise ValueError(
                f"surgery should be of the {self.decompositions.num_data:,} data of the check, "
                f"got one of {surgery.num_data:,}"
            )
        return replace(self, surgery=surgery, skipped="")

    @property
    def per(self) -> Per:
        """The meaning of a row: a "datum"; or the "data set", where a latent is global."""
        return self.psis.per

    @property
    def findings(self) -> list[Finding]:
        """The result of each diagnostic."""
        return list(findings(self))

    @property
    def notes(self) -> list[str]:
        """The texts of the findings."""
        return [finding.text for finding in self.findings]

    @property
    def verdict(self) -> Verdict:
        """The worst of the findings."""
        found = {finding.verdict for finding in self.findings}
        return next(verdict for verdict in WORST_FIRST if verdict in found)

    def as_json(self) -> dict[str, object]:
        """The verdict and the numbers behind it."""
        parts = self.decompositions
        return {
            "verdict": self.verdict,
            "findings": [finding._asdict() for finding in self.findings],
            "elbo": parts.elbo.value,
            "log_evidence": parts.log_evidence.value,
            "posterior_kl": parts.posterior_kl.value,
            "per": self.per,
            "khat": self.psis.khat.tolist(),
            "joint_khat": self.psis.joint_khat,
            "khat_by_level": {level: part.khat.tolist() for level, (part, _) in self._levels},
        }

    def to_xarray(self) -> "xarray.DataTree":
        """An ``xarray.DataTree``: the verdict and its findings, and each part's own dataset.

        The groups are "decompositions", "psis", "moments", and, where they are known, "fisher",
        "linear_response" and "surgery"; where there are levels "psis_global" and so on.
        ``findings`` and the ``verdicts`` on them have the dim "finding"; the verdict on all is an
        attribute.
        """
        import xarray

        findings = {
            "findings": ("finding", self.notes),
            "verdicts": ("finding", [finding.verdict for finding in self.findings]),
        }
        attributes: dict[str, object] = {"verdict": self.verdict, "skipped": self.skipped}
        attributes |= {"per": self.per, "is_amortised": int(self.is_amortised)}
        groups = {"/": xarray.Dataset(findings, attrs=attributes)}
        groups |= {name: part.to_xarray() for name, part in self._parts.items()}
        return xarray.DataTree.from_dict(groups)

    @property
    def _levels(self) -> list[tuple[str, tuple[Psis, Moments]]]:
        return list(self.levels.items())

    @property
    def _parts(self) -> dict[str, Result]:
        parts = {
            "decompositions": self.decompositions,
            "psis": self.psis,
            **({} if self.levels else {"moments": self.moments}),
            **{f"psis_{level}": part for level, (part, _) in self._levels},
            **{f"moments_{level}": part for level, (_, part) in self._levels},
            "fisher": self.fisher,
            "linear_response": self.response,
            "surgery": self.surgery,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _table(self) -> Table:
        rows = [Row(finding.verdict, (), finding.text) for finding in self.findings]
        return Table(f"Verdict: {self.verdict}", rows)

    def _sections(self) -> list[Section]:
        """The sections of the parts, then the findings with the verdict on each."""
        parts = [section for part in self._parts.values() for section in part._sections()]
        return [*parts, Section(self._table())]
