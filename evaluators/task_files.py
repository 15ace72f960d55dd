"""The YAML files of question tasks: what they include, and which files a task is read from. Imports no harness."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_COMPOSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the harness's own, so that both read the same
PLAIN = "tag:yaml.org,2002:"
_FUNCTION = "!function"
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # by the harness, too


class _Plain(yaml.SafeLoader):  # type: ignore[misc]
    """Reads tags that only the harness knows, such as `!function module.name`, as plain text."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {getattr(node, 'value', '')}")


class TaskFile(NamedTuple):
    """One YAML file, parsed but not run."""

    path: Path
    root: Any
    """Its node, which knows lines and tags; None for an empty file, and where there is a problem."""
    config: Mapping[str, Any]
    """What it says, as plain data; empty where that is no mapping."""
    problem: str
    """Why it cannot be read; empty if it can."""

    def included(self) -> Iterator[Path]:
        """Yield the files that it includes."""
        for name in _includes(self.root):
            yield (self.path.parent / Path(name).expanduser()).resolve()


def yaml_files(folder: Path) -> Iterator[Path]:
    """Yield the YAML files of a folder of tasks."""
    return (path for path in sorted(folder.glob("**/*.yaml")) if not _IGNORED & set(path.parts))


def walk(path: Path, seen: set[Path]) -> Iterator[TaskFile]:
    """Yield a YAML file and all that it includes, each once; `seen` are those to leave out."""
    path = path.expanduser().resolve()
    if path in seen:
        return
    seen.add(path)
    file = _parse(path)
    yield file
    for included in file.included():
        yield from walk(included, seen)


def task_files(folder: Path, names: Collection[str]) -> list[Path]:
    """Return the files that the tasks, groups and tags called `names` are read from, sorted.

    These are their YAML files, and what those name: files that they include, code beside them, and data. Names that
    no file of `folder` has are the harness's own. What cannot be read counts by its own content alone; the harness
    says what is wrong with it.
    """
    known = _named(folder)
    found: set[Path] = set()
    for name in _reached(known, names):
        for task in known.get(name, ()):
            for file in walk(task.path, set()):
                found.update(_behind(file))
    return sorted(found)


def task_names(folder: Path, names: Collection[str]) -> set[str] | None:
    """Return `names` with the tasks and groups below them; None if the folder has not all of them."""
    known = _named(folder)
    reached = _reached(known, names)
    return reached if reached <= known.keys() else None


def _named(folder: Path) -> dict[str, list[TaskFile]]:
    """Return the files of a folder by the tasks, groups and tags that they define."""
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
    """Return `names`, the members of the groups and tags among them, and so on."""
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
    """Yield a YAML file, the code beside it if it names a function, and its data."""
    yield file.path
    if any(text.startswith(_FUNCTION) for text in _texts(file.config)):
        yield from (code.resolve() for code in file.path.parent.glob("**/*.py"))
    arguments = file.config.get("dataset_kwargs")
    for text in _texts(arguments if isinstance(arguments, Mapping) else {}):
        yield from _data(file.path.parent, text)


def _data(folder: Path, text: str) -> Iterator[Path]:
    """Yield the files that a text among a data set's arguments names, if it names any."""
    try:
        path = Path(text).expanduser()
        if (folder / path).exists():
            inside = (folder / path).rglob("*") if (folder / path).is_dir() else [folder / path]
            yield from (file.resolve() for file in inside if file.is_file())
        elif any(mark in text for mark in "*?["):
            root = Path(path.anchor) if path.is_absolute() else folder
            yield from (file.resolve() for file in root.glob(str(path.relative_to(path.anchor))) if file.is_file())
    except (OSError, ValueError, RuntimeError, NotImplementedError):  # no text of a path
        return


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _includes(root: Any) -> Iterator[str]:
    """Yield the paths of the files that a file includes, by a key of its own or of a mapping merged into it."""
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
    """Parse a YAML file, once for each state of it."""
    try:
        text = path.read_bytes()
        root = yaml.compose(text, Loader=_COMPOSER)
    except OSError as error:
        return TaskFile(path, None, {}, f"{path}: cannot be read: {error.strerror}")
    except (yaml.YAMLError, ValueError) as error:
        return TaskFile(path, None, {}, f"{path}: not YAML: {' '.join(str(error).split())}")
    try:
        config = yaml.load(text, Loader=_Plain)
    except (yaml.YAMLError, ValueError, TypeError):  # a tag of Python, or a key that cannot be one
        config = None
    return TaskFile(path, root, config if isinstance(config, dict) else {}, "")
