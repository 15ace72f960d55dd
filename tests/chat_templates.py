"""Chat templates in the style of every family, and the tokenizers that they belong to."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.tokenizers import TOKENIZERS

_CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{{ bos_token }}"
)
_LLAMA_2 = (
    _SYSTEM_FIRST + "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system and loop.first else '') "
    "+ m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL = (
    _SYSTEM_FIRST + "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST]' + (system + '\n\n' if system and loop.last else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ GAP + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}User: {{ m['content'] }}\n\n{% else %}Assistant:{{ m['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_SILENT = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}\n{% endfor %}"


class Family(NamedTuple):
    """A template, its tokenizer, its own special tokens, and how many BOS a prompt in it has."""

    template: str
    kind: str
    special: tuple[str, ...]
    bos: int
    system: bool = True


_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_INST = ("[INST]", "[/INST]")
FAMILIES = {
    "Llama 3": Family(_LLAMA_3, "Llama 3", _HEADERS, 1),
    "ChatML without BOS": Family(_CHATML, "GPT-2", ("<|im_start|>", "<|im_end|>"), 0),
    "ChatML, tokenizer adds BOS": Family(_CHATML, "Llama 3", ("<|im_start|>", "<|im_end|>"), 0),
    "Llama 2": Family(_LLAMA_2, "Llama 2", (), 1),
    "Mistral": Family(_MISTRAL.replace("GAP", "' '"), "Llama 2", _INST, 1),
    "Mistral, byte-level": Family(_MISTRAL.replace("GAP", "''"), "Llama 3", _INST, 1),
    "Gemma": Family(_GEMMA, "Llama 2", ("<start_of_turn>", "<end_of_turn>"), 1, system=False),
    "Zephyr": Family(_ZEPHYR, "Llama 2", (), 0),
    "plain words": Family(_PLAIN, "Llama 3", (), 1),
    "WordPiece": Family(_LLAMA_3, "WordPiece", _HEADERS, 1),
    "without a system turn": Family(_SILENT, "GPT-2", (), 0, system=False),
}


def chat_tokenizer(family: str) -> Any:
    """Make the tokenizer of a family, with its template."""
    found = FAMILIES[family]
    tokenizer = TOKENIZERS[found.kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": list(found.special)})
    tokenizer.chat_template = found.template
    return tokenizer
