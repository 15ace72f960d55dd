"""`lmcompose show`, `compare` and `report` on stored runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pytest_lmcompose.baseline.storage import Storage
from pytest_lmcompose.cli import main
from pytest_lmcompose.report.sections import order_rows
from pytest_lmcompose.results import Composability, Interval, OrderedSet, OrderValue
from tests.plugin.documents import gate, report, typed

GOOD = [1.0] * 19 + [0.0]
BAD = [1.0] * 5 + [0.0] * 15


def document(memit: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    base = {"recall": [1.0] * 20, "perplexity": [2.0 + i / 10 for i in range(20)]}
    return report({"base": base, "memit": memit}, **fields)


OLD = document({"recall": GOOD, "perplexity": [2.1 + i / 10 for i in range(20)]})
WORSE = document({"recall": BAD, "perplexity": [2.1 + i / 10 for i in range(20)]})
GONE = document({"perplexity": [2.1 + i / 10 for i in range(20)]})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two stored runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    storage = Storage(tmp_path / ".lmcompose")
    storage.save(typed(OLD), "v1")
    storage.save(typed(WORSE), "v2")
    (tmp_path / "gone.json").write_text(json.dumps(GONE))
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(main, words)


@pytest.mark.parametrize("run", ["v1", "1", "0001_v1", ".lmcompose/0001_v1.json"])
def test_a_run_is_named_by_name_number_or_path(folder: Path, run: str) -> None:
    result = call("show", run)
    assert result.exit_code == 0, result.output
    assert "0001_v1.json: finished 2026-01-01T01:00:00+00:00" in result.output
    assert "tiny, weights 111111111111; seed 0" in result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert ["composition", "recall", "perplexity"] in rows
    assert ["base", "1.000", "2.950"] in rows and ["memit", "0.950", "3.050"] in rows


def test_show_prints_what_a_run_prints(folder: Path) -> None:
    """Failed gates are marked, paired gates and composability have tables of their own."""
    failing = json.loads(json.dumps(OLD))
    gate = {"metric": "recall", "gate": "min", "threshold": 0.99, "passed": False, "message": "", "value": 0.95}
    failing["compositions"][1]["gates"] = [gate | {"base_value": None}]
    (folder / "failing.json").write_text(json.dumps(failing))
    result = call("show", "failing.json")
    assert result.exit_code == 0
    rows = [line.split() for line in result.output.splitlines()]
    assert ["composition", "recall"] in rows  # what no gate judged is left out
    assert ["memit", "0.950!"] in rows
    assert "! a gate failed" in result.output
    assert "perplexity" in call("show", "failing.json", "--all").output


def test_show_chooses_and_sorts(folder: Path) -> None:
    lines = call("show", "v1", "--metric=perp*", "--sort=-perplexity").output.splitlines()
    rows = [line.split() for line in lines if line]
    assert ["composition", "perplexity"] in rows and not any("recall" in line for line in lines)
    assert rows.index(["memit", "3.050"]) < rows.index(["base", "2.950"])


def test_show_has_no_colour_off_a_terminal(folder: Path) -> None:
    assert "\x1b" not in call("show", "v1").output
    coloured = CliRunner().invoke(main, ["show", "v1"], color=True).output
    assert "\x1b[1m" in coloured


def test_compare_tells_what_got_worse(folder: Path) -> None:
    result = call("compare", "v1", "v2")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    row = next(row for row in rows if row[:2] == ["memit", "recall!"])
    assert row[2:5] == ["0.950", "0.250", "-0.7"] and row[-1] == "worse"
    assert not any(row[:2] == ["memit", "perplexity"] for row in rows)  # nothing changed there
    assert result.output.splitlines()[-1] == "3 equal, 1 worse"
    assert "memit  perplexity" in call("compare", "v1", "v2", "--all").output


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["v1", "v2"], 0),
        (["v1", "v2", "--fail"], 1),
        (["v2", "v1", "--fail"], 0),
        (["v1", "v2", "--fail", "--metric=perplexity"], 0),
        (["v1", "gone.json", "--fail"], 1),  # what is missing is not as good as before
    ],
)
def test_compare_fails_where_it_is_asked_to(folder: Path, words: list[str], code: int) -> None:
    assert call("compare", *words).exit_code == code


def test_compare_as_json_has_every_row(folder: Path) -> None:
    found = json.loads(call("compare", "v1", "v2", "--json").output)
    assert {(row["composition"], row["metric"]) for row in found["rows"]} == {
        (name, metric) for name in ("base", "memit") for metric in ("recall", "perplexity")
    }


def test_compare_tells_of_other_circumstances(folder: Path) -> None:
    other = json.loads(json.dumps(OLD))
    other["environment"]["packages"]["torch"] = "9.9"
    (folder / "other.json").write_text(json.dumps(other))
    assert "versions differ: torch: 2.13.0 -> 9.9" in call("compare", "v1", "other.json").output
    other["model"]["architecture"] = "Other"
    (folder / "other.json").write_text(json.dumps(other))
    result = call("compare", "v1", "other.json")
    assert result.exit_code == 2
    assert "cannot be compared" in result.stderr and "architecture" in result.stderr


@pytest.mark.parametrize("command", [["show"], ["compare", "v1"], ["report", "--html=x.html"]])
@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("v11", "Did you mean"),
        ("cut.json", "is broken or truncated"),
        ("newer.json", "install the pytest-lmcompose that wrote it, or a later one"),
    ],
)
def test_a_run_that_cannot_be_read(folder: Path, command: list[str], run: str, message: str) -> None:
    (folder / "cut.json").write_text(json.dumps(OLD)[:100])
    (folder / "newer.json").write_text(json.dumps(OLD | {"schema_version": 99}))
    result = call(*command, run)
    assert result.exit_code == 2
    assert message in result.stderr and result.stdout == ""


def test_a_metric_that_is_misspelt(folder: Path) -> None:
    for words in (["show", "v1"], ["compare", "v1", "v2"]):
        result = call(*words, "--metric=recal")
        assert result.exit_code == 2
        assert "Did you mean recall" in result.stderr


def test_report_writes_what_is_asked_for(folder: Path) -> None:
    result = call("report", "v2", "--baseline=v1", "--html=a.html", "--markdown=-", "--latex=c.tex")
    assert result.exit_code == 0, result.output
    assert (folder / "a.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert (folder / "c.tex").is_file()
    assert "memit" in result.output and "a.html: " in result.output


def test_report_needs_a_target_that_can_be_written(folder: Path) -> None:
    assert call("report", "v1").exit_code == 2
    result = call("report", "v1", "--markdown=none/a.md")
    assert result.exit_code == 2 and "does not exist; create it first" in result.stderr


def test_none_of_them_needs_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom pytest_lmcompose.cli import main\n"
        "main(['show', 'v1', '--all'], standalone_mode=False)\n"
        "main(['compare', 'v1', 'v2', '--all'], standalone_mode=False)\n"
        "main(['report', 'v2', '--baseline=v1', '--markdown=-'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_orders_stand_under_their_heads() -> None:
    error, gap = Interval(0.25, None, None), Interval(0.5, None, None)
    orders = (OrderValue("awq+memit", 0.75), OrderValue("memit+awq", 0.25))
    entry = OrderedSet(("awq", "memit"), "recall", True, orders, "awq+memit", error, gap, 4, 1, "")
    head, row = order_rows(Composability(0.95, 10, (entry,), ()), ["recall"])
    assert dict(zip((cell.text for cell in head), (cell.text for cell in row), strict=True)) == {
        "steps  metric": "awq & memit  recall",
        "best order": "awq+memit",
        "order-free error": "0.250",
        "order sensitivity": "0.500",
    }


def test_show_sorts_by_a_metric_that_it_does_not_show(folder: Path) -> None:
    """Among the groups too, and by a name that must have been measured."""

    def order(*words: str) -> list[str]:
        result = call("show", "v2", "--metric=perplexity", *words)
        assert result.exit_code == 0, result.output
        rows = [line.split() for line in result.output.splitlines() if line.startswith((" ", "base", "memit"))]
        assert all(len(row) == 2 for row in rows)
        return [row[0] for row in rows]

    assert order("--sort=recall") == ["base", "memit"]
    assert order("--sort=-recall") == order("--sort=-id") == ["memit", "base"]
    assert order("--sort", "perplexity") == ["base", "memit"]
    unknown = call("show", "v2", "--sort=recal")
    assert unknown.exit_code == 2 and "no metric 'recal' was measured. Did you mean recall" in unknown.stderr


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with nine stored runs, in which memit loses recall."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    for i in range(9):
        stored = {"name": f"v{i}", "how": "save", "passed": i != 4, "commit": "abcdef0123", "dirty": i == 2}
        entry = document({"recall": [1.0] * (19 - i) + [0.0] * (1 + i), "perplexity": [2.0] * 20}, stored=stored)
        entry["compositions"][1]["gates"] = [gate("recall", passed=i != 4)]
        entry["recipe"]["world"] = {"folder": "/data/paper"}
        Storage(tmp_path / ".lmcompose").save(typed(entry), f"v{i}")
    return tmp_path


def test_runs_lists_what_is_stored(history: Path) -> None:
    (history / ".lmcompose" / "0010_broken.json").write_text("{")
    result = call("runs")
    assert result.exit_code == 0
    rows = [line.split() for line in result.output.splitlines()]
    assert ["0003_v2", "2026-01-01", "01:00", "abcdef01*", "tiny", "paper", "2", "1", "passed", "3600"] in rows
    assert ["0005_v4", "2026-01-01", "01:00", "abcdef01", "tiny", "paper", "2", "1", "failed", "3600"] in rows
    assert "left out: .lmcompose/0010_broken.json is broken or truncated" in result.output
    (first, last) = json.loads(call("runs", "--json", "--last", "3").stdout)["runs"]
    assert (first["run"], last["run"], last["seconds"], last["passed"]) == ("0008_v7", "0009_v8", 3600, True)
    assert last["gates"] == {"passed": 1, "failed": 0, "lost": 0}


def test_runs_follows_metrics_and_finds_drift(history: Path) -> None:
    result = call("runs", "--metric", "rec*", "--of", "memit")
    assert result.exit_code == 0
    rows = [line.split() for line in result.output.splitlines()]
    assert ["0001_v0", "0.950", "±", "0.050"] in rows and ["0009_v8", "0.550", "±", "0.114"] in rows
    assert ["memit", "recall!", "█▇▆▅▅▄▃▂▁", "-0.4", "2.8e-06", "drifts"] in rows  # 1 of 9! orders
    found = json.loads(call("runs", "-m", "recall", "-m", "perplexity", "--json").stdout)["trends"]
    by_name = {(entry["composition"], entry["metric"]): entry for entry in found}
    drift = by_name["memit", "recall"]["mann_kendall"]
    assert drift["drifts"] and drift["p"] == pytest.approx(1 / 362880) and drift["p_holm"] == pytest.approx(4 / 362880)
    assert [point["run"] for point in by_name["memit", "recall"]["points"]][:2] == ["0001_v0", "0002_v1"]
    assert not by_name["base", "recall"]["mann_kendall"]["drifts"]
    assert "too few runs" in call("runs", "-m", "recall", "--last", "2").output


@pytest.mark.parametrize("name", ["trend.svg", pytest.param("trend.html", marks=pytest.mark.slow)])
def test_runs_draws_metrics(history: Path, name: str) -> None:
    result = call("runs", "--metric", "recall", "--plot", name)
    assert result.exit_code == 0, result.output
    text = (history / name).read_text()
    assert "recall" in text and "memit" in text and "number of the run" in text
    assert text.lstrip().startswith("<svg" if name.endswith("svg") else "<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "x.svg"], "--plot draws metrics: name them with --metric or --of"),
        (["-m", "recall", "--plot", "x.png"], "expected a path that ends with .svg or .html"),
        (["-m", "recal"], "no metric 'recal' was measured. Did you mean recall?"),
        (["-c", "rome"], "--of=rome: the last run, 0009_v8, has no such composition: base, memit"),
        (["-m", "recall", "--plot", "no/x.svg"], "no/x.svg cannot be written"),
        (["--storage", "empty"], "no run is stored in empty; store one with pytest --lmcompose-save=NAME"),
    ],
)
def test_runs_says_what_is_wrong_in_one_line(history: Path, words: list[str], message: str) -> None:
    result = call("runs", *words)
    assert result.exit_code == 2 and message in result.output


def test_runs_follows_what_the_last_run_has(history: Path) -> None:
    Storage(history / ".lmcompose").save(typed(report({"base": {"recall": [1.0] * 20}})), "v9")
    result = call("runs", "-m", "perplexity")
    assert result.exit_code == 2 and "the last run, 0010_v9, has no finite value of these metrics" in result.output


def test_several_runs_are_columns(history: Path) -> None:
    result = call("compare", "v0", "v1", "v8")
    assert result.exit_code == 0
    rows = [line.split() for line in result.output.splitlines()]
    assert ["composition", "metric", "0001_v0", "0002_v1", "0009_v8"] in rows
    p = 2**-7 * 2  # 8 answers lost; Holm's correction covers both columns
    assert f"memit recall 0.950 0.900 (-0.05, p 1) 0.550 (-0.4, p {p:.2g})! ".split() in rows
    assert "0009_v8: " in result.output and "1 worse" in result.output
    assert call("compare", "v0", "v1", "v8", "--fail").exit_code == 1
    assert call("compare", "v0", "v1", "v2", "--fail").exit_code == 0
    found = json.loads(call("compare", "v0", "v1", "v8", "--json").stdout)
    assert list(found) == [".lmcompose/0002_v1.json", ".lmcompose/0009_v8.json"]
