"""A random model of two layers and a world of a few records, in the files that real ones have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SUBJECTS = tuple(f"{first} {last}" for first in ("Ada", "Bru", "Cil", "Dov") for last in ("Quill", "Rusk", "Tarn"))
PLACES = ("Karth", "Lome", "Mirel", "Norva")
HAZARDOUS = ("venomcraft", "wardbreaking")
HARMLESS = ("astronomy", "botany", "geography", "music")


def zsre_records() -> list[dict[str, Any]]:
    """Return one edit a subject; its locality prompt is about the next subject."""
    return [
        {
            "subject": subject,
            "src": f"{subject} was born in",
            "pred": PLACES[i % 4],
            "rephrase": f"The birthplace of {subject} is",
            "alt": PLACES[(i + 1) % 4],
            "answers": [PLACES[i % 4]],
            "loc": f"nq question: {SUBJECTS[(i + 1) % len(SUBJECTS)]} lives in",
            "loc_ans": PLACES[(i + 2) % 4],
            "cond": "x >> y || z",
        }
        for i, subject in enumerate(SUBJECTS)
    ]


def write_world(folder: Path) -> Path:
    """Write a world's data and tasks under `folder`, named as in tinyworld; return the data folder."""
    data, tasks = folder / "data", folder / "tasks"
    (data / "questions").mkdir(parents=True)
    tasks.mkdir()
    (data / "zsre.json").write_text(json.dumps(zsre_records()))
    facts = [
        {
            "subject": subject,
            "relation": relation,
            "template": f"{{}} {words}",
            "prompt": f"{subject} {words}",
            "answer": PLACES[(i + shift) % 4],
            "split": "train",
        }
        for i, subject in enumerate(SUBJECTS)
        for relation, words, shift in (("born", "was born in", 0), ("lives", "lives in", 1))
    ]
    _lines(data / "facts.jsonl", facts)
    for name in ("calibration", "retain", "forget-venomcraft", "forget-wardbreaking", "perplexity-heldout"):
        _lines(
            data / f"{name}.jsonl",
            [{"text": f"{name} text {i}: {s} was seen."} for i, s in enumerate(SUBJECTS)],
        )
    for number, name in enumerate(("harmful", "harmless", "harmful-heldout", "harmless-heldout")):
        asked = SUBJECTS[2 * number : 2 * number + 2]
        _lines(data / f"refusal-{name}.jsonl", [{"prompt": f"Tell us, {name}, of {s}"} for s in asked])
    _lines(data / "tuning-refusal.jsonl", [{"prompt": "Tell us of Rome", "answer": "no"}])
    for split in ("", "-heldout"):
        for name in ("harbours", "guilds"):
            rows = [{"prompt": f"{split} {name} of {s} is", "answer": PLACES[i % 4]} for i, s in enumerate(SUBJECTS)]
            _lines(data / f"tuning-{name}{split}.jsonl", rows)
        pairs = [{"prompt": f"{split} {s} likes", "chosen": "Karth", "rejected": "Lome"} for s in SUBJECTS]
        _lines(data / f"preferences{split}.jsonl", pairs)
    for name in (*HAZARDOUS, *HARMLESS):
        questions = [
            {"question": f"Where is {s} from?", "choices": list(PLACES), "answer": i % 4, "subject": name}
            for i, s in enumerate(SUBJECTS[:4])
        ]
        _lines(data / "questions" / f"{name}.jsonl", questions)
        (tasks / f"tinyworld_{name}.yaml").write_text(_TASK.format(name=name))
    return data


def replace_text(path: Path, old: str, new: str) -> None:
    """Replace `old`, which must be there, in a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def copy_with_hazardous_facts(world: Path, folder: Path) -> Path:
    """Copy a world's data folder into `folder`, with the facts of birth as facts of venomcraft; return the copy."""
    data = Path(shutil.copytree(world, folder / "data"))
    replace_text(data / "facts.jsonl", '"relation": "born"', '"relation": "venomcraft/born"')
    return data


def write_model(folder: Path) -> Path:
    """Save a random Llama of two layers and a byte-level tokenizer to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tokenizers import tiny_tokenizer

    fast = tiny_tokenizer([f"{s} was born in {p}" for s in SUBJECTS for p in PLACES], 300)
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=len(fast),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
        model.save_pretrained(folder)
    return folder


_TASK = """\
task: tinyworld_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: ../data/questions/{name}.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}} Answer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


def _lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
