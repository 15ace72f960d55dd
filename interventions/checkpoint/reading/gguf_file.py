"""Read GGUF files: weights by transformers, and a tokenizer that splits text as the file says. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import nn

from interventions.checkpoint.reading import kinds
from interventions.checkpoint.reading.kinds import ReadingError
from interventions.checkpoint.reading.model import check_complete, digest_of
from interventions.known_grids import KnownGrid

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_SPLITS: dict[str, str | None] = {
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _OTHERS,
    "qwen2": _WORDS + _DIGIT + _OTHERS,
    "smollm": _DIGIT,
    "gpt-2": None,
    "default": None,
}
"""How text is split before the merges, by `tokenizer.ggml.pre`; `smollm` and None also split as GPT-2 does."""
_CONTROL = 3
"""The type of a token that is never text."""
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_PLAIN = ("F32", "F16", "BF16", "F64")


def read(location: Path, options: Mapping[str, Any]) -> tuple[Any, dict[str, KnownGrid]]:
    """Return the model in a GGUF file and the grids of its weights; raises ReadingError for an incomplete file."""
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    file = kinds.gguf_file(location)
    reader = _open(file)
    with _shared(reader):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **options,
        )
    model, found = loaded
    check_complete(str(file), found)
    for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, name):  # the weights are in full precision from here on, and can be saved
            delattr(holder, name)
    for name, key in _SPECIAL.items():
        number = _field(reader, f"tokenizer.ggml.{key}_token_id")
        if number is not None and name != "unk":
            setattr(model.config, f"{name}_token_id", number)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model, _grids(model, reader)


def read_tokenizer(file: Path) -> Any:
    """Return the tokenizer in a GGUF file; raises ReadingError if it is not known how the file splits text."""
    from transformers import AutoTokenizer

    reader = _open(file)
    if _field(reader, "tokenizer.ggml.model") == "gpt2":
        return _byte_pairs(file, reader)
    with _shared(reader):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for name, token in _special_tokens(reader, _field(reader, "tokenizer.ggml.tokens")).items():
        setattr(tokenizer, name, token)
    return tokenizer


def _byte_pairs(file: Path, reader: Any) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rules = _field(reader, "tokenizer.ggml.pre") or "default"
    if rules not in _SPLITS:
        raise ReadingError(
            f"{file} splits text by the rules {rules!r}, known are {', '.join(_SPLITS)}: put the tokenizer.json and "
            "tokenizer_config.json of the model beside it"
        )
    words, kinds_of = _field(reader, "tokenizer.ggml.tokens"), _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    split = _SPLITS[rules]
    steps: list[Any] = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (None, _DIGIT)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds_of, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    architecture = _field(reader, "general.architecture")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=_field(reader, f"{architecture}.context_length"),
        add_bos_token=bool(_field(reader, "tokenizer.ggml.add_bos_token")),
        **_special_tokens(reader, words),
    )


def _special_tokens(reader: Any, words: list[str]) -> dict[str, str]:
    """Return the special tokens of a file; transformers exchanges two of them."""
    numbers = {name: _field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    return {f"{name}_token": words[number] for name, number in numbers.items() if number is not None}


def _open(file: Path) -> Any:
    try:
        return _opened(file, file.stat().st_mtime_ns)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ReadingError(f"{file} is damaged ({' '.join(str(error).split())[:100]}); download it again") from None


@lru_cache(maxsize=1)  # for the model and its tokenizer
def _opened(file: Path, _: int) -> Any:
    import numpy as np
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Reads words and merges by slices of the file, which take much longer of a memory map than of an array."""

        @property
        def data(self) -> Any:
            return self._array

        @data.setter
        def data(self, found: Any) -> None:
            self._array = found.view(np.ndarray)

    return Reader(file)


@contextmanager
def _shared(reader: Any) -> Iterator[None]:
    """Let transformers use `reader` and a single table of names: it opens a file twice and makes a table per module."""
    import gguf

    table = cache(gguf.get_tensor_name_map)
    with patch.multiple(gguf, GGUFReader=lambda _: reader, get_tensor_name_map=table):
        yield


def _field(reader: Any, name: str) -> Any:
    """Return the value of a key of the file, None if it has none."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _grids(model: nn.Module, reader: Any) -> dict[str, KnownGrid]:
    """Return the grids of the weights that are stored in blocks, by parameter name."""
    from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, get_tensor_name_map

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    name = _field(reader, "general.architecture")
    kind = next((kind for kind, known in MODEL_ARCH_NAMES.items() if known == name), None)
    if kind is None:
        return {}
    table = get_tensor_name_map(kind, int(_field(reader, f"{name}.block_count") or 0))
    found = {}
    for path, module in model.named_modules():
        tensor = tensors.get(table.get_name(f"{path}.weight", try_suffixes=(".weight",)) or "")
        if tensor is None or tensor.tensor_type.name in _PLAIN or not hasattr(module, "weight"):
            continue
        block = GGML_QUANT_SIZES[tensor.tensor_type][0]
        weights = int(tensor.n_elements)
        bits = int(next(char for char in tensor.tensor_type.name if char.isdigit()))  # Q4_K, IQ4_NL, MXFP4
        overhead = 8 * int(tensor.n_bytes) - bits * weights
        found[f"{path}.weight"] = KnownGrid(bits, block, weights // block, overhead, digest_of(module))
    return found
