"""From log q(z) at draws to the surgery, with its marginals."""

import math
from collections.abc import Sequence
from concurrent.futures import Executor

import torch

from pyproelbo._messages.warn import warn
from pyproelbo._rows.passes import UnfinishedWarning, keep_in
from pyproelbo._surgery.draws import DataDraws
from pyproelbo._surgery.estimates import estimates_of
from pyproelbo._surgery.guide_aggregate import normal_marginals
from pyproelbo._surgery.local_latents import LocalLatents
from pyproelbo._surgery.result import SCALARS, VECTORS, Surgery
from pyproelbo._surgery.series import At


def surgery_of(
    which: LocalLatents,
    num_samples: int,
    draws: Sequence[DataDraws],
    joint: At,
    by_dim: At | None,
    executor: Executor | None = None,
) -> Surgery:
    """The surgery, without marginals if Ctrl-C or an error comes before they are finished.

    Args:
        which: the latents.
        num_samples: S, the number of draws over which the means are taken.
        draws: of all data.
        joint: log q(z), at all draws or at those of some data.
        by_dim: log q(z) of each dimension there; None where posteriors are independent and normal,
            whose marginals are computed here, and where they are not known.
        executor: whose workers compute these; None for this process.
    """

    def surgery(log_q_by_dim: At | None) -> Surgery:
        found = estimates_of(which, draws, joint, log_q_by_dim, num_samples)
        return Surgery(
            **{**dict.fromkeys((*SCALARS, *VECTORS)), "global_kl": 0.0, **found.mean},
            stderr=found.stderr,
            active_units=found.active_units,
            log_n=math.log(found.num_data),
            num_data=found.num_data,
            num_samples=num_samples,
            dims=which.dims,
            codes=draws[0].by_dim["z"].cpu(),
            given=which.given,
            num_points=found.num_points,
        )

    is_there, found = False, None
    try:
        found, is_there = _marginals(draws, joint, executor) if which.is_gaussian else by_dim, True
        return surgery(found)
    except KeyboardInterrupt:
        what = "whole" if is_there else "without the marginals of q(z), which are None"
        warn(f"interrupted: the surgery is {what}", UnfinishedWarning)
        return surgery(found)
    except Exception as error:
        if not is_there:
            keep_in(error, "surgery", surgery(None), "without marginals")
        raise


def _marginals(draws: Sequence[DataDraws], joint: At, executor: Executor | None) -> At:
    """Of normal posteriors, at all draws: interpolated, which takes less time than the pairs."""
    is_some = len(joint.draws[0].rows) < len(draws[0].rows)
    device = torch.device("cpu") if is_some else None
    return At.of(draws, normal_marginals(draws, device, executor))
