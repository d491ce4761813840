"""Linear algebra that torch lacks."""

import torch
from torch import Tensor


def cholesky_of_inverse(M: Tensor) -> Tensor:
    """The lower triangular T with T T^T = M^-1, for M positive definite, without a host sync."""
    U = torch.linalg.cholesky_ex(M.flip(-2, -1)).L.flip(-2, -1)  # M = U U^T, U upper
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return torch.linalg.solve_triangular(U.mT, identity, upper=False)
