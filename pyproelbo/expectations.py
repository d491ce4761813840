r"""From one sample of the guide to an expectation under it, with the right gradient.

Each class here turns the value t of a term at the sampled z into an estimate of E_q[t]. Its
value is unbiased, and so is its *gradient*, also where z cannot be reparameterised and the
gradient must come from the score function (Williams 1992; Schulman et al. 2015):

    grad E_q[t] = E_q[grad t + t grad log q].

An objective is then any smooth function of terms, and autograd does the rest.
"""

import math
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import opt_einsum
from pyro.distributions.util import is_identically_zero
from pyro.infer.traceenum_elbo import _get_common_scale
from pyro.infer.util import compute_site_dice_factor
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from torch import Tensor

from pyproelbo.traces import Plate, Site, Traces

Packed = Any  # a tensor with the symbols of its dims in ._pyro_dims, as Pyro packs them


Plates = frozenset[Plate]


def sum_to(value: Tensor, plates: Plates) -> Tensor:
    """``value`` summed over every dim that belongs to none of ``plates``."""
    keep = {plate.dim for plate in plates}
    drop = [dim for dim in range(-value.dim(), 0) if dim not in keep]
    if drop:
        value = value.sum(drop, keepdim=True)
        value = value.reshape(value.shape[max(0, value.dim() + min(keep, default=0)) :])
    return value


class Term(NamedTuple):
    """A tensor in nats, and the plates that its dims are."""

    value: Tensor
    plates: Plates

    def __neg__(self) -> "Term":
        return Term(-self.value, self.plates)


def total(terms: list[Term]) -> Term:
    """The sum of terms, over all plates that they do not share."""
    if len(terms) == 1:
        return terms[0]
    plates = frozenset.intersection(*(term.plates for term in terms))
    values = [sum_to(term.value, plates) for term in terms]
    return Term(sum(values[1:], start=values[0]), plates)


class Sampled:
    r"""z was sampled: t + t.detach() (s - s.detach()), with s the score of z.

    s sums log q over the guide's sites that are not reparameterised. Plates are independent of
    each other, so that an element of t needs the scores of its own plates' elements alone:
    that is the variance reduction of Pyro's Trace_ELBO, here for auxiliary sites too.
    """

    def __init__(self, traces: Traces) -> None:
        self._scores = [
            (name, site["plates"], site["score_parts"].score_function)
            for name, site in traces.guide_sites.items()
            if getattr(site["score_parts"].score_function, "requires_grad", False)
        ]
        self._order = {name: i for i, name in enumerate(traces.guide_sites)}

    def __call__(self, value: Tensor, site: Site, before: str | None = None) -> Tensor:
        """E_q of ``value``, which has the dims of ``site``'s log_prob.

        ``before`` names a site of the guide that ``value`` does not depend on, nor on any
        after it: their scores would add nothing but noise.
        """
        score = None
        for name, plates, log_q in self._scores:
            if before is None or self._order[name] < self._order[before]:
                part = sum_to(log_q, plates & site["plates"])
                score = part if score is None else score + part
        if score is None:
            return value
        return value + value.detach() * (score - score.detach())

    def log_prob(self, site: Site) -> Term:
        """E_q[log p] of a site of the model."""
        return Term(self(site["log_prob"], site), site["plates"])

    def log_q(self, site: Site) -> Term:
        """E_q[log q] of a site of the guide, without the part of its gradient that averages 0."""
        log_prob, _, entropy = site["score_parts"]
        if entropy is not log_prob:
            log_prob = log_prob.detach()
            if not is_identically_zero(entropy):
                log_prob = log_prob + (entropy - entropy.detach())
        return Term(self(log_prob, site), site["plates"])


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
        traces.guide.pack_tensors()
        traces.model.pack_tensors(traces.guide.plate_to_symbol)
        self._dims = {**traces.guide.symbol_to_dim, **traces.model.symbol_to_dim}
        self._symbols = traces.model.plate_to_symbol
        self._order = {name: i for i, name in enumerate(traces.guide_sites)}
        self._factors: list[_Factor] = []
        for name, site in traces.guide_sites.items():
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
            if site["name"] not in enumerated:
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
        probs = [factor.prob for factor in _needed(upstream, dims)]
        summed = set[str]().union(*(prob._pyro_dims for prob in probs))
        if not dims <= plates | summed:
            raise ValueError(
                f"site {name!r} is outside of a plate, but depends on an enumerated site "
                "inside of it: move it into the plate, or sample the other site instead"
            )
        if probs:
            target = "".join(sorted(summed & (dims | plates)))
            equation = ",".join(prob._pyro_dims for prob in probs) + "->" + target
            prob: Packed = opt_einsum.contract(equation, *probs, backend="torch")
            prob._pyro_dims = target
            prob, value = packed.broadcast_all(prob, value)
            # log-density -inf at a z with q(z) = 0 adds nothing, and 0 * -inf is no number
            expected: Packed = prob * value.masked_fill(prob == 0, 0.0)
            drop = [i for i, dim in enumerate(value._pyro_dims) if dim not in plates]
            kept = "".join(dim for dim in value._pyro_dims if dim in plates)
            value = expected.sum(drop) if drop else expected
            value._pyro_dims = kept
        value = packed.unpack(value, self._dims)
        runs = math.prod(f.runs for f in self._factors if f not in upstream)
        if runs > 1:  # each of those runs adds the same value
            value = value / runs
        shape = [1] * -min((plate.dim for plate in within), default=0)
        for plate in within:
            shape[plate.dim] = plate.size
        return value.expand(shape)


def _needed(factors: list[_Factor], dims: set[str]) -> list[_Factor]:
    """Without the sites that no other depends on, nor a value with ``dims``: they sum to 1."""
    while True:
        uses = Counter(dim for factor in factors for dim in factor.prob._pyro_dims)
        needed = [f for f in factors if f.symbol is None or f.symbol in dims or uses[f.symbol] > 1]
        if len(needed) == len(factors):
            return factors
        factors = needed
