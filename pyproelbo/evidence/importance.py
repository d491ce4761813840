"""log p(x) by importance weighting, with the guide as proposal."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from tqdm import tqdm

from pyproelbo.batches import Batch, Batches, Data, device_of
from pyproelbo.collect import terms_of
from pyproelbo.data_plate import check_all_in_plate, data_plate
from pyproelbo.evaluating import evaluating
from pyproelbo.terms import Terms
from pyproelbo.traces import Plate, Program, Traces, run

_ROWS = 2560  # of draws of a batch, that are made at once


@dataclass(frozen=True)
class Evidence:
    r"""log p(x_n) of each datum, estimated by log (1/S) sum_s p(x_n, z_s) / q(z_s | x_n).

    Without the logarithm the estimate has no bias; with it, it lies below log p(x_n) on
    average, and the more samples, the nearer (Burda, Grosse & Salakhutdinov 2016). What one
    sample gives on average is the ELBO.

    Attributes:
        log_evidence: in nats, (N,).
        elbo: the mean of the same log-weights, in nats, (N,).
        stderr: of log_evidence, by the spread of the weights, (N,); it misses what no sample
            has found, so that it means little where the effective sample size is small.
        effective_sample_size: (sum of the weights)^2 / sum of their squares, (N,): from 1 to S.
        num_samples: S.
    """

    log_evidence: Tensor
    elbo: Tensor
    stderr: Tensor
    effective_sample_size: Tensor
    num_samples: int

    def __str__(self) -> str:
        num, error = len(self.log_evidence), self.stderr.square().sum().sqrt() / len(self.stderr)
        rows = [
            f"evidence, nats per datum ({num:,} data, samples: {self.num_samples:,})",
            f"log p(x)               {self.log_evidence.mean():>12.4f}  ± {error:.4f}",
            f"ELBO                   {self.elbo.mean():>12.4f}",
            f"gap                    {(self.log_evidence - self.elbo).mean():>12.4f}",
            f"effective sample size  {self.effective_sample_size.median():>12.1f}  "
            f"(median; least {self.effective_sample_size.min():.1f})",
        ]
        return "\n".join(rows)

    __repr__ = __str__


def evidence(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    plate: str | None = None,
    batch_size: int = 256,
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evidence:
    """log p(x_n) of each datum by importance weighting (see :class:`Evidence`).

    Modules are evaluated in eval mode, and are put back as they were, as are Pyro's parameter
    store and torch's generators.

    Args:
        model: a Pyro program with all latents and data under one plate over the data; masks,
            inner plates and a subsampling scale of that plate are right.
        guide: its guide.
        data: a tensor (N, ...), several tensors (a tuple for several arguments, a mapping for
            keyword arguments), or a ``DataLoader`` of such batches.
        num_samples: S, draws of the guide for each datum.
        plate: the name of the plate over the data, where others are as large as a batch.
        batch_size: rows that model and guide see at once; a loader has its own.
        chunk: draws that are made at once, as vectorised particles: memory grows with it. By
            default as many as make about 2,500 rows of a batch.
        seed: of the draws. The result depends on it, on ``batch_size`` and on ``chunk``.
        progress: whether to show a progress bar, on a terminal.

    Raises:
        ValueError: for a latent or data outside of the plate, for enumeration, for densities
            that something else than the plate scales, and for data without rows.

    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> x = torch.randn(200, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> result = evidence(ppca, Exact(ppca), x, num_samples=5)
    >>> torch.allclose(result.log_evidence, ppca.log_evidence(x).double(), rtol=1e-4)
    True
    """
    for name, value in {"num_samples": num_samples, "chunk": chunk}.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} should be a positive whole number, got {value!r}")
    batches = Batches(data, batch_size, device_of(guide, model))
    parts = []
    with evaluating(model, guide), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in tqdm(
            batches, desc="evidence", disable=None if progress else True, leave=False
        ):
            weights = Weights(model, guide, batch, plate)
            at_once = max(1, _ROWS // batch.size) if chunk is None else chunk
            parts.append(_summary(weights.chunks(num_samples, at_once), num_samples))
    log_evidence, elbo, ess = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    stderr = (1 / ess - 1 / num_samples).clamp(min=0).sqrt()
    return Evidence(log_evidence, elbo, stderr, ess, num_samples)


class Weights:
    """log p(x, z) - log q(z | x) of each datum of a batch, for draws of its guide."""

    def __init__(self, model: Program, guide: Program, batch: Batch, plate: str | None) -> None:
        self._run = lambda **kwargs: run(model, guide, batch.args, batch.kwargs, **kwargs)
        first = self._run()
        terms = _terms(first)
        latents = {n: s["plates"] for n, s in first[0].guide_sites.items() if n in terms.log_q}
        self._plate = data_plate(latents, plate, batch.size)
        self._nesting = first[0].plate_nesting
        check_all_in_plate(terms, self._plate, batch.size)
        _check_scales(first[0], self._plate)

    def chunks(self, num_samples: int, chunk: int) -> Iterator[Tensor]:
        """The log-weights of ``num_samples`` draws, (at most ``chunk``, B) at a time."""
        for start in range(0, num_samples, chunk):
            num = min(chunk, num_samples - start)
            yield self.draw(num)

    def draw(self, num: int) -> Tensor:
        """The log-weights of ``num`` draws, (num, B)."""
        terms = _terms(self._run(num_particles=num, max_plate_nesting=self._nesting))
        parts = [*terms.log_likelihood.values(), *terms.factors.values()]
        parts += [-value for value in terms.kl.values()]
        total: Any = sum(self._by_row(part, num) for part in parts)
        return total / (self._plate.full_size / self._plate.size)

    def _by_row(self, value: Tensor, num: int) -> Tensor:
        """The sum over all dims but those of draws and rows."""
        rows = value.dim() + self._plate.dim
        keep = {0, rows} if num > 1 else {rows}
        drop = [dim for dim in range(value.dim()) if dim not in keep]
        value = value.sum(drop) if drop else value
        return value if num > 1 else value.unsqueeze(0)


def _terms(runs: list[Traces]) -> Terms:
    if len(runs) > 1 or any("_enumerate_dim" in s["infer"] for s in runs[0].guide_sites.values()):
        raise ValueError(
            "the guide enumerates its discrete latents, but importance weights are of samples: "
            "take config_enumerate or infer={'enumerate': ...} off the guide"
        )
    return terms_of(runs[0], "sampled")


def _check_scales(traces: Traces, plate: Plate) -> None:
    expected = plate.full_size / plate.size
    for site in traces.sites:
        scale = site["scale"]
        if isinstance(scale, Tensor):
            scale = scale.item() if scale.numel() == 1 else math.nan
        if not math.isclose(scale, expected, rel_tol=1e-6):
            raise ValueError(
                f"site {site['name']!r} has its density scaled by {scale}, where plate "
                f"{plate.name!r} gives {expected}: an evidence is of densities that only the plate "
                "over the data scales, in model and guide"
            )


def _summary(chunks: Iterator[Tensor], num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """log of the mean weight, mean of the log-weights, effective sample size: each (B,)."""
    parts = []
    for weights in chunks:
        w = weights.double()
        if is_validation_enabled() and w.isnan().any():
            raise ValueError("a weight is NaN: look for NaN in the data, model or guide")
        parts.append((w.logsumexp(0), (2 * w).logsumexp(0), w.sum(0)))
    sums, squares, totals = (torch.stack(column) for column in zip(*parts, strict=True))
    log_sum = sums.logsumexp(0)
    ess = (2 * log_sum - squares.logsumexp(0)).exp()
    return log_sum - math.log(num_samples), totals.sum(0) / num_samples, ess
