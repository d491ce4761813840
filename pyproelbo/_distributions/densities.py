"""The log-density of a distribution at a value that it need not have drawn."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.distributions import Distribution


def log_density(d: Distribution, value: Tensor) -> Tensor:
    """``d.log_prob(value)``.

    Raises:
        ValueError: for a flow whose transforms have no inverse.
    """
    with at_given_values(d):
        return d.log_prob(value)


@contextmanager
def at_given_values(d: Distribution, name: str | None = None) -> Iterator[None]:
    """Explain errors within for unknown densities.

    Args:
        name: of the site.

    Raises:
        ValueError: for a flow whose transforms have no inverse.
    """
    try:
        yield
    except (KeyError, NotImplementedError) as error:
        of = f" of site {name!r}" if name else ""
        raise ValueError(
            f"the density of the {type(d).__name__}{of} is not known at a given z, as for a flow "
            "whose transforms have no inverse: use others"
        ) from error
