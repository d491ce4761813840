r"""Mixtures of as many Normals as there are data, in memory independent of their number.

The aggregate posterior q(z) = (1/N) sum_n q(z | x_n) at M points is a sum over M x N densities.
They are computed in tiles that fit the cache, summed as they come, and computed again in the
backward pass.
"""

import math
from collections.abc import Iterator

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyproelbo._backend.autograd import Context
from pyproelbo._messages.renamed import renamed


@renamed(chunk="max_elements")
def log_aggregate_posterior(
    z: Tensor,
    loc: Tensor,
    scale: Tensor,
    log_weights: Tensor | None = None,
    *,
    max_elements: int | None = None,
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
        log_weights: log of the weight of each component, shape (N,), in place of -log N. They are
            not normalised: the weights need not sum to 1.
        max_elements: how many densities to hold at once; by default, what fits the cache.

    Returns:
        Log densities, shape (...), differentiable once in all arguments.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or there are no components; under
            Pyro's validation, if a value is not finite, a scale not positive, or a log weight NaN
            or +inf.
    """
    check_mixture(z, loc, scale)
    if log_weights is not None:
        _check_weights(log_weights, loc)
    n, d = loc.shape
    points, constant = z.reshape(-1, d), -0.5 * d * math.log(2 * math.pi)
    if log_weights is None:
        constant -= math.log(n)
    if z.device.type == "mps":
        result = _by_differences(points, loc, scale, log_weights, max_elements)
    else:
        center = loc.detach().double().mean(0)
        x, m, s = points.double() - center, loc.double() - center, scale.double()
        w = s.square().reciprocal()
        bias = -0.5 * (w * m.square()).sum(1) - s.log().sum(1)
        if log_weights is not None:
            bias = bias + log_weights
        features = torch.cat([x.square(), x, torch.ones_like(x[:, :1])], 1)
        weights = torch.cat([-0.5 * w.mT, (w * m).mT, bias[None]]).mT
        result = _LogSumExp.apply(_Product, max_elements, z.dtype, features, weights)
    return (result + constant).to(z.dtype).reshape(z.shape[:-1])


def log_aggregate_marginals(
    z: Tensor, loc: Tensor, scale: Tensor, *, max_elements: int | None = None
) -> Tensor:
    r"""log (1/N) sum_n N(z_d; loc_nd, scale_nd^2) for each dimension d separately, in nats.

    Args:
        z: points, shape (..., D), float32 or float64.
        loc: means, shape (N, D).
        scale: standard deviations, shape (N, D).
        max_elements: how many densities to hold at once; by default, what fits the cache.

    Returns:
        Log densities, shape (..., D), differentiable once in all arguments.

    Raises:
        ValueError: as for :func:`log_aggregate_posterior`.
    """
    check_mixture(z, loc, scale)
    n, d = loc.shape
    # in memory dimension by dimension, as the tiles are
    tensors = (
        x.mT.contiguous().mT for x in (z.reshape(-1, d), loc, scale.reciprocal(), -scale.log())
    )
    result = _LogSumExp.apply(_Normals, max_elements, z.dtype, *tensors)
    return (result - 0.5 * math.log(2 * math.pi) - math.log(n)).to(z.dtype).reshape(z.shape)


class RunningLogSumExp:
    """log sum_n exp(e_mn) for each row m, from blocks of e that arrive one by one.

    >>> state = RunningLogSumExp((2,), torch.zeros(()))
    >>> for e in (1.0, 1.0, -torch.inf):
    ...     state.update(slice(0, 1), torch.full((1, 1), e))
    >>> print(state.value)
    tensor([1.6931,   -inf], dtype=torch.float64)

    Args:
        shape: of the answer, (M, *rest).
        like: a tensor on the device and of the dtype in which to take exponentials. The sums are
            kept in float64, where the device has it.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        wide = torch.float32 if like.device.type == "mps" else torch.float64
        self._top = torch.full(shape, -torch.inf, dtype=wide, device=like.device)
        self._total = torch.zeros_like(self._top)
        self._scratch = like.new_empty(0)

    def update(self, rows: slice, block: Tensor) -> None:
        """Adds exp(block), of shape (m, n, *rest), over dim 1 to ``rows``; overwrites ``block``.

        All blocks of one sum should have the same dtype.
        """
        if len(self._scratch) < block.numel() and block.dtype != self._scratch.dtype:
            self._scratch = self._scratch.new_empty(block.numel())
        top, total = self._top[rows], self._total[rows]
        new = torch.maximum(top, block.amax(1))
        floor = _finite(new.to(block.dtype))
        added = _exp(block, floor, self._scratch).sum(1)
        total.mul_((top - floor).exp_()).add_(added)
        top.copy_(new)

    @property
    def value(self) -> Tensor:
        """The log of each row's sum so far, shape (M, *rest); -inf where it is 0."""
        return self._top + self._total.log()


def _finite(top: Tensor) -> Tensor:
    """``top`` where it is above -inf: what can be subtracted from -inf."""
    return top.clamp(min=torch.finfo(top.dtype).min)


def _exp(block: Tensor, top: Tensor, scratch: Tensor) -> Tensor:
    """exp(block - top): in ``block``, or in ``scratch`` where that is of another dtype."""
    block.sub_(top.unsqueeze(1))
    if block.dtype != scratch.dtype:
        block = _shaped(scratch, block.shape).copy_(block)
    # below that, exp and what is done with its values are slow: they underflow
    return block.clamp_(min=-60.0 if block.dtype == torch.float32 else -600.0).exp_()


def _shaped(scratch: Tensor, shape: tuple[int, ...]) -> Tensor:
    return scratch.view(-1)[: math.prod(shape)].view(shape)


class _Product:
    """features . weights: rows (m, K) and columns (n, K) to exponents (m, n)."""

    @staticmethod
    def shape(m: int, n: int, _: int) -> tuple[int, ...]:
        return m, n

    @staticmethod
    def exponents(e: Tensor, _: Tensor, features: Tensor, weights: Tensor) -> Tensor:
        return torch.mm(features, weights.mT, out=e)

    @staticmethod
    def add_gradients(
        sums: list[Tensor | None], r: Tensor, _: Tensor, features: Tensor, weights: Tensor
    ) -> None:
        of_features, of_weights = sums
        if of_features is not None:
            of_features.addmm_(r, weights)
        if of_weights is not None:
            of_weights.mT.addmm_(features.mT, r)


class _Normals:
    """bias - u^2 / 2, u = (z - loc) inverse: (m, D) and (n, D) to (m, n, D), inverse 1 / scale.

    In memory it is (D, m, n), so that inner loops are long.
    """

    @staticmethod
    def shape(m: int, n: int, d: int) -> tuple[int, ...]:
        return d, m, n

    @staticmethod
    def exponents(
        e: Tensor, u: Tensor, z: Tensor, loc: Tensor, inverse: Tensor, bias: Tensor
    ) -> Tensor:
        torch.sub(z.mT[:, :, None], loc.mT[:, None], out=u).mul_(inverse.mT[:, None])
        return torch.addcmul(bias.mT[:, None], u, u, value=-0.5, out=e).permute(1, 2, 0)

    @staticmethod
    def add_gradients(
        sums: list[Tensor | None],
        r: Tensor,
        u: Tensor,
        z: Tensor,
        loc: Tensor,
        inverse: Tensor,
        bias: Tensor,
    ) -> None:
        of_z, of_loc, of_inverse, of_bias = sums
        r, inverse = r.permute(2, 0, 1), inverse.mT
        if of_bias is not None:
            of_bias.mT.add_(r.sum(1))
        r.mul_(u)
        if of_loc is not None:
            of_loc.mT.add_(r.sum(1).mul_(inverse))
        if of_inverse is not None:
            of_inverse.mT.sub_(u.mul_(r).sum(1).div_(inverse))
        if of_z is not None:
            of_z.mT.sub_(r.mul_(inverse[:, None]).sum(2))


class _Tiled(Context):
    form: "type[_Product | _Normals]"
    max_elements: int | None
    dtype: torch.dtype


class _LogSumExp(torch.autograd.Function):
    """log sum_n exp(e_mn), of exponents e that are computed in tiles, and again in backward.

    ``form`` says how; ``dtype`` is that in which exponentials are taken.
    """

    @staticmethod
    def forward(
        form: type[_Product | _Normals],
        max_elements: int | None,
        dtype: torch.dtype,
        rows: Tensor,
        *columns: Tensor,
    ) -> Tensor:
        shape = rows.shape if form is _Normals else rows.shape[:1]
        state = RunningLogSumExp(shape, rows.new_empty((), dtype=dtype))
        for i, _, e, _, _ in _tiles(form, max_elements, dtype, rows, *columns):
            state.update(i, e)
        return state.value

    @staticmethod
    def setup_context(ctx: _Tiled, inputs: tuple, output: Tensor) -> None:
        ctx.form, ctx.max_elements, ctx.dtype, *tensors = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: _Tiled, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[3:]
        gradients = _Gradients.apply(
            ctx.form, ctx.max_elements, ctx.dtype, needed, grad, *ctx.saved_tensors
        )
        return None, None, None, *gradients


class _Gradients(torch.autograd.Function):
    """The gradients of ``_LogSumExp``, where they are needed."""

    @staticmethod
    def forward(
        form: type[_Product | _Normals],
        max_elements: int | None,
        dtype: torch.dtype,
        needed: tuple[bool, ...],
        grad: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        rows, *columns, result = tensors
        gradients = [
            torch.zeros_like(x) if need else None
            for x, need in zip((rows, *columns), needed, strict=True)
        ]
        top, grad = (x.detach().to(rows.dtype) for x in (_finite(result), grad))
        for i, j, e, u, parts in _tiles(form, max_elements, dtype, rows, *columns):
            r = e.copy_(_exp(e, top[i], u)).mul_(grad[i].unsqueeze(1))
            slices = i, *(j for _ in columns)
            sums = [None if g is None else g[k] for g, k in zip(gradients, slices, strict=True)]
            form.add_gradients(sums, r, u, *parts)
        return tuple(gradients)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Context, *_: Tensor | None) -> None:
        raise RuntimeError(
            "log densities of aggregate posteriors can be differentiated once, not twice: detach "
            "them, or their gradients, from what is differentiated again"
        )


def _tiles(
    form: type[_Product | _Normals],
    max_elements: int | None,
    dtype: torch.dtype,
    rows: Tensor,
    *columns: Tensor,
) -> Iterator[tuple[slice, slice, Tensor, Tensor, list[Tensor]]]:
    """Slices of rows and columns, their exponents, scratch in ``dtype``, and the sliced inputs."""
    # the replay of a captured graph has no custom function: let it not differentiate the tiles
    rows, columns = rows.detach(), tuple(x.detach() for x in columns)
    (m, d), n = rows.shape, len(columns[0])
    if max_elements is None:
        max_elements = _default_elements(rows.device)
    pairs = max(1, max_elements // math.prod(form.shape(1, 1, d)))
    across = min(n, max(1, 2 * math.isqrt(pairs)))
    down = min(m, max(1, pairs // across))
    e = rows.new_empty(math.prod(form.shape(down, across, d)))
    u = torch.empty_like(e, dtype=dtype)
    for top in range(0, m, max(1, down)):
        i = slice(top, min(top + down, m))
        for left in range(0, n, across):
            j = slice(left, min(left + across, n))
            shape = form.shape(i.stop - top, j.stop - left, d)
            parts = [rows[i], *(x[j] for x in columns)]
            u_ij = _shaped(u, shape)
            yield i, j, form.exponents(_shaped(e, shape), u_ij, *parts), u_ij, parts


def _by_differences(
    z: Tensor, loc: Tensor, scale: Tensor, log_weights: Tensor | None, max_elements: int | None
) -> Tensor:
    """What ``_Product`` gives, in the dtype of ``z``; at least N D numbers at a time."""
    bias = -scale.log().sum(1) + (0.0 if log_weights is None else log_weights)

    def of_rows(z: Tensor) -> Tensor:
        u = (z[:, None] - loc) / scale
        return (bias - 0.5 * u.square().sum(-1)).logsumexp(1)

    rows = max(1, (max_elements or _default_elements(z.device)) // loc.numel())
    parts = [checkpoint(of_rows, x, use_reentrant=False) for x in z.split(rows)]
    return torch.cat([x for x in parts if isinstance(x, Tensor)])


def _default_elements(device: torch.device) -> int:
    """How many numbers of 8 bytes fit the caches; on a GPU, a small share of its memory."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return min(memory // 64, 2**28) // 8
    return 2**19 * min(8, torch.get_num_threads())


def check_mixture(z: Tensor, loc: Tensor, scale: Tensor) -> None:
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
