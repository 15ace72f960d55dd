"""Read what lm-evaluation-harness writes with `--log_samples`: results_DATE.json and samples_TASK_DATE.jsonl."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from pytest_lmcompose.logs.log import Log, LogError, Metric, last_run, number

_DATED = re.compile(r"(?P<kind>samples_(?P<task>.+)|results)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl?")
_LOWER = ("perplexity", "ppl", "bits_per_byte", "brier", "loss")
"""Parts of the names of metrics where lower is better, for results that do not say."""


class _Results(msgspec.Struct):
    higher_is_better: dict[str, dict[str, bool | None]] = {}


def find(folder: Path) -> list[Path]:
    """Return the files of samples of the last run in a folder, also below it, as the harness nests them by model."""
    return last_run(folder, "samples_*.jsonl", _DATED)


def read(folder: Path, files: list[Path]) -> Log:
    """Return the samples in `files`; raises LogError for rows that are broken or have no metrics."""
    directions = _directions(files[0])
    found: dict[str, Metric] = {}
    for file in files:
        match = _DATED.fullmatch(file.name)
        assert match is not None and match["task"] is not None
        task = match["task"]
        for row in _rows(file):
            sample = f"{row.doc_id} {row.doc_hash[:12]}".strip()
            filtered = "" if row.filter in ("", "none") else f",{row.filter}"
            for place, name in enumerate(row.metrics):
                if (
                    value := number(getattr(row, f"value_{place}"))
                ) is not None:  # not what is computed over all samples
                    full = f"{task}/{name}{filtered}"
                    if full not in found:
                        better = directions.get(task, {}).get(name)
                        lower = any(part in name for part in _LOWER) if better is None else not better
                        found[full] = Metric(full, not lower)
                    found[full].add(sample, value)
    return Log(str(folder), "lm-evaluation-harness", found)


class _Row(msgspec.Struct):
    doc_id: Any
    metrics: tuple[str, ...]
    doc_hash: str = ""
    filter: str = ""


@cache
def _decoder(metrics: tuple[str, ...]) -> msgspec.json.Decoder[Any]:
    """Return a decoder of rows with these metrics, which skips all else: as `value_0`, `value_1`, ..."""
    fields = [(f"value_{place}", Any, None) for place in range(len(metrics))]
    names = {f"value_{place}": name for place, name in enumerate(metrics)}
    return msgspec.json.Decoder(msgspec.defstruct("Row", fields, bases=(_Row,), rename=names, kw_only=True))


def _rows(file: Path) -> Iterator[Any]:
    """Yield the rows of a file of samples; raises LogError."""
    metrics: tuple[str, ...] = ()
    with file.open("rb") as lines:
        for line, text in enumerate(lines, start=1):
            try:
                row = _decoder(metrics).decode(text)
                if row.metrics != metrics:
                    metrics = row.metrics
                    row = _decoder(metrics).decode(text)
            except msgspec.MsgspecError as error:
                raise LogError(f"{file}, line {line}: no sample of lm-evaluation-harness: {error}") from None
            yield row


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
