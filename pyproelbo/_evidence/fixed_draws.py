"""An objective at draws with fixed noise: a smooth function of parameters."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pyproelbo._distributions.sharing import sharing
from pyproelbo._distributions.sobol import Points
from pyproelbo._evidence.trained_guide import borrowed, check_reparameterised, parameters_of
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.report_data import Unit
from pyproelbo._rows.runs import Use
from pyproelbo._rows.values import latent_values
from pyproelbo._terms.traces import Program, Traces

AT_ONCE = 2**16  # draws of a site, times its size, that are made in one run
GROUPS = 20  # of independent draws
_BATCHED = 2**20  # the same, times the directions that are multiplied at once

Draws = Sequence[range]  # the numbers of some draws, in parts


class FixedObjective:
    r"""A mean over S draws of the guide with fixed noise, and its derivatives.

    With unconstrained parameters eta, one vector of n numbers, and the guide's draws z_s(eta), made
    from noise that does not change with eta, it is, for the ELBO,

        L(eta) = 1/S sum_s log p(x, z_s(eta)) - log q(z_s(eta) | eta),

    in nats. It has no noise, and can be maximised by any optimiser (Giordano, Ingram & Broderick
    2024, "Black box variational inference with a deterministic objective"). A full-rank guide of D
    latents needs more than D draws: with fewer, L has no maximum.

    All vectors are float64 on the CPU, as in SciPy; the programs compute in their own dtype and on
    their own device. After a call the parameters are those that it was given.

    Args:
        traces: from the indices of draws to runs of them.
        first: a run of one draw, which is not one of the S.
        value: the sum over the draws of a run, in nats, whose mean is wanted.
        parameters: the arguments of L, which take gradients.
        num_samples: S.
        chunk: how many draws are made at once; by default as many as memory allows.
        points: the Sobol points that the draws are made from; None where they are independent.

    Attributes:
        size: n.
        groups: the indices of draws in independent parts of equal size, whose differences give the
            errors: replicates of Sobol points, or else 20.
        start: the initial parameters, (n,).
        first: a run of one draw, which is not one of the S.
        largest: how many numbers a draw of a site has, at most.
        eps: the relative spacing of numbers in the parameters' dtype.

    Raises:
        ValueError: for a latent without reparameterised draws.
    """

    def __init__(
        self,
        traces: Callable[[range], list[Traces]],
        first: Traces,
        value: Callable[[Traces], Tensor],
        parameters: Sequence[Tensor],
        num_samples: int,
        chunk: int | None = None,
        points: Points | None = None,
    ) -> None:
        check_reparameterised(first)
        self._traces, self.first, self._value = traces, first, value
        self.num_samples = num_samples
        num = GROUPS if points is None else points.replicates(num_samples)
        ends = [num_samples * j // num for j in range(num + 1)]
        self.groups = [range(*pair) for pair in pairwise(ends)]
        self.largest = max(site["log_prob"].numel() for site in self.first.sites)
        self._chunk = max(1, AT_ONCE // self.largest) if chunk is None else chunk
        self._can_batch = True
        self._take(list(parameters))

    def beside(self, others: Sequence[Tensor]) -> "FixedObjective":
        """The same at the same draws, as a function of its parameters followed by others."""
        found = copy(self)
        found._take([*self._parameters, *others])
        return found

    def _take(self, parameters: list[Tensor]) -> None:
        """Become a function of these."""
        self._parameters = parameters
        self.size = sum(value.numel() for value in parameters)
        self.start = self._joined(parameters)
        self.eps = max(torch.finfo(value.dtype).eps for value in parameters)

    @property
    def all(self) -> Draws:
        """The indices of all draws."""
        return [range(self.num_samples)]

    def value(self, eta: np.ndarray, draws: Draws | None = None) -> tuple[float, np.ndarray]:
        """L at the draws with these indices, by default all, and its gradient (n,)."""

        def of(traces: Traces) -> list[np.ndarray]:
            total = self._value(traces)
            return [total.detach().double().cpu().numpy(), self._joined(self._gradient(total))]

        value, gradient = self._mean(eta, draws, of)
        return float(value), gradient

    def hessian_product(
        self, eta: np.ndarray, directions: np.ndarray, draws: Draws | None = None
    ) -> np.ndarray:
        """The Hessian of L times each of the columns of ``directions`` (n, k): (n, k).

        Raises:
            ValueError: where a density or a draw has no second derivatives.
        """

        def of(traces: Traces) -> list[np.ndarray]:
            total = self._value(traces)
            gradient = self._gradient(total, create_graph=True)
            return [self._products(gradient, directions.T).T]

        return self._mean(eta, draws, of)[0]

    def jacobian(
        self, eta: np.ndarray, names: Collection[str], draws: Draws | None = None
    ) -> np.ndarray:
        """The Jacobian of the means over draws of the P elements of latents, (P, n)."""

        def of(traces: Traces) -> list[np.ndarray]:
            total = latent_values(traces, None, names)[1].sum((0, 1))
            return [self._products([total], np.eye(len(total)), [total])]

        return self._mean(eta, draws, of)[0]

    def slopes(
        self,
        eta: np.ndarray,
        numbers: Callable[[Traces], Tensor],
        directions: np.ndarray,
        draws: Draws | None = None,
    ) -> np.ndarray:
        """The Jacobian of the means over draws of m numbers, times each column of ``directions``
        (n, k): (m, k).

        Args:
            numbers: their sums over the draws of a run, (m,).
        """

        def of(traces: Traces) -> list[np.ndarray]:
            total = numbers(traces)
            v = torch.zeros_like(total, requires_grad=True)
            gradient = self._gradient((total * v).sum(), create_graph=True)  # J^T v, linear in v
            return [self._products(gradient, directions.T, inputs=[v]).T]

        return self._mean(eta, draws, of)[0]

    def values(self, eta: np.ndarray, names: Collection[str]) -> tuple[tuple[str, ...], np.ndarray]:
        """The labels of the elements of latents, and their draws (S, P)."""
        labels, found = (), []

        def of(traces: Traces) -> list[np.ndarray]:
            nonlocal labels
            labels, values = latent_values(traces, None, names)
            found.append(values.detach()[:, 0].numpy())
            return []

        self._mean(eta, None, of)
        return labels, np.concatenate(found)

    def _mean(
        self, eta: np.ndarray, draws: Draws | None, of: Callable[[Traces], list[np.ndarray]]
    ) -> list[np.ndarray]:
        """The mean over the draws, from sums over those of one run."""
        draws = self.all if draws is None else draws
        self._put(eta)
        total: list[np.ndarray] = []
        for part in draws:
            for first in range(part.start, part.stop, self._chunk):
                numbers = range(first, min(first + self._chunk, part.stop))
                with torch.enable_grad(), sharing():  # for parameters change from call to call
                    for traces in self._traces(numbers):
                        found = of(traces)
                        pairs = zip(total, found, strict=True)
                        total = [a + b for a, b in pairs] if total else found
        return [value / sum(map(len, draws)) for value in total]

    def _put(self, eta: np.ndarray) -> None:
        with torch.no_grad():
            for value, part in zip(self._parameters, self._split(eta), strict=True):
                value.copy_(part)

    def _split(self, rows: np.ndarray) -> list[Tensor]:
        """Vectors (..., n) by parameters, (..., *shape)."""
        parts = torch.as_tensor(rows, device="cpu").split([p.numel() for p in self._parameters], -1)
        pairs = zip(parts, self._parameters, strict=True)
        return [part.reshape((*rows.shape[:-1], *p.shape)).to(p) for part, p in pairs]

    def _joined(self, parts: Sequence[Tensor | None]) -> np.ndarray:
        """Gradients (*shape) by parameters, as one vector (n,)."""
        return _joined(parts, self._parameters)

    def _gradient(self, total: Tensor, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        if not total.requires_grad:
            return (None,) * len(self._parameters)
        return torch.autograd.grad(
            total, self._parameters, allow_unused=True, create_graph=create_graph
        )

    def _products(
        self,
        outputs: Sequence[Tensor | None],
        rows: np.ndarray,
        like: Sequence[Tensor] | None = None,
        inputs: Sequence[Tensor] | None = None,
    ) -> np.ndarray:
        """Each row (m,) times the Jacobian (m, n) of outputs with m elements: (k, n).

        Args:
            like: tensors with the shapes of the outputs; by default the parameters.
            inputs: the arguments of the outputs; by default the parameters.
        """
        inputs = self._parameters if inputs is None else inputs
        found = np.zeros((len(rows), sum(x.numel() for x in inputs)))
        at_once = max(1, _BATCHED // (self.largest * min(self._chunk, self.num_samples)))
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            given = self._split(part) if like is None else [torch.as_tensor(part).to(like[0])]
            both = zip(outputs, given, strict=True)
            pairs = [(y, v) for y, v in both if y is not None and y.requires_grad]
            if pairs:
                found[first : first + at_once] = self._pulled_back(pairs, inputs, len(part))
        return found

    def _pulled_back(
        self, pairs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor], num: int
    ) -> np.ndarray:
        outputs, given = zip(*pairs, strict=True)
        options = {"allow_unused": True, "retain_graph": True}
        if self._can_batch and num > 1:
            try:
                found = torch.autograd.grad(
                    outputs, inputs, given, is_grads_batched=True, **options
                )
                return _joined(found, inputs, num)
            except RuntimeError:  # an operation that takes only one direction, or none
                self._can_batch = False
        try:
            each = [
                torch.autograd.grad(outputs, inputs, [v[i] for v in given], **options)
                for i in range(num)
            ]
        except RuntimeError as error:
            raise ValueError(
                "the ELBO at fixed draws should have second derivatives, but a density or a draw "
                f"has none: {error}. Draw gamma, beta, Dirichlet and Student latents as transforms "
                "of normal ones, as AutoGuides do"
            ) from error
        return np.stack([_joined(found, inputs) for found in each])


def _joined(
    parts: Sequence[Tensor | None], like: Sequence[Tensor], num: int | None = None
) -> np.ndarray:
    """Gradients (*shape) by tensors, as one vector (n,); ``num`` of them, (num, n)."""
    rows = () if num is None else (num,)
    columns = [
        np.zeros((*rows, x.numel()))
        if part is None
        else part.detach().double().cpu().reshape(*rows, -1).numpy()
        for part, x in zip(parts, like, strict=True)
    ]
    return np.concatenate(columns, -1)


@contextmanager
def fixed_draws(
    model: Program,
    guide: Program,
    batch: Batch,
    unit: Unit,
    num_samples: int,
    seed: int,
    chunk: int | None = None,
    points: Points | None = None,
) -> Iterator[FixedObjective]:
    """The ELBO as a function of a guide's parameters, which are restored afterwards.

    Raises:
        ValueError: as for :class:`~pyproelbo._rows.draws.RowDraws` and :class:`FixedObjective`, and
            for a guide without parameters.
    """
    parameters = parameters_of(guide, model, batch)
    if not parameters:
        raise ValueError(
            "the guide should have parameters, of which the ELBO at fixed draws is a function, "
            "but has none of its own: give it pyro.param sites, or take an AutoGuide"
        )
    draws = RowDraws(model, guide, batch, unit, seed, points)

    def traces(numbers: range) -> list[Traces]:
        return draws.traces(numbers, Use.FIXED)

    def value(traces: Traces) -> Tensor:
        return draws.terms(traces).log_weight.sum()

    with borrowed(parameters):
        yield FixedObjective(traces, draws.first, value, parameters, num_samples, chunk, points)
