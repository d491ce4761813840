"""The data at whose draws log q(z) is evaluated, if not at those of all."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyproelbo._rows.runs import Use

LEAST = 100  # with fewer data errors cannot be estimated
_AT_ONCE = 1000


class Points(NamedTuple):
    """Some of these data.

    Attributes:
        rows: their indices, ascending.
        stop: the number of data so far, including these.
    """

    rows: Tensor
    stop: int


def num_points(max_pairs: int | None, num_data: int, num_samples: int) -> int:
    """The number of data at whose draws log q(z) can be summed over all data: N for all.

    Raises:
        ValueError: for too few.
    """
    if max_pairs is None:
        return num_data
    num, least = max_pairs // (num_samples * num_data), min(LEAST, num_data)
    if num < least:
        raise ValueError(
            f"max_pairs should be at least {least * num_samples * num_data:_}, for the draws of "
            f"{least} of {num_data:,} data, got {max_pairs:_}: with fewer the errors cannot be "
            "estimated"
        )
    return min(num, num_data)


def points(num_data: int, num: int, seed: int) -> Iterator[Points]:
    """``num`` of the data, one of each of as many strata of them in their order; part by part.

    The strata of a part are random, as is the start of the first stratum: though some have one
    datum more than others, all data are equally likely.
    """
    random = np.random.default_rng((seed, Use.POINTS))
    ends = np.arange(num + 1) * num_data // num
    rows = random.integers(ends[:-1], ends[1:]) + random.integers(num_data)
    rows = random.permutation(rows % num_data)
    stop = 0
    for part in np.array_split(rows, -(-num // _AT_ONCE)):
        stop += len(part)
        yield Points(torch.from_numpy(np.sort(part)), stop)
