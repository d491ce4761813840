"""The Kullback-Leibler divergence of one site in closed form, where that form is valid.

``closed_form`` considers only two distributions. Whether the *programs* around them allow a
closed form (scales, masks, order of the sites) is decided in
:mod:`pyproelbo._terms.divergences`.
"""

from functools import cache

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Distribution,
    Independent,
    InverseGamma,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    kl_divergence,
)
from torch.distributions.transforms import (
    ExpTransform,
    SigmoidTransform,
    SoftplusTransform,
    StickBreakingTransform,
    TanhTransform,
)

from pyproelbo._backend.pyro_private import mask_of
from pyproelbo._backend.torch_private import memory_of, registered_kls
from pyproelbo._distributions.layers import layers
from pyproelbo._distributions.owners import DENSITY, class_keeps, has_only_class_methods, keeps

Mask = Tensor | bool | None

_WITHOUT_PARAMETERS = (
    ExpTransform,
    SigmoidTransform,
    SoftplusTransform,
    StickBreakingTransform,
    TanhTransform,
)


def closed_form(q: Distribution, p: Distribution) -> Tensor | None:
    r"""KL(q || p) = E_q[log q(z) - log p(z)] of a pair of distributions, or None.

    None where no closed form is registered, and where a registered one would be wrong:

    - a ``Delta`` on either side: the registered form drops the log-density that the Delta carries
      for a transformed auxiliary variable;
    - different masks on the two sides: the registered form masks both with their conjunction,
      but log q and log p are masked each by its own;
    - transformed distributions whose transforms are not the same objects: comparing their
      parameters would wait for the device, and different transforms have no closed form;
    - different batch or event shapes: a broadcast would count one side more often;
    - a class that overrides ``log_prob``, ``rsample`` or ``sample`` of the one whose form is
      registered.

    Args:
        q: the guide's distribution, batch shape ``B``.
        p: the model's distribution, batch shape ``B``.

    Returns:
        A tensor of shape ``B`` in nats, or None.
    """
    if q.batch_shape != p.batch_shape or q.event_shape != p.event_shape:
        return None
    q, q_mask = _unmask(q)
    p, p_mask = _unmask(p)
    if q_mask is not None or p_mask is not None:
        kl = closed_form(q, p) if is_same(q_mask, p_mask) else None
        return None if kl is None else scale_and_mask(kl, mask=q_mask)
    if keeps(q, Independent) and keeps(p, Independent, DENSITY):
        n = q.reinterpreted_batch_ndims
        kl = closed_form(q.base_dist, p.base_dist) if n == p.reinterpreted_batch_ndims else None
        return None if kl is None else kl.flatten(kl.dim() - n).sum(-1) if n else kl
    if keeps(q, InverseGamma) and keeps(p, InverseGamma, DENSITY):  # one power of each
        return kl_divergence(q.base_dist, p.base_dist)
    if not (_is_plain(q) and _is_plain(p)):
        return None
    if isinstance(q, MultivariateNormal | LowRankMultivariateNormal):
        p = _as_multivariate(p)
    forms = _forms(type(q), type(p), len(registered_kls()))
    is_of_base = TransformedDistribution in forms
    if not forms or (is_of_base and not _same_transforms(q, p)):
        return None
    if not (has_only_class_methods(q) and has_only_class_methods(p, DENSITY)):
        return None
    if isinstance(q, Bernoulli) and isinstance(p, Bernoulli) and not q.batch_shape:
        return kl_divergence(q.expand([1]), p.expand([1])).squeeze(0)  # else it reads its mask
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def is_same(a: object, b: object) -> bool:
    """Whether two scales or masks are certainly equal: tensors are compared by location."""
    if a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor)):
        return a is b or a == b
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and memory_of(a) == memory_of(b)
        and (a.dtype, a.shape, a.stride(), a.storage_offset())
        == (b.dtype, b.shape, b.stride(), b.storage_offset())
    )


def as_tensor(mask: Mask) -> Tensor:
    """A mask as a tensor: True for None. It broadcasts to masks of any device."""
    return mask if isinstance(mask, Tensor) else torch.tensor(mask is not False, device="cpu")


def _unmask(d: Distribution) -> tuple[Distribution, Mask]:
    if not isinstance(d, MaskedDistribution):
        return d, None
    mask = mask_of(d)
    return d.base_dist, None if mask is True else mask


def _is_plain(d: Distribution) -> bool:
    return all(_is_plain_type(type(layer)) for layer in layers(d))


@cache  # these classes check instances in Python
def _is_plain_type(cls: type) -> bool:
    return not issubclass(cls, Delta | MaskedDistribution)


def _same_transforms(q: Distribution, p: Distribution) -> bool:
    pairs = zip(layers(q), layers(p), strict=False)
    return all(
        len(a.transforms) == len(b.transforms)
        and all(
            s is t or (type(s) is type(t) and type(s) in _WITHOUT_PARAMETERS)
            for s, t in zip(a.transforms, b.transforms, strict=True)
        )
        for a, b in pairs
        if isinstance(a, TransformedDistribution) and isinstance(b, TransformedDistribution)
    )


@cache
def _forms(q: type, p: type, num_registered: int) -> tuple[type, ...]:
    """The classes of q with a registered form, among those that define its methods."""
    pairs = list(registered_kls())
    return tuple(a for a, b in pairs if class_keeps(q, a) and class_keeps(p, b, DENSITY))


def _as_multivariate(p: Distribution) -> Distribution:
    """A diagonal Normal written as the MultivariateNormal that it is."""
    if (
        keeps(p, Independent, DENSITY)
        and p.reinterpreted_batch_ndims == 1
        and keeps(p.base_dist, Normal, DENSITY)
    ):
        scale_tril = torch.diag_embed(p.base_dist.scale)
        return MultivariateNormal(p.base_dist.loc, scale_tril=scale_tril, validate_args=False)
    return p
