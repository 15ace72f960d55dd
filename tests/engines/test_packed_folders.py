"""Exported folders as GPTQModel loads them; needs its environment: `make engine-gptqmodel`, `make test-engines`."""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path

import pytest
import torch

from interventions import apply
from tests.checkpoints.packed import unpacked, write_packed
from tests.engines.states import logits_of, packable_model, windows
from tests.models import tiny_tokenizer

PYTHON = os.environ.get("LMCOMPOSE_GPTQMODEL_PYTHON")
pytestmark = [pytest.mark.engines, pytest.mark.skipif(PYTHON is None, reason="needs LMCOMPOSE_GPTQMODEL_PYTHON")]
LOAD = """
import sys
import torch
from gptqmodel import BACKEND, GPTQModel

folder, backend, ids, logits = sys.argv[1:]
model = GPTQModel.load(folder, device="cpu", backend=BACKEND[backend], dtype=torch.float16).model
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits.float(), logits)
"""


@pytest.mark.parametrize(
    ("format", "backend", "bits", "symmetric"),
    [
        ("gptq", "GPTQ_TORCH", 2, False),
        ("gptq", "GPTQ_TORCH", 3, False),
        ("gptq", "GPTQ_TORCH", 4, False),
        ("gptq", "GPTQ_TORCH", 8, True),
        ("awq", "AWQ_TORCH", 4, False),
    ],
)
def test_gptqmodel_computes_what_was_packed(
    format: str, backend: str, bits: int, symmetric: bool, tmp_path: Path
) -> None:
    model = packable_model()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[:5].abs_()  # groups whose level of zero would be 0
    apply(model, tiny_tokenizer(), "rtn", bits=bits, group_size=32, symmetric=symmetric)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(torch.linspace(0.9, 1.1, 128))  # off its grid
    packing = write_packed(model, tmp_path / "model", format)
    assert len(packing.layers) == 13
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    torch.save(windows()["input_ids"], tmp_path / "ids")
    (tmp_path / "load.py").write_text(LOAD)
    paths = (
        [str(tmp_path / name) for name in ("load.py", "model")],
        [str(tmp_path / name) for name in ("ids", "logits")],
    )
    done = subprocess.run([str(PYTHON), *paths[0], backend, *paths[1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    stored = unpacked(model, packing)
    wanted, rounded, found = logits_of(stored), logits_of(copy.deepcopy(stored).half()), torch.load(tmp_path / "logits")
    # Its kernels compute in float16, so it is as far off as a float16 model.
    assert float((found - wanted).abs().max()) <= 2 * float((rounded - wanted).abs().max())
