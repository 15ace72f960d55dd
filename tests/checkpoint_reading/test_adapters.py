"""A folder of a PEFT adapter is read with its base, merged."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from interventions.checkpoint.reading import ReadingError, read_model, sources
from pytest_lmcompose.build.checkpoint import check_folder
from pytest_lmcompose.build.load import load_model
from pytest_lmcompose.errors import ModelError
from pytest_lmcompose.settings import ModelSettings
from tests.checkpoint_reading.folders import awq_tensors, write
from tests.models import tiny_model, tiny_tokenizer

FLOAT = {"dtype": torch.float32}
CPU = torch.device("cpu")
IDS = torch.arange(20).unsqueeze(0)
RANDOM: dict[str, Any] = {"init_lora_weights": False}
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], **RANDOM}
ADAPTERS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(**LORA),
    "rank-stabilised, all layers": peft.LoraConfig(r=4, target_modules="all-linear", use_rslora=True, **RANDOM),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "on the embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"], init_lora_weights=False),
    "with a module of its own": peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_lora_weights=False),
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
}  # fmt: skip


def base(folder: Path, family: str = "llama") -> Path:
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapt(model: Any, config: peft.PeftConfig, folder: Path, base_model: str) -> Any:
    """Write a random adapter of `model`, and return the model with it, not merged."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(part in name for part in ("lora_", "ia3_", "modules_to_save", "magnitude")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    with warnings.catch_warnings():  # a target that is an embedding is saved whole
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**written, "base_model_name_or_path": base_model}))
    return adapted.eval()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_logits_are_those_of_the_adapter_beside_its_base(kind: str, tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    adapted = adapt(read_model(folder, FLOAT)[0], ADAPTERS[kind], tmp_path / "adapter", str(folder))
    loaded = load_model(ModelSettings(), str(tmp_path / "adapter"), CPU)
    plain = tiny_model()
    assert [name for name, _ in loaded.model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    with torch.no_grad():
        expected, found, before = adapted(IDS).logits, loaded.model(IDS).logits, plain(IDS).logits
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(before, expected, atol=1e-2 * float(expected.abs().max()))
    assert len(loaded.tokenizer) == len(tiny_tokenizer())
    loaded.model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").exists()


@pytest.mark.parametrize("name", ["base", "../base", "./base"])
def test_a_base_may_be_named_relative_to_the_adapter(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "adapter" / "base"
    folder = base(inside if name == "./base" else tmp_path / "base")
    adapt(tiny_model(), peft.LoraConfig(**LORA), tmp_path / "adapter", name)
    check_folder(tmp_path / "adapter")
    assert sources(tmp_path / "adapter") == (str(tmp_path / "adapter"), str(folder))


def test_an_adapter_of_an_adapter_of_a_quantised_model(tmp_path: Path) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
    write(tmp_path / "base", "llama", settings, awq_tensors)
    adapt(tiny_model(), peft.LoraConfig(**LORA), tmp_path / "one", "../base")
    adapt(
        tiny_model(), peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False), tmp_path / "two", "one"
    )
    model, grids = read_model(tmp_path / "two", FLOAT)
    below, _ = read_model(tmp_path / "base", FLOAT)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, below.get_parameter(n))}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj", "up_proj"}
    # What the adapters moved is on no grid any more.
    assert {name.split(".")[-2] for name in grids} == {"k_proj", "v_proj", "o_proj", "gate_proj"}


def change(**changes: Any) -> Any:
    def apply(folder: Path) -> None:
        found = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**found, **changes}))

    return apply


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


UNREADABLE: dict[str, tuple[Any, str]] = {
    "no base": (change(base_model_name_or_path=None), "has no base_model_name_or_path: set it to the folder"),
    "a missing base": (change(base_model_name_or_path="../gone/for/good"), "there is no base model .*: set base_model"),
    "a base that the hub lacks": (change(base_model_name_or_path="nobody/such"), "base model 'nobody/such' is not"),
    "itself": (change(base_model_name_or_path="."), "leads back to the adapter"),
    "a base that is broken": (lambda f: (f.parent / "base" / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "pickled weights": (pickled, "can run code when it is read"),
    "cut weights": (truncated, "adapter_model.safetensors is damaged"),
    "other modules": (change(target_modules=["query_key_value"]), "does not fit the model: .*query_key_value"),
    "other shapes": (change(r=8), "does not fit the model: .*size mismatch"),
    "an unknown kind": (change(peft_type="NEWEST"), "cannot be loaded|does not fit|NEWEST"),
}  # fmt: skip


@pytest.mark.parametrize("alter, message", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_one_line(
    alter: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base(tmp_path / "base")
    adapt(tiny_model(), peft.LoraConfig(**LORA), tmp_path / "adapter", "../base")
    alter(tmp_path / "adapter")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(ModelSettings(), str(tmp_path / "adapter"), CPU)
    assert "\n" not in str(caught.value)


def test_adapters_that_cannot_be_merged_and_those_of_another_model(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    adapt(
        tiny_model(),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        tmp_path / "prefix",
        str(folder),
    )
    with pytest.raises(ReadingError, match=r"PREFIX_TUNING.* cannot be merged"):
        read_model(tmp_path / "prefix", FLOAT)
    adapt(tiny_model(), peft.LoraConfig(**LORA), tmp_path / "adapter", str(folder))
    shutil.rmtree(folder)
    base(folder, "llama-odd")
    with pytest.raises(ReadingError, match=r"base does not fit the model: .*size mismatch"):
        read_model(tmp_path / "adapter", FLOAT)
