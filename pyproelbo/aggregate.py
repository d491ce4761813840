r"""Mixtures of as many Normals as there are data, in memory that does not grow with them.

The aggregate posterior q(z) = (1/N) sum_n q(z | x_n) at M points is a sum over M x N densities.
They are computed in tiles that fit the cache, summed as they come, and computed again in the
backward pass.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.autograd.function import once_differentiable


def log_aggregate_posterior(
    z: Tensor,
    loc: Tensor,
    scale: Tensor,
    log_weights: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    r"""log (1/N) sum_n N(z; loc_n, diag(scale_n)^2), in nats.

    With w = 1 / scale^2 and m = loc, both counted from the mean of ``loc``, the exponents are one
    matrix product, [z^2, z, 1] . [-w/2, w m, -sum(w m^2)/2 - sum(log scale)]. It cancels, so it
    is done in float64: its error is about 1e-16 D (m / scale)^2 nats, below 1e-4 for means that
    lie up to 1e5 scales apart. Devices without float64 add up squared differences instead.

    Args:
        z: points, shape (..., D), float32 or float64.
        loc: means, shape (N, D).
        scale: standard deviations, shape (N, D).
        log_weights: log of the weight of each component, shape (N,), in place of -log N. Taken as
            they are: the weights need not sum to 1.
        chunk: how many densities to hold at a time; by default, what fits the cache.

    Returns:
        Log densities, shape (...), differentiable once in all arguments.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or there are no components; under
            Pyro's validation, if a value is not finite, a scale not positive, or a log weight NaN
            or +inf.
    """
    _check(z, loc, scale)
    if log_weights is not None:
        _check_weights(log_weights, loc)
    n, d = loc.shape
    constant = -0.5 * d * math.log(2 * math.pi) - (math.log(n) if log_weights is None else 0.0)
    points = z.reshape(-1, d)
    if z.device.type == "mps":
        bias = -scale.log() if log_weights is None else -scale.log() + log_weights[:, None] / d
        tensors = points, loc, scale.reciprocal(), bias
        result = _LogSumExp.apply(_square_distances, chunk, d, z.dtype, *tensors)
    else:
        center = loc.detach().double().mean(0)
        x, m, s = points.double() - center, loc.double() - center, scale.double()
        w = s.square().reciprocal()
        bias = -0.5 * (w * m.square()).sum(1) - s.log().sum(1)
        if log_weights is not None:
            bias = bias + log_weights
        features = torch.cat([x.square(), x, torch.ones_like(x[:, :1])], 1)
        weights = torch.cat([-0.5 * w, w * m, bias[:, None]], 1)
        result = _LogSumExp.apply(_product, chunk, 1, z.dtype, features, weights)
    return (result + constant).to(z.dtype).reshape(z.shape[:-1])


def log_aggregate_marginals(
    z: Tensor, loc: Tensor, scale: Tensor, *, chunk: int | None = None
) -> Tensor:
    r"""log (1/N) sum_n N(z_d; loc_nd, scale_nd^2) of each dimension d by itself, in nats.

    Args:
        z: points, shape (..., D), float32 or float64.
        loc: means, shape (N, D).
        scale: standard deviations, shape (N, D).
        chunk: how many densities to hold at a time; by default, what fits the cache.

    Returns:
        Log densities, shape (..., D), differentiable once in all arguments.

    Raises:
        ValueError: as :func:`log_aggregate_posterior`.
    """
    _check(z, loc, scale)
    n, d = loc.shape
    # columns side by side in memory, so that a tile is a row of vectors for each dimension
    tensors = (x.mT.contiguous().mT for x in (loc, scale.reciprocal(), -scale.log()))
    result = _LogSumExp.apply(_normals, chunk, d, z.dtype, z.reshape(-1, d), *tensors)
    return (result - 0.5 * math.log(2 * math.pi) - math.log(n)).to(z.dtype).reshape(z.shape)


class RunningLogSumExp:
    """log sum_n exp(e_mn) for each row m, of blocks of e that come one after the other.

    >>> state = RunningLogSumExp((2,), torch.zeros(()))
    >>> for column in (1.0, 1.0, -torch.inf):
    ...     state.update(slice(0, 1), torch.full((1, 1), column))
    >>> state.value
    tensor([1.6931,   -inf])

    Args:
        shape: of the answer, (M, *rest).
        like: a tensor on the device and of the dtype in which to take exponentials. The sums are
            kept in float64, where the device has it.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        wide = torch.float32 if like.device.type == "mps" else torch.float64
        self.top = torch.full(shape, -torch.inf, dtype=wide, device=like.device)
        self.total = torch.zeros_like(self.top)
        self.dtype = like.dtype

    def update(self, rows: slice, block: Tensor) -> None:
        """Adds exp(block), of shape (m, n, *rest), over dim 1 to ``rows``; overwrites ``block``.

        All blocks should have one dtype.
        """
        top, total = self.top[rows], self.total[rows]
        new = torch.maximum(top, block.amax(1))
        floor = _finite(new.to(block.dtype))
        added = _exp(block, floor, self.dtype).sum(1)
        total.mul_((top - floor).exp_()).add_(added)
        top.copy_(new)

    @property
    def value(self) -> Tensor:
        """The log of each row's sum so far, shape (M, *rest); -inf where it is 0."""
        return self.top + self.total.log()


def _finite(top: Tensor) -> Tensor:
    """``top`` where it is above -inf: what can be subtracted from -inf."""
    return top.clamp(min=torch.finfo(top.dtype).min)


def _exp(block: Tensor, top: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(block - top), over dim 1, but never below exp(-80): where it underflows exp is slow."""
    floor = -80.0 if dtype == torch.float32 else -700.0
    return block.sub_(top.unsqueeze(1)).to(dtype).clamp_(min=floor).exp_()


def _product(features: Tensor, weights: Tensor) -> Tensor:
    return features @ weights.mT


def _normals(z: Tensor, loc: Tensor, precision: Tensor, bias: Tensor) -> Tensor:
    """bias - ((z - loc) precision)^2 / 2: (m, D) and (n, D) to (m, n, D)."""
    u = (z.mT[:, :, None] - loc.mT[:, None]) * precision.mT[:, None]
    return torch.addcmul(bias.mT[:, None], u, u, value=-0.5).permute(1, 2, 0)


def _square_distances(z: Tensor, loc: Tensor, precision: Tensor, bias: Tensor) -> Tensor:
    return _normals(z, loc, precision, bias).sum(-1)


class _LogSumExp(torch.autograd.Function):
    """log sum_n exp(block(row_m, column_n)), of tiles that backward computes again.

    ``block`` maps rows (m, ...) and columns (n, ...) to exponents (m, n, *rest), holding
    ``width`` numbers for each pair; ``dtype`` is that of the exponentials.
    """

    @staticmethod
    def forward(
        block: Callable[..., Tensor],
        chunk: int | None,
        width: int,
        dtype: torch.dtype,
        rows: Tensor,
        *columns: Tensor,
    ) -> Tensor:
        rest = rows.shape[1:] if block is _normals else ()
        state = RunningLogSumExp((len(rows), *rest), rows.new_empty((), dtype=dtype))
        for i, j in _tiles(rows, columns, chunk, width):
            state.update(i, block(rows[i], *(x[j] for x in columns)))
        return state.value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.block, ctx.chunk, ctx.width, ctx.dtype, *tensors = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *columns, result = ctx.saved_tensors
        needed = [k for k, need in enumerate(ctx.needs_input_grad[4:]) if need]
        totals = [torch.zeros_like((rows, *columns)[k]) for k in needed]
        for i, j in _tiles(rows, columns, ctx.chunk, ctx.width):
            parts = [x.detach() for x in (rows[i], *(x[j] for x in columns))]
            inputs = [parts[k].requires_grad_() for k in needed]
            with torch.enable_grad():
                block = ctx.block(*parts)
            top = _finite(result[i].to(block.dtype))
            weight = _exp(block.detach(), top, ctx.dtype) * grad[i].unsqueeze(1)
            for k, total, part in zip(
                needed,
                totals,
                torch.autograd.grad(block, inputs, weight.to(block.dtype)),
                strict=True,
            ):
                total[j if k else i].add_(part)
        grads: list[Tensor | None] = [None] * (1 + len(columns))
        for k, total in zip(needed, totals, strict=True):
            grads[k] = total
        return None, None, None, None, *grads


def _tiles(
    rows: Tensor, columns: tuple[Tensor, ...] | list[Tensor], chunk: int | None, width: int
) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and columns whose pairs hold about ``chunk`` numbers."""
    m, n = len(rows), len(columns[0])
    pairs = max(1, (_default_chunk(rows.device) if chunk is None else chunk) // width)
    across = min(n, max(1, 2 * math.isqrt(pairs)))
    down = max(1, pairs // across)
    for i in range(0, m, down):
        for j in range(0, n, across):
            yield slice(i, min(i + down, m)), slice(j, min(j + across, n))


def _default_chunk(device: torch.device) -> int:
    """How many numbers of 8 bytes fit the caches; on a GPU, a small share of its memory."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return min(memory // 64, 2**28) // 8
    return 2**17 * torch.get_num_threads()


def _check(z: Tensor, loc: Tensor, scale: Tensor) -> None:
    if loc.ndim != 2 or 0 in loc.shape:
        raise ValueError(
            "loc should have shape (N, D) with at least one component and one dimension, "
            f"got {tuple(loc.shape)}"
        )
    if scale.shape != loc.shape:
        raise ValueError(
            f"scale should have loc's shape {tuple(loc.shape)}, got {tuple(scale.shape)}: "
            "expand it first"
        )
    if z.ndim < 1 or z.shape[-1] != loc.shape[1]:
        raise ValueError(
            f"z should have shape (..., {loc.shape[1]}), as many dimensions as loc, "
            f"got {tuple(z.shape)}"
        )
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"z should be float32 or float64, got {z.dtype}: call z.float() first")
    for name, x in (("loc", loc), ("scale", scale)):
        _check_like(name, x, z)
    if is_validation_enabled():
        for name, x in (("z", z), ("loc", loc), ("scale", scale)):
            if not x.isfinite().all():
                raise ValueError(f"{name} should be finite: it has NaN or infinite entries")
        if not (scale > 0).all():
            raise ValueError("scale should be positive everywhere: clamp it above 0")


def _check_weights(log_weights: Tensor, loc: Tensor) -> None:
    if log_weights.shape != loc.shape[:1]:
        raise ValueError(
            f"log_weights should have shape ({len(loc)},), one for each component, "
            f"got {tuple(log_weights.shape)}"
        )
    _check_like("log_weights", log_weights, loc)
    if is_validation_enabled() and not (log_weights < torch.inf).all():
        raise ValueError("log_weights should be below +inf and not NaN: use -inf for a weight of 0")


def _check_like(name: str, x: Tensor, z: Tensor) -> None:
    if x.dtype != z.dtype or x.device != z.device:
        raise ValueError(
            f"{name} should have z's dtype and device, {z.dtype} on {z.device}, got {x.dtype} on "
            f"{x.device}: call {name}.to(z) first"
        )
