"""Rows of token ids as one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `rows` as input ids and attention mask, both (rows, longest) int64, padded on the right."""
    return _padded(rows, [0] * len(rows), max(len(row) for row in rows), pad, device)


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, width: int) -> tuple[Tensor, Tensor]:
    """Return `rows` as input ids and attention mask, both (rows, width) int64, padded on the left."""
    return _padded(rows, [width - len(row) for row in rows], width, pad, device)


def _padded(
    rows: Sequence[Sequence[int]], starts: Sequence[int], width: int, pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[number, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[number, start : start + len(row)] = 1
    return ids.to(device), mask.to(device)


def padding_id(tokenizer: Any) -> int:
    """Return an id to pad with; masked out, so any will do where the tokenizer has none."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)
