"""Folders of GPTQ, AWQ, FP8 and bitsandbytes are read to the last bit of what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from interventions.checkpoint.reading import ReadingError, read_kind, read_model
from pytest_lmcompose.build.load import load_model
from pytest_lmcompose.errors import ModelError
from pytest_lmcompose.settings import ModelSettings
from tests.checkpoint_reading.folders import (
    GROUP,
    SQUARE,
    Layer,
    Written,
    assert_read,
    awq_tensors,
    change_config,
    gptq_tensors,
    random_layer,
    stream,
    write,
)
from tests.models import VOCABULARY, tiny_model

FLOAT = {"dtype": torch.float32}
FAMILIES = ("llama-bias", "llama-gqa", "qwen2", "gemma", "phi3", "gpt_neox", "opt", "gpt2")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def gptq(folder: Path, family: Any = "llama", bits: int = 4, v2: bool = False, act_order: bool = False) -> Written:
    settings = {**GPTQ, "bits": bits, "desc_act": act_order}
    settings |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    return write(
        folder,
        family,
        settings,
        lambda layer: gptq_tensors(layer, bits, less_one=not v2),
        bits=bits,
        act_order=act_order,
        low=0 if v2 else 1,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_of_every_family(family: str, tmp_path: Path) -> None:
    written = gptq(tmp_path, family)
    assert read_kind(tmp_path) == "gptq"
    loaded = load_model(ModelSettings(), str(tmp_path), torch.device("cpu"))
    assert_read(loaded.model, written)
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.grids.keys() == written.expected.keys()
    assert {(grid.bits, grid.group_size) for grid in loaded.grids.values()} == {(4, GROUP)}


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_in_both_formats(bits: int, v2: bool, act_order: bool, tmp_path: Path) -> None:
    written = gptq(tmp_path, SQUARE, bits, v2, act_order)
    model, grids = read_model(tmp_path, FLOAT)
    assert_read(model, written)
    grid = grids["model.layers.0.mlp.down_proj.weight"]
    assert grid.groups == 4 * 32
    # A scale and a zero point for each group, and the group of each input.
    assert grid.overhead_bits == 4 * 32 * (16 + bits) + 64 * 32


def test_gptq_zeros_that_borrow_from_their_neighbours(tmp_path: Path) -> None:
    """Writers subtract one from a whole word, so a zero point of 0 changes the next one."""

    def tensors(layer: Layer) -> dict[str, Any]:
        words = stream(layer.zeros.T, 4).T.view(np.uint32)
        return {**gptq_tensors(layer, 4, less_one=False), "qzeros": (words - np.uint32(0x11111111)).view(np.int32)}

    written = write(tmp_path, "llama", GPTQ, tensors, low=0)
    assert_read(read_model(tmp_path, FLOAT)[0], written)


def test_gptq_without_the_order_and_with_settings_in_their_own_file(tmp_path: Path) -> None:
    written = write(tmp_path, "llama", GPTQ, lambda layer: gptq_tensors(layer, 4, less_one=True, with_order=False))
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    assert_read(read_model(tmp_path, FLOAT)[0], written)


def test_layers_that_stayed_in_full_precision(tmp_path: Path) -> None:
    written = write(
        tmp_path,
        "llama",
        GPTQ,
        lambda layer: gptq_tensors(layer, 4, less_one=True),
        skip=lambda name: "down_proj" in name or name == "lm_head",
    )
    model, grids = read_model(tmp_path, FLOAT)
    assert_read(model, written)
    assert not any("down_proj" in name for name in grids)


@pytest.mark.parametrize("family", FAMILIES)
def test_awq_of_every_family(family: str, tmp_path: Path) -> None:
    written = write(tmp_path, family, AWQ, awq_tensors, low=0)
    model, grids = read_model(tmp_path, FLOAT)
    assert_read(model, written)
    assert {(grid.bits, grid.group_size) for grid in grids.values()} == {(4, GROUP)}


def test_a_quantised_head_and_the_tie_of_an_unquantised_one(tmp_path: Path) -> None:
    written = write(tmp_path / "head", "llama", AWQ, awq_tensors, skip=lambda name: False)
    assert "lm_head.weight" in written.expected
    assert_read(read_model(tmp_path / "head", FLOAT)[0], written)
    tied = write(tmp_path / "tied", "gemma", AWQ, awq_tensors)
    model, _ = read_model(tmp_path / "tied", FLOAT)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_read(model, tied)


def test_experts_that_the_model_keeps_in_one_tensor(tmp_path: Path) -> None:
    """The checkpoint has a layer for each expert; transformers merges them."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(**size, vocab_size=VOCABULARY, num_local_experts=2, num_experts_per_tok=1)
    tiny_model(config).save_pretrained(tmp_path / "plain")
    tiny_model(config).save_pretrained(tmp_path / "packed")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    packed, draw = dict(plain), np.random.default_rng(0)
    names = [name for name in plain if ".experts." in name]
    assert len(names) == 6
    for name in names:
        outputs, inputs = plain[name].shape
        layer = random_layer(draw, inputs, outputs, 4, act_order=True, low=1)
        plain[name] = torch.from_numpy(layer.weight.copy())
        del packed[name]
        for role, tensor in gptq_tensors(layer, 4, less_one=True).items():
            packed[name.replace("weight", role)] = torch.from_numpy(tensor.copy())
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path / "packed", quantization_config=GPTQ)
    expected, _ = read_model(tmp_path / "plain", FLOAT)
    found, _ = read_model(tmp_path / "packed", FLOAT)
    assert all(torch.equal(p, found.get_parameter(name)) for name, p in expected.named_parameters())


@pytest.mark.parametrize("block", [[16, 16], [32, 20], None])
def test_fp8_with_blocks_and_with_one_scale(block: list[int] | None, tmp_path: Path) -> None:
    def tensors(layer: Layer) -> dict[str, Any]:
        weight = torch.from_numpy(layer.codes.T - 8.0).to(torch.float8_e4m3fn)
        if block is None:
            return {"": weight, "weight_scale_inv": torch.tensor(0.25)}
        rows, columns = (-(-width // size) for width, size in zip(weight.shape, block, strict=True))
        return {"": weight, "weight_scale_inv": 0.1 * torch.arange(1, rows * columns + 1).reshape(rows, columns)}

    settings = {"quant_method": "fp8", "weight_block_size": block}
    written = write(tmp_path, "llama", settings, tensors)
    stored = load_file(tmp_path / "model.safetensors")
    for name in written.expected:
        weight, scale = stored[name].float().numpy(), stored[f"{name}_scale_inv"].numpy()
        expected = np.empty_like(weight)
        for row in range(weight.shape[0]):
            for column in range(weight.shape[1]):
                by = scale if block is None else scale[row // block[0], column // block[1]]
                expected[row, column] = weight[row, column] * by
        written.expected[name] = torch.from_numpy(expected)
    model, grids = read_model(tmp_path, FLOAT)
    assert_read(model, written)
    assert {grid.bits for grid in grids.values()} == {8}


def test_bitsandbytes_8_bits(tmp_path: Path) -> None:
    def tensors(layer: Layer) -> dict[str, Any]:
        rows = np.arange(1, layer.codes.shape[1] + 1, dtype=np.float32)
        return {"": (layer.codes.T - 100).astype(np.int8), "SCB": rows}

    written = write(tmp_path, "llama", {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors, bits=8)
    stored = load_file(tmp_path / "model.safetensors")
    for name in written.expected:
        rows = zip(stored[name], stored[name.replace(".weight", ".SCB")], strict=True)
        written.expected[name] = torch.stack([row.float() * (scale / 127) for row, scale in rows])
    model, grids = read_model(tmp_path, FLOAT)
    assert_read(model, written)
    assert {grid.bits for grid in grids.values()} == {8}


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4_bits(nested: bool, tmp_path: Path) -> None:
    """Two numbers in a byte, the first in the upper half; the scales of blocks of 64 may be numbers themselves."""
    block, outer, offset = 64, 256, 0.5
    draw = np.random.default_rng(3)
    values, levels = np.sort(draw.random(16)).astype(np.float32), np.sort(draw.random(256)).astype(np.float32)
    expected = []

    def tensors(layer: Layer) -> dict[str, Any]:
        rows, columns = layer.codes.T.shape
        codes = layer.codes.T.reshape(-1)
        blocks = -(-codes.size // block)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": [rows, columns]}
        scales, more = draw.random(blocks).astype(np.float32), {}
        stored: Any = scales
        if nested:
            stored = draw.integers(0, 256, blocks).astype(np.uint8)
            above = draw.random(-(-blocks // outer)).astype(np.float32)
            scales = np.array(
                [levels[number] * above[place // outer] + np.float32(offset) for place, number in enumerate(stored)]
            )
            state |= {"nested_blocksize": outer, "nested_dtype": "float32", "nested_offset": offset}
            more = {"weight.nested_absmax": above, "weight.nested_quant_map": levels}
        weight = np.array([values[code] * scales[place // block] for place, code in enumerate(codes)], np.float32)
        expected.append(torch.from_numpy(weight.reshape(rows, columns)))
        return {
            "": (codes[::2] * 16 + codes[1::2]).astype(np.uint8).reshape(-1, 1),
            "weight.absmax": stored,
            "weight.quant_map": values,
            "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
            **more,
        }

    written = write(tmp_path, "llama", {"quant_method": "bitsandbytes", "load_in_4bit": True}, tensors)
    written = written._replace(expected=dict(zip(written.expected, expected, strict=True)))
    model, grids = read_model(tmp_path, FLOAT)
    assert_read(model, written)
    assert {(grid.bits, grid.group_size) for grid in grids.values()} == {(4, block)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_that_of_the_settings(dtype: str, tmp_path: Path) -> None:
    written = write(tmp_path, "llama", AWQ, awq_tensors)
    loaded = load_model(ModelSettings(dtype=dtype), str(tmp_path), torch.device("cpu"))
    wanted = getattr(torch, dtype)
    for name, weight in written.expected.items():
        assert torch.equal(loaded.model.get_parameter(name), weight.to(wanted))
    stored, _ = read_model(tmp_path, {"dtype": "auto"})
    assert stored.dtype == torch.float32  # that of config.json


def test_sharded_folders_and_generation_settings(tmp_path: Path) -> None:
    written = gptq(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    places = {name: f"model-{1 + place % 2}-of-2.safetensors" for place, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "eos_token_id": [1, 5]}))
    model, _ = read_model(tmp_path, FLOAT)
    assert_read(model, written)
    assert (model.generation_config.max_new_tokens, model.generation_config.eos_token_id) == (7, [1, 5])
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ReadingError, match=r"model-2-of-2.safetensors is missing, but .*index.json lists it"):
        read_model(tmp_path, FLOAT)


def drop(part: str) -> Any:
    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        del state[f"model.layers.1.mlp.up_proj.{part}"]
        save_file(state, folder / "model.safetensors")

    return change


def shorten(part: str) -> Any:
    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        name = f"model.layers.1.mlp.up_proj.{part}"
        state[name] = state[name][..., :-8].contiguous()
        save_file(state, folder / "model.safetensors")

    return change


def settings(**changes: Any) -> Any:
    return lambda folder: change_config(folder, quantization_config={**GPTQ, **changes})


UNREADABLE = {
    "no zero points": (drop("qzeros"), "up_proj.qweight has no model.layers.1.mlp.up_proj.qzeros"),
    "no codes": (drop("qweight"), "lacks model.layers.1.mlp.up_proj.weight|stores .*up_proj"),
    "other shapes": (shorten("scales"), r"up_proj: qweight \(4, 48\), scales \(2, 40\) and 32 inputs do not fit"),
    "another format": (settings(checkpoint_format="marlin"), "checkpoint_format 'marlin' cannot be read"),
    "unknown method": (settings(quant_method="aqlm"), "quant_method 'aqlm'.* cannot be read"),
    "a misspelt method": (settings(quant_method="gpqt"), "Did you mean gptq"),
    "AWQ for other kernels": (settings(quant_method="awq", version="gemv"), "version 'gemv' cannot be read"),
    "AWQ of 3 bits": (settings(quant_method="awq", bits=3), "AWQ weights of 3 bits"),
}


@pytest.mark.parametrize("change, message", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_one_line(change: Any, message: str, tmp_path: Path) -> None:
    gptq(tmp_path)
    change(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(ModelSettings(), str(tmp_path), torch.device("cpu"))
    assert "\n" not in str(caught.value)
