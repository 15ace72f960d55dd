"""Rotate the values of attention heads, and back in the layer that reads them.

Attention adds up values of tokens, head by head, so that a rotation of a head's channels passes through it. Where the
rows of values stand in a fused layer, and whether anything else stands between them and the output, is tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from interventions.compress.kernels.capture import Call
from interventions.compress.kernels.trials import TOLERANCE, moved, precise
from interventions.structure import Block, Linear

LARGE = 2.0**10
"""Factor of values in a second trial, to reach clips far from usual values; exact in every dtype."""


def head_width(model: nn.Module, block: Block) -> int:
    """Return the width of an attention head's values, as the attention's output layer reads them; 0 if unknown."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    outputs = [group.in_features for group in block.linear_groups if group.role == "attention_out"]
    return outputs[0] // heads if outputs and isinstance(heads, int) else 0


def rotate_values_(block: Block, call: Call, R: Tensor) -> bool:
    """Rotate each head's values by R (head width, head width), and back in the attention's output layer, in place.

    Return whether the block's output stays. If not, nothing changes: something stands between values and output.
    """
    output = block.group("attention_out").linears[0]
    R = precise(R, call.hidden.device)
    for values, rows in _value_rows(block, output.in_features, len(R)):
        kept = [part.clone() for part in (*_parts(values), *_parts(output))]
        before = _outputs_of_values(block, call, values, rows)
        weight, bias = values.weight, values.bias
        weight[rows] = (R.t() @ weight[rows].to(R.dtype)).to(weight.dtype)  # (heads, head width, in)
        if bias is not None:
            bias[rows] = (bias[rows].to(R.dtype) @ R).to(bias.dtype)
        by_head = output.weight.to(R.dtype).reshape(output.out_features, -1, len(R))
        output.set_weight_((by_head @ R).flatten(1))
        after = _outputs_of_values(block, call, values, rows)
        if all(moved(new, old, old - call.hidden) <= TOLERANCE for new, old in zip(after, before, strict=True)):
            return True
        for part, former in zip((*_parts(values), *_parts(output)), kept, strict=True):
            part.copy_(former)
    return False


def _outputs_of_values(block: Block, call: Call, values: Linear, rows: Tensor) -> list[Tensor]:
    """Return the block's outputs with its values as they are, and so large that a clip after them shows."""
    outputs = []
    for factor in (1.0, LARGE):
        for part in _parts(values):
            part[rows] *= factor
        outputs.append(call(block.module))
        for part in _parts(values):
            part[rows] /= factor
    return outputs


def _parts(linear: Linear) -> list[Tensor]:
    return [linear.weight] if linear.bias is None else [linear.weight, linear.bias]


def _value_rows(block: Block, inputs: int, head: int) -> Iterator[tuple[Linear, Tensor]]:
    """Yield where the rows of values may be, (heads, head width): in a layer of their own, or at the end of a fused one
    or of each of its heads."""
    linears = next((group.linears for group in block.linear_groups if group.role == "attention_in"), ())
    if len(linears) == 3:
        rows = linears[2].out_features
        if rows % head == 0:
            yield linears[2], torch.arange(rows).view(-1, head)
    elif len(linears) == 1:
        rows = linears[0].out_features
        heads, rest = divmod(rows - inputs, 2 * head)
        if rest == 0 and heads > 0:
            yield linears[0], torch.arange(rows)[rows - heads * head :].view(-1, head)
            if rows % (heads * head) == 0:
                yield linears[0], torch.arange(rows).view(heads, -1, head)[:, -1]
