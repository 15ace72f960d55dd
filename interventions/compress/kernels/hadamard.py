"""Orthogonal matrices that spread a vector over all channels: Hadamard matrices with random signs, or random ones.

A Hadamard matrix has entries 1 and -1 and orthogonal rows. The size must be 1, 2 or a multiple of 4; not for all of
these is a construction known. Sylvester's doubles a matrix; Paley's (1933) make one of size q + 1 for a prime
q = 3 modulo 4, and of size 2 (q + 1) for a prime q = 1 modulo 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """An orthogonal matrix; row vectors x become x Q."""

    matrix: Tensor
    """(n, n) float64 on the host."""
    kind: str
    """How it was made, for the report."""


def random_rotation(n: int, generator: torch.Generator, *, hadamard: bool = True, keeps_mean: bool = False) -> Rotation:
    """Return a random rotation of n channels.

    A Hadamard matrix with random signs if there is a known one and `hadamard`, otherwise a matrix drawn evenly from all
    orthogonal ones. With `keeps_mean`, the mean of the channels stays: a reflection moves the image of (1, ..., 1)
    back there.
    """
    found = find_hadamard(n) if hadamard else None
    if found is not None:
        signs = torch.randint(2, (n, 1), generator=generator, dtype=torch.float64) * 2 - 1
        matrix, kind = signs * found / n**0.5, "hadamard"
    else:
        gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64)
        matrix, upper = torch.linalg.qr(gaussian)
        matrix, kind = matrix * upper.diagonal().sign(), "orthogonal"
    if keeps_mean:
        even = torch.full((n,), n**-0.5, dtype=torch.float64)
        w = even @ matrix - even
        if float(w.norm()) > 1e-9:
            matrix = matrix - torch.outer(matrix @ w, w) * (2 / w.square().sum())
        kind += ", keeping the mean"
    return Rotation(matrix, kind)


def find_hadamard(n: int) -> Tensor | None:
    """Return a Hadamard matrix (n, n) of 1 and -1, float64; None if these constructions have none of that size."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    half = find_hadamard(n // 2) if n % 2 == 0 else None
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    if n % 4 == 0 and is_prime(n - 1):  # n - 1 = 3 modulo 4
        return _bordered(n - 1, -1) + torch.eye(n, dtype=torch.float64)
    if n % 4 == 0 and n // 2 % 4 == 2 and is_prime(n // 2 - 1):
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(n // 2 - 1, 1), plus) + torch.kron(torch.eye(n // 2, dtype=torch.float64), minus)
    return None


def is_prime(q: int) -> bool:
    """Return whether a whole number is a prime."""
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _bordered(q: int, sign: int) -> Tensor:
    """Return Paley's conference matrix (q + 1, q + 1): the quadratic characters of j - i modulo q, with a border."""
    characters = torch.full((q,), -1.0, dtype=torch.float64)
    characters[torch.arange(q).square().remainder(q)] = 1
    characters[0] = 0
    places = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, sign
    matrix[1:, 1:] = characters[(places.unsqueeze(0) - places.unsqueeze(1)).remainder(q)]
    return matrix
