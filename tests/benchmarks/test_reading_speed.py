"""Reading of 10,000 CounterFact records, in both published forms and all formats."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from pytest_lmcompose.data.readers import read_edits
from pytest_lmcompose.data.records import select_edits

pytestmark = pytest.mark.benchmark

RECORDS = 10_000


def nested(i: int) -> dict[str, Any]:
    rewrite = {
        "prompt": "The mother tongue of {} is",
        "subject": f"Person {i:05}",
        "target_new": {"str": "English"},
        "target_true": {"str": "French"},
    }
    return {
        "requested_rewrite": rewrite,
        "paraphrase_prompts": [f"Paraphrase {j} of {i} " + "with words " * 15 for j in range(2)],
        "neighborhood_prompts": [f"Neighbour {j} of {i} " + "with words " * 4 for j in range(10)],
        "generation_prompts": [f"Text {j} of {i} " + "with words " * 4 for j in range(10)],
    }


def flat(i: int) -> dict[str, Any]:
    return {
        "prompt": f"The mother tongue of Person {i:05} is",
        "subject": f"Person {i:05}",
        "target_new": "English",
        "ground_truth": "French",
        "rephrase_prompt": f"Paraphrase of {i}",
        "locality_prompt": f"Neighbour of {i}",
        "locality_ground_truth": "French",
    }


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("make", [nested, flat])
def test_10000_counterfact_records_are_read_and_selected_in_two_seconds(tmp_path: Path, make: Any, suffix: str) -> None:
    rows, path = [make(i) for i in range(RECORDS)], tmp_path / f"counterfact.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    start = time.perf_counter()
    records = read_edits(path)
    chosen = select_edits(records, 50, 0)
    assert time.perf_counter() - start < 2
    assert (len(records), len(chosen)) == (RECORDS, 50)
