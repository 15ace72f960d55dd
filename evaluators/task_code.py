"""Detect code in the YAML files of question tasks without running it. Imports no harness."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from evaluators.measurement import EvaluationError
from evaluators.task_files import PLAIN, walk, yaml_files

_SWITCHES = {
    "unsafe_code": "runs what the model writes",
    "trust_remote_code": "runs the dataset's own code",
    "hf_evaluate": "downloads the code of a metric",
    "use_prompt": "imports a library of prompts",
}
"""Keys that make the harness run code, at any level."""
_OFF = ("", "null", "false", "~", "no", "off")


def refuse_code(folder: Path) -> None:
    """Raise EvaluationError if a task file of `folder`, or one that it includes, would run or import code.

    Checks all files, because a folder is trusted as a whole. Files are read as plain data.
    """
    seen: set[Path] = set()
    for path in yaml_files(folder):
        for file in walk(path, seen):
            if file.problem:
                raise EvaluationError(file.problem)
            for what in _code_below(file.root, set()):
                raise EvaluationError(
                    f"{file.path}: {what}; set world.trust_code=true if you trust the folder {folder}"
                )


def _code_below(node: Any, seen: set[int]) -> Iterator[str]:
    """Yield a message for each part of a YAML node that would run code."""
    if node is None or id(node) in seen:  # aliases may be recursive
        return
    seen.add(id(node))
    if not node.tag.startswith(PLAIN) or node.tag.startswith(f"{PLAIN}python"):
        value = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
        what = f"{node.tag.removeprefix(PLAIN)} {' '.join(value.split())}".rstrip()
        yield f"line {node.start_mark.line + 1}: {what} runs code"
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _code_below(item, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name in _SWITCHES and not (isinstance(value, yaml.ScalarNode) and value.value.lower() in _OFF):
                yield f"line {key.start_mark.line + 1}: {name} {_SWITCHES[name]}"
            yield from _code_below(key, seen)
            yield from _code_below(value, seen)
