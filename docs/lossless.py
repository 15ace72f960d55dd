"""Judge changes that lose nothing: other batch sizes and numbers of threads, against strict gates.

    python docs/lossless.py          # 200 repeats on tinyworld, about 10 minutes
    python docs/lossless.py 20

Each repeat measures the same state (`awq`) again with a random batch size and number of threads, and gates the result
against the first measurement. Prints how many repeats had a red gate, and the largest difference of each metric. Exits
with 1 if any gate was red.
"""

from __future__ import annotations

import random
import sys

import torch

from compositions.tinyworld.bench import DATA, SUITE, Bench
from evaluators import Measurement, measure_perplexity, measure_questions, measure_recall, pool
from pytest_lmcompose.data.readers import read_texts
from pytest_lmcompose.gate.judge import Reference, judge, settle
from pytest_lmcompose.gate.thresholds import BASELINE, read_expression

STATE = "awq"
LIMITS = ("p0.05", "3se", "0.1%")
BATCHES = (1, 2, 3, 5, 8, 13, 21, 32, 64)
FACTS, TEXTS, TASKS = 100, 20, ("tinyworld_botany",)


def measure(bench: Bench, batch_size: int) -> list[Measurement]:
    """Measure recall, perplexity and accuracy of the state."""
    model, tokenizer = bench.model, bench.tokenizer
    texts = read_texts(DATA / "perplexity-heldout.jsonl")[:TEXTS]
    tasks = measure_questions(model, tokenizer, TASKS, task_folder=SUITE / "tinyworld" / "tasks", batch_size=batch_size)
    return [
        measure_recall(model, tokenizer, bench.facts[:FACTS], batch_size=batch_size)[0],
        measure_perplexity(model, tokenizer, texts, window=127, batch_size=batch_size),
        pool("accuracy/harmless", tasks),
    ]


def main(repeats: int = 200) -> int:
    """Print the table; return 1 if any gate was red."""
    bench, chance, threads = Bench(), random.Random(0), torch.get_num_threads()
    bench.apply(STATE)
    first = measure(bench, BATCHES[-1])
    rules = [read_expression(f"{m.metric}:{limit}") for m in first for limit in LIMITS]
    known = {BASELINE: Reference("the first", first, [first])}
    bad = 0
    largest: dict[str, float] = {}
    for _ in range(repeats):
        torch.set_num_threads(chance.randint(1, max(2, threads)))
        found = measure(bench, chance.choice(BATCHES))
        gates = settle({STATE: judge(rules, STATE, found, known, runs=[found])})[STATE]
        bad += any(not gate.passed for gate in gates)
        for before, after in zip(first, found, strict=True):
            largest[before.metric] = max(largest.get(before.metric, 0.0), abs(after.value - before.value))
    print(f"{bad} of {repeats} repeats had a red gate, of {len(rules)} gates each")
    for metric, difference in largest.items():
        print(f"{metric}: largest difference {difference:.2g}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
