"""Small GGUF files of a Llama with one block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTH, HEADS, INNER = 32, 2, 64


def start_llama(file: Path, rules: str, words: Sequence[str], merges: Sequence[str], **special: int) -> Any:
    """Return a writer with everything but the weights; `special` are the ids of special tokens, such as bos."""
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rules)
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(merges)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, number in special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    return writer


def finish(writer: Any) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
