"""The format of AutoAWQ's `gemm` kernels: words of levels along the output, in an order of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_lmcompose.checkpoints.schemes import Codes, Format, Scheme, skipped
from pytest_lmcompose.checkpoints.words import pack_words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours a word holds, from its lowest bits up."""

if TYPE_CHECKING:
    from interventions.rounding import Rounding


class Awq(Format):
    """All layers of a folder have one group size and 4 bits."""

    name = "awq"
    mixed = False
    group_sizes = (16, 32, 64, 128)

    def scale_dtype(self, weight: torch.dtype) -> torch.dtype:
        """Return float16, whatever the model's dtype is."""
        return torch.float16

    def problem(self, rows: int, cols: int, bits: int) -> str | None:
        """Outputs fill whole words."""
        return f"{rows} outputs, where awq wants a multiple of 8" if rows % 8 else None

    def config(self, layers: Mapping[str, Scheme], left: Iterable[str], rounding: Rounding) -> dict[str, Any]:
        """State the grid of all layers, and which modules are not packed: GPTQModel's own loader reads `dynamic`."""
        left = list(left)
        scheme = next(iter(layers.values()))
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            "modules_to_not_convert": left,
            "dynamic": skipped(left),
        }

    def store(self, codes: Codes) -> dict[str, Tensor]:
        """Return the tensors, (inputs or groups, outputs)."""
        return {
            "qweight": _packed(codes.levels, codes.scheme.bits),
            "qzeros": _packed(codes.zeros, codes.scheme.bits),
            "scales": codes.scales.t().contiguous(),
        }


def _packed(numbers: Tensor, bits: int) -> Tensor:
    """Pack (outputs, k) along the outputs: (k, outputs / 8)."""
    outputs = torch.arange(len(numbers)).reshape(-1, 8)[:, list(ORDER)].flatten()
    return pack_words(numbers[outputs].t(), bits)
