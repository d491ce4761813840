r"""From one sample of the guide to an expectation under it, with the correct gradient.

Each class here turns the value t of a term at the sampled z into an estimate of E_q[t]. Its
value is unbiased, and so is its *gradient*, even where z cannot be reparameterised and the gradient
must come from the score function (Williams 1992; Schulman et al. 2015):

    grad E_q[t] = E_q[grad t + t grad log q].

An objective is then any smooth function of terms, and autograd does the rest.
"""

from typing import NamedTuple

from torch import Tensor

from pyproelbo._terms.traces import Plates


def sum_to(value: Tensor, plates: Plates, leading: int = 0) -> Tensor:
    """``value`` summed over every dim that belongs to none of ``plates``, but for the first."""
    keep = {plate.dim for plate in plates}
    drop = [dim for dim in range(leading - value.dim(), 0) if dim not in keep]
    if drop:
        value = value.sum(drop, keepdim=True)
        left = max(leading, value.dim() + min(keep, default=0))
        value = value.reshape(value.shape[:leading] + value.shape[left:])
    return value


class Term(NamedTuple):
    """A tensor in nats, and the plates that its dims are."""

    value: Tensor
    plates: Plates

    def __neg__(self) -> "Term":
        return Term(-self.value, self.plates)


def total(terms: list[Term], leading: int = 0) -> Term:
    """The sum of terms, over all plates that they do not share."""
    if len(terms) == 1:
        return terms[0]
    plates = frozenset.intersection(*(term.plates for term in terms))
    values = [sum_to(term.value, plates, leading) for term in terms]
    return Term(sum(values[1:], start=values[0]), plates)
