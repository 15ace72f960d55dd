"""Time interventions on a model of Llama-3-8B's shapes with random weights, and write a Markdown table.

    python -m tests.benchmarks.large [--blocks 32] [--only gptq ...] [--out FILE] [--device cuda]

bfloat16; compress methods at their defaults, 4 bits in groups of 128 or half of the weights, on 128
texts of 2,048 tokens; MEMIT of 50 edits with its covariance; RMU of 250 updates. Seconds and peak
memory are those of the step: the model made anew for each is not counted. The weights are random, so
times say something and results nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from interventions import Edit, Resources, apply
from tests.tokenizers import word_tokenizer

VOCABULARY = 128_256
TEXTS, TOKENS = 128, 2048
EDITS = 50
ROWS: dict[str, tuple[dict[str, Any], int]] = {
    "rtn": ({}, 10),
    "wanda": ({}, 60),
    "sparsegpt": ({}, 240),
    "gptq": ({}, 240),
    "awq": ({"max_tokens": TOKENS}, 360),
    "memit": ({}, 180),
    "rmu": ({"max_num_batches": 250}, 120),
}
"""Settings that are not the defaults, and the seconds that a release can wait for it."""


class Shapes(NamedTuple):
    """How large the model is; what is smaller than Llama-3-8B is for trying the benchmark out."""

    blocks: int = 32
    hidden: int = 4096
    mlp: int = 14_336
    heads: int = 32
    kv_heads: int = 8


SMALL = Shapes(blocks=2, hidden=64, mlp=160, heads=4, kv_heads=2)


def make_model(shapes: Shapes, device: torch.device) -> Any:
    """Return a random Llama of these shapes in bfloat16, made where it stays."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.mlp,
        num_hidden_layers=shapes.blocks,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_tokenizer() -> Any:
    """Return a tokenizer of as many words as the model has, each a token."""
    special = {"bos_token": word(0), "eos_token": word(1), "pad_token": word(2), "unk_token": word(3)}
    return word_tokenizer(map(word, range(VOCABULARY)), "$A", special)


def word(number: int) -> str:
    return f"w{number}"


def make_resources(texts: int, tokens: int) -> Resources:
    """Return random words: `texts` calibration texts of `tokens` tokens, shorter texts to forget and retain, edits."""
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> str:
        return " ".join(word(n) for n in torch.randint(4, VOCABULARY, (count,), generator=generator).tolist())

    def edit() -> Edit:
        subject = words(3)
        return Edit(f"{words(4)} {subject} {words(3)}", subject, words(2))

    short = [tuple(words(tokens // 4) for _ in range(4 * texts)) for _ in range(2)]
    return Resources(
        edits=tuple(edit() for _ in range(EDITS)),
        calibration=tuple(words(tokens) for _ in range(texts)),
        forget={"words": short[0]},
        retain=short[1],
    )


def measure(methods: list[str], shapes: Shapes, device: torch.device, texts: int, tokens: int) -> Iterator[str]:
    """Yield a line of the table for each method."""
    tokenizer, resources = make_tokenizer(), make_resources(texts, tokens)
    for method in methods:
        settings, bound = ROWS[method]
        model = make_model(shapes, device)
        start = time.perf_counter()

        def tell(line: str, method: str = method, start: float = start) -> None:
            print(f"{method}: {time.perf_counter() - start:.1f} s: {line}", file=sys.stderr, flush=True)

        try:
            report = apply(model, tokenizer, method, resources=resources, progress=tell, **settings)
        except Exception as error:  # the others are worth their time
            tell(f"{type(error).__name__}: {error}")
            yield f"| {method} | failed | | |"
            continue
        finally:
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()
        for warning in report.warnings[:3]:
            tell(warning)
        tell(f"{time.perf_counter() - start:.1f} s with the copy of the weights and the check of what changed")
        yield f"| {method} | {report.seconds:.1f} | {bound} | {report.peak_memory_bytes / 2**30:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), help="methods; all if not given")
    parser.add_argument("--blocks", type=int, default=32, help="decoder blocks (32)")
    parser.add_argument("--small", action="store_true", help="a model of no size, to try the benchmark out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="write the table there too")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    shapes = SMALL if chosen.small else Shapes(blocks=chosen.blocks)
    texts, tokens = (16, 128) if chosen.small else (TEXTS, TOKENS)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    lines = [
        f"{name}, torch {torch.__version__}, bfloat16, {shapes.blocks} blocks of {shapes.hidden} and {shapes.mlp}, "
        f"{texts} texts of {tokens} tokens.",
        "",
        "| method | seconds | bound | peak memory, GiB |",
        "|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for line in measure(chosen.only, shapes, device, texts, tokens):
        lines.append(line)
        print(line, flush=True)
        if chosen.out is not None:
            chosen.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
