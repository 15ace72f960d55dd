"""Floating-point numbers of 4 to 8 bits: pure functions on tensors. Imports nothing else of the project."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EXPONENT = 0x7F800000
"""The bits of a float32 number that are left of 2**floor(log2(x))."""


@dataclass(frozen=True)
class FloatFormat:
    """A format with a sign, an exponent and a mantissa, and without infinity (OCP Microscaling Formats, v1.0)."""

    bits: int
    mantissa: int
    """Bits of the mantissa."""
    step: float
    """The smallest number above 0."""
    greatest: float

    def round_(self, numbers: Tensor) -> Tensor:
        """Round float32 numbers up to the greatest to the nearest of the format, ties to even, in place."""
        steps = numbers.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
        steps.mul_(2.0**-self.mantissa).clamp_(min=self.step)
        return numbers.div_(steps).round_().mul_(steps)

    def round(self, numbers: Tensor) -> Tensor:
        """Return the nearest numbers of the format."""
        return self.round_(numbers.clamp(-self.greatest, self.greatest))


E2M1 = FloatFormat(4, 1, 0.5, 6.0)
E2M3 = FloatFormat(6, 3, 0.125, 7.5)
E4M3 = FloatFormat(8, 3, 2.0**-9, 448.0)


def power_of_two(magnitudes: Tensor, mantissa: int) -> Tensor:
    """Return the power of two below each positive float32 number; above it, if `mantissa` bits would round up to it."""
    half = 1 << (22 - mantissa)
    return (magnitudes.view(torch.int32) + half).bitwise_and_(_EXPONENT).view(torch.float32)
