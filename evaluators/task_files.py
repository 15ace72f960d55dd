"""YAML files of question tasks, their includes and their data files. Imports no harness."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_COMPOSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as in the harness
PLAIN = "tag:yaml.org,2002:"
_FUNCTION = "!function"
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # as in the harness


class _Plain(yaml.SafeLoader):  # type: ignore[misc]
    """Reads tags of the harness, such as `!function module.name`, as plain text."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {getattr(node, 'value', '')}")


class TaskFile(NamedTuple):
    """A YAML file, parsed without running code."""

    path: Path
    root: Any
    """Root node with lines and tags; None for an empty or unreadable file."""
    config: Mapping[str, Any]
    """Content as plain data; empty if it is not a mapping."""
    problem: str
    """Error message; empty if the file can be read."""

    def included(self) -> Iterator[Path]:
        """Yield the included files."""
        for name in _includes(self.root):
            yield (self.path.parent / Path(name).expanduser()).resolve()


def yaml_files(folder: Path) -> Iterator[Path]:
    """Yield the YAML files of a folder of tasks."""
    return (path for path in sorted(folder.glob("**/*.yaml")) if not _IGNORED & set(path.parts))


def walk(path: Path, seen: set[Path]) -> Iterator[TaskFile]:
    """Yield a YAML file and its includes, except files in `seen`, which is updated."""
    path = path.expanduser().resolve()
    if path in seen:
        return
    seen.add(path)
    file = _parse(path)
    yield file
    for included in file.included():
        yield from walk(included, seen)


def task_files(folder: Path, names: Collection[str]) -> list[Path]:
    """Return the files of the tasks, groups and tags called `names`, sorted.

    These are their YAML files with includes, code and data files. Names that are not in `folder` belong to the harness.
    An unreadable file is listed without its includes; the harness reports the error.
    """
    known = _named(folder)
    found: set[Path] = set()
    for name in _reached(known, names):
        for task in known.get(name, ()):
            for file in walk(task.path, set()):
                found.update(_behind(file))
    return sorted(found)


def task_names(folder: Path, names: Collection[str]) -> set[str] | None:
    """Return `names` with their tasks and groups, recursively; None if some are not in the folder."""
    known = _named(folder)
    reached = _reached(known, names)
    return reached if reached <= known.keys() else None


def _named(folder: Path) -> dict[str, list[TaskFile]]:
    """Return the files of a folder by the names that they define."""
    known: dict[str, list[TaskFile]] = {}
    for path in yaml_files(folder):
        file = _parse(path.resolve())
        for key in ("task", "group", "tag"):
            value = file.config.get(key)
            for name in value if isinstance(value, list) and key == "tag" else [value]:
                if isinstance(name, str):
                    known.setdefault(name, []).append(file)
    return known


def _reached(known: Mapping[str, list[TaskFile]], names: Collection[str]) -> set[str]:
    """Return `names` with the members of groups and tags, recursively."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for file in known.get(name, ()):
            for key in ("task", "group"):  # the members of a group, or the task that has a tag
                listed = file.config.get(key)
                for member in listed if isinstance(listed, list) else [listed]:
                    own = member.get("task", member.get("group")) if isinstance(member, Mapping) else member
                    if isinstance(own, str):
                        waiting.append(own)
    return seen


def _behind(file: TaskFile) -> Iterator[Path]:
    """Yield a YAML file, the code next to it if it uses `!function`, and its data files."""
    yield file.path
    if any(text.startswith(_FUNCTION) for text in _texts(file.config)):
        yield from (code.resolve() for code in file.path.parent.glob("**/*.py"))
    arguments = file.config.get("dataset_kwargs")
    for text in _texts(arguments if isinstance(arguments, Mapping) else {}):
        yield from _data(file.path.parent, text)


def _data(folder: Path, text: str) -> Iterator[Path]:
    """Yield the files that a text in the dataset arguments refers to, if any."""
    try:
        path = Path(text).expanduser()
        if (folder / path).exists():
            inside = (folder / path).rglob("*") if (folder / path).is_dir() else [folder / path]
            yield from (file.resolve() for file in inside if file.is_file())
        elif any(mark in text for mark in "*?["):
            root = Path(path.anchor) if path.is_absolute() else folder
            yield from (file.resolve() for file in root.glob(str(path.relative_to(path.anchor))) if file.is_file())
    except (OSError, ValueError, RuntimeError, NotImplementedError):  # not a path
        return


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _includes(root: Any) -> Iterator[str]:
    """Yield the included paths of a file, also from merged mappings."""
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        below = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if key.value == "include":
            yield from (node.value for node in below if isinstance(node, yaml.ScalarNode))
        elif key.tag == f"{PLAIN}merge":
            for node in below:
                yield from _includes(node)


def _parse(path: Path) -> TaskFile:
    try:
        stat = path.stat()
    except OSError as error:
        return TaskFile(path, None, {}, f"{path}: cannot be read: {error.strerror}")
    return _parsed(path, stat.st_mtime_ns, stat.st_size)


@cache
def _parsed(path: Path, modified: int, size: int) -> TaskFile:
    """Parse a YAML file; cached until the file changes."""
    try:
        text = path.read_bytes()
        root = yaml.compose(text, Loader=_COMPOSER)
    except OSError as error:
        return TaskFile(path, None, {}, f"{path}: cannot be read: {error.strerror}")
    except (yaml.YAMLError, ValueError) as error:
        return TaskFile(path, None, {}, f"{path}: not YAML: {' '.join(str(error).split())}")
    try:
        config = yaml.load(text, Loader=_Plain)
    except (yaml.YAMLError, ValueError, TypeError):  # a Python tag or an unhashable key
        config = None
    return TaskFile(path, root, config if isinstance(config, dict) else {}, "")
