"""Experts that share a parameter, as folders of compressed-tensors hold them: a layer for each.

The names of these layers are those that transformers merges when it reads a checkpoint. It unpacks them before, if they
all have one symmetric grid of whole numbers: it reads no zero points, and takes one scheme for all experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evaluators.grids import find_grid
from pytest_lmcompose.checkpoints.integer_layers import (
    PackedLayer,
    decode,
    encode,
    recover_layer,
    scale_problem,
)
from pytest_lmcompose.checkpoints.schemes import Format, Scheme
from pytest_lmcompose.checkpoints.stored_names import as_read

EXPERTS = r"re:.*\.experts\.[0-9]+\..*"
"""The target of a config group that stands for all experts; transformers looks for one with that word."""
_STORED = re.compile(EXPERTS.removeprefix("re:") + r"\.weight")


def plan_experts(model: nn.Module, merged: Sequence[str], form: Format) -> dict[str, PackedLayer] | str:
    """Return how the layers of all experts are stored, by checkpoint name, or why none of them can be.

    `merged` are the layers by parameter and number.
    """
    if not merged or not form.experts:
        return "experts that share a parameter, which the format does not know" if merged else {}
    layers: dict[str, PackedLayer] = {}
    for parameter in dict.fromkeys(name.rpartition(".")[0] for name in merged):
        for name, weight in as_read(model, {parameter: model.get_parameter(parameter).detach()}).items():
            if not _STORED.fullmatch(name) or weight.dim() != 2:
                return "experts that share a parameter in the checkpoint, too"
            layer = _symmetric(weight, form)
            if layer is None:
                return "experts of which not all have a symmetric grid of whole numbers, as transformers reads them"
            layers[name] = layer
    if len({layer.scheme for layer in layers.values()}) > 1:
        return "experts with several grids, of which transformers reads one"
    return layers


def _symmetric(weight: Tensor, form: Format) -> PackedLayer | None:
    """Return how a weight (out, in) is stored without zero points, None if some of its values would not come back."""
    recovered = recover_layer(weight, find_grid(weight), form)
    if recovered is None or isinstance(recovered, str):
        return None
    found, scales = recovered
    layer = PackedLayer(Scheme(found.bits, found.group_size, symmetric=True), scales)
    fits = found.symmetric(found.bits) and scale_problem(layer, form, weight) is None
    return layer if fits and torch.equal(decode(encode(weight, layer, form)).to(weight.dtype), weight) else None
