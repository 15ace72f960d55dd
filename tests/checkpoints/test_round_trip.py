"""Packed folders as they are written: read again by the project and by the stock loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from interventions import apply
from interventions.checkpoint.reading import read_model
from pytest_lmcompose.build.load import hash_weights
from pytest_lmcompose.checkpoints.packing import FORMATS, plan_packing
from pytest_lmcompose.checkpoints.write import write_checkpoint
from pytest_lmcompose.errors import CheckpointError
from tests.engines.states import logits_of
from tests.experts import tiny_experts
from tests.models import CONFIGS, tiny_model, tiny_tokenizer
from tests.plugin.test_checkpoints_out import MOE

FAMILIES = ["llama", "qwen3", "gemma2", "opt", "phi3"]


def quantised_linears(model: Any) -> Any:
    """Round the decoder's ordinary linear layers to 4 bits."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name and module.weight.shape[1] % 32 == 0:
            with torch.no_grad():
                groups = module.weight.unflatten(1, (-1, 32))
                step = groups.abs().amax(dim=2, keepdim=True) / 7
                module.weight.copy_(((groups / step).round() * step).flatten(1) + 0.0)  # no negative zeros
    return model


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    if family in MOE:
        return quantised_linears(transformers.AutoModelForCausalLM.from_config(MOE[family]()).eval())
    model = tiny_model(family)
    apply(model, tiny_tokenizer(), "rtn", bits=4, group_size=32)
    return model


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", [*(f for f in FAMILIES if f in CONFIGS), *MOE])
def test_a_packed_folder_is_read_as_its_hash_says(family: str, format: str, tmp_path: Path) -> None:
    model = model_of(family)
    if (family, format) == ("llama4", "compressed-tensors"):
        with pytest.raises(CheckpointError, match="reads the Llama4TextExperts of a packed Llama4ForCausalLM"):
            plan_packing(model, format, lambda name: None)
        return
    packing = plan_packing(model, format, lambda name: None)
    digest = write_checkpoint(tmp_path, model, tiny_tokenizer(), packing)
    again, grids = read_model(tmp_path, {"dtype": torch.float32})
    assert hash_weights(again) == digest
    assert set(grids) == set(packing.layers)
    if format == "compressed-tensors":
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(logits_of(stock), logits_of(model))
        assert digest == hash_weights(model)


SYMMETRIC = {"bits": 4, "symmetric": True}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mixtral", {"scheme": "W4A16", "keep": ["attention_in:W8A16", "attention_out:16"]}),
        ("glm4_moe", SYMMETRIC),
        *(
            pytest.param(name, SYMMETRIC, marks=pytest.mark.slow)
            for name in ("qwen2_moe", "qwen3_moe", "olmoe", "phimoe")
        ),
        pytest.param("qwen3_moe", {"scheme": "W8A8"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_experts_that_share_a_parameter_are_stored_one_by_one(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_experts(family)
    apply(model, tiny_tokenizer(), "rtn", **settings)
    packing = plan_packing(model, "compressed-tensors", lambda name: None)
    digest = write_checkpoint(tmp_path, model, tiny_tokenizer(), packing)
    stored = load_file(tmp_path / "model.safetensors")
    packed = {name for name in stored if name.endswith(".weight_packed") and ".experts." in name}
    assert packed == {f"{name}_packed" for name in packing.experts} and len(packed) >= 8 * 3
    assert not any("experts." in name for name in packing.left)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(stock), logits_of(model))
    assert digest == hash_weights(model) == hash_weights(read_model(tmp_path, {"dtype": torch.float32})[0])


def test_experts_that_transformers_would_not_unpack_are_stored_as_they_are(tmp_path: Path) -> None:
    model = tiny_experts("mixtral")
    apply(model, tiny_tokenizer(), "rtn", bits=4)  # with zero points
    for format, reason in (("compressed-tensors", "not all have a symmetric grid"), ("gptq", "format does not know")):
        packing = plan_packing(model, format, lambda name: None)
        assert not packing.experts and packing.layers
        assert all(reason in packing.left[name] for name in packing.left if "experts" in name)
    write_checkpoint(tmp_path, model, tiny_tokenizer(), plan_packing(model, "compressed-tensors", lambda name: None))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(stock), logits_of(model))
