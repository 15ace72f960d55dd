"""The closed form of MEMIT: the least-squares update of a linear associative memory.

Equation 14 of Meng et al. (2023): with C the second moment of the keys already stored, K the new
keys and R the change wanted at them, delta = R K^T (weight C + K K^T)^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from interventions.types import InterventionError

_RIDGES = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)


def memit_update(keys: Tensor, residuals: Tensor, second_moment: Tensor, weight: float) -> tuple[Tensor, float]:
    """Return the update of W, (d_out, d_k) float64, and the ridge that the solve needed.

    `keys` K is (d_k, n), `residuals` R (d_out, n), `second_moment` C (d_k, d_k). Solved by
    Woodbury's identity with a Cholesky factor of weight * C:
    (A + K K^T)^-1 K = A^-1 K (I + K^T A^-1 K)^-1. Where C is singular (a key that is always zero,
    too few tokens) a ridge, relative to C's mean diagonal, is added; 0.0 where none was.
    """
    K, R, C = keys.double(), residuals.double(), second_moment.double()
    C = (C + C.t()) / 2  # float32 sums are symmetric only up to rounding, and Cholesky reads one half
    scale = C.diagonal().mean()
    if not bool(scale > 0) or not bool(torch.isfinite(scale)):
        raise InterventionError(f"the second moment of the keys has mean diagonal {float(scale)}; is the text empty?")
    identity = torch.eye(K.shape[1], dtype=torch.float64, device=K.device)
    for ridge in _RIDGES:
        A = weight * C
        A.diagonal().add_(weight * ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(A)
        if int(failed) == 0:
            A_inv_K = torch.cholesky_solve(K, factor)  # (d_k, n)
            adjusted = torch.linalg.solve(identity + K.t() @ A_inv_K, A_inv_K, left=False)
            return R @ adjusted.t(), ridge
    raise InterventionError(
        f"weight * C stays singular with a ridge of {_RIDGES[-1]}; give more text (covariance_tokens) "
        "or a larger covariance_weight"
    )
