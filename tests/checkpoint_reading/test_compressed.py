"""Folders that the package compressed-tensors writes are read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from interventions.checkpoint.reading import ReadingError, read_model
from pytest_lmcompose.build.load import load_model
from pytest_lmcompose.settings import ModelSettings
from tests.checkpoint_reading.folders import change_config
from tests.models import tiny_model, tiny_tokenizer

pytest.importorskip("compressed_tensors")

FLOAT = {"dtype": torch.float32}
GROUP = {"strategy": "group", "group_size": 16}
CHANNEL = {"strategy": "channel"}
DYNAMIC = {"num_bits": 8, "dynamic": True, "symmetric": True, "strategy": "token"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "int4 group": ({"weights": {"num_bits": 4, "symmetric": True, **GROUP}}, "pack-quantized"),
    "int4 group, zero points": ({"weights": {"num_bits": 4, "symmetric": False, **GROUP}}, "pack-quantized"),
    "int4 channel, zero points": ({"weights": {"num_bits": 4, "symmetric": False, **CHANNEL}}, "pack-quantized"),
    "int8 group": ({"weights": {"num_bits": 8, "symmetric": True, **GROUP}}, "pack-quantized"),
    "int8 group, zero points": ({"weights": {"num_bits": 8, "symmetric": False, **GROUP}}, "pack-quantized"),
    "int8 with activations": (
        {"weights": {"num_bits": 8, "symmetric": True, **CHANNEL}, "input_activations": DYNAMIC},
        "int-quantized",
    ),
    "float8 channel": (
        {"weights": {**FLOAT8, **CHANNEL}, "input_activations": DYNAMIC | {"type": "float"}},
        "float-quantized",
    ),
    "float8 tensor": (
        {"weights": {**FLOAT8, "strategy": "tensor"}, "input_activations": DYNAMIC | {"type": "float"}},
        "float-quantized",
    ),
    "float8 blocks": (
        {"weights": {**FLOAT8, "strategy": "block", "block_structure": [16, 16]}},
        "naive-quantized",
    ),
}  # fmt: skip


def write(folder: Path, scheme: dict[str, Any], family: str = "llama", targets: list[str] | None = None) -> Any:
    """Quantise a tiny model by the package, and let it write the folder."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = tiny_model(family)
    groups = {"group_0": QuantizationScheme(targets=targets or ["Linear"], **scheme)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        found = getattr(module, "quantization_scheme", None)
        if found is None:
            continue
        args, weight, scale = found.weights, module.weight.data, module.weight_scale.data
        if args.strategy == "block":
            rows, columns = args.block_structure
            parts = weight.reshape(weight.shape[0] // rows, rows, -1, columns).transpose(1, 2).flatten(2)
        else:
            parts = weight.reshape(*scale.shape, -1) if scale.dim() == 2 else weight.reshape(1, -1)
        steps, zeros = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
        scale.copy_(steps.reshape(scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zeros.reshape(module.weight_zero_point.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("scheme, stored", SCHEMES.values(), ids=SCHEMES)
def test_what_the_package_writes(scheme: dict[str, Any], stored: str, tmp_path: Path) -> None:
    write(tmp_path, scheme)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format"] == stored
    loaded = load_model(ModelSettings(), str(tmp_path), torch.device("cpu"))
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, stock(ids).logits)
    grid = loaded.grids["model.layers.0.mlp.up_proj.weight"]
    weights = scheme["weights"]
    assert grid.bits == weights["num_bits"]
    widths = {"group": (16, 48 * 2), "channel": (32, 48), "tensor": (32, 1), "block": (16, 3 * 2)}
    assert (grid.group_size, grid.groups) == widths[weights["strategy"]]
    assert type(loaded.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not hasattr(loaded.model.config, "quantization_config")


def test_codes_in_the_order_of_activations(tmp_path: Path) -> None:
    """`weight_g_idx` is the group of each column."""
    write(tmp_path, {"weights": {"num_bits": 4, "symmetric": False, **GROUP}})
    before, _ = read_model(tmp_path, FLOAT)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    order = np.random.default_rng(0).permutation(np.arange(48) // 16)
    found = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    found["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    change_config(tmp_path, quantization_config=found)
    state[f"{name}.weight_g_idx"] = torch.from_numpy(order.astype(np.int32))
    save_file(state, tmp_path / "model.safetensors")
    model, _ = read_model(tmp_path, FLOAT)
    packed, scales = state[f"{name}.weight_packed"].numpy(), state[f"{name}.weight_scale"].numpy()
    zeros = state[f"{name}.weight_zero_point"].numpy()
    expected = np.empty((32, 48), np.float32)
    for row in range(32):
        for column in range(48):
            code = (int(packed[row, column // 8]) >> (4 * (column % 8))) & 15
            zero = (int(zeros[row // 8, order[column]]) >> (4 * (row % 8))) & 15
            expected[row, column] = scales[row, order[column]] * np.float32(code - zero)
    assert np.array_equal(model.get_parameter(f"{name}.weight").detach().numpy(), expected)
    others = [n for n, _ in before.named_parameters() if not n.startswith(name)]
    assert all(torch.equal(before.get_parameter(n), model.get_parameter(n)) for n in others)


def test_single_layers_by_name_and_an_embedding(tmp_path: Path) -> None:
    scheme = {"weights": {"num_bits": 8, "symmetric": True, **CHANNEL}}
    original = write(tmp_path, scheme, targets=["re:.*up_proj", "Embedding"])
    model, grids = read_model(tmp_path, FLOAT)
    assert {name.rpartition(".")[0] for name in grids} == {
        "model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    }  # fmt: skip
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_scales_in_half_precision_do_not_round_the_weights(tmp_path: Path) -> None:
    write(tmp_path, {"weights": {"num_bits": 8, "symmetric": True, **CHANNEL}})
    state = load_file(tmp_path / "model.safetensors")
    state = {n: t.to(torch.bfloat16) if n.endswith("weight_scale") else t for n, t in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    model, _ = read_model(tmp_path, FLOAT)
    name = "model.layers.1.self_attn.q_proj"
    codes = state[f"{name}.weight_packed"].contiguous().view(torch.uint8).float() - 128
    expected = codes.reshape(32, 32) * state[f"{name}.weight_scale"].float()
    assert torch.equal(model.get_parameter(f"{name}.weight"), expected)


def settings(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())["quantization_config"]
        change_config(folder, quantization_config={**found, **changes})

    return change


def cut(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_packed"
    state[name] = state[name][:, :-1].contiguous()
    save_file(state, folder / "model.safetensors")


UNREADABLE = {
    "sparse": (settings(sparsity_config={"format": "sparse-24-bitmask"}), "sparse compressed-tensors weights"),
    "rotated": (settings(transform_config={"config_groups": {"R1": {}}}), "transform_config rotates activations"),
    "no groups": (settings(config_groups=None), "is not one of compressed-tensors"),
    "cut": (cut, r"up_proj.weight_packed \(48, 3\) does not hold \(48, 32\) in 4 bits"),
}


@pytest.mark.parametrize("change, message", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_one_line(change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, {"weights": {"num_bits": 4, "symmetric": True, **GROUP}})
    change(tmp_path)
    with pytest.raises(ReadingError, match=message) as caught:
        read_model(tmp_path, FLOAT)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"weights": {"num_bits": 4, "symmetric": True, **GROUP}})
    monkeypatch.setattr("interventions.checkpoint.reading.kinds.find_spec", lambda name: None)
    with pytest.raises(ReadingError, match=r'pip install "pytest-lmcompose\[checkpoints\]"'):
        read_model(tmp_path, FLOAT)
