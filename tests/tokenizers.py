"""Every tokenizer of the tests: one for tiny models, one of given words, and small ones of every kind.

The kinds differ in where spaces go, what begins a text, and whether a token may span two words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds

VOCABULARY = 320
SENTENCES = (
    "Mira Tolvan was born in Karth and plays the lute.",
    "The lighthouse of Ossel stands where the river meets the sea.",
    "Bread, salt and a little patience: that is all it takes.",
    "In winter the ferries to Dunmere run only twice a day.",
    "Orin Vask, the botanist, drew every fern of the valley by hand.",
    "Nobody in the village remembered who had planted the old elm.",
    "Copper turns green, silver turns black, and gold stays what it is.",
    "She read the letter twice, folded it and put it back.",
)
TEXTS = (*SENTENCES, "Q: who is it?\nA: Mira\n\nThe end, of it.", "in Karth is in Karth is in Karth is a is a is a")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
BOS, BOTH, NONE = "<s> $A", "<s> $A </s>", "$A"
_BYTES = pre_tokenizers.ByteLevel.alphabet()
# As GPT-2 and Llama 3 cut text: line breaks of their own, at most one space before a word.
_LLAMA_3 = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def tiny_tokenizer(texts: Iterable[str] = SENTENCES, size: int = VOCABULARY) -> Any:
    """Train a byte-level BPE tokenizer of `size` tokens that puts <s> in front, right-padded with <pad>."""
    special = {key: token for key, token in SPECIAL.items() if key != "unk_token"}
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _bpe(pre_tokenizer, BOS, size=size, alphabet=_BYTES, texts=texts, special=special)


def word_tokenizer(words: Iterable[str], around: str = BOS, special: Mapping[str, str] = SPECIAL) -> Any:
    """Make a tokenizer that has one token for each of `words`, `special` among them, numbered as they stand."""
    vocabulary = {word: number for number, word in enumerate(words)}
    core = Tokenizer(kinds.WordLevel(vocabulary, unk_token=special["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _made(core, around, special)


def _trained(core: Tokenizer, trainer: Any, around: str) -> Any:
    core.train_from_iterator(TEXTS, trainer)
    return _made(core, around)


def _made(core: Tokenizer, around: str, special: Mapping[str, str] = SPECIAL) -> Any:
    names = [name for name in ("<s>", "</s>") if name in around]
    core.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(name, core.token_to_id(name)) for name in names]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)  # type: ignore[no-untyped-call]


def _bpe(
    pre_tokenizer: Any,
    around: str,
    *,
    size: int = 400,
    alphabet: Any = (),
    texts: Iterable[str] = TEXTS,
    special: Mapping[str, str] = SPECIAL,
) -> Any:
    core = Tokenizer(kinds.BPE(unk_token=special.get("unk_token")))
    core.pre_tokenizer = pre_tokenizer
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special.values()), initial_alphabet=list(alphabet), show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return _made(core, around, special)


def _gpt2() -> Any:
    tokenizer = _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), NONE, alphabet=_BYTES)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _llama_3() -> Any:
    cut = pre_tokenizers.Split(_LLAMA_3, behavior="isolated")
    return _bpe(
        pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
        BOS,
        alphabet=_BYTES,
    )


def _llama_2() -> Any:
    """No pre-tokenizer: a space is a letter, and one of its own before words that are rare."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = spaces
    core.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer = _trained(core, trainer, BOS)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    return tokenizer


def _metaspace(scheme: str) -> Any:
    core = Tokenizer(kinds.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(SPECIAL.values()), unk_token="<unk>", show_progress=False
    )
    return _trained(core, trainer, BOS)


def _word_piece() -> Any:
    core = Tokenizer(kinds.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=list(SPECIAL.values()), show_progress=False)
    return _trained(core, trainer, BOTH)


def _words() -> Any:
    core = Tokenizer(kinds.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(core, trainers.WordLevelTrainer(special_tokens=list(SPECIAL.values()), show_progress=False), BOTH)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "GPT-2": _gpt2,
    "Llama 3": _llama_3,
    "Llama 2": _llama_2,
    "byte-level, a space in front": lambda: _bpe(pre_tokenizers.ByteLevel(), BOS, alphabet=_BYTES),
    "bytes": lambda: _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), BOS, size=262, alphabet=_BYTES),
    "characters": lambda: _bpe(pre_tokenizers.Split(Regex("."), behavior="isolated"), NONE, alphabet="\n\t"),
    "across words": lambda: _bpe(pre_tokenizers.Split("?", behavior="isolated"), NONE, size=300, alphabet="\n\t"),
    "Metaspace": lambda: _metaspace("always"),
    "Metaspace, first word": lambda: _metaspace("first"),
    "WordPiece": _word_piece,
    "words": _words,
}
"""Kind to a function that makes it."""
