"""Folders of models: what is incomplete, damaged or of another kind is refused in one line; whole ones load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pytest_lmcompose.build.load import load_model
from pytest_lmcompose.errors import ModelError
from pytest_lmcompose.settings import ModelSettings
from tests.models import CONFIGS, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[Path], object]


def config(**changes: object) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**found, **changes}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def weights(content: bytes) -> Change:
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(change: Change) -> Change:
    def apply(folder: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        change(folder)

    return apply


def only(*names: str) -> Change:
    def apply(folder: Path) -> None:
        for path in list(folder.iterdir()):
            if path.name not in names:
                path.unlink()

    return apply


def without_tokenizer(folder: Path) -> None:
    only("config.json", "generation_config.json", "model.safetensors")(folder)


def in_a_folder(folder: Path) -> None:
    """As trainers write."""
    for name in ("checkpoint-500", "checkpoint-1000"):
        shutil.copytree(folder, folder.parent / "moved" / name)
    shutil.rmtree(folder)
    shutil.move(folder.parent / "moved", folder)


def larger_tokenizer(folder: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = found["model"]["vocab"]
    vocabulary.update({f"word{i}": len(vocabulary) + i for i in range(300)})
    (folder / "tokenizer.json").write_text(json.dumps(found))


def another(kind: transformers.PretrainedConfig) -> Change:
    return lambda folder: kind.save_pretrained(folder)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}

BROKEN: dict[str, tuple[Change, str]] = {
    "missing tensor": (tensors(lambda found: found.pop(UP)), f"lacks {UP}: weights and config.json do not"),
    "missing head": (tensors(lambda found: found.pop("lm_head.weight")), "lacks lm_head.weight"),
    "more layers in the config": (config(num_hidden_layers=3), r"lacks model.layers.2.* and 8 more tensors"),
    "fewer layers in the config": (
        config(num_hidden_layers=1),
        r"stores model.layers.1.* and 8 more tensors, which",
    ),
    "extra tensor": (
        tensors(lambda found: found.update(more=torch.zeros(2))),
        "stores more, which its config.json",
    ),
    "wrong shape": (tensors(lambda found: found.update({UP: torch.zeros(3, 4)})), "tensors of other shapes"),
    "wider config": (config(intermediate_size=64), "tensors of other shapes"),
    "whole numbers": (
        tensors(lambda found: found.update({UP: found[UP].to(torch.int8)})),
        r"as integers \(I8\), but .*config.json has no quantization_config",
    ),
    "not a number": (tensors(lambda found: found[UP].fill_(torch.nan)), f"NaN or infinite values, such as {UP}"),
    "cut off": (lambda folder: os.truncate(folder / "model.safetensors", 20_000), "is damaged: 20000 bytes"),
    "cut off in the header": (lambda folder: os.truncate(folder / "model.safetensors", 99), "is damaged"),
    "empty weights": (weights(b""), "is damaged or not a safetensors file"),
    "garbage": (weights(b"\xff" * 900), "is damaged or not a safetensors file"),
    "a header that is no JSON": (weights((8).to_bytes(8, "little") + b"notjson!"), "its header cannot be read"),
    "a page of HTML": (weights(b"<!DOCTYPE html><html>not found</html>"), "is damaged or not a safetensors file"),
    "a pointer": (weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"), "git lfs pull"),
    "pickled": (pickled, "only pytorch_model.bin, which can run code"),
    "no weights": (only("config.json", "tokenizer.json", "tokenizer_config.json"), "has no weights: neither"),
    "another name": (lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"), "but weights.safetensors"),
    "a missing shard": (
        sharded(lambda f: next(f.glob("model-00002*")).unlink()),
        "is missing, but model.safetensors",
    ),
    "a cut shard": (sharded(lambda f: os.truncate(next(f.glob("model-00002*")), 700)), "is damaged"),
    "an index of nothing": (
        sharded(lambda f: (f / "model.safetensors.index.json").write_text("{}")),
        "has no weight_map",
    ),
    "an index of more": (
        sharded(
            lambda f: (f / "model.safetensors.index.json").write_text(
                (f / "model.safetensors.index.json").read_text().replace("layers.1.mlp.up", "layers.7.mlp.up")
            )
        ),
        "has no tensor model.layers.7",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a folder of folders": (in_a_folder, "has no config.json, but checkpoint-1000 in it has one: name that"),
    "an empty config": (lambda folder: (folder / "config.json").write_text(""), "is not JSON"),
    "half a config": (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    "a list as config": (lambda folder: (folder / "config.json").write_text("[]"), "is a JSON list"),
    "no kind": (lambda folder: (folder / "config.json").write_text("{}"), "has no model_type"),
    "an unknown kind": (config(model_type="lama"), "`lama`"),
    "quantised": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "its weights are stored as gptq, but no tensor is",
    ),
    "quantised somehow": (config(quantization_config={"quant_method": "newest"}), "stored quantised .*'newest'"),
    "broken generation config": (
        lambda f: (f / "generation_config.json").write_text("{,"),
        "generation_config.json is",
    ),
    "no tokenizer": (without_tokenizer, "has no tokenizer"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is not JSON"),
    "a tokenizer of nothing": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer in .* is damaged"),
    "another tokenizer": (larger_tokenizer, "tokens, but the model embeds 320"),
    "an image model": (another(transformers.ViTConfig()), "not a causal language model|lacks|stores"),
    "a translation model": (another(transformers.T5Config()), "not a causal language model"),
    "an encoder": (another(transformers.BertConfig(**SMALL)), "lacks|stores"),
    "code of its own": (
        config(auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, model_type="own"),
        "model.trust_remote_code=true if you trust it",
    ),
    "an adapter": (
        lambda f: (only()(f), (f / "adapter_config.json").write_text("{}")),
        "has adapter_config.json but no adapter_model.safetensors",
    ),
    "a GGUF file": (lambda f: (only()(f), (f / "model.gguf").write_bytes(b"GGUF")), "model.gguf is damaged"),
    "an empty folder": (only(), "has no config.json"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(
    llama: Path, tmp_path: Path, change: Change, message: str
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    change(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(ModelSettings(), str(folder), CPU)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert folder.name in str(caught.value)


def test_a_file_and_an_absent_hub_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, content in (("model.gguf", b"GGML"), ("model.gguf", b"GGUF"), ("model.bin", b"GGUF")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=r"not a GGUF file|damaged|is a file: name a folder"):
            load_model(ModelSettings(), str(tmp_path / name), CPU)
    with pytest.raises(ModelError, match="name a local folder, or set HF_HOME"):
        load_model(ModelSettings(), "nobody/such-a-model", CPU)


@pytest.mark.parametrize("family", CONFIGS)
def test_whole_folders_of_every_family_load(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(ModelSettings(), str(tmp_path), CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.model.parameters(), strict=True))


def test_an_encoder_that_poses_as_a_language_model_is_refused(tmp_path: Path) -> None:
    kind = transformers.BertConfig(**SMALL, vocab_size=320)
    transformers.AutoModelForCausalLM.from_config(kind).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="reads text in both directions"):
        load_model(ModelSettings(), str(tmp_path), CPU)
