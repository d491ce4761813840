"""Linear chains: all steps of a sample at once, in log2 T rounds."""

import torch
from pyro.distributions import MultivariateNormal, TorchDistribution
from torch import Tensor

from pyproelbo._distributions.row_noise import Noise, draws_by_row
from pyproelbo.sequences.base import check_steps
from pyproelbo.sequences.chains import MarkovChain


class LinearGaussianChain(MarkovChain):
    r"""z_0 ~ p(z_0), z_t ~ N(A_t z_{t-1} + b_t, L_t L_t^T): a vector autoregression.

    The same as a :class:`MarkovChain` of such steps, but a sample is made by an associative scan
    (Blelloch 1990, "Prefix sums and their applications"): log2 T rounds of matrix products in place
    of T steps, which pays where T is large. It draws other random numbers than the loop.

    >>> import torch, pyro.distributions as dist
    >>> walk = LinearGaussianChain(
    ...     initial=dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    ...     matrix=0.9 * torch.eye(2),
    ...     offsets=torch.zeros(1000, 2),
    ...     scale_tril=0.1 * torch.eye(2),
    ... )
    >>> walk.sample((5,)).shape, walk.log_prob(walk.sample((5,))).shape
    (torch.Size([5, 1000, 2]), torch.Size([5]))

    Args:
        initial: p(z_0), a ``MultivariateNormal`` of batch shape (...).
        matrix: A, (k, k), the same at all steps, or (..., T, k, k); A_0 is not used.
        offsets: b, (..., T, k); b_0 is not used.
        scale_tril: L, lower triangular with a positive diagonal, (k, k) or (..., T, k, k).
        mask: which steps count, bool (..., T): True up to a sequence's length. All if None.

    Raises:
        ValueError: for shapes that do not match, no step at all, and a mask with gaps.
    """

    def __init__(
        self,
        initial: MultivariateNormal,
        matrix: Tensor,
        offsets: Tensor,
        scale_tril: Tensor,
        mask: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_steps(None, offsets, mask)
        k = initial.event_shape[-1]
        for name, x in (("matrix", matrix), ("scale_tril", scale_tril)):
            if x.shape[-2:] != (k, k) or (x.dim() > 2 and x.shape[-3] != offsets.shape[-2]):
                raise ValueError(
                    f"{name} should have shape (k, k) or (..., T, k, k), for k = {k} and T = "
                    f"{offsets.shape[-2]}, got {tuple(x.shape)}"
                )
        if offsets.shape[-1] != k:
            raise ValueError(
                f"offsets should have shape (..., T, k), for k = {k}, got {tuple(offsets.shape)}"
            )
        self._matrix, self._offsets, self._scale_tril = matrix, offsets, scale_tril
        by_step = [x for x in (matrix, scale_tril) if x.dim() > 2]
        shape = torch.broadcast_shapes(
            offsets.shape[:-1], *(x.shape[:-2] for x in by_step)
        )  # of the inputs, except their last dim
        inputs = [offsets.expand(*shape, k)]
        inputs += [x.expand(*shape, k, k).flatten(-2) for x in by_step]
        constant = {"matrix": matrix, "scale_tril": scale_tril}
        changing = [name for name, x in constant.items() if x.dim() > 2]

        def transition(z: Tensor, u: Tensor) -> TorchDistribution:
            b, *parts = u.split([k, *[k * k] * len(changing)], -1)
            found = constant | {
                name: part.unflatten(-1, (k, k)) for name, part in zip(changing, parts, strict=True)
            }
            loc = times(found["matrix"], z) + b
            return MultivariateNormal(loc, scale_tril=found["scale_tril"])

        super().__init__(
            initial,
            transition,
            inputs=torch.cat(inputs, -1),
            mask=mask,
            validate_args=validate_args,
        )

    def _expanded(self, batch_shape: torch.Size) -> "LinearGaussianChain":
        first = self._first.expand(batch_shape)
        assert isinstance(first, MultivariateNormal)
        parts = self._matrix, self._offsets, self._scale_tril
        mask = None if self.step_mask is None else self.step_mask.expand(*batch_shape, -1)
        return LinearGaussianChain(first, *parts, mask, self._validate_args)

    def _draw(self) -> Tensor:
        return self.of_noise(torch.randn_like(self._offsets.expand(self.shape())))

    def of_noise(self, noise: Tensor) -> Tensor:
        """The sample made from standard normal numbers (..., T, k)."""
        first, matrix, scale_tril = self._first, self._matrix, self._scale_tril
        if scale_tril.dim() > 2:
            scale_tril = scale_tril[..., 1:, :, :]
        z = first.loc + times(first.scale_tril, noise[..., 0, :])
        steps = self._offsets[..., 1:, :] + times(scale_tril, noise[..., 1:, :])
        return linear_scan(
            matrix, torch.cat([z.unsqueeze(-2), steps.expand(*z.shape[:-1], -1, -1)], -2)
        )


@draws_by_row(LinearGaussianChain)
def _linear(d: LinearGaussianChain, noise: Noise) -> Tensor:
    return d.of_noise(noise.normal(d._offsets, d.shape(), 2))


def linear_scan(matrix: Tensor, x: Tensor) -> Tensor:
    """y_0 = x_0, y_t = A_t y_{t-1} + x_t, for all steps, in log2 T rounds.

    Args:
        matrix: A, (k, k), or (..., T, k, k), whose A_0 is not used.
        x: (..., T, k).
    """
    distance = 1
    while distance < x.shape[-2]:
        before, now = x[..., :-distance, :], x[..., distance:, :]
        if matrix.dim() == 2:
            now = now + before @ matrix.mT
            matrix = matrix @ matrix
        else:
            of_now = matrix[..., distance:, :, :]
            now = now + times(of_now, before)  # A_t ... A_{t-distance+1}, where there is a past
            further = of_now[..., distance:, :, :] @ matrix[..., distance:-distance, :, :]
            matrix = torch.cat([matrix[..., : 2 * distance, :, :], further], -3)
        x = torch.cat([x[..., :distance, :].expand(*now.shape[:-2], -1, -1), now], -2)
        distance *= 2
    return x


def times(matrix: Tensor, z: Tensor) -> Tensor:
    """The matrix (..., k, k) times vectors (..., k)."""
    return z @ matrix.mT if matrix.dim() == 2 else (matrix @ z.unsqueeze(-1)).squeeze(-1)
