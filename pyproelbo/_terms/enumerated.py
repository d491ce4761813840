"""Expectations where discrete sites of the guide were enumerated."""

import math
from collections import OrderedDict
from typing import NamedTuple

import opt_einsum
from pyro.distributions.util import is_identically_zero
from pyro.infer.util import compute_site_dice_factor
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyproelbo._backend.pyro_private import (
    Packed,
    common_scale,
    dims_of,
    pack,
    runs_of,
    symbol_of,
    with_dims,
)
from pyproelbo._terms.expectations import Term, total
from pyproelbo._terms.roles import is_data
from pyproelbo._terms.traces import Plates, Site, Traces


class _Factor(NamedTuple):
    name: str
    plates: frozenset[str]
    symbol: str | None  # the dim that sums to one, None for a site that has no such dim
    prob: Packed
    runs: int  # how many values it takes in runs of their own, 1 unless sequential


class Enumerated:
    r"""Discrete sites of the guide were enumerated: sum_z q(z) t(z), exactly.

    Where they were enumerated sequentially, this is the part of the sum for one of their values.
    Like Pyro's TraceEnum_ELBO, this assumes that nothing outside a plate depends on what is inside,
    and uses DiCE factors (Foerster et al. 2018) for sites that were sampled.
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
                plates, prob = self._symbols_of(site["plates"]), packed.exp(log_prob)
                is_exact = site["infer"].get("num_samples") is None
                symbol, runs = symbol_of(site) if is_exact else None, runs_of(site)
                self._factors.append(_Factor(name, plates, symbol, prob, runs))  # type: ignore[arg-type]

    def __call__(self, value: Tensor, site: Site, before: str | None = None) -> Tensor:
        """As :meth:`Sampled.__call__`; the dims of enumeration are summed out."""
        return self._expect(pack(value, site), site["plates"], site["name"], before)

    def log_prob(self, site: Site) -> Term:
        """E_q[log p] of a site of the model, or E_q[log q] of one of the guide."""
        return Term(self(site["log_prob"], site), site["plates"])

    log_q = log_prob

    def components(self, enumerated: dict[str, Site], others: dict[str, Site]) -> list[list[Site]]:
        """The sites of the model that depend on ``enumerated`` ones, in connected lists."""
        symbols = {str(symbol_of(site)) for site in enumerated.values()}
        components: list[tuple[set[str], list[Site]]] = []
        for site in (*enumerated.values(), *others.values()):
            dims = symbols.intersection(dims_of(site["packed"]["unscaled_log_prob"]))
            if dims:
                joined = [c for c in components if c[0] & dims]
                components = [c for c in components if not c[0] & dims]
                sites = [s for _, part in joined for s in part]
                components.append((dims.union(*(d for d, _ in joined)), [*sites, site]))
        return [sites for _, sites in components]

    def marginal(self, sites: list[Site], enumerated: dict[str, Site]) -> Term:
        """E_q[log sum_c prod p] of sites of the model, over the c that the model enumerates."""
        scale = common_scale([site["scale"] for site in sites])
        symbols = {str(symbol_of(s)) for s in sites if s["name"] in enumerated}
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
                value = packed.scale_and_mask(factor, scale=scale)  # type: ignore[arg-type]
                terms.append(Term(self._expect(value, within, name), within))
        return total(terms)

    def _symbols_of(self, plates: Plates) -> frozenset[str]:
        return frozenset(self._symbols[plate.name] for plate in plates)

    def _expect(
        self, value: Packed, within: Plates, name: str, before: str | None = None
    ) -> Tensor:
        plates, dims = self._symbols_of(within), set(dims_of(value))
        upstream = [
            factor
            for factor in self._factors
            if factor.plates <= plates
            and (before is None or self._order[factor.name] < self._order[before])
        ]
        factors = _needed(upstream, dims)
        summed = set[str]().union(*(dims_of(factor.prob) for factor in factors))
        if not dims <= plates | summed:
            raise ValueError(
                f"site {name!r} is outside a plate, but depends on an enumerated site inside it: "
                "move it into the plate, or sample the other site instead"
            )
        if factors:
            prob = self._marginal_prob(factors, "".join(sorted(summed & (dims | plates))))
            prob, value = packed.broadcast_all(prob, value)
            # log-density -inf at a z with q(z) = 0 adds nothing, and 0 * -inf is no number
            expected: Packed = prob * value.masked_fill(prob == 0, 0.0)
            drop = [i for i, dim in enumerate(dims_of(value)) if dim not in plates]
            kept = "".join(dim for dim in dims_of(value) if dim in plates)
            value = with_dims(expected.sum(drop) if drop else expected, kept)
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
            equation = ",".join(map(dims_of, probs)) + "->" + dims
            prob = opt_einsum.contract(equation, *probs, backend="torch")
            self._probs[key] = with_dims(prob, dims)
        return self._probs[key]


def _weight_of_values(site: Site, log_prob: Packed) -> Packed:
    """log p(c) of the values c of a site that the model sums out.

    Where they are K draws of the prior in place of all values (tensor Monte Carlo, as in Pyro's
    TraceTMC_ELBO), each has weight 1 / K, with the gradient of the score if it has no other.
    """
    num_samples = site["infer"].get("num_samples")
    if num_samples is None:
        return log_prob
    score = log_prob.detach() if site["fn"].has_rsample else log_prob
    weight = score - score.detach() - math.log(num_samples)
    return with_dims(weight, dims_of(log_prob))


def _needed(factors: list[_Factor], dims: set[str]) -> list[_Factor]:
    """The factors that a value with ``dims`` depends on, in the guide's order; others sum to 1."""
    needed, dims = [], set(dims)
    for factor in reversed(factors):  # a site depends on what was sampled before
        if factor.symbol is None or factor.symbol in dims:
            needed.append(factor)
            dims.update(dims_of(factor.prob))
    return needed[::-1]
