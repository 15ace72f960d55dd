"""GGUF files: weights in blocks, the tokenizer inside, and the facts that transformers reads wrong."""

# ruff: noqa: E402

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

gguf = pytest.importorskip("gguf")

from interventions.checkpoint.reading import ReadingError, read_kind, read_model, read_tokenizer
from pytest_lmcompose.build.load import load_model
from pytest_lmcompose.settings import ModelSettings
from tests.gguf_files import HEADS, INNER, WIDTH, finish, start_llama
from tests.models import tiny_tokenizer

FLOAT = {"dtype": torch.float32}
WORDS = [
    "<end>",
    "<begin>",
    "<stop>",
    *"abcdefghijklmnopqrstuvwxyz0123456789.'",
    "Ġ",
    "th",
    "the",
    "Ġthe",
    "12",
    "123",
    "1234",
]
MERGES = ["t h", "th e", "Ġ the", "1 2", "12 3", "123 4"]
NORMS = ("blk.0.attn_norm", "blk.0.ffn_norm")
TYPES = {"attn_q": "F32", "attn_k": "Q8_0", "attn_v": "Q4_0", "attn_output": "Q5_1"}
TYPES |= {"ffn_up": "Q4_1", "ffn_gate": "Q8_0", "ffn_down": "F16"}
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
}


def write(file: Path, rules: str = "smollm", **numbers: int) -> dict[str, Any]:
    """Write a random Llama, and return its weights as they were before they were stored."""
    writer = start_llama(file, rules, WORDS, MERGES, **{"bos": 1, "eos": 2, "pad": 0, **numbers})
    draw = np.random.default_rng(0)
    shapes = {f"attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
    written = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in written.items():
        kind = gguf.GGMLQuantizationType[TYPES[name]]
        writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    plain = {"token_embd": (len(WORDS), WIDTH), **dict.fromkeys(("output_norm", *NORMS), (WIDTH,))}
    for name, shape in plain.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    finish(writer)
    return written


def test_weights_and_their_grids(tmp_path: Path) -> None:
    written = write(tmp_path / "model.gguf")
    assert read_kind(tmp_path) == read_kind(tmp_path / "model.gguf") == "gguf"
    model, grids = read_model(tmp_path, FLOAT)
    for name, weight in written.items():
        kind = gguf.GGMLQuantizationType[TYPES[name]]
        stored = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        if name in ("attn_q", "attn_k"):  # GGUF pairs the halves that are rotated together
            stored = stored.reshape(HEADS, WIDTH // HEADS // 2, 2, WIDTH).swapaxes(1, 2).reshape(WIDTH, WIDTH)
        found = model.get_parameter(f"model.layers.0.{NAMES[name]}.weight")
        assert np.array_equal(found.detach().numpy(), stored), name
    facts = {name.split(".")[-2]: (grid.bits, grid.overhead_bits / grid.groups) for name, grid in grids.items()}
    # A scale in 16 bits for 32 weights; the types that end in 1 also have an offset.
    assert facts == {"k_proj": (8, 16), "gate_proj": (8, 16), "v_proj": (4, 16), "o_proj": (5, 32), "up_proj": (4, 32)}


def test_it_becomes_an_ordinary_model(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf")
    loaded = load_model(ModelSettings(), str(tmp_path / "model.gguf"), torch.device("cpu"))
    config = loaded.model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert loaded.model.generation_config.eos_token_id == 2
    assert not hasattr(config, "quantization_config")
    loaded.model.save_pretrained(tmp_path / "saved")
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(again.get_parameter(n), p) for n, p in loaded.model.named_parameters())


SPLITS = {
    "smollm": ["Ġthe", "Ġ", "1", "2", "3", "4"],
    "qwen2": ["Ġthe", "Ġ", "1", "2", "3", "4"],
    "llama-bpe": ["Ġthe", "Ġ", "123", "4"],
    "gpt-2": ["Ġthe", "Ġ", "1234"],
}


@pytest.mark.parametrize("rules", SPLITS)
def test_the_tokenizer_splits_text_as_the_file_says(rules: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", rules)
    tokenizer = read_tokenizer(tmp_path, {})
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the 1234").input_ids) == SPLITS[rules]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<begin>", "<stop>", "<end>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a<stop>").input_ids) == ["a", "<stop>"]
    assert tokenizer.decode(tokenizer("in the 12").input_ids) == "in the 12"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_rules_that_are_not_known_need_the_models_own_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "newest")
    with pytest.raises(ReadingError, match=r"splits text by the rules 'newest'.*put the tokenizer.json"):
        read_tokenizer(tmp_path, {})
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(read_tokenizer(tmp_path, {})) == len(tiny_tokenizer())


def test_several_files_and_damaged_ones(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ReadingError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\): name one of them"):
        read_model(tmp_path, FLOAT)
    with pytest.raises(ReadingError, match=r"b.gguf is damaged"):
        read_model(tmp_path / "b.gguf", FLOAT)


def test_the_file_is_parsed_once_for_the_model_and_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes most of the time, because it has hundreds of thousands of strings."""
    opened = []

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    write(tmp_path / "model.gguf")
    load_model(ModelSettings(), str(tmp_path / "model.gguf"), torch.device("cpu"))
    assert opened == [tmp_path / "model.gguf"]
    assert gguf.GGUFReader is Reader  # what was exchanged is back
