"""What is logged of a batch, per datum, and its weight in means over data."""

import torch
from torch import Tensor

from pyproelbo._terms.terms import Terms, largest


def in_nats_per_datum(terms: Terms, objective: Tensor) -> dict[str, Tensor]:
    """The parts of the ELBO of a batch, per datum, and the objective that is given.

    The KL of single sites is there if there are several.
    """
    values = {"elbo": terms.elbo, "reconstruction": terms.reconstruction, "kl": terms.shrinkage}
    if len(terms.kl) > 1:
        values |= {f"kl/{site}": terms.mean([kl]) for site, kl in terms.kl.items()}
    return {n: value / terms.num_data for n, value in values.items()} | {"objective": objective}


def num_rows(terms: Terms) -> Tensor:
    """The number of data in a batch, without the factor N / B that minibatches have.

    Where all latents are global, B / N. In double precision, where the device has that.
    """
    scales = [scale for both in terms.scales.values() for scale in both]
    number = terms.num_data / largest(s for s in scales if not (isinstance(s, Tensor) and s.dim()))
    wide = torch.float32 if terms.elbo.device.type == "mps" else torch.float64
    if isinstance(number, Tensor):
        return number.to(wide)
    return terms.elbo.new_full((), number, dtype=wide)  # on its device, without a copy from here
