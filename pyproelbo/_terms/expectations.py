r"""From one sample of the guide to an expectation under it, with the right gradient.

Each class here turns the value t of a term at the sampled z into an estimate of E_q[t]. Its
value is unbiased, and so is its *gradient*, also where z cannot be reparameterised and the
gradient must come from the score function (Williams 1992; Schulman et al. 2015):

    grad E_q[t] = E_q[grad t + t grad log q].

An objective is then any smooth function of terms, and autograd does the rest.
"""

import math
from bisect import bisect_left
from collections import OrderedDict
from typing import Any, NamedTuple

import opt_einsum
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.traceenum_elbo import _get_common_scale
from pyro.infer.util import compute_site_dice_factor
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyproelbo._terms.roles import is_data
from pyproelbo._terms.traces import Plate, Site, Traces

Packed = Any  # a tensor with the symbols of its dims in ._pyro_dims, as Pyro packs them


Plates = frozenset[Plate]


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


class Sampled:
    r"""z was sampled: t + t.detach() (s - s.detach()), with s the score of z.

    s sums log q over the guide's sites that are not reparameterised. Plates are independent of
    each other, so that an element of t needs the scores of its own plates' elements alone:
    that is the variance reduction of Pyro's Trace_ELBO, here for auxiliary sites too.
    """

    def __init__(self, traces: Traces) -> None:
        self._order = {name: i for i, name in enumerate(traces.guide_sites)}
        # for each set of plates, which sites of the guide are in it, and their scores summed so far
        self._scores: dict[Plates, tuple[list[int], list[Tensor]]] = {}
        for name, site in traces.guide_sites.items():
            score = site["score_parts"].score_function
            if getattr(score, "requires_grad", False) and not is_data(site):
                orders, sums = self._scores.setdefault(site["plates"], ([], []))
                orders.append(self._order[name])
                sums.append(sums[-1] + score if sums else score)
        self._magic: dict[tuple[Plates, int], Tensor | None] = {}

    def __call__(self, value: Tensor, site: Site, before: str | None = None) -> Tensor:
        """E_q of ``value``, which has the dims of ``site``'s log_prob.

        ``before`` names a site of the guide that ``value`` does not depend on, nor on any
        after it: their scores would add nothing but noise.
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
        """E_q[log p] of a site of the model, or of what the guide observes."""
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


class _Factor(NamedTuple):
    name: str
    plates: frozenset[str]
    symbol: str | None  # the dim that sums to one, None for a site that has no such dim
    prob: Packed
    runs: int  # how many values it takes in runs of their own, 1 unless sequential


class Enumerated:
    r"""Discrete sites of the guide were enumerated: sum_z q(z) t(z), exactly.

    Where they were enumerated sequentially, this is the part of the sum for one of their
    values. As Pyro's TraceEnum_ELBO, this takes it that nothing outside of a plate depends on
    what is inside, and uses DiCE factors (Foerster et al. 2018) for sites that were sampled.
    """

    def __init__(self, traces: Traces) -> None:
        guide, model = map(prune_subsample_sites, (traces.guide, traces.model))
        guide.pack_tensors()
        model.pack_tensors(guide.plate_to_symbol)
        self._dims = {**guide.symbol_to_dim, **model.symbol_to_dim}
        self._symbols = model.plate_to_symbol
        self._order = {name: i for i, name in enumerate(traces.guide_sites)}
        self._probs: dict[tuple[tuple[str, ...], str], Packed] = {}  # what several terms need
        self._factors: list[_Factor] = []
        for name, site in traces.guide_sites.items():
            if is_data(site):
                continue
            log_prob, _ = compute_site_dice_factor(site)
            if not is_identically_zero(log_prob):
                infer, plates = site["infer"], self._symbols_of(site["plates"])
                exact = infer.get("num_samples") is None
                symbol = infer.get("_enumerate_symbol") if exact else None
                prob, runs = packed.exp(log_prob), infer.get("_enum_total", 1)
                self._factors.append(_Factor(name, plates, symbol, prob, runs))

    def __call__(self, value: Tensor, site: Site, before: str | None = None) -> Tensor:
        """As :meth:`Sampled.__call__`; the dims of enumeration are summed out."""
        value = packed.pack(value, site["infer"]["_dim_to_symbol"])
        return self._expect(value, site["plates"], site["name"], before)

    def log_prob(self, site: Site) -> Term:
        """E_q[log p] of a site of the model, or E_q[log q] of one of the guide."""
        return Term(self(site["log_prob"], site), site["plates"])

    log_q = log_prob

    def components(self, enumerated: dict[str, Site], others: dict[str, Site]) -> list[list[Site]]:
        """The sites of the model that depend on ``enumerated`` ones, in connected lists."""
        symbols = {site["infer"]["_enumerate_symbol"] for site in enumerated.values()}
        components: list[tuple[set[str], list[Site]]] = []
        for site in (*enumerated.values(), *others.values()):
            dims = symbols.intersection(site["packed"]["unscaled_log_prob"]._pyro_dims)
            if dims:
                joined = [c for c in components if c[0] & dims]
                components = [c for c in components if not c[0] & dims]
                sites = [s for _, part in joined for s in part]
                components.append((dims.union(*(d for d, _ in joined)), [*sites, site]))
        return [sites for _, sites in components]

    def marginal(self, sites: list[Site], enumerated: dict[str, Site]) -> Term:
        """E_q[log sum_c prod p] of sites of the model, over the c that the model enumerates."""
        scale = _get_common_scale([site["scale"] for site in sites])
        symbols = {s["infer"]["_enumerate_symbol"] for s in sites if s["name"] in enumerated}
        tree: OrderedDict[frozenset, list[Packed]] = OrderedDict()
        for site in sites:
            factor = site["packed"]["unscaled_log_prob"]
            if site["name"] in enumerated:
                factor = _weight_of_values(site, factor)
            else:
                factor = packed.scale_and_mask(factor, mask=site["packed"]["mask"])
            tree.setdefault(self._symbols_of(site["plates"]), []).append(factor)
        plates = {self._symbols[plate.name]: plate for site in sites for plate in site["plates"]}
        name = sites[-1]["name"]
        terms = []
        for kept, factors in contract_tensor_tree(tree, symbols).items():
            within = frozenset(plates[symbol] for symbol in kept)
            for factor in factors:
                value = packed.scale_and_mask(factor, scale=scale)
                terms.append(Term(self._expect(value, within, name), within))
        return total(terms)

    def _symbols_of(self, plates: Plates) -> frozenset[str]:
        return frozenset(self._symbols[plate.name] for plate in plates)

    def _expect(
        self, value: Packed, within: Plates, name: str, before: str | None = None
    ) -> Tensor:
        plates, dims = self._symbols_of(within), set(value._pyro_dims)
        upstream = [
            factor
            for factor in self._factors
            if factor.plates <= plates
            and (before is None or self._order[factor.name] < self._order[before])
        ]
        factors = _needed(upstream, dims)
        summed = set[str]().union(*(factor.prob._pyro_dims for factor in factors))
        if not dims <= plates | summed:
            raise ValueError(
                f"site {name!r} is outside of a plate, but depends on an enumerated site "
                "inside of it: move it into the plate, or sample the other site instead"
            )
        if factors:
            prob = self._marginal_prob(factors, "".join(sorted(summed & (dims | plates))))
            prob, value = packed.broadcast_all(prob, value)
            # log-density -inf at a z with q(z) = 0 adds nothing, and 0 * -inf is no number
            expected: Packed = prob * value.masked_fill(prob == 0, 0.0)
            drop = [i for i, dim in enumerate(value._pyro_dims) if dim not in plates]
            kept = "".join(dim for dim in value._pyro_dims if dim in plates)
            value = expected.sum(drop) if drop else expected
            value._pyro_dims = kept
        value = packed.unpack(value, self._dims)
        runs = math.prod(f.runs for f in self._factors if f.runs > 1 and f not in upstream)
        if runs > 1:  # each of those runs adds the same value
            value = value / runs
        shape = [1] * -min((plate.dim for plate in within), default=0)
        for plate in within:
            shape[plate.dim] = plate.size
        return value.expand(shape)

    def _marginal_prob(self, factors: list[_Factor], dims: str) -> Packed:
        """The product of the factors, summed over all dims but ``dims``."""
        key = tuple(factor.name for factor in factors), dims
        if key not in self._probs:
            probs = [factor.prob for factor in factors]
            equation = ",".join(prob._pyro_dims for prob in probs) + "->" + dims
            self._probs[key] = opt_einsum.contract(equation, *probs, backend="torch")
            self._probs[key]._pyro_dims = dims
        return self._probs[key]


def _weight_of_values(site: Site, log_prob: Packed) -> Packed:
    """log p(c) of the values c of a site that the model sums out.

    Where they are K draws of the prior in place of all values (tensor Monte Carlo, as in Pyro's
    TraceTMC_ELBO), each stands for 1 / K, with the gradient of the score if it has no other.
    """
    num_samples = site["infer"].get("num_samples")
    if num_samples is None:
        return log_prob
    score = log_prob.detach() if site["fn"].has_rsample else log_prob
    weight = score - score.detach() - math.log(num_samples)
    weight._pyro_dims = log_prob._pyro_dims
    return weight


def _needed(factors: list[_Factor], dims: set[str]) -> list[_Factor]:
    """The factors that a value with ``dims`` depends on, in the guide's order; others sum to 1."""
    needed, dims = [], set(dims)
    for factor in reversed(factors):  # a site depends on what was sampled before
        if factor.symbol is None or factor.symbol in dims:
            needed.append(factor)
            dims.update(factor.prob._pyro_dims)
    return needed[::-1]
