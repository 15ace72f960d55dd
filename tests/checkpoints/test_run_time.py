"""Folders of models that round inputs, keys and values as they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from interventions import apply
from interventions.rounding import rounding_of, unrounded
from pytest_lmcompose.build.load import hash_weights, load_model
from pytest_lmcompose.checkpoints.packing import plan_packing
from pytest_lmcompose.checkpoints.write import write_checkpoint
from pytest_lmcompose.errors import CheckpointError
from pytest_lmcompose.settings import ModelSettings
from tests.models import SENTENCES, VOCABULARY

pytest.importorskip("compressed_tensors")

EXACT = [
    ("W8A8", {"kv_cache": "int8"}, torch.float32),
    ("W4A8", {}, torch.float32),
    ("FP8", {}, torch.float32),
    ("FP8_DYNAMIC", {"kv_cache": "fp8"}, torch.float32),
    ("FP8_BLOCK", {}, torch.float32),
    ("NVFP4", {}, torch.bfloat16),
    ("MXFP4", {}, torch.bfloat16),
    ("MXFP8", {}, torch.bfloat16),
]
"""Schemes and dtypes. In bfloat16, the stock loader divides by many scales in bfloat16 where kernels use float32."""


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(3, 23)[None], use_cache=False).logits.float()
    return found


def rounding_model(folder: Path, tokenizer: Any, dtype: torch.dtype, scheme: str, **settings: Any) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    made.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    apply(model, tokenizer, "rtn", calibration=[" ".join(SENTENCES)] * 4, scheme=scheme, **settings)
    return model


@pytest.mark.parametrize(("scheme", "settings", "dtype"), EXACT, ids=[scheme for scheme, *_ in EXACT])
def test_the_stock_loader_and_ours_round_the_same(
    scheme: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path, tokenizer: Any
) -> None:
    model = rounding_model(tmp_path / "model", tokenizer, dtype, scheme, **settings)
    wanted = logits(model)
    with unrounded(model):
        assert not torch.equal(logits(model), wanted)
    folder = tmp_path / "packed"
    folder.mkdir()
    digest = write_checkpoint(folder, model, tokenizer, plan_packing(model, "compressed-tensors", lambda name: None))
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    assert torch.equal(logits(stock), wanted)
    options = ModelSettings(path=str(folder), dtype=str(dtype).removeprefix("torch."))
    again = load_model(options, str(folder), torch.device("cpu")).model
    assert rounding_of(again) == rounding_of(model)
    assert torch.equal(logits(again), wanted)
    assert hash_weights(again) == digest


def test_folders_that_cannot_say_what_is_rounded_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = rounding_model(tmp_path / "model", tokenizer, torch.float32, "W8A8")
    (tmp_path / "out").mkdir()
    with pytest.raises(
        CheckpointError, match=r"full precision: the model rounds inputs .* compressed-tensors describes"
    ):
        write_checkpoint(tmp_path / "out", model, tokenizer)
    with pytest.raises(CheckpointError, match=r"gptq: the model rounds inputs .*: choose that format"):
        plan_packing(model, "gptq", lambda name: None)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(torch.randn(256, 128))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj are rounded .*: quantise last"):
        plan_packing(model, "compressed-tensors", lambda name: None)
