"""Hub ids of every kind of model are read from the hub's cache, at one commit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from interventions.checkpoint.reading import ReadingError, read_tokenizer
from pytest_lmcompose.build.load import load_model
from pytest_lmcompose.settings import ModelSettings
from tests.checkpoint_reading.folders import gptq_tensors, write
from tests.models import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub that cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def publish(hub: Path, name: str) -> Path:
    """Return the folder of a repository's only commit, which the branch main has."""
    place = hub / f"models--org--{name}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    return place / "snapshots" / COMMIT


def test_plain_and_quantised_models_and_adapters(hub: Path) -> None:
    plain = publish(hub, "plain")
    model = tiny_model()
    model.save_pretrained(plain, max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(plain)
    packed = write(publish(hub, "packed"), "llama", GPTQ, lambda layer: gptq_tensors(layer, 4, less_one=True))
    kind = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    lora = publish(hub, "lora")
    peft.get_peft_model(tiny_model(), kind).save_pretrained(lora)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/plain"}))
    for name in ("plain", "packed", "lora"):
        for settings in (ModelSettings(), ModelSettings(revision="main"), ModelSettings(revision=COMMIT)):
            loaded = load_model(settings, f"org/{name}", CPU)
            assert loaded.revision == COMMIT and loaded.model.config._name_or_path == f"org/{name}"
            assert len(loaded.grids) == (len(packed.expected) if name == "packed" else 0)
            assert loaded.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
            found: dict[str, Any] = dict(loaded.model.named_parameters())
            expected = packed.expected if name == "packed" else dict(model.named_parameters())
            moved = [weight for weight in expected if not torch.equal(found[weight], expected[weight])]
            assert bool(moved) == (name == "lora") and all("q_proj" in weight for weight in moved)


def test_a_tokenizer_needs_no_weights(hub: Path) -> None:
    place = publish(hub, "plain")
    tiny_model().save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    (place / "model.safetensors").unlink()
    assert read_tokenizer("org/plain", {"revision": "main"}).get_vocab() == tiny_tokenizer().get_vocab()


def test_absent_repositories_revisions_and_files(hub: Path) -> None:
    place = publish(hub, "plain")
    tiny_model().save_pretrained(place)
    for revision in (None, "v9"):
        with pytest.raises(ReadingError, match="not a local folder, and the hub or its cache does not have it"):
            read_tokenizer("org/other" if revision is None else "org/plain", {"revision": revision})
    shutil.rmtree(place)
    with pytest.raises(ReadingError, match="'org/plain' is not a local folder"):
        read_tokenizer("org/plain", {})
