"""log p(x) by importance weighting, with the guide as proposal."""

import math
from dataclasses import dataclass

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from tqdm import tqdm

from pyproelbo.batches import Batches, Data, device_of
from pyproelbo.evaluating import evaluating
from pyproelbo.evidence.row_terms import RowDraws
from pyproelbo.traces import Program


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
        elbo_stderr: of elbo, (N,); NaN of a single sample.
        effective_sample_size: (sum of the weights)^2 / sum of their squares, (N,): from 1 to S.
        num_samples: S.
    """

    log_evidence: Tensor
    elbo: Tensor
    stderr: Tensor
    elbo_stderr: Tensor
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
            draws = RowDraws(model, guide, batch, plate)
            parts.append(evidence_of(draws, num_samples, chunk))
    return joined(parts)


def evidence_of(draws: RowDraws, num_samples: int, chunk: int | None) -> Evidence:
    """That of a batch."""
    parts, shift = [], None
    for part in draws.chunks(num_samples, chunk):
        w = part.log_weight.double()
        if is_validation_enabled() and w.isnan().any():
            raise ValueError("a weight is NaN: look for NaN in the data, model or guide")
        shift = w.mean(0) if shift is None else shift
        apart = w - shift
        parts.append((w.logsumexp(0), (2 * w).logsumexp(0), apart.sum(0), apart.square().sum(0)))
    sums, squares, totals, spreads = (torch.stack(column) for column in zip(*parts, strict=True))
    log_sum = sums.logsumexp(0)
    ess = (2 * log_sum - squares.logsumexp(0)).exp()
    mean = totals.sum(0) / num_samples
    variance = (spreads.sum(0) / num_samples - mean.square()).clamp(min=0) / (num_samples - 1)
    return Evidence(
        log_sum - math.log(num_samples),
        shift + mean,
        (1 / ess - 1 / num_samples).clamp(min=0).sqrt(),
        variance.sqrt(),
        ess,
        num_samples,
    )


def joined(parts: list[Evidence]) -> Evidence:
    """That of all data, on the CPU, from those of their batches."""
    names = ("log_evidence", "elbo", "stderr", "elbo_stderr", "effective_sample_size")
    columns = (torch.cat([getattr(part, name) for part in parts]).cpu() for name in names)
    return Evidence(*columns, num_samples=parts[0].num_samples)
