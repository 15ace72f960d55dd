"""Read the records of a source: a file, a folder in the hub's layout, a dataset on the hub, or a named one. No torch.

A named source is a function that yields numbered rows for a `Source`. A package adds one by an entry point of the group
`lmcompose.sources`; a notebook or a `conftest.py` calls `register("mine", rows)`. Then `world.retain=mine` reads it.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from interventions.ranges import shown
from pytest_lmcompose.data import python_docs
from pytest_lmcompose.data.extensions import add, add_installed
from pytest_lmcompose.data.files import Rows, file_rows, is_data_file
from pytest_lmcompose.data.hub import dataset_rows, hub_file
from pytest_lmcompose.data.records import Record, WorldError
from pytest_lmcompose.data.source import Source, parse_source

ENTRY_POINT_GROUP = "lmcompose.sources"
_WHAT = "source"


@cache
def named_sources() -> dict[str, Callable[[Source], Rows]]:
    """Return the named sources; `python-docs` is built in."""
    table: dict[str, Callable[[Source], Rows]] = {"python-docs": python_docs.rows}
    return add_installed(table, ENTRY_POINT_GROUP, _WHAT)


def register(name: str, rows: Callable[[Source], Rows]) -> None:
    """Add a named source to this process; raises ValueError if the name has another one."""
    add(named_sources(), name, rows, _WHAT)


def read_source(value: Any, folder: Path = Path()) -> Iterator[Record]:
    """Yield the records of a source, `folder` being the world's; they know where they stand, for errors.

    Raises WorldError for a file, field, split or revision that is missing, and for a hub that cannot be reached.
    """
    source = parse_source(value)
    name, rows, shuffled = _rows(source, folder)
    names = source.fields | ({"text": source.field} if source.field else {})
    records: Iterator[Record] = (_renamed(Record(name, number, data), names) for number, data in rows)
    if source.filter:
        records = _filtered(records, source.filter)
    if source.limit is not None:
        in_order = source.seed is None or shuffled
        records = itertools.islice(records, source.limit) if in_order else _sample(records, source)
    first = next(records, None)
    if first is None:
        raise WorldError(f"{name}: no records" + (f" with {shown(source.filter)}" if source.filter else ""))
    return itertools.chain([first], records)


def _rows(source: Source, folder: Path) -> tuple[str, Rows, bool]:
    """Return the name of what is read, its numbered rows, and whether they are shuffled by the source's seed."""
    local = local_path(source, folder)
    if local is None and (named := named_sources().get(source.path)) is not None:
        return source.name, named(source), False
    if local is None and is_data_file(source.path):
        raise WorldError(f"no such data file: {folder / os.path.expanduser(source.path)}")
    if source.file is not None and (local is None or local.is_dir()):
        local = hub_file(source.path, source.file, source.revision) if local is None else local / source.file
    elif local is None or local.is_dir():
        return source.name, dataset_rows(source, local), True
    if source.file is not None and not local.name == Path(source.file).name:
        raise WorldError(f"{local}: is a file, and has no file {source.file!r}; leave out file")
    for key in ("configuration", "split"):
        if (wanted := getattr(source, key)) is not None:
            raise WorldError(f"{local}: a single file has no {key} {wanted!r}; leave out {key}")
    return str(local), file_rows(local), False


def local_path(source: Source, folder: Path) -> Path | None:
    """Return the file or folder of a source, in the world's folder or the working folder; None if there is none."""
    expanded = os.path.expanduser(source.path)
    return next((found for found in (folder / expanded, Path(expanded)) if found.exists()), None)


def _renamed(record: Record, names: Mapping[str, str]) -> Record:
    """Return the record with other fields under the names that readers know."""
    if not names:
        return record
    found = {ours: _inside(record, theirs) for ours, theirs in names.items()}
    return Record(record.path, record.number, {**record.data, **found})


def _inside(record: Record, name: str) -> Any:
    if name in record.data:
        return record.data[name]
    value: Any = record.data
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise record.error(f"field {name!r} is missing; it has {', '.join(record.data)}")
        value = value[part]
    return value


def _filtered(records: Iterable[Record], wanted: Mapping[str, Any]) -> Iterator[Record]:
    allowed = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in wanted.items()}
    for record in records:
        values = {name: _inside(record, name) for name in allowed}
        if all(_among(values[name], allowed[name]) for name in allowed):
            yield record


def _among(value: Any, allowed: Iterable[Any]) -> bool:
    """Compare by the texts too: every value of a csv file is one."""
    return any(value == one or str(value) == str(one) for one in allowed)


def _sample(records: Iterable[Record], source: Source) -> Iterator[Record]:
    found = list(records)
    if source.limit is None or source.limit >= len(found):
        return iter(found)
    chosen = random.Random(f"records {source.seed}").sample(range(len(found)), source.limit)
    return (found[i] for i in sorted(chosen))
