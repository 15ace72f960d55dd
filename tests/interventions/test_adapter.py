"""The step `adapter`: adapters of PEFT of every kind, merged into models of several families."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from interventions import InterventionError, apply
from interventions.checkpoint.adapter import AdapterSettings
from interventions.ranges import SettingError
from tests.interventions.test_load import MOE, equal, weights
from tests.models import CONFIGS, tiny_model

IDS = torch.arange(3, 40).unsqueeze(0)
TWO = ["q_proj", "down_proj"]
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TWO),
    "rank-stabilised": lambda: peft.LoraConfig(r=4, target_modules=TWO, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TWO, use_dora=True),
    "modules to save": lambda: peft.LoraConfig(r=4, target_modules=TWO, modules_to_save=["lm_head"]),
    "pissa": lambda: peft.LoraConfig(r=4, target_modules=TWO, init_lora_weights="pissa"),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TWO),
    "ia3": lambda: peft.IA3Config(target_modules=TWO, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TWO),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=TWO),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=TWO),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "a bank of vectors": lambda: peft.VBLoRAConfig(r=2, target_modules=TWO, vector_length=16, num_vectors=8),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"]),
}


def moved(model: Any, config: Any, folder: Path) -> Any:
    """Save an adapter that is not trivial, and return its model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(copy.deepcopy(model), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        adapted.eval().save_pretrained(folder)
    return adapted


def check(model: Any, config: Any, folder: Path) -> list[str]:
    """Compare the step with peft's own unmerged adapter, and half of it with half the change; return what changed."""
    with torch.no_grad():
        wanted = moved(model, config, folder)(input_ids=IDS).logits
        before, attributes = weights(model), [sorted(vars(module)) for module in model.modules()]
        half = copy.deepcopy(model)
        changed = apply(model, None, "adapter", path=str(folder)).changed
        assert torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
        assert [sorted(vars(module)) for module in model.modules()] == attributes
        after = weights(model)
        apply(half, None, "adapter", path=str(folder), weight=0.5)
        for name, weight in weights(half).items():
            assert torch.allclose(weight, (before[name] + after[name]) / 2, atol=1e-6), name
    return list(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_computes_as_unmerged(kind: str, tmp_path: Path) -> None:
    changed = check(tiny_model(), KINDS[kind](), tmp_path)
    assert ("lm_head.weight" in changed) == (kind == "modules to save")


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("gpt2", ["c_attn", "c_fc"]),
        ("gpt_neox", ["query_key_value"]),
        ("opt", ["q_proj", "fc1"]),
        ("phi3", "all-linear"),
    ],
)
def test_families_with_their_biases(family: str, targets: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=targets, bias="all", fan_in_fan_out=family == "gpt2")
    changed = check(tiny_model(family), config, tmp_path)
    assert any(name.endswith("bias") for name in changed) == (family != "phi3")


def test_experts_of_a_mixture(tmp_path: Path) -> None:
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    changed = check(
        tiny_model(MOE), peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=experts), tmp_path
    )
    assert len([name for name in changed if "experts" in name]) == 4


def tied() -> Any:
    config: Any = transformers.LlamaConfig(**CONFIGS["llama"]().to_dict() | {"tie_word_embeddings": True})
    return tiny_model(config)


def test_rows_of_tied_embeddings_are_trained_for_both_uses(tmp_path: Path) -> None:
    assert check(tied(), KINDS["tokens"](), tmp_path) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    "config",
    [
        KINDS["modules to save"],
        lambda: peft.LoraConfig(r=4, target_modules=["lm_head"]),
        lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
    ],
)
def test_one_use_of_tied_embeddings_is_refused(config: Callable[[], Any], tmp_path: Path) -> None:
    moved(tied(), config(), tmp_path)
    refused(tied(), tmp_path, "alone, which is tied to .*: merged, it would change both")


def refused(model: Any, folder: Path, message: str, **settings: Any) -> None:
    """Expect one line that says so, and the model as it was."""
    before, modules = weights(model), [type(module) for module in model.modules()]
    with pytest.raises(InterventionError, match=message) as error:
        apply(model, None, "adapter", path=str(folder), **settings)
    assert "\n" not in str(error.value)
    assert equal(weights(model), before) and [type(module) for module in model.modules()] == modules


LLAMA = CONFIGS["llama"]().to_dict()


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", "does not fit the model: Target modules .* not found"),
        (transformers.LlamaConfig(**LLAMA | {"intermediate_size": 64}), "does not fit the model: .*size mismatch"),
        (
            transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 1}),
            r"has .*layers.1.*: it was made for another model",
        ),
        (transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 3}), r"lacks .*layers.2.*: it was made for another"),
    ],
)
def test_an_adapter_for_another_model(family: Any, message: str, tmp_path: Path) -> None:
    moved(tiny_model(), KINDS["lora"](), tmp_path)
    refused(tiny_model(family), tmp_path, message)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
)
def test_prompts_cannot_be_merged(config: Callable[[], Any], tmp_path: Path) -> None:
    moved(tiny_model(), config(), tmp_path)
    refused(tiny_model(), tmp_path, "changes inputs, not weights, and cannot be merged")


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    refused(tiny_model(), tmp_path, "no PEFT adapter: .*adapter_config.json is missing$")
    (tmp_path / "config.json").write_text("{}")
    refused(tiny_model(), tmp_path, r"is missing; for the weights of a model use load\[path=...\]")
    (tmp_path / "adapter_config.json").write_text("[")
    refused(tiny_model(), tmp_path, "adapter_config.json has no peft_type")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").touch()
    refused(tiny_model(), tmp_path, "has only adapter_model.bin, which can run code")
    refused(tiny_model(), tmp_path / "none", "no such folder")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"garbage")
    refused(tiny_model(), tmp_path, "adapter_model.safetensors is damaged or not a safetensors file")


def test_an_adapter_of_a_later_version_of_peft(tmp_path: Path) -> None:
    """The installed one ignores what it does not know, and would merge another adapter."""
    moved(tiny_model(), KINDS["lora"](), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_newest": True}))
    refused(tiny_model(), tmp_path, "needs a later version of peft: .* has use_newest")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_newest": False}))
    assert apply(tiny_model(), None, "adapter", path=str(tmp_path)).changed


def test_settings_and_details(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    moved(model, KINDS["lora"](), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/base"}))
    identity = AdapterSettings(path=str(tmp_path)).identity(tmp_path)
    assert (
        identity
        == AdapterSettings(path=".").identity(tmp_path)
        != AdapterSettings(path=".", weight=2).identity(tmp_path)
    )
    report = apply(model, None, "adapter", path=".", weight=-1, folder=tmp_path)
    details = {"path": ".", "revision": None, "content": identity["content"], "kind": "LORA", "base": "org/base"}
    assert report.details == details
    with pytest.raises(SettingError, match=r"adapter\.weight=0"):
        apply(model, None, "adapter", path=str(tmp_path), weight=0.0)
