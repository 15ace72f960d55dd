"""Closed forms of ROME, MEMIT, EMMET and AlphaEdit: least-squares updates of a linear associative memory.

A projection W stores values under keys, W K = V. C (d_k, d_k), `second_moment`, is the second moment of the keys to
preserve. New keys K are (d_k, n); R (d_out, n) is the wanted change of W K. All computations are in float64.

The keys of E routed experts are E parts of length d below one another. C may be (E, d, d), the blocks on its diagonal:
those beside it, of tokens that two experts share, are then taken as zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from interventions.types import InterventionError

_RIDGES = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)


class Factor(NamedTuple):
    """Cholesky factor L of a second moment, C + ridge = L L^T, reused by all solves."""

    lower: Tensor
    """(d_k, d_k) or (E, d, d) float64."""
    ridge: float
    """Added to the diagonal, as a multiple of its mean; 0.0 if not needed. Of several blocks the largest."""

    def solve(self, keys: Tensor) -> Tensor:
        """Return C^-1 K for keys K (d_k, n) float64."""
        return torch.cholesky_solve(_parts(keys, self.lower), self.lower).reshape(keys.shape)


def factorise(second_moment: Tensor) -> Factor:
    """Factorise C, with a ridge if it is singular (a key that is always zero, too few tokens)."""
    C, scale = _symmetric(second_moment)
    lower, used = torch.empty_like(C), 0.0
    left = torch.arange(len(C), device=C.device)
    for ridge in _RIDGES:
        damped = C[left]
        damped.diagonal(dim1=1, dim2=2).add_(ridge * scale)
        lower[left], failed = torch.linalg.cholesky_ex(damped)
        used = ridge
        left = left[failed > 0]
        if not len(left):
            return Factor(lower.reshape(second_moment.shape), used)
    raise InterventionError(
        f"the second moment of the keys stays singular with a ridge of {_RIDGES[-1]}; "
        "give more text (covariance_tokens)"
    )


def memit_update(keys: Tensor, residuals: Tensor, stored: Factor, weight: float) -> Tensor:
    """Return R K^T (weight C + K K^T)^-1, (d_out, d_k): equation 14 of Meng et al. (2023).

    By Woodbury's identity, with A = weight C: (A + K K^T)^-1 K = A^-1 K (I + K^T A^-1 K)^-1.
    """
    K, R = keys.double(), residuals.double()
    A_inv_K = stored.solve(K) / weight  # (d_k, n)
    identity = torch.eye(K.shape[1], dtype=torch.float64, device=K.device)
    adjusted = torch.linalg.solve(identity + K.t() @ A_inv_K, A_inv_K, left=False)
    update: Tensor = R @ adjusted.t()
    return update


def rome_update(keys: Tensor, residuals: Tensor, stored: Factor) -> Tensor:
    """Return the sum of n sequential rank-one updates, (d_out, d_k).

    Equation 2 of Meng et al. (2022): the update L (C^-1 k)^T is the smallest one in the norm of C that changes W k by
    exactly r; L is the remaining part of r divided by k^T C^-1 k. All terms use the same key, as in the paper. The
    authors' code uses the bare prompt's key in some terms, with which a single edit can break the model (Gupta et
    al., 2024, arXiv 2403.07175).
    """
    K, R = keys.double(), residuals.double()
    C_inv_K = stored.solve(K)  # (d_k, n)
    update = torch.zeros(R.shape[0], K.shape[0], dtype=torch.float64, device=K.device)
    for k, u, r in zip(K.t(), C_inv_K.t(), R.t(), strict=True):
        update += torch.outer((r - update @ k) / (u @ k), u)
    return update


def emmet_update(keys: Tensor, residuals: Tensor, stored: Factor, ridge: float) -> Tensor:
    """Return R (K^T C^-1 K + ridge I)^-1 K^T C^-1, (d_out, d_k): the solution of Gupta et al. (2024).

    Without ridge, it is the smallest update in the norm of C that changes W K by exactly R, the solution of the
    Lagrangian; keys that depend on each other get the least-squares solution. As published, one key gets no ridge.
    """
    K, R = keys.double(), residuals.double()
    C_inv_K = stored.solve(K)  # (d_k, n)
    gram = K.t() @ C_inv_K
    if len(gram) > 1:
        gram.diagonal().add_(ridge)
    update: Tensor = R @ torch.linalg.pinv(gram, hermitian=True) @ C_inv_K.t()
    return update


def null_space(second_moment: Tensor, threshold: float, *, relative: bool = False) -> Tensor:
    """Return the eigenvectors of C with eigenvalues below `threshold`, as orthonormal columns (d_k, r).

    Of several blocks (E, d, r), with columns of zeros in blocks that have fewer than others. With `relative`, the
    threshold is a multiple of the mean eigenvalue. Raises InterventionError if there are none.
    """
    C, mean = _symmetric(second_moment)
    eigenvalues, vectors = torch.linalg.eigh(C)
    limit = threshold * float(mean) if relative else threshold
    free = eigenvalues < limit
    if not bool(free.any()):
        low, high = float(eigenvalues.min()), float(eigenvalues.max())
        raise InterventionError(
            f"no eigenvalue of the keys' second moment is below {limit:.3g} (they go from {low:.3g} to {high:.3g}, "
            f"mean {float(mean):.3g}): raise nullspace_threshold, or count it in means by nullspace_relative=true"
        )
    most = int(free.sum(dim=1).max())  # eigenvalues ascend
    basis: Tensor = (vectors * free[:, None])[:, :, :most]
    return basis.reshape(*second_moment.shape[:-1], most)


def free_share(basis: Tensor) -> float:
    """Return the share of all directions that a basis of null spaces has."""
    return float(basis.any(dim=-2).sum()) / basis.shape[:-1].numel()


def alphaedit_update(keys: Tensor, residuals: Tensor, earlier: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """Return the update (d_out, d_k) restricted to the null space (Fang et al., 2025).

    P = basis basis^T; `earlier` (d_k, m) are the keys of earlier batches, whose outputs must not change. The update is
    R K^T P (K K^T P + earlier earlier^T P + ridge I)^-1. As P is a projection, only P Q matters of all keys Q, and
    (P Q Q^T P + ridge I)^-1 P Q = P Q (Q^T P Q + ridge I)^-1, a solve of the size of the edits.
    """
    K, R = keys.double(), residuals.double()
    U = basis.double()
    Q = torch.cat([K, earlier.double()], dim=1)  # (d_k, n + m)
    Q = (U @ (U.mT @ _parts(Q, U))).reshape(Q.shape)  # projected
    gram = Q.t() @ Q
    gram.diagonal().add_(ridge)
    wanted = torch.cat([R, R.new_zeros(R.shape[0], earlier.shape[1])], dim=1)
    update: Tensor = torch.linalg.solve(gram, wanted, left=False) @ Q.t()
    return update


def _parts(keys: Tensor, blocks: Tensor) -> Tensor:
    """Return keys (d_k, n) in the parts that blocks (d_k, .) or (E, d, .) multiply."""
    return keys.reshape(*blocks.shape[:-1], keys.shape[1])


def _symmetric(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return C in blocks, float64, and its mean diagonal; raises InterventionError if that is not above zero."""
    C = second_moment.double().reshape(-1, *second_moment.shape[-2:])
    C = (C + C.mT) / 2  # float32 sums are symmetric only up to rounding, and the solvers read one half
    scale = C.diagonal(dim1=1, dim2=2).mean()
    if not bool(scale > 0) or not bool(torch.isfinite(scale)):
        raise InterventionError(f"the second moment of the keys has mean diagonal {float(scale)}; is the text empty?")
    return C, scale


class NullSpaceSolve:
    """AlphaEdit's solve for one layer; keeps the keys of earlier batches.

    A layer's keys depend only on the weights below it, which are edited first, so the keys stay valid in a batch.
    """

    def __init__(self, basis: Tensor, ridge: float) -> None:
        self._basis = basis
        self._ridge = ridge
        self._earlier = basis.new_zeros(basis.shape[:-1].numel(), 0)

    def __call__(self, keys: Tensor, residuals: Tensor) -> Tensor:
        update = alphaedit_update(keys, residuals, self._earlier, self._basis, self._ridge)
        self._earlier = torch.cat([self._earlier, keys.double()], dim=1)
        return update
