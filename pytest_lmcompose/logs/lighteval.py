"""Read details of LightEval: details_TASK_DATE.parquet, one file a task, with the columns `doc` and `metric`."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_lmcompose.logs.log import Log, LogError, Metric, gather, last_run, lower_is_better

_DATED = re.compile(r"details_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.:-]+)\.parquet")


def find(folder: Path) -> list[Path]:
    """Return the details of the last run in a folder, or below it."""
    return last_run(folder, "details_*.parquet", _DATED, level=1)


def read(folder: Path, files: list[Path]) -> Log:
    """Return the scores in `files`; raises LogError for files without the columns."""
    import pyarrow
    from pyarrow import parquet

    found: dict[str, Metric] = {}
    for file in files:
        match = _DATED.fullmatch(file.name)
        assert match is not None
        try:
            names = parquet.read_schema(file).names
            scores = "metric" if "metric" in names else "metrics"
            asked = [name for name in ("doc.id", "doc.query", "full_prompt") if name.partition(".")[0] in names]
            table = parquet.read_table(file, columns=[*asked, scores]).flatten()
        except (OSError, pyarrow.ArrowException) as error:
            raise LogError(f"{file} cannot be read as details of LightEval: {error}".splitlines()[0]) from None
        values = {name: table[name].to_pylist() for name in table.column_names}
        places = [str(place) for place in range(len(table))]
        samples = [str(i or place) for i, place in zip(values.get("doc.id", places), places, strict=True)]
        prompts = [str(text) for text in values.get("doc.query") or values.get("full_prompt") or [""] * len(table)]
        for column, scored in values.items():
            if (name := column.removeprefix(f"{scores}.")) != column:
                metric = Metric(f"{match['task']}/{name}", not lower_is_better(name))
                gather(found, metric, samples, prompts, scored)
    return Log(str(folder), "LightEval", found)
