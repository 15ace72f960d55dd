"""Packed folders hold what was measured: read by the stock loader, or by the published layouts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from evaluators.efficiency import decoder_linears, read_layers
from interventions import apply
from pytest_lmcompose.checkpoints.packing import FORMATS, Packing, plan_packing
from pytest_lmcompose.errors import CheckpointError
from tests.checkpoints.packed import dequantised_awq, dequantised_gptq, unpacked, write_packed
from tests.engines.states import READ, logits_of, packable_model
from tests.models import CONFIGS, VOCABULARY, tiny_model, tiny_tokenizer


def quantised(method: str = "rtn", model: Any = None, **settings: Any) -> Any:
    model = packable_model() if model is None else model
    read = {} if method == "rtn" else READ
    grid: dict[str, Any] = {} if "scheme" in settings else {"bits": 4, "group_size": 32}
    apply(model, tiny_tokenizer(), method, **{**grid, **read, **settings})
    return model


def move_(model: Any, module: str) -> None:
    """Move a layer off its grid, as a later edit does."""
    weight = model.get_submodule(module).weight
    random = torch.Generator().manual_seed(0)
    change = torch.randn(len(weight), 1, generator=random) @ torch.randn(1, weight.shape[1], generator=random)
    with torch.no_grad():
        weight.add_(0.01 * change)


def moved(name: str) -> str | None:
    return "step 2, memit"


def names_of(packing: Packing) -> set[str]:
    return set(packing.layers)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "gpt2"])
def test_the_stock_loader_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    model = quantised(model=tiny_model(family))
    packing = write_packed(model, tmp_path / "model", "compressed-tensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert len(packing.layers) >= 8
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rtn", "bits": 2, "group_size": -1},
        {"method": "rtn", "bits": 3, "symmetric": True},
        {"method": "rtn", "bits": 5, "group_size": 64},
        {"method": "rtn", "bits": 8, "group_size": -1, "symmetric": True},
        {"method": "awq"},
        {"method": "gptq", "act_order": True, "symmetric": True},
    ],
    ids=str,
)
def test_float32_layers_are_stored_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    model = quantised(**settings)
    packing = write_packed(model, tmp_path / "model", "compressed-tensors")
    assert names_of(packing) == set(decoder_linears(model)) and not packing.left
    assert {layer.scheme.symmetric for layer in packing.layers.values()} == {settings.get("symmetric", False)}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded), logits_of(model))
    for name, weight in decoder_linears(model).items():
        assert torch.equal(packing.unpacked(name, weight), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scales_are_what_the_loader_computes_with(dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantised(model=packable_model().to(dtype))
    packing = write_packed(model, tmp_path / "model", "compressed-tensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    logits_of(loaded)  # which unpacks it
    assert loaded.dtype == dtype
    weights = dict(loaded.named_parameters())
    for name, weight in decoder_linears(model).items():
        assert torch.equal(weights[name], packing.unpacked(name, weight))
        assert torch.equal(weights[name], weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_is_stored_as_published(bits: int, symmetric: bool) -> None:
    model = packable_model()
    for weight in decoder_linears(model).values():
        weight[:5].abs_()  # groups without negative values, whose level of zero would be 0
        weight[5:9].abs_().neg_()
    quantised(model=model, bits=bits, symmetric=symmetric)
    packing = plan_packing(model, "gptq", moved)
    assert names_of(packing) == set(decoder_linears(model))
    expected = {"bits": bits, "group_size": 32, "sym": symmetric, "desc_act": False, "quant_method": "gptq"}
    assert expected.items() <= packing.config.items()
    for name, weight in decoder_linears(model).items():
        module = name.removesuffix("weight")
        stored = {key.removeprefix(module): value for key, value in packing.replace(name, weight).items()}
        rows, cols = weight.shape
        shapes = {key: tuple(value.shape) for key, value in stored.items()}
        assert shapes == {
            "qweight": (cols * bits // 32, rows),
            "qzeros": (cols // 32, rows * bits // 32),
            "scales": (cols // 32, rows),
            "g_idx": (cols,),
        }
        assert torch.equal(dequantised_gptq(stored, bits), packing.unpacked(name, weight))
        assert torch.equal(packing.unpacked(name, weight), weight)


@pytest.mark.parametrize("group_size", [32, -1])
def test_awq_is_stored_as_published(group_size: int) -> None:
    model = packable_model()
    for weight in decoder_linears(model).values():
        weight[:5].abs_()
    quantised(model=model, group_size=group_size)
    packing = plan_packing(model, "awq", moved)
    assert names_of(packing) == set(decoder_linears(model))
    assert {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True}.items() <= packing.config.items()
    assert packing.config["group_size"] == group_size
    for name, weight in decoder_linears(model).items():
        module = name.removesuffix("weight")
        stored = {key.removeprefix(module): value for key, value in packing.replace(name, weight).items()}
        assert tuple(stored["qweight"].shape) == (weight.shape[1], weight.shape[0] // 8)
        assert torch.equal(dequantised_awq(stored), packing.unpacked(name, weight))
        assert torch.equal(packing.unpacked(name, weight), weight)


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_that_a_step_moved_stays_in_full_precision(format: str, tmp_path: Path) -> None:
    model = quantised()
    module = "model.layers.1.mlp.down_proj"
    move_(model, module)
    packing = write_packed(model, tmp_path / "model", format, moved)
    assert packing.left == {f"{module}.weight": "no grid, last changed by step 2, memit"}
    assert not packing.packs(f"{module}.weight") and not packing.packs("lm_head.weight")
    if format == "compressed-tensors":
        assert set(packing.config["ignore"]) == {module, "lm_head"}
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(logits_of(loaded), logits_of(model))
    if format == "awq":
        assert set(packing.config["modules_to_not_convert"]) == {module, "lm_head"}
    if format != "compressed-tensors":
        assert set(packing.config["dynamic"]) == {r"-:^model\.layers\.1\.mlp\.down_proj$", "-:^lm_head$"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt_neox", "opt"])
def test_formats_store_what_quantisers_leave(family: str, dtype: torch.dtype) -> None:
    """Whatever the dtype: the scales are 16-bit numbers that all of them store."""
    config = CONFIGS[family]()
    wide = {"intermediate_size": 64} if family != "opt" else {"ffn_dim": 64}
    config.update({**wide, "num_hidden_layers": 1})
    for settings in ({"bits": 4}, {"bits": 8, "group_size": -1}, {"bits": 3, "symmetric": True}):
        model = quantised(model=tiny_model(config, dtype=dtype), **settings)
        for format in FORMATS if settings["bits"] == 4 else FORMATS[:2]:
            packing = plan_packing(model, format, moved)
            assert set(packing.layers) == set(decoder_linears(model)), (settings, format, packing.left)
            for name in packing.layers:
                weight = model.get_parameter(name).detach()
                assert torch.equal(packing.unpacked(name, weight), weight), (settings, format, name)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_packed_model_says_what_was_measured(method: str, format: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = quantised(method, packable_model().to(dtype))
        packed = unpacked(model, plan_packing(model, format, moved))
        assert torch.equal(logits_of(packed), logits_of(model))


def test_layers_with_different_grids_are_stored_side_by_side(tmp_path: Path) -> None:
    model = quantised(bits=8)
    four = quantised()
    for name in ("up_proj", "gate_proj"):
        model.model.layers[0].mlp.get_submodule(name).weight = four.model.layers[0].mlp.get_submodule(name).weight
    packing = write_packed(model, tmp_path / "model", "compressed-tensors")
    assert sorted(layer.scheme.bits for layer in packing.layers.values()) == [4] * 2 + [8] * 12
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded), logits_of(model))
    dynamic = plan_packing(model, "gptq", moved).config["dynamic"]
    assert dynamic[r"+:^model\.layers\.0\.mlp\.up_proj$"] == {"bits": 4, "group_size": 32, "sym": False}
    assert len(plan_packing(model, "awq", moved).layers) == 2
    with pytest.raises(CheckpointError, match="14 with 8 bits, which compressed-tensors and gptq store"):
        plan_packing(quantised(bits=8), "awq", moved)


def test_pruned_and_quantised_weights_are_packed(tmp_path: Path) -> None:
    model = packable_model()
    apply(model, tiny_tokenizer(), "magnitude", sparsity=0.5)
    quantised(model=model)
    packing = write_packed(model, tmp_path / "model", "compressed-tensors")
    assert names_of(packing) == set(decoder_linears(model))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_tied_weights_are_not_packed(tmp_path: Path) -> None:
    model = packable_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    quantised(model=model)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    packing = plan_packing(model, "compressed-tensors", moved)
    assert not packing.packs("model.embed_tokens.weight") and not packing.packs("lm_head.weight")
    assert "lm_head" in packing.config["ignore"]
    assert set(packing.left.values()) == {"weights tied to another layer"}
    assert len(packing.layers) == 12


@pytest.mark.parametrize("format", FORMATS)
def test_the_error_says_why_nothing_can_be_packed(format: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"^{format}: no linear layer can be packed: 14 with no grid, last changed"
    ):
        plan_packing(packable_model(), format, moved)
    with pytest.raises(CheckpointError, match="14 with no grid, changed by no step"):
        plan_packing(packable_model(), format, lambda name: None)
    with pytest.raises(CheckpointError, match="8 with Conv1D modules, which no packed format knows"):
        plan_packing(quantised(model=tiny_model("gpt2")), format, moved)


def test_what_a_format_cannot_store_is_said() -> None:
    with pytest.raises(
        CheckpointError, match=r"14 with 5 bits, which compressed-tensors stores\. Choose another format, "
    ):
        plan_packing(quantised(bits=5), "gptq", moved)
    model = quantised(model=tiny_model("llama-odd"))
    assert set(plan_packing(model, "compressed-tensors", moved).left.values()) == {
        "groups that do not divide its columns evenly"
    }
    assert "45 x 32 weights, where gptq wants multiples of 8" in plan_packing(model, "gptq", moved).left.values()
    assert "45 outputs, where awq wants a multiple of 8" in plan_packing(model, "awq", moved).left.values()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1e-9)
    left = plan_packing(model, "gptq", moved).left
    assert left["model.layers.0.self_attn.q_proj.weight"] == "scales out of the range of float16"


def test_formats_can_be_named_without_torch() -> None:
    code = "import sys, pytest_lmcompose.checkpoints.packing; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_the_report_says_how_large_packed_layers_are(format: str, group_size: int) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tiny_model(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes))
    quantised(model=model, group_size=group_size)
    layers = {layer.name: layer for layer in read_layers(decoder_linears(model))}
    packing = plan_packing(model, format, moved)
    same = [name for name, layer in layers.items() if layer.grid.groups == packing.layers[name].scales.numel()]
    assert len(same) >= 6  # one width out of two has smaller groups if all layers share one size
    for name in same:
        parts = packing.replace(name, model.get_parameter(name).detach())
        stored = sum(8 * part.numel() * part.element_size() for key, part in parts.items() if "g_idx" not in key)
        assert stored == layers[name].packed_bits
