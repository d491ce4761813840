"""An optimum of an objective, and linear systems of its Hessian there."""

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import numpy as np
import scipy

from pyproelbo._evidence.fixed_draws import FixedObjective

DENSE = 1000  # parameters, up to which the whole Hessian is computed
_WHOLE, _PROBES, _ROUNDS = 100, 10, 5
_PRODUCTS = 1000  # with the Hessian, at most, to find a maximum


class NotAtOptimumError(ValueError):
    """Minus the Hessian is not positive definite."""


class Solve(Protocol):
    """The solution of a linear system."""

    def __call__(self, b: np.ndarray, *, is_there: bool = True) -> np.ndarray:
        """The solution for (n, k) right-hand sides, (n, k).

        Args:
            is_there: whether these belong to the point of the matrix, and should vanish along
                directions in which it is 0. Otherwise these directions are left out.
        """
        ...


def scales(objective: FixedObjective, eta: np.ndarray, seed: int) -> np.ndarray:
    """Scales d, (n,), with which no row of the Hessian is much larger than others.

    The rows of H / sqrt(d d^T) have norms near 1: they are equilibrated in rounds (Ruiz 2001,
    "A scaling algorithm to equilibrate both rows and columns norms in matrices"), and for more than
    100 parameters estimated with random signs.
    """
    n, rng = objective.size, np.random.default_rng(seed)
    whole = objective.hessian_product(eta, np.eye(n)) if n <= _WHOLE else None
    d = np.ones(n)
    for _ in range(_ROUNDS):
        root = np.sqrt(d)[:, None]
        if whole is None:
            signs = rng.choice([-1.0, 1.0], (n, _PROBES))
            products = objective.hessian_product(eta, signs / root) / root
            norm = np.sqrt((products**2).mean(1))
        else:
            norm = np.linalg.norm(whole / root / root.T, axis=1)
        d = d * np.where(norm > 0, norm, 1.0)
    return d


def maximised(objective: FixedObjective, eta: np.ndarray, seed: int) -> np.ndarray:
    """The parameters of a maximum, from ``eta`` on: by L-BFGS near to it, and then by Newton's
    method in a trust region.

    It stops when the ELBO is indistinguishable from its maximum, or after 1,000 steps of the first,
    and 200 steps or 1,000 products with the Hessian of the second; the caller checks whether the
    maximum is reached.
    """
    for search in (by_gradients, by_curvature):
        eta = search(objective, eta, np.sqrt(scales(objective, eta, seed)))
    return eta


def by_gradients(objective: FixedObjective, eta: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Better parameters, by L-BFGS; ``root`` are the square roots of :func:`scales`."""
    options = {"maxiter": 1000, "maxcor": 30}
    found = scipy.optimize.minimize(
        _loss(objective, eta, root), 0 * eta, jac=True, method="L-BFGS-B", options=options
    )
    return eta + found.x / root if found.fun < 0 else eta


def by_curvature(objective: FixedObjective, eta: np.ndarray, root: np.ndarray) -> np.ndarray:
    """The same by Newton's method in a trust region."""
    best, num_products = 0 * eta, 0

    def product(x: np.ndarray, v: np.ndarray) -> np.ndarray:
        nonlocal num_products, best
        best, num_products = x, num_products + 1
        if num_products > _PRODUCTS:
            raise _TooLong
        return -objective.hessian_product(eta + x / root, (v / root)[:, None])[:, 0] / root

    loss = _loss(objective, eta, root)
    # below this steps are lost in the rounding of the ELBO
    scale = (1 + abs(objective.value(eta)[0])) * (1 + objective.size / 10)
    options = {"gtol": 10 * np.sqrt(objective.eps * scale), "maxiter": 200}
    with suppress(_TooLong):  # steps are limited, but each may take any number of products
        best = scipy.optimize.minimize(
            loss, best, jac=True, hessp=product, method="trust-ncg", options=options
        ).x
    return eta + best / root


def _loss(
    objective: FixedObjective, eta: np.ndarray, root: np.ndarray
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """From x to how far the ELBO falls from eta to eta + x / root, and its gradient."""
    first = objective.value(eta)[0]

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        try:
            value, gradient = objective.value(eta + x / root)
        except ValueError:  # as for an infinite scale: a step too far
            return np.inf, np.zeros_like(x)
        if not np.isfinite(value) or not np.isfinite(gradient).all():
            return np.inf, np.zeros_like(x)
        return first - value, -gradient / root

    return loss


class _TooLong(Exception):
    """More products than an objective with a maximum needs."""


def check_second_derivatives(
    objective: FixedObjective, eta: np.ndarray, d: np.ndarray, seed: int
) -> None:
    """Check along one direction that the Hessian belongs to the objective.

    Raises:
        ValueError: where it disagrees with differences of the gradient.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], objective.size)
    direction = _STEP * signs / np.sqrt(d * objective.size)
    ahead, behind = (objective.value(eta + sign * direction)[1] for sign in (1, -1))
    expected = (ahead - behind) / 2 / np.sqrt(d)
    found = objective.hessian_product(eta, direction[:, None])[:, 0] / np.sqrt(d)
    off = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if not off < _OFF:
        raise ValueError(
            "the ELBO at fixed draws should have second derivatives, but autograd's disagree with "
            f"its gradient (off by {off:.0%} along one direction): densities with kinks, such as "
            "Laplace's, and nets of ReLU units have none"
        )


_STEP, _OFF, _FLAT = 0.03, 0.1, 1e-3


def solver(objective: FixedObjective, eta: np.ndarray, d: np.ndarray) -> Solve:
    """``solve(b)``, (-H)^-1 b, of the Hessian H at ``eta``.

    By the whole matrix for up to 1,000 parameters, by conjugate gradients for more.

    Args:
        d: from :func:`scales`.

    Raises:
        ValueError: "not at an optimum", where -H is not positive definite; conjugate gradients
            detect it when they solve.
    """
    make = _dense if objective.size <= DENSE else _by_conjugate_gradients
    return make(objective, eta, d)


def _dense(objective: FixedObjective, eta: np.ndarray, d: np.ndarray) -> Solve:
    root = np.sqrt(d)[:, None]
    matrix = -objective.hessian_product(eta, np.diag(1 / root[:, 0])) / root
    if not np.isfinite(matrix).all():
        raise NotAtOptimumError(_not_at_an_optimum("it is not finite"))
    values, Q = scipy.linalg.eigh((matrix + matrix.T) / 2)
    least = np.sqrt(objective.eps) * values[-1]
    if not values[0] > -least:
        raise NotAtOptimumError(
            _not_at_an_optimum(f"an eigenvalue is {values[0] / values[-1]:.1e}")
        )
    is_flat = values < least  # along it q does not change, as for a product of two parameters
    flat, curved = Q[:, is_flat], Q[:, ~is_flat]

    def solve(b: np.ndarray, *, is_there: bool = True) -> np.ndarray:
        b = b / root
        most = np.sqrt(_FLAT * np.sqrt(objective.eps))  # it may be the square of the covariance
        if is_there and np.abs(flat.T @ b).max(initial=0.0) > most * np.abs(b).max():
            raise NotAtOptimumError(_not_at_an_optimum("it is 0 along a direction"))
        return curved @ ((curved.T @ b) / values[~is_flat, None]) / root

    return solve


def _by_conjugate_gradients(objective: FixedObjective, eta: np.ndarray, d: np.ndarray) -> Solve:
    root, n = np.sqrt(d), objective.size

    def product(v: np.ndarray) -> np.ndarray:
        found = -objective.hessian_product(eta, (v.ravel() / root)[:, None])[:, 0] / root
        curvature = v.ravel() @ found
        if not curvature > 0:
            raise NotAtOptimumError(_not_at_an_optimum(f"it is {curvature:.1e} along a direction"))
        return found

    matrix = scipy.sparse.linalg.LinearOperator(dtype=np.float64, shape=(n, n), matvec=product)

    def solve(b: np.ndarray, *, is_there: bool = True) -> np.ndarray:
        found = np.zeros_like(b)
        for k in range(b.shape[1]):
            x, info = scipy.sparse.linalg.cg(
                matrix, b[:, k] / root, rtol=np.sqrt(objective.eps), maxiter=2 * n
            )
            if info:
                raise NotAtOptimumError(_not_at_an_optimum("conjugate gradients do not converge"))
            found[:, k] = x / root
        return found

    return solve


def _not_at_an_optimum(why: str) -> str:
    return (
        "not at an optimum, where the response is defined: minus the Hessian of the ELBO at fixed "
        f"draws should be positive definite, but {why}. Train the guide longer, or leave "
        "polish=True. A guide with a joint draw of D latents needs num_samples well above D; one "
        "with redundant parameters, such as a network's, has no such Hessian: take an AutoGuide"
    )
