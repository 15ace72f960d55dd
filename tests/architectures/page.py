"""Write the results of all architectures as a page of the documentation."""

from __future__ import annotations

from collections.abc import Mapping

import transformers

from tests.architectures.check import EVALUATORS, GOAL, INVARIANTS, METHODS, PASSED, Result
from tests.architectures.tiny import Size

Results = Mapping[str, Mapping[str, Result]]


def share(results: Results, names: tuple[str, ...]) -> float:
    """Return the share of architectures that pass all the checks named."""
    return sum(passes(found, names) for found in results.values()) / len(results)


def passes(found: Mapping[str, Result], names: tuple[str, ...]) -> bool:
    return all(name in found and found[name].state == PASSED for name in names)


def page(results: Results, size: Size, seed: int) -> str:
    """Return the page in Markdown."""
    total = len(results)
    goal = sum(passes(found, GOAL) for found in results.values())
    lines = [
        "# Architectures",
        "",
        "pytest-lmcompose finds the parts of a model by running it once, not by names. This page checks that on every "
        f"architecture in the causal-language-model mapping of transformers {transformers.__version__}: a tiny random "
        f"model of each ({size.layers} or more blocks of width {size.hidden}, {size.heads} heads, seed {seed}, "
        "float32, CPU) goes through every method and every evaluator.",
        "",
        f"{goal} of {total} architectures ({goal / total:.0%}) pass {', '.join(GOAL[: -len(EVALUATORS)])} and all "
        "evaluators. The others are refused with the reasons below. Regenerate this page with `make architectures`. "
        "Other seeds, sizes and single architectures: `python -m tests.architectures --seed=1 --hidden=64 --layers=3 "
        "mixtral falcon`.",
        "",
        "Invariants: finding the parts leaves weights, modes, hooks and random numbers as they were; random scales "
        "folded into what makes an input leave the logits as they were (1e-4); logits computed from a block on are "
        "the model's (1e-3); rounding to 8 bits moves the logits by less than 2 % of their range on average; "
        "likelihoods do not depend on the batch size (1e-3).",
        "",
        "| check | passed | share |",
        "|---|---|---|",
    ]
    for title, names in (("", METHODS), ("evaluator ", EVALUATORS), ("invariant: ", INVARIANTS)):
        for name in names:
            if not any(name in found for found in results.values()):
                continue
            count = sum(passes(found, (name,)) for found in results.values())
            lines.append(f"| {title}{_code(name, title)} | {count} of {total} | {count / total:.1%} |")
    lines += ["", "| architecture | result |", "|---|---|"]
    lines += [f"| `{name}` | {_row(found)} |" for name, found in sorted(results.items())]
    return "\n".join(lines) + "\n"


def _code(name: str, title: str) -> str:
    return name if title.startswith("invariant") else f"`{name}`"


def _row(found: Mapping[str, Result]) -> str:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, result in found.items():
        if result.state != PASSED:
            by_reason.setdefault((result.state, _short(result.reason)), []).append(name)
    if not by_reason:
        return "passes"
    parts = [f"{state} ({', '.join(names)}): {reason}" for (state, reason), names in by_reason.items()]
    return "; ".join(parts)


def _short(reason: str) -> str:
    """Return a reason without the advice at its end, safe in a table."""
    reason = reason.partition(" Describe the architecture with")[0]
    return reason.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").strip()[:300]
