"""Which components of a mixture prior the codes of the data use."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyproelbo._messages.renamed import renamed
from pyproelbo._results.numbers import share as percent
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Row, Table, row
from pyproelbo.priors.mixture import Mixture, MixturePrior

if TYPE_CHECKING:
    import xarray

DEAD = 0.01  # of the share 1 / K: a component with less explains nothing


@dataclass(frozen=True, eq=False, repr=False)
class Usage(Result):
    r"""Shares of N codes z_n among a prior's K components, by r_nk = p(k | z_n).

    Attributes:
        weights: w_k, (K,), each component's share in the prior.
        usage: (1/N) sum_n r_nk, (K,), its share of the codes. Both sum to 1.
        used: exp of the entropy of ``usage``, the effective number of components in use: K if the
            codes are spread evenly, 1 if one component has them all.
        distinct: exp of the mutual information I(k; z) between a code and its component, the
            effective number of distinguishable components: 1 if all are the same.
        num_codes: N.
    """

    weights: Tensor
    usage: Tensor
    used: float
    distinct: float
    num_codes: int

    @property
    def dead(self) -> Tensor:
        """Whether a component has less than a hundredth of the share 1 / K of the codes: (K,)."""
        return self.usage * len(self.usage) < DEAD

    @property
    def notes(self) -> list[str]:
        """Remarks on the prior, in sentences; empty where nothing stands out."""
        K, notes = len(self.usage), []
        if (num := int(self.dead.sum())) > 0:
            notes.append(
                f"{num} of {K} components are dead: they account for hardly any codes. Take fewer, "
                "or start pseudo-inputs at data (RowsOf)."
            )
        if K > 1 and self.distinct < 1.5:
            notes.append(
                "The components have collapsed: they are nearly the same, and the mixture is "
                "little more than one of them. Start pseudo-inputs at data (RowsOf), or let beta "
                "rise from 0."
            )
        return notes

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` with the dim "component"."""
        import xarray

        values: dict[str, Any] = {
            name: ("component", np.asarray(getattr(self, name)), {"units": "1"})
            for name in ("weights", "usage")
        }
        values["dead"] = ("component", np.asarray(self.dead))
        for name in ("used", "distinct"):
            values[name] = ((), getattr(self, name), {"units": "components"})
        return xarray.Dataset(values, attrs={"num_codes": self.num_codes})

    def _table(self) -> Table:
        K, top = len(self.usage), percent(float(self.usage.max()))
        of_shares = "(exp of the entropy of their shares)"
        rows = [
            row("components in use", self.used, None, of_shares, decimals=1),
            row("components told apart", self.distinct, None, "(exp of I(component; z))", 1),
            row("dead components", int(self.dead.sum())),
            Row("largest share of codes", (top,), f"(1 / K = {percent(1 / K)})"),
        ]
        return Table(f"Prior of {K:,} components, at the codes of {self.num_codes:,} data", rows)


@torch.no_grad()
@renamed(chunk="max_elements")
def usage(prior: MixturePrior | Mixture, codes: Tensor, *, max_elements: int = 2**24) -> Usage:
    """The shares of a mixture prior's components in the codes of the data.

    Args:
        prior: the prior, or the mixture that it returns.
        codes: z, (N, ...), one draw of q(z | x_n) for each datum, such as
            ``pe.surgery(model, guide, x, site="z").codes``; dims of events may be flat.
        max_elements: how many of the codes x components x dimensions numbers to hold at once.

    Raises:
        ValueError: if ``codes`` are empty, not finite, or differ in size from the prior's z.

    >>> import pyro.distributions as dist
    >>> far = Mixture(dist.Normal(torch.tensor([-9.0, 0.0, 9.0]).unsqueeze(1), 1.0).to_event(1))
    >>> result = usage(far, torch.tensor([[-9.0], [9.0]]))
    >>> round(result.used, 3), round(result.distinct, 3), result.dead.tolist()
    (2.0, 2.0, [False, True, False])
    """
    mixture = prior if isinstance(prior, Mixture) else prior()
    shape = mixture.event_shape
    if codes.dim() < 1 or len(codes) == 0 or codes[0].numel() != shape.numel():
        raise ValueError(
            f"codes should have shape (N, {shape.numel()}) with at least one row, for z of shape "
            f"{tuple(shape)}, got {tuple(codes.shape)}"
        )
    if not codes.isfinite().all():
        raise ValueError("codes should be finite: remove the data whose codes are not")
    weights = mixture.log_weights.exp()
    codes = codes.to(weights).reshape(len(codes), *shape)
    sums = torch.zeros(len(weights), dtype=torch.float64, device="cpu")
    entropy = 0.0
    for r in _blocks(mixture, codes, max_elements):
        sums += r.sum(0).cpu()
        entropy += torch.special.entr(r).sum().item()
    share = sums / len(codes)
    total = torch.special.entr(share).sum().item()
    return Usage(
        weights.cpu(),
        share,
        math.exp(total),
        math.exp(max(total - entropy / len(codes), 0.0)),
        len(codes),
    )


def _blocks(mixture: Mixture, codes: Tensor, max_elements: int) -> Iterator[Tensor]:
    """Responsibilities of the codes, block by block."""
    size = mixture.num_components * max(1, mixture.event_shape.numel())
    for z in codes.split(max(1, max_elements // size)):
        yield mixture.responsibilities(z)
