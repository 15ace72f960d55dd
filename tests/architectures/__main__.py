"""Check every architecture and write docs/architectures.md: python -m tests.architectures [NAME ...].

Each architecture is checked in a process of its own, so that one that crashes or hangs is one row.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path

from evaluators.registry import BUILT_IN
from interventions.registry import find_method
from tests.architectures.check import CHECKS, METHODS, Result, check
from tests.architectures.page import page
from tests.architectures.tiny import ARCHITECTURES, Size

_SECONDS = 300
"""An architecture that takes longer hangs."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", default=ARCHITECTURES, help="model types (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--hidden", type=int, default=Size.hidden, help="hidden size, a multiple of 32")
    parser.add_argument("--layers", type=int, default=Size.layers, help="blocks, at least")
    parser.add_argument("--heads", type=int, default=Size.heads, help="attention heads")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--checks", nargs="*", default=CHECKS, help="checks to run (default: all)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--write", type=Path, help="page to write, such as docs/architectures.md")
    chosen = parser.parse_args()
    size = Size(chosen.hidden, chosen.layers, chosen.heads)
    results = check_all(chosen.names, size, chosen.seed, chosen.checks, chosen.processes)
    if chosen.write:
        chosen.write.write_text(page(results, size, chosen.seed))
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1))


def check_all(
    names: list[str], size: Size, seed: int, checks: list[str], processes: int
) -> dict[str, dict[str, Result]]:
    """Check architectures, several at a time, and print a line for each."""
    _load()
    context = multiprocessing.get_context("fork")
    waiting, results = list(reversed(names)), {}
    running: dict[Connection, tuple[str, multiprocessing.process.BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            ours, theirs = context.Pipe(duplex=False)
            name = waiting.pop()
            process = context.Process(target=_send, args=(theirs, name, size, seed, checks))
            process.start()
            theirs.close()
            running[ours] = (name, process, time.monotonic())
        for pipe in wait(list(running), timeout=1.0):
            name, process, start = running.pop(pipe)  # type: ignore[index]
            try:
                results[name] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                process.join()
                results[name] = {"built": Result("broken", f"the process ended with {process.exitcode}")}
            process.join()
            _show(name, results[name], time.monotonic() - start)
        for _, process, start in list(running.values()):
            if time.monotonic() - start > _SECONDS:
                process.kill()
    return {name: results[name] for name in names}


def _load() -> None:
    """Import what the checks need, once for all processes."""
    for evaluator in BUILT_IN:
        evaluator.load()
    for name in METHODS:
        find_method(name).load()
    for name in ("lm_eval.api.task", "lm_eval.tasks", "lm_eval.evaluator", "peft"):
        importlib.import_module(name)


def _send(pipe: Connection, name: str, size: Size, seed: int, checks: list[str]) -> None:
    pipe.send(check(name, size, seed, checks))


def _show(name: str, found: dict[str, Result], seconds: float) -> None:
    by_reason: dict[Result, list[str]] = {}
    for check_name, result in found.items():
        by_reason.setdefault(result, []).append(check_name)
    print(f"{name}: {len(by_reason.get(Result('passed'), []))} passed in {seconds:.0f} s", flush=True)
    for result, checks in by_reason.items():
        if result.state != "passed":
            print(f"    {result.state}: {' '.join(checks)}: {result.reason[:300]}", flush=True)


if __name__ == "__main__":
    main()
