"""The format of AutoGPTQ, version 1: words of levels along the input, zero points less one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_lmcompose.checkpoints.schemes import WHOLE_ROW, Codes, Format, Scheme, skipped
from pytest_lmcompose.checkpoints.words import pack_words

if TYPE_CHECKING:
    from interventions.rounding import Rounding


class Gptq(Format):
    """Each layer has its own grid, by `dynamic`, which GPTQModel and vLLM read."""

    name = "gptq"
    mixed = True
    group_sizes = (16, 32, 64, 128, 256, 512, 1024)

    def scale_dtype(self, weight: torch.dtype) -> torch.dtype:
        """Return float16, whatever the model's dtype is."""
        return torch.float16

    def problem(self, rows: int, cols: int, bits: int) -> str | None:
        """Layers fill whole words both ways."""
        step = 32 if bits == 3 else 32 // bits
        return f"{rows} x {cols} weights, where gptq wants multiples of {step}" if rows % step or cols % step else None

    def config(self, layers: Mapping[str, Scheme], left: Iterable[str], rounding: Rounding) -> dict[str, Any]:
        """State the most common grid, then what differs, by patterns of module names."""
        (main, _), *_ = Counter(layers.values()).most_common()
        dynamic = skipped(left) | {
            f"+:^{re.escape(name)}$": {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
            for name, scheme in layers.items()
            if scheme != main
        }
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": main.bits,
            "group_size": main.group_size,
            "sym": main.symmetric,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "dynamic": dynamic,
            # Without this mark GPTQModel refuses asymmetric grids of version 1, because older packers let zero points
            # of 0 overflow into their neighbours; here none is 0.
            "meta": {"quantizer": ["gptqmodel:0.9.0"]},
        }

    def store(self, codes: Codes) -> dict[str, Tensor]:
        """Return the tensors. A group whose level of zero is 0 is turned over, with a negative scale."""
        bits, size, _ = codes.scheme
        cols = codes.levels.shape[1]
        size = cols if size == WHOLE_ROW else size
        turned = codes.zeros == 0
        most = 2**bits - 1
        over = turned.repeat_interleave(size, dim=1)
        levels = torch.where(over, most - codes.levels, codes.levels)
        zeros = torch.where(turned, most, codes.zeros)
        scales = torch.where(turned, -codes.scales, codes.scales)
        return {
            "qweight": pack_words(levels, bits).t().contiguous(),
            "qzeros": pack_words((zeros - 1).t(), bits),
            "scales": scales.t().contiguous(),
            "g_idx": torch.arange(cols, dtype=torch.int32, device=scales.device) // size,
        }
