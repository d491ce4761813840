"""Expectations where z was sampled: their gradient by the score function, or at fixed draws."""

from bisect import bisect_left

from pyro.distributions.util import is_identically_zero
from torch import Tensor

from pyproelbo._backend.pyro_private import scale_and_mask
from pyproelbo._terms.expectations import Term, sum_to
from pyproelbo._terms.roles import is_data
from pyproelbo._terms.traces import Plates, Site, Traces


class Sampled:
    r"""z was sampled: t + t.detach() (s - s.detach()), with s the score of z.

    s sums log q over the guide's sites that are not reparameterised. Plate elements are
    independent: an element of t needs only the scores of its own plates' elements. This is the
    variance reduction of Pyro's Trace_ELBO, here for auxiliary sites too.
    """

    def __init__(self, traces: Traces) -> None:
        self._order = {name: i for i, name in enumerate(traces.guide_sites)}
        # for each set of plates, which sites of the guide are in it, and their scores summed so far
        self._scores: dict[Plates, tuple[list[int], list[Tensor]]] = {}
        for name in traces.scored:
            site = traces.guide_sites[name]
            score = site["score_parts"].score_function
            if not is_data(site):
                orders, sums = self._scores.setdefault(site["plates"], ([], []))
                orders.append(self._order[name])
                sums.append(sums[-1] + score if sums else score)
        self._magic: dict[tuple[Plates, int], Tensor | None] = {}

    def __call__(self, value: Tensor, site: Site, before: str | None = None) -> Tensor:
        """E_q of ``value``, which has the dims of ``site``'s log_prob.

        ``before`` names a site of the guide such that ``value`` depends neither on it nor on any
        after it: their scores would add only noise.
        """
        if not self._scores:
            return value
        end = len(self._order) if before is None else self._order[before]
        key = site["plates"], end
        if key not in self._magic:
            self._magic[key] = self._zero_with_the_gradient_of_the_score(*key)
        zero = self._magic[key]
        return value if zero is None else value + value.detach() * zero

    def _zero_with_the_gradient_of_the_score(self, within: Plates, end: int) -> Tensor | None:
        """s - s.detach() for the sites of the guide before the ``end``-th, in some plates."""
        parts = [
            sum_to(sums[num - 1], plates & within)
            for plates, (orders, sums) in self._scores.items()
            if (num := bisect_left(orders, end))
        ]
        if not parts:
            return None
        score = sum(parts[1:], start=parts[0])
        return score - score.detach()

    def log_prob(self, site: Site) -> Term:
        """E_q[log p] of a site of the model, or of one that the guide observes."""
        return Term(self(site["log_prob"], site), site["plates"])

    def log_q(self, site: Site) -> Term:
        """E_q[log q] of a site of the guide, without the part of its gradient that averages 0."""
        log_prob, _, entropy = site["score_parts"]
        if entropy is not log_prob:
            log_prob = log_prob.detach()
            if not is_identically_zero(entropy):
                log_prob = log_prob + (entropy - entropy.detach())
        return Term(self(log_prob, site), site["plates"])

    def by_time(self, site: Site) -> Term:
        """E_q[log p] or E_q[log q] of each step of a sequence-valued site, dims (T, *plates)."""
        value = site["log_prob_by_time"].movedim(-1, 0)
        value = scale_and_mask(value, site["scale"], site["mask"])
        if "score_parts" in site and not site["fn"].has_rsample:
            value = value.detach()
        return Term(self(value, site), site["plates"])


class AtDraws:
    """Terms at the draws: densities, from which weights of several draws are made."""

    def __call__(self, value: Tensor, site: Site, before: str | None = None) -> Tensor:
        """``value`` itself."""
        return value

    def log_prob(self, site: Site) -> Term:
        """log p of a site of the model, or log q of one of the guide."""
        return Term(site["log_prob"], site["plates"])

    log_q = log_prob

    def by_time(self, site: Site) -> Term:
        """log p or log q of each step of a sequence-valued site, dims (T, *plates)."""
        value = site["log_prob_by_time"].movedim(-1, 0)
        return Term(scale_and_mask(value, site["scale"], site["mask"]), site["plates"])
