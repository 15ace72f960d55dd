"""Interventions and the plugin on a GPU: what they do there is what they do on the CPU. Skipped where there is none."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from interventions import Edit, apply
from interventions.anatomy import find_anatomy
from interventions.compress.kernels import blockwise
from interventions.compress.kernels.working_memory import bytes_for
from interventions.edit.bases import ValueSettings
from interventions.edit.pmet import PmetValueSettings
from interventions.offload import offload
from pytest_lmcompose.build.load import hash_weights
from pytest_lmcompose.build.snapshot import WorkingModel
from tests.interventions.unlearning import difference
from tests.models import SENTENCES, share_of_same_weights, tiny_model

GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1]
COMPRESS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "hqq": {},
    "gptq": {"act_order": True},
    "awq": {},
    "magnitude": {},
    "wanda": {},
    "sparsegpt": {},
    "smooth": {},
    "rotate": {},
}
VALUES = {"contexts_per_length": 0, "z": ValueSettings(steps=3)}
TRAINED: dict[str, dict[str, Any]] = {
    "ft": {"layers": [1], "steps": 2, "lr": 1e-3},
    "memit": {"layers": [0], **VALUES},
    "rome": {"layer": 0, **VALUES},
    "alphaedit": {"layers": [0], "nullspace_threshold": 0.5, "nullspace_relative": True, **VALUES},
    "emmet": {"layers": [0], **VALUES},
    "pmet": {"layers": [0], "contexts_per_length": 0, "z": PmetValueSettings(steps=3)},
    "rmu": {"layer": 1, "max_num_batches": 4, "lr": 1e-3},
    "ga": {"lr": 1e-3},
    "gd": {"lr": 1e-3},
    "npo": {"lr": 1e-3, "epochs": 2, "accumulation": 1},
    "simnpo": {"lr": 1e-3, "epochs": 2, "accumulation": 1},
    **{name: {"lr": 1e-3, "epochs": 2, "accumulation": 1} for name in ("wga", "satimp", "undial", "jensun", "quail")},
    "relearn": {"lr": 1e-3},
}
TEXTS: dict[str, Any] = {
    "edits": [Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere"), Edit("Orin Vask is a", "Orin Vask", "river")],
    "calibration": SENTENCES,
    "forget": {"people": SENTENCES[:3], "places": SENTENCES[3:5]},
    "retain": SENTENCES[5:],
}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.mark.parametrize("family", ["llama-gqa", "phi3", "gpt2"])
@pytest.mark.parametrize("method", COMPRESS)
def test_weights_are_compressed_as_on_the_cpu(method: str, family: str, tokenizer: Any) -> None:
    """Sums round otherwise there: a weight here and there may fall on the other side."""
    here = tiny_model(family)
    there = copy.deepcopy(here).to(GPU)
    settings = COMPRESS[method]
    ours, theirs = (apply(model, tokenizer, method, **TEXTS, **settings) for model in (here, there))
    assert theirs.changed == ours.changed
    if method == "awq":  # of two scales that do as well, the other one may be chosen
        losses = [[group["loss"] for group in report.details["groups"]] for report in (ours, theirs)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    else:
        assert share_of_same_weights(here, there) > 0.99


@pytest.mark.parametrize("method", TRAINED)
def test_weights_are_trained_and_edited_as_on_the_cpu(method: str, tokenizer: Any) -> None:
    start = tiny_model("llama-gqa")
    here, there = copy.deepcopy(start), copy.deepcopy(start).to(GPU)
    ours, theirs = (apply(model, tokenizer, method, **TEXTS, **TRAINED[method]) for model in (here, there))
    assert theirs.changed == ours.changed
    assert difference(there.cpu(), here, start) < 0.02


def test_lora_on_a_gpu_changes_the_weights_that_it_names(tokenizer: Any) -> None:
    """Its matrices start at random, and otherwise on a GPU."""
    model = tiny_model("llama-gqa").to(GPU)
    report = apply(model, tokenizer, "lora", **TEXTS, layers=[1], targets=["mlp_out"], steps=4, lr=1e-2)
    assert set(report.changed) == {"model.layers.1.mlp.down_proj.weight"}


@pytest.mark.parametrize("method", [*COMPRESS, *TRAINED, "lora"])
def test_bfloat16(method: str, tokenizer: Any) -> None:
    model = tiny_model("llama-gqa", dtype=torch.bfloat16).to(GPU)
    report = apply(model, tokenizer, method, **TEXTS, **(COMPRESS | TRAINED).get(method, {}))
    assert report.changed
    assert all(p.dtype == torch.bfloat16 and p.device == GPU for p in model.parameters())
    assert torch.get_float32_matmul_precision() == "highest"
    assert 0 < report.peak_memory_bytes < 1 << 30


@pytest.mark.parametrize("method", ["gptq", "awq", "wanda", "sparsegpt"])
def test_passes_in_tf32_do_little_to_16_bit_weights(
    method: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tiny_model("llama-gqa", dtype=torch.bfloat16).to(GPU)
    fast, exact = copy.deepcopy(start), copy.deepcopy(start)
    apply(fast, tokenizer, method, **TEXTS)
    monkeypatch.setattr(blockwise, "pass_precision", lambda *_: nullcontext())
    apply(exact, tokenizer, method, **TEXTS)
    assert share_of_same_weights(fast, exact) > 0.98


@pytest.mark.parametrize("method", COMPRESS)
def test_weights_on_the_host_are_compressed_as_on_the_gpu(method: str, tokenizer: Any) -> None:
    there, host = tiny_model("llama-gqa").to(GPU), tiny_model("llama-gqa")
    offload(host, GPU, 2 * bytes_for(find_anatomy(host).blocks[0]))
    for model in (there, host):
        apply(model, tokenizer, method, **TEXTS)
    assert all(p.device.type == "cpu" for p in host.parameters())
    assert share_of_same_weights(host, there) > 0.99


def test_snapshots_lie_in_pinned_memory_and_come_back(tokenizer: Any) -> None:
    working = WorkingModel(tiny_model("llama-gqa").to(GPU))
    report = apply(working.model, tokenizer, "rtn")
    changed = working.take(working.base, report.changed)
    assert all(tensor.is_pinned() for tensor in changed.changed.values())
    for snapshot in (working.base, changed):
        working.restore(snapshot)
        assert hash_weights(working.model) == snapshot.state_hash


def test_a_run_on_a_gpu_alone_and_with_two_workers(tmp_path: Path) -> None:
    def run(*arguments: str) -> dict[str, dict[str, float]]:
        report = tmp_path / "report.json"
        orders = ["--lmcompose-compose=memit+gptq", "--lmcompose-compose=gptq+memit"]
        options = [
            "--lmcompose-device=cuda",
            "--lmcompose-no-cache",
            f"--lmcompose-json={report}",
            "-pno:cacheprovider",
        ]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "compositions",
            "-k",
            "memit and gptq",
            *orders,
            *options,
            *arguments,
        ]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return {
            record["id"]: {m["metric"]: m["value"] for m in record["measurements"] if "latency" not in m["metric"]}
            for record in json.loads(report.read_text())["compositions"]
        }

    alone, apart = run("-n0"), run("-n2")
    assert alone.keys() == apart.keys() == {"base", "memit+gptq", "gptq+memit"}
    for name, values in alone.items():
        assert apart[name] == pytest.approx(values, rel=1e-3, nan_ok=True), name
