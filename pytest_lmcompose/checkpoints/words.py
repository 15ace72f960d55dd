"""Pack small numbers into 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_words(numbers: Tensor, bits: int) -> Tensor:
    """Pack numbers (n, k) of `bits` bits into int32 words (n, k * bits / 32), rounded up.

    Number i begins at bit i * bits, counted from the lowest bit of the first word; it may reach into the next word.
    """
    count = numbers.shape[1]
    groups = pad(numbers, (0, -count % 32)).reshape(len(numbers), -1, 32)
    words = torch.zeros(*groups.shape[:2], bits, dtype=torch.int64, device=numbers.device)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        part = groups[..., place].long()
        words[..., word] |= part << shift
        if shift + bits > 32:
            words[..., word + 1] |= part >> (32 - shift)
    words &= 2**32 - 1
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.reshape(len(numbers), -1)[:, : -(-count * bits // 32)].contiguous()
