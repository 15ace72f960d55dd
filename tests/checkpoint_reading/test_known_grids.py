"""What counts as bits: how a weight was stored, as long as its values are the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from evaluators import measure_efficiency
from evaluators.efficiency import decoder_linears, read_layers
from interventions import apply
from interventions.checkpoint.reading import read_model
from pytest_lmcompose.build.identity import base_address
from pytest_lmcompose.build.load import load_model
from pytest_lmcompose.settings import ModelSettings
from tests.checkpoint_reading.folders import SQUARE, gptq_tensors, write
from tests.models import tiny_model, tiny_tokenizer
from tests.plugin.conftest import heavy_modules as heavy_modules

CPU = torch.device("cpu")
GPTQ = {"quant_method": "gptq", "bits": 3, "group_size": 16, "desc_act": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in 3 bits, whose groups are not neighbours."""
    write(tmp_path, SQUARE, GPTQ, lambda layer: gptq_tensors(layer, 3, less_one=True), bits=3, act_order=True)
    return tmp_path


def bits(model: Any, known: Any = None) -> dict[str, float]:
    return {m.metric: m.value for m in measure_efficiency(model, known=known, length=8)}


def test_the_stored_bits_count_where_the_values_do_not_show_them(folder: Path) -> None:
    model, grids = read_model(folder, {"dtype": torch.float32})
    assert bits(model)["average_bits"] > 20  # alone, the values show no grid; zeros count 1 bit
    found = bits(model, grids)
    assert found["average_bits"] == 3
    stored = load_file(folder / "model.safetensors")
    on_disk = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert found["packed_megabytes"] == pytest.approx(on_disk / 1e6, rel=1e-6)


def test_a_weight_that_a_step_moved_counts_in_full_or_on_its_new_grid(folder: Path) -> None:
    model, grids = read_model(folder, {"dtype": torch.float32})
    layer = model.model.layers[0].mlp
    linears = [module.weight for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    share = layer.up_proj.weight.numel() / sum(weight.numel() for weight in linears)
    with torch.no_grad():
        layer.up_proj.weight[layer.up_proj.weight == 0] = 1e-3
    assert bits(model, grids)["average_bits"] == pytest.approx(3 + share * 29)
    with torch.no_grad():
        layer.up_proj.weight.copy_(torch.randint(-128, 128, layer.up_proj.weight.shape) * 0.01)
    assert bits(model, grids)["average_bits"] == pytest.approx(3 + share * 5)


def test_a_models_address_depends_on_how_it_was_stored(folder: Path) -> None:
    loaded = load_model(ModelSettings(), str(folder), CPU)
    plain = dataclasses.replace(loaded, grids={})
    name, grid = next(iter(loaded.grids.items()))
    other = dataclasses.replace(loaded, grids={**loaded.grids, name: dataclasses.replace(grid, bits=4)})
    assert len({base_address(state, "weights") for state in (loaded, plain, other)}) == 3
    again = load_model(ModelSettings(), str(folder), CPU)
    assert base_address(again, "weights") == base_address(loaded, "weights")


@pytest.mark.usefixtures("heavy_modules")
def test_a_run_counts_the_stored_bits_also_from_the_cache(folder: Path, pytester: pytest.Pytester) -> None:
    command = (
        "--pyargs", "compositions", f"--lmcompose-model={folder}", "--lmcompose-world=none",
        "--lmcompose-compose=base", "--lmcompose-compose=rtn[bits=8,group_size=32]",
        "--lmcompose-set=evaluate.recall=false", "--lmcompose-set=evaluate.perplexity=false",
        "--lmcompose-set=evaluate.questions=false", "--lmcompose-set=evaluate.latency_length=16",
        "--lmcompose-cache-dir=cache", "--lmcompose-json=report.json", "-q", "-p", "no:cacheprovider",
    )  # fmt: skip
    for _ in range(2):
        pytester.runpytest(*command)
        report = json.loads((pytester.path / "report.json").read_text())
        found = {
            record["id"]: {m["metric"]: m["value"] for m in record["measurements"]}["average_bits"]
            for record in report["compositions"]
        }
        assert found == {"base": 3, "rtn[bits=8,group_size=32]": 8}


def test_a_step_that_reads_a_checkpoint_knows_how_it_was_stored(folder: Path, tmp_path_factory: Any) -> None:
    """Also where some weights have another dtype, and where an adapter moved some of them."""
    expected, grids = read_model(folder, {"dtype": torch.float32})
    down = "model.layers.0.mlp.down_proj.weight"
    for dtype in (torch.float32, torch.float16):
        model: Any = tiny_model(SQUARE, seed=1)
        model.model.layers[0].mlp.down_proj.to(dtype)
        report = apply(model, tiny_tokenizer(), "load", path=str(folder))
        assert report.grids.keys() == grids.keys()
        assert {layer.bits for layer in read_layers(decoder_linears(model), report.grids)} == {3}
        assert (report.grids[down] == grids[down]) == (dtype == torch.float32)
    some = apply(tiny_model(SQUARE, seed=1), tiny_tokenizer(), "load", path=str(folder), only=["*.mlp.*"])
    assert some.grids == {name: grid for name, grid in grids.items() if ".mlp." in name}

    lora = tmp_path_factory.mktemp("lora")
    kind = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(expected, kind).to(torch.bfloat16)  # of which the base must not get the dtype
    adapted.save_pretrained(lora)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder)}))
    model = tiny_model(SQUARE, seed=1)
    report = apply(model, tiny_tokenizer(), "load", path=str(lora))
    assert report.grids == {name: grid for name, grid in grids.items() if name != down}
