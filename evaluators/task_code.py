"""What would run code in the YAML files of question tasks: found without running it. Imports no harness."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from evaluators.measurement import EvaluationError

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the harness's own, so that both read the same
_PLAIN = "tag:yaml.org,2002:"
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # by the harness, too
_SWITCHES = {
    "unsafe_code": "runs what the model writes",
    "trust_remote_code": "runs the data set's own code",
    "hf_evaluate": "fetches a metric's code",
    "use_prompt": "imports a library of prompts",
}
"""Keys that let the harness run code, wherever they stand."""
_OFF = ("", "null", "false", "~", "no", "off")


def refuse_code(folder: Path) -> None:
    """Raise EvaluationError if a task file of `folder`, or one that it includes, would run or import code.

    All files count, asked for or not: a folder is trusted as a whole. Files are read as plain data.
    """
    seen: set[Path] = set()
    for path in sorted(folder.glob("**/*.yaml")):
        if not _IGNORED & set(path.parts):
            for file, what in _code_in(path, seen):
                raise EvaluationError(f"{file}: {what}; set world.trust_code=true if you trust the folder {folder}")


def _code_in(path: Path, seen: set[Path]) -> Iterator[tuple[Path, str]]:
    """Yield what would run code in a file and in those that it includes, each with the file."""
    path = path.expanduser().resolve()
    if path in seen:
        return
    seen.add(path)
    try:
        root = yaml.compose(path.read_bytes(), Loader=_LOADER)
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise EvaluationError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    for what in _code_below(root, set()):
        yield path, what
    for included in _includes(root):
        yield from _code_in(path.parent / included, seen)


def _code_below(node: Any, seen: set[int]) -> Iterator[str]:
    """Yield what would run code in a node of YAML, and below it."""
    if node is None or id(node) in seen:  # an alias may stand inside of what it stands for
        return
    seen.add(id(node))
    if not node.tag.startswith(_PLAIN) or node.tag.startswith(f"{_PLAIN}python"):
        value = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
        what = f"{node.tag.removeprefix(_PLAIN)} {' '.join(value.split())}".rstrip()
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


def _includes(root: Any) -> Iterator[str]:
    """Yield the paths of the files that a file includes, by a key of its own or of a mapping merged into it."""
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        below = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if key.value == "include":
            yield from (node.value for node in below if isinstance(node, yaml.ScalarNode))
        elif key.tag == f"{_PLAIN}merge":
            for node in below:
                yield from _includes(node)
