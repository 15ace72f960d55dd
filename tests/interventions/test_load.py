"""The step `load`: the weights of another checkpoint, and everything in which it may not differ."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from interventions import InterventionError, apply
from interventions.checkpoint.load import LoadSettings
from interventions.contents import checkpoint_content
from tests.models import CONFIGS, tiny_model, tiny_tokenizer
from tests.tokenizers import word_tokenizer

MOE = transformers.MixtralConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
)


def weights(model: Any) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.mark.parametrize("family", [*CONFIGS, "mixtral"])
def test_it_gives_every_family_the_weights_of_the_folder(family: str, tmp_path: Path) -> None:
    kind: Any = MOE if family == "mixtral" else family
    other = tiny_model(kind, seed=1)
    other.save_pretrained(tmp_path)
    model = tiny_model(kind)
    report = apply(model, None, "load", path=str(tmp_path))
    assert equal(weights(model), weights(other))
    assert report.details["replaced"] == len(weights(model)) >= len(report.changed) > 0


def test_shards_and_a_relative_path(tmp_path: Path, tokenizer: Any) -> None:
    other = tiny_model(seed=1)
    other.save_pretrained(tmp_path / "sft", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "sft")
    assert len(list((tmp_path / "sft").glob("*.safetensors"))) > 2
    model = tiny_model()
    report = apply(model, tokenizer, "load", path="./sft", folder=tmp_path)
    assert equal(weights(model), weights(other)) and not report.warnings
    assert report.settings["path"] == report.details["path"] == "./sft"
    assert report.details["content"] == checkpoint_content("sft", None, tmp_path)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_rounded_once_to_the_models_dtype(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    other = tiny_model(seed=1, dtype=stored)
    other.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))  # which nothing is stored in
    model = tiny_model(dtype=dtype)
    apply(model, None, "load", path=str(tmp_path))
    assert equal(weights(model), weights(other.to(dtype)))


def test_only_some_parameters(tmp_path: Path) -> None:
    other, model = tiny_model(seed=1), tiny_model()
    other.save_pretrained(tmp_path)
    before, theirs = weights(model), weights(other)
    report = apply(model, None, "load", path=str(tmp_path), only=["*.mlp.*", "lm_head*"])
    after = weights(model)
    assert report.changed and all(".mlp." in name or name == "lm_head.weight" for name in report.changed)
    assert all(torch.equal(after[n], (theirs if n in report.changed else before)[n]) for n in after)
    with pytest.raises(InterventionError, match=r"only=\*\.mpl\.\* matches no parameter"):
        apply(model, None, "load", path=str(tmp_path), only=["*.mpl.*"])
    assert equal(weights(model), after)


def config_with(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def saved(family: Any, **options: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        tiny_model(family, seed=1).save_pretrained(folder, **options)

    return change


def without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without_a_shard(folder: Path) -> None:
    saved("llama", max_shard_size="50KB")(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()


def other_numbers(folder: Path) -> None:
    word_tokenizer(["<s>", "</s>", "<pad>", "<unk>", *map(str, range(316))]).save_pretrained(folder)


def other_merges(folder: Path) -> None:
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text())
    document["model"]["merges"].reverse()
    file.write_text(json.dumps(document))


def untied(folder: Path) -> None:
    config: Any = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    saved(config)(folder)


LLAMA = CONFIGS["llama"]().to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (saved("qwen2"), r"is a Qwen2ForCausalLM, but the model is a LlamaForCausalLM"),
        (
            saved(transformers.LlamaConfig(**LLAMA | {"vocab_size": 321})),
            "has a vocabulary of 321 tokens, but the model has one of 320",
        ),
        (
            saved(transformers.LlamaConfig(**LLAMA | {"intermediate_size": 64})),
            r"gate_proj.weight of shape \(64, 32\), but the model's is \(48, 32\)",
        ),
        (saved(transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 1})), r"lacks model.layers.1.*, which the mod"),
        (saved(transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 3})), r"has model.layers.2.*the model lacks"),
        (untied, r"lacks lm_head.weight, which the model has"),
        (config_with(rms_norm_eps=0.1), r"computes with rms_norm_eps=0.1 instead of 1e-06"),
        (config_with(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), r"rope_parameters.rope_theta=5.0 i"),
        (without_a_tensor, r"lacks model.layers.1.mlp.up_proj.weight: weights and config.json do not match"),
        (without_a_shard, "is missing, but model.safetensors.index.json lists it"),
        (lambda folder: os.truncate(folder / "model.safetensors", 900), "model.safetensors is damaged"),
        (other_numbers, "has another tokenizer: the model's numbers .* the other"),
        (other_merges, "has another tokenizer: it cuts text in another way"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_another_model_is_refused_before_anything_changes(
    change: Callable[[Path], None], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    folder = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    change(folder)
    model = tiny_model()
    before = weights(model)
    with pytest.raises(InterventionError, match=message) as error:
        apply(model, tokenizer, "load", path=str(folder))
    assert equal(weights(model), before) and "\n" not in str(error.value)


def test_what_does_not_affect_results_may_differ(tmp_path: Path, tokenizer: Any) -> None:
    other = tiny_model(seed=1)
    other.save_pretrained(tmp_path)
    config_with(use_cache=False, attention_dropout=0.3, eos_token_id=2, max_position_embeddings=999, own=1)(tmp_path)
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{{ messages }}"
    changed.add_tokens(["<tool>"])
    changed.save_pretrained(tmp_path)
    model = tiny_model()
    report = apply(model, tokenizer, "load", path=str(tmp_path))
    assert equal(weights(model), weights(other))
    assert any("1 more tokens, such as '<tool>'" in text for text in report.warnings)
    assert any("chat template" in text for text in report.warnings)


def test_the_weights_that_the_model_has_already(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(InterventionError, match="holds the weights that the model has already"):
        apply(model, None, "load", path=str(tmp_path))


def test_a_path_is_required() -> None:
    with pytest.raises(InterventionError, match="load: path is empty: name a folder or a hub id"):
        apply(tiny_model(), None, "load")
    with pytest.raises(InterventionError, match=r"load: path=\./sft: no such folder"):
        apply(tiny_model(), None, "load", path="./sft")


def test_a_hub_id_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InterventionError, match="'nobody/nothing' is not a local folder, and the hub or its cache does"
    ):
        apply(tiny_model(), None, "load", path="nobody/nothing")


def test_a_hub_id_is_read_at_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--org--sft"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    other = tiny_model(seed=1)
    other.save_pretrained(place / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tiny_model()
    report = apply(model, None, "load", path="org/sft")
    assert equal(weights(model), weights(other))
    assert report.details["revision"] == report.details["content"] == commit
    assert LoadSettings(path="org/sft", revision="main").identity(tmp_path)["content"] == commit
    absent = LoadSettings(path="org/sft", revision="other").identity(tmp_path)["content"]
    assert absent == "absent: org/sft@other"


def test_its_identity_is_the_content_wherever_it_lies(tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("A card.")
    one, two = (LoadSettings(path=f"./{name}").identity(tmp_path) for name in ("one", "two"))
    assert one == two != LoadSettings(path="./one", only=["*"]).identity(tmp_path)
    with (tmp_path / "two" / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read()
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    assert one != LoadSettings(path="./two").identity(tmp_path)
    assert checkpoint_content("./three", None, tmp_path) != one["content"]
