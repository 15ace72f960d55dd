"""Layers of floating-point numbers are stored exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from evaluators.efficiency import decoder_linears
from pytest_lmcompose.checkpoints.packing import plan_packing
from pytest_lmcompose.errors import CheckpointError
from tests.checkpoints.packed import write_packed
from tests.checkpoints.test_packing import moved, quantised
from tests.engines.states import logits_of, packable_model

CASES = [
    ("FP8A16", torch.float32, "float-quantized"),
    ("FP8A16_CHANNEL", torch.float16, "float-quantized"),
    ("FP8A16_BLOCK", torch.bfloat16, "float-quantized"),
    ("NVFP4A16", torch.bfloat16, "nvfp4-pack-quantized"),
    ("MXFP4A16", torch.bfloat16, "mxfp4-pack-quantized"),
    ("MXFP6A16", torch.bfloat16, "mxfp6-pack-quantized"),
    ("MXFP8A16", torch.bfloat16, "mxfp8-quantized"),
]


@pytest.mark.parametrize(("scheme", "dtype", "format"), CASES)
def test_the_stock_loader_gives_the_same_weights(scheme: str, dtype: torch.dtype, format: str, tmp_path: Path) -> None:
    for method in ("rtn", "gptq"):
        model = quantised(method, packable_model().to(dtype), scheme=scheme)
        packing = write_packed(model, tmp_path / method, "compressed-tensors")
        assert packing.config["format"] == format and not packing.left
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / method)
        logits_of(loaded)  # which unpacks it
        weights = dict(loaded.named_parameters())
        for name, weight in decoder_linears(model).items():
            assert weights[name].dtype == dtype
            assert torch.equal(weights[name], weight), name
            assert torch.equal(packing.unpacked(name, weight), weight), name


def test_grids_of_both_kinds_are_stored_side_by_side(tmp_path: Path) -> None:
    model = quantised("rtn", packable_model().to(torch.bfloat16), keep=["mlp_in:NVFP4A16", "first:8", "*.o_proj:16"])
    packing = write_packed(model, tmp_path / "model", "compressed-tensors")
    assert packing.config["format"] == "mixed-precision"
    assert set(packing.left) == {f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)}
    assert set(packing.floats) == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")}
    assert sorted(layer.scheme.bits for layer in packing.layers.values()) == [4] * 4 + [8] * 6
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    logits_of(loaded)
    for name, weight in decoder_linears(model).items():
        assert torch.equal(loaded.get_parameter(name), weight), name


def test_what_cannot_be_stored_is_said() -> None:
    model = quantised("rtn", scheme="MXFP4A16")
    with pytest.raises(CheckpointError, match="14 with float32 weights, where mxfp4-pack-quantized wants bfloat16"):
        plan_packing(model, "compressed-tensors", moved)
    with pytest.raises(CheckpointError, match=r"gptq: .*: 14 with floating-point numbers, which it lacks"):
        plan_packing(model, "gptq", moved)
