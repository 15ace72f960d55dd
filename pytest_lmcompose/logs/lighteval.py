"""Read details of LightEval: details_TASK_DATE.parquet, one file a task, with the columns `doc` and `metric`."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_lmcompose.logs.log import Log, LogError, Metric, last_run, number

_DATED = re.compile(r"details_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.:-]+)\.parquet")
_LOWER = ("ppl", "perplexity", "bits_per_byte", "loss")


def find(folder: Path) -> list[Path]:
    """Return the details of the last run in a folder, or below it."""
    return last_run(folder, "details_*.parquet", _DATED)


def read(folder: Path, files: list[Path]) -> Log:
    """Return the scores in `files`; raises LogError for files without the columns."""
    import pyarrow
    from pyarrow import parquet

    found: dict[str, Metric] = {}
    for file in files:
        match = _DATED.fullmatch(file.name)
        assert match is not None
        try:
            columns = set(parquet.read_schema(file).names)
            scores = "metric" if "metric" in columns else "metrics"
            table = parquet.read_table(file, columns=["doc", scores])
            rows = zip(table["doc"].to_pylist(), table[scores].to_pylist(), strict=True)
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise LogError(f"{file} cannot be read as details of LightEval: {error}".splitlines()[0]) from None
        for place, (document, values) in enumerate(rows):
            sample = str(document.get("id") or place)
            for name, value in (values or {}).items():
                if (score := number(value)) is not None:
                    full = f"{match['task']}/{name}"
                    lower = any(part in name for part in _LOWER)
                    found.setdefault(full, Metric(full, not lower)).add(sample, score)
    return Log(str(folder), "LightEval", found)
