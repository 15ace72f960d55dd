"""Read what lm-evaluation-harness writes with `--log_samples`: results_DATE.json and samples_TASK_DATE.jsonl."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec

from pytest_lmcompose.logs.log import Log, LogError, Metric, decode, gather, last_run, lower_is_better, number

_DATED = re.compile(r"(?P<kind>samples_(?P<task>.+)|results)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl?")
_BLOCK = 1 << 24
"""Bytes to decode at once."""
_UNNAMED = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter"} | {
    f"{part}_hash" for part in ("doc", "prompt", "target")
}
"""Fields that are no metrics, for rows that do not name theirs (before version 0.4.5)."""


class _Results(msgspec.Struct):
    higher_is_better: dict[str, dict[str, bool | None]] = {}


class _Row(msgspec.Struct, gc=False):
    doc_id: Any
    metrics: tuple[str, ...] = ()
    doc_hash: str = ""
    prompt_hash: str = ""
    filter: str = ""


def find(folder: Path) -> list[Path]:
    """Return the files of samples of the last run in a folder, also below it, as the harness nests them by model."""
    return last_run(folder, "samples_*.jsonl", _DATED)


def read(folder: Path, files: list[Path]) -> Log:
    """Return the samples in `files`; raises LogError for rows that are broken."""
    directions = _directions(files[0])
    found: dict[str, Metric] = {}
    for file in files:
        match = _DATED.fullmatch(file.name)
        assert match is not None and match["task"] is not None
        task = match["task"]
        for names, rows in _blocks(file):
            filters = dict.fromkeys(map(attrgetter("filter"), rows))
            for filter in filters:
                part = rows if len(filters) == 1 else [row for row in rows if row.filter == filter]
                samples = [str(row.doc_id) for row in part]
                prompts = [row.doc_hash + row.prompt_hash for row in part]
                for place, name in enumerate(names):
                    better = directions.get(task, {}).get(name)
                    lower = lower_is_better(name) if better is None else not better
                    full = f"{task}/{name}" + ("" if filter in ("", "none") else f",{filter}")
                    values = list(map(attrgetter(f"value_{place}"), part))
                    gather(found, Metric(full, not lower), samples, prompts, values)
    return Log(str(folder), "lm-evaluation-harness", found)


def _blocks(file: Path) -> Iterator[tuple[Sequence[str], list[Any]]]:
    """Yield the rows of a file of samples in blocks, with the names of `value_0`, `value_1`, ...; raises LogError."""
    names: tuple[str, ...] = ()
    line, size = 1, 1  # the first row says which metrics to decode
    with file.open("rb") as stream:
        while block := stream.read(size) + stream.readline():
            size = _BLOCK
            rows = _decoded(file, block, names, line)
            given = {name for named in set(map(attrgetter("metrics"), rows)) for name in named or _unnamed(block)}
            if new := sorted(given - set(names)):
                names = (*names, *new)
                rows = _decoded(file, block, names, line)
            yield names, rows
            line += block.count(b"\n")


def _decoded(file: Path, block: bytes, names: tuple[str, ...], first: int) -> list[Any]:
    """Return the rows of a block; NaN and a broken line are looked for line by line."""
    kind = _kind(names)
    try:
        return msgspec.json.Decoder(kind).decode_lines(block)
    except msgspec.MsgspecError:
        rows = []
        for line, text in enumerate(block.split(b"\n"), start=first):
            try:
                if text.strip():
                    rows.append(decode(text, kind))
            except (ValueError, msgspec.MsgspecError) as error:
                raise LogError(f"{file}, line {line}: no sample of lm-evaluation-harness: {error}") from None
        return rows


@cache
def _kind(names: tuple[str, ...]) -> type[Any]:
    """Return the type of rows with these metrics, as `value_0`, `value_1`, ..., which skips all else."""
    fields = [(f"value_{place}", Any, None) for place in range(len(names))]
    renamed = {f"value_{place}": name for place, name in enumerate(names)}
    return msgspec.defstruct("Row", fields, bases=(_Row,), rename=renamed, kw_only=True, gc=False)


def _unnamed(block: bytes) -> Iterator[str]:
    """Yield the metrics of the first row of a block, which does not name them."""
    row: dict[str, Any] = msgspec.json.decode(block.lstrip().partition(b"\n")[0])
    return (name for name, value in row.items() if name not in _UNNAMED and number(value) is not None)


def _directions(samples: Path) -> Mapping[str, Mapping[str, bool | None]]:
    """Return which way each metric is better, from the results beside a file of samples."""
    match = _DATED.fullmatch(samples.name)
    assert match is not None
    results = samples.with_name(f"results_{match['date']}.json")
    try:
        return msgspec.json.decode(results.read_bytes(), type=_Results).higher_is_better
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        raise LogError(f"{results} cannot be read: {error}") from None
