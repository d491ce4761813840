"""Values and the shapes of their sites: none is scored several times."""

from pyro.distributions.hmm import HiddenMarkovModel
from torch import Tensor
from torch.distributions import Distribution

from pyproelbo._backend.pyro_private import site_is_factor
from pyproelbo._distributions.layers import innermost
from pyproelbo._terms.roles import Site, is_delta
from pyproelbo.sequences.base import SequenceDistribution


def check_value(name: str, site: Site, nesting: float) -> None:
    """Check that a value has no more elements than its site, which would count each repeatedly.

    Args:
        nesting: the number of batch dims, from the right, that belong to plates; those at their
            left belong to enumeration, and may occur only in the value.

    Raises:
        ValueError: where the value's shape broadcasts the distribution's to a larger one.
    """
    fn, value = site["fn"], site["value"]
    if not isinstance(value, Tensor) or isinstance(fn, SequenceDistribution):
        return
    expected = fn.batch_shape + fn.event_shape
    if value.shape == expected or is_delta(site) or site_is_factor(site):
        return
    plates = {plate.dim - fn.event_dim for plate in site["plates"]}
    dims = max(value.dim(), len(expected))
    if nesting < float("inf"):
        dims = min(dims, int(nesting) + fn.event_dim)
    # others may take events of any length, as a hidden Markov model does
    first = 0 if _has_plain_events(fn) else -fn.event_dim
    for dim in range(-dims, first):
        given, size = (s[dim] if len(s) >= -dim else 1 for s in (value.shape, expected))
        is_larger = given > 1 and size == 1 and dim not in plates
        is_batch = dim < -fn.event_dim and dim not in plates
        is_repeated = site["is_observed"] and is_batch and given == 1 and size > 1
        if is_larger or is_repeated:
            shapes = f"{tuple(expected)} (batch {tuple(fn.batch_shape)}, event "
            raise ValueError(
                f"the value of site {name!r} has shape {tuple(value.shape)}, but its distribution "
                f"{shapes}{tuple(fn.event_shape)}): broadcast together, they would score each "
                "element against several. Give both one shape, by unsqueeze(-1) or squeeze(-1) of "
                "one of them, put pyro.plate around the site, or .to_event on the distribution"
            )


def _has_plain_events(fn: Distribution) -> bool:
    """Whether events have the distribution's shape: for those of torch and Pyro."""
    fn = innermost(fn)
    return not isinstance(fn, HiddenMarkovModel) and type(fn).__module__.startswith(_PLAIN)


_PLAIN = ("torch.distributions.", "pyro.distributions.")
