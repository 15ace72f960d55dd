"""Which files a question task is read from: its YAML, what that includes, its data, its code. Imports no harness."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_FUNCTION = "!function"


class _Plain(yaml.SafeLoader):  # type: ignore[misc]
    """Reads tags that only the harness knows, such as `!function module.name`, as plain text."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {getattr(node, 'value', '')}")


def task_files(folder: Path, names: Collection[str]) -> list[Path]:
    """Return the files that the tasks, groups and tags called `names` are read from, sorted.

    Names that no file of `folder` has are the harness's own. What cannot be read counts by its own content alone; the
    harness says what is wrong with it.
    """
    known: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("**/*.yaml")):
        for name in _names(_read(path)):
            known.setdefault(name, []).append(path)
    found: set[Path] = set()
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for path in known.get(name, ()):
            found.update(_behind(path.resolve(), set()))
            waiting += _members(_read(path))
    return sorted(found)


def _names(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names under which a file's task, group or tag is asked for."""
    for key in ("task", "group", "tag"):
        value = config.get(key)
        for name in value if isinstance(value, list) and key == "tag" else [value]:
            if isinstance(name, str):
                yield name


def _members(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names that a group lists."""
    listed = config.get("task")
    for member in listed if isinstance(listed, list) else []:
        name = member.get("task", member.get("group")) if isinstance(member, Mapping) else member
        if isinstance(name, str):
            yield name


def _behind(path: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield a YAML file and all that it names: files that it includes, code beside it, and data."""
    if path in seen:
        return
    seen.add(path)
    yield path
    config = _read(path)
    included = config.get("include", ())
    for name in included if isinstance(included, list) else [included]:
        if isinstance(name, str):
            yield from _behind((path.parent / Path(name).expanduser()).resolve(), seen)
    if any(text.startswith(_FUNCTION) for text in _texts(config)):
        yield from (file.resolve() for file in path.parent.glob("**/*.py"))
    arguments = config.get("dataset_kwargs")
    for text in _texts(arguments if isinstance(arguments, Mapping) else {}):
        yield from _data(path.parent, text)


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
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        stat = path.stat()
    except OSError:
        return {}
    return _parsed(path, stat.st_mtime_ns, stat.st_size)


@cache
def _parsed(path: Path, modified: int, size: int) -> Mapping[str, Any]:
    """Return what a YAML file says, once for each state of it."""
    try:
        found = yaml.load(path.read_bytes(), Loader=_Plain)
    except (OSError, yaml.YAMLError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
