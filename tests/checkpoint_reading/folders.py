"""Folders of quantised models, written number by number with Python's integers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.models import VOCABULARY, tiny_model, tiny_tokenizer

Array = NDArray[Any]
GROUP = 16
SQUARE = transformers.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=64,
)
"""Widths that 3 bits fill words of."""


class Layer(NamedTuple):
    """Random codes of a layer (in, out), and what they mean."""

    codes: Array
    zeros: Array
    """(groups, out)."""
    scales: Array
    """(groups, out), float16."""
    order: Array
    """The group of each input."""

    @property
    def weight(self) -> Array:
        """(out, in) in float32."""
        found = np.empty(self.codes.shape, np.float32)
        for row, group in enumerate(self.order):
            found[row] = self.scales[group].astype(np.float32) * (self.codes[row] - self.zeros[group])
        return found.T


class Written(NamedTuple):
    """A folder, and what its model should be."""

    folder: Path
    expected: dict[str, Tensor]
    """The weights of the quantised layers, as the model has them."""
    original: Any


def random_layer(draw: np.random.Generator, inputs: int, outputs: int, bits: int, act_order: bool, low: int) -> Layer:
    groups = inputs // GROUP
    order = np.arange(inputs) // GROUP
    return Layer(
        draw.integers(0, 2**bits, (inputs, outputs)),
        draw.integers(low, 2**bits, (groups, outputs)),
        (0.01 + 0.1 * draw.random((groups, outputs))).astype(np.float16),
        draw.permutation(order) if act_order else order,
    )


def stream(numbers: Array, bits: int) -> Array:
    """Write down each column of `numbers` as one integer, and cut it into 32-bit words."""
    rows, columns = numbers.shape
    words = np.empty((rows * bits // 32, columns), np.uint32)
    for column in range(columns):
        whole = sum(int(number) << (bits * place) for place, number in enumerate(numbers[:, column]))
        for place in range(len(words)):
            words[place, column] = (whole >> (32 * place)) & 0xFFFFFFFF
    return words.view(np.int32)


def gptq_tensors(layer: Layer, bits: int, *, less_one: bool, with_order: bool = True) -> dict[str, Array]:
    stored = layer.zeros - 1 if less_one else layer.zeros
    found = {
        "qweight": stream(layer.codes, bits),
        "qzeros": stream(stored.T, bits).T,
        "scales": layer.scales,
        "g_idx": layer.order.astype(np.int32),
    }
    return found if with_order else {role: tensor for role, tensor in found.items() if role != "g_idx"}


def awq_tensors(layer: Layer) -> dict[str, Array]:
    def pack(numbers: Array) -> Array:
        words = np.zeros((len(numbers), numbers.shape[1] // 8), np.uint32)
        for word in range(words.shape[1]):
            for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, word] |= numbers[:, 8 * word + column].astype(np.uint32) << np.uint32(4 * place)
        return words.view(np.int32)

    return {"qweight": pack(layer.codes), "qzeros": pack(layer.zeros), "scales": layer.scales}


def write(
    folder: Path,
    family: str | transformers.PretrainedConfig,
    settings: Mapping[str, Any],
    tensors: Callable[[Layer], Mapping[str, Array | Tensor]],
    *,
    bits: int = 4,
    act_order: bool = False,
    low: int = 1,
    skip: Callable[[str], bool] = lambda name: name.endswith(("lm_head", "embed_out")),
    draw: Callable[[np.random.Generator, int, int], Layer] | None = None,
) -> Written:
    """Write a model whose linear layers are stored by `tensors`."""
    model = tiny_model(family)
    generator = np.random.default_rng(0)
    expected = {}
    model.save_pretrained(folder)
    state: dict[str, Tensor] = dict(transformers.modeling_utils.load_state_dict(str(folder / "model.safetensors")))
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or skip(name):
            continue
        outputs, inputs = module.weight.t().shape if isinstance(module, Conv1D) else module.weight.shape
        make = draw or (lambda g, i, o: random_layer(g, i, o, bits, act_order, low))
        layer = make(generator, inputs, outputs)
        weight = torch.from_numpy(layer.weight.copy())
        expected[f"{name}.weight"] = weight.t().contiguous() if isinstance(module, Conv1D) else weight
        del state[f"{name}.weight"]
        for role, tensor in tensors(layer).items():
            found = tensor if isinstance(tensor, Tensor) else torch.from_numpy(tensor.copy())
            state[f"{name}.{role}" if role else f"{name}.weight"] = found.contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=dict(settings))
    tiny_tokenizer().save_pretrained(folder)
    return Written(folder, expected, model)


def change_config(folder: Path, **changes: Any) -> None:
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **changes}))


def assert_read(model: Any, written: Written) -> None:
    """The quantised layers have the expected values, all others the original ones, to the last bit."""
    original = dict(written.original.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == original.keys() and len(written.expected) >= 4
    for name, parameter in found.items():
        expected = written.expected.get(name, original[name])
        assert parameter.dtype == torch.float32 and torch.equal(parameter, expected), name
