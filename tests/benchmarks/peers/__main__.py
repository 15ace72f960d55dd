"""Time our methods beside the engines that do the same, on one model, and write a Markdown table.

    python -m tests.benchmarks.peers [--out FILE] [--repeats N] [--blocks N] [--only gptq ...]

Random Llama of 4 blocks, hidden size 256, MLP 704, groups of 64, 32 windows of 128 tokens, float32. Each engine runs in
its own environment (see docs/engines.md); the table leaves out those that are not installed. The best of `repeats`
counts on both sides, without imports, files and tokenising.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.compress.engines.engine_workers.job import REPEATS
from interventions.statistics import collect_statistics, window_batches
from tests.engines.states import output_error
from tests.models import VOCABULARY, tiny_tokenizer

TEXTS, TOKENS, GROUP = 32, 128, 64
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("gptq", "llmcompressor", {"group_size": GROUP}),
    ("gptq", "gptqmodel", {"group_size": GROUP}),
    ("gptq", "auto_gptq", {"group_size": GROUP}),
    ("awq", "llmcompressor", {"group_size": GROUP}),
    ("awq", "autoawq", {"group_size": GROUP}),
    ("sparsegpt", "llmcompressor", {}),
    ("wanda", "llmcompressor", {}),
)


class Times(NamedTuple):
    seconds: float
    cpu_seconds: float
    """Of all threads: on a busy machine the clock on the wall tells of the neighbours."""


class Row(NamedTuple):
    method: str
    engine: str
    theirs: Times
    error: float
    ours: Times
    our_error: float

    def __str__(self) -> str:
        def pair(theirs: float, ours: float) -> str:
            return f"{theirs:.2f} | {ours:.3f} | {theirs / ours:.1f}"

        return (
            f"| {self.method} | {self.engine} | {pair(self.theirs.seconds, self.ours.seconds)} | "
            f"{pair(self.theirs.cpu_seconds, self.ours.cpu_seconds)} | {self.error:.4e} | {self.our_error:.4e} |"
        )


def model_and_texts(blocks: int) -> tuple[Any, Any, list[str]]:
    """Return the random model, its tokenizer and texts that all have at least `TOKENS` tokens."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(1)
    texts = [tokenizer.decode(torch.randint(3, VOCABULARY, (2 * TOKENS,), generator=generator)) for _ in range(TEXTS)]
    return transformers.LlamaForCausalLM(config).eval(), tokenizer, texts


def mean_output_error(before: Any, after: Any, grams: dict[str, Tensor]) -> float:
    """Return the mean relative output error of the first block's linears, whose inputs every method saw.

    AWQ scales what makes the inputs; the scaling is undone before weights are compared.
    """
    old, new = find_anatomy(before).blocks[0], find_anatomy(after).blocks[0]
    errors = []
    for group, changed in zip(old.linear_groups, new.linear_groups, strict=True):
        columns = _scaling(group.previous, changed.previous)
        for linear, other in zip(group.linears, changed.linears, strict=True):
            if group.previous is None or isinstance(group.previous, torch.nn.Linear):
                continue  # scaled by rows as well, by what follows: not comparable one by one
            if any(linear.module is follower.previous for follower in old.linear_groups):
                continue
            errors.append(output_error(linear.weight, other.weight / columns, grams[linear.name]))
    return sum(errors) / len(errors)


def _scaling(before: Any, after: Any) -> Tensor | float:
    if before is None or isinstance(before, torch.nn.Linear):
        return 1.0
    return before.weight / after.weight  # type: ignore[no-any-return]


def compare(repeats: int, methods: list[str], depth: int) -> Iterator[Row]:
    """Yield a row for each engine that is there."""
    base, tokenizer, texts = model_and_texts(depth)
    blocks = find_anatomy(base).blocks
    batches = window_batches(tokenizer, texts, samples=TEXTS, max_tokens=TOKENS)
    grams = {name: s.gram for name, s in collect_statistics(base, batches, blocks[0].linears).items()}
    for method, engine, settings in ROWS:
        if methods and method not in methods:
            continue
        theirs = copy.deepcopy(base)
        common: dict[str, Any] = {"calibration": texts, "samples": TEXTS, "max_tokens": TOKENS, **settings}
        try:
            report = apply(theirs, tokenizer, method, engine=engine, **common)
        except InterventionError as error:
            print(f"{method}, {engine}: {error}", file=sys.stderr)
            continue
        times = []
        for _ in range(max(3, repeats)):  # the first one warms up
            ours = copy.deepcopy(base)
            start = time.process_time()
            seconds = apply(ours, tokenizer, method, **common).seconds
            times.append(Times(seconds, time.process_time() - start))
        yield Row(
            method,
            engine,
            Times(float(report.details["engine_seconds"]), float(report.details["engine_cpu_seconds"])),
            mean_output_error(base, theirs, grams),
            Times(min(t.seconds for t in times), min(t.cpu_seconds for t in times)),
            mean_output_error(base, ours, grams),
        )


def main() -> None:
    import os

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="methods; all if not given")
    parser.add_argument("--blocks", type=int, default=4, help="decoder blocks (4)")
    chosen = parser.parse_args()
    os.environ[REPEATS] = str(chosen.repeats)
    lines = [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, float32, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}, best of {chosen.repeats}.",
        "",
        "| method | engine | its seconds | ours | ratio | its CPU seconds | ours | ratio | its output error | ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for row in compare(chosen.repeats, chosen.only, chosen.blocks):
        lines.append(str(row))
        print(row, flush=True)
    if chosen.out is not None:
        chosen.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
