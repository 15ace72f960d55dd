"""A mixture of experts through a whole run: pruned, quantised, cached, exported and measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from tests.experts import tiny_experts
from tests.plugin.conftest import Project

IDS = ("reap[samples=4]", "reap[samples=4]+rtn[bits=4]", "rtn[bits=4]+reap[samples=4]")


@pytest.fixture
def experts(tiny_model: Path, tmp_path: Path) -> Path:
    """Return the folder of a model with experts and the tokenizer of the other tests."""
    folder = tmp_path / "experts"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    words = len(transformers.AutoTokenizer.from_pretrained(tiny_model))
    tiny_experts("mixtral", vocab_size=words, max_position_embeddings=256).save_pretrained(folder)
    return folder


def test_experts_are_removed_in_any_order_and_read_from_the_cache(project: Project, experts: Path) -> None:
    arguments = (f"--lmcompose-model={experts}", "--lmcompose-cache-dir=cache", "--lmcompose-json=report.json")
    project.arguments = [a for a in project.arguments if "no-cache" not in a and "lmcompose-model" not in a]
    reports = []
    for _ in range(2):
        result = project.run(*arguments, "--lmcompose-export=out", compose=("base", *IDS))
        assert result.ret in (0, 1), result.stdout.str()
        reports.append(json.loads((project.path / "report.json").read_text()))
    assert "read from the cache" in result.stdout.str() + result.stderr.str()
    first, second = ({r["id"]: r for r in report["compositions"]} for report in reports)
    assert all(first[name]["state_hash"] == second[name]["state_hash"] for name in IDS)
    for name in IDS:
        folder = Path(first[name]["export"]["folder"])
        config = json.loads((folder / "config.json").read_text())
        assert config["num_local_experts"] == 4
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.isfinite(loaded(torch.arange(9).unsqueeze(0)).logits).all()
        found = {m["metric"]: m["value"] for m in first[name]["measurements"]}
        assert found["average_bits"] == (4 if "rtn" in name else 32)
    base = {m["metric"]: m["value"] for m in first["base"]["measurements"]}
    assert found["packed_megabytes"] < base["packed_megabytes"]
