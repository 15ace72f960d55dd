"""What may be typed, written as thresholds, or handed over as a report: refused in one line, or shown."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from evaluators.measurement import Measurement
from interventions.registry import methods
from pytest_lmcompose.baseline.reference import Baseline
from pytest_lmcompose.baseline.storage import StorageError, read_run
from pytest_lmcompose.cli import main
from pytest_lmcompose.cli.flags import plugin_flags
from pytest_lmcompose.gate.globs import impossible, overlap
from pytest_lmcompose.gate.judge import Reference, judge, settle
from pytest_lmcompose.gate.thresholds import ThresholdError, check_compositions, read_expression, read_rules
from pytest_lmcompose.options import read_options
from pytest_lmcompose.report import html, latex, markdown
from pytest_lmcompose.report.planned import dropped, idle, unmatched
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.run import CONF
from tests.plugin.conftest import Project
from tests.plugin.documents import composition, gate, report, typed, typed_record
from tests.plugin.rich_documents import rich as rich_document

VALUED = [flag.name for flag in plugin_flags()[0] if flag.metavar is not None]


@pytest.mark.parametrize("value", ["", " ", "\t", ","])
def test_an_empty_value_of_any_flag_is_refused(pytester: pytest.Pytester, value: str) -> None:
    assert len(VALUED) > 20
    config = pytester.parseconfig(*(f"--lmcompose-{name}={value}" for name in VALUED))
    for name in VALUED:
        key = f"lmcompose_{name.replace('-', '_')}"
        given = {f"lmcompose_{other.replace('-', '_')}": None for other in VALUED}
        kept = {other: getattr(config.option, other) for other in given}
        vars(config.option).update(given | {key: kept[key]})
        with pytest.raises(pytest.UsageError, match=rf"^--lmcompose-{name}={value}: the value is empty"):
            read_options(config)
        vars(config.option).update(kept)


def test_an_empty_value_of_an_ini_file_is_not_set(pytester: pytest.Pytester) -> None:
    empty = "".join(f"lmcompose_{name.replace('-', '_')} =\n" for name in VALUED)
    pytester.makeini(f"[pytest]\n{empty}")
    assert not read_options(pytester.parseconfig()).given


@pytest.mark.parametrize(
    "words",
    [
        ["init", ""],
        ["init", ".", "--model="],
        ["init", ".", "--compose", " "],
        ["plan", "--model="],
        ["plan", "--lmcompose-compose= "],
        ["plan", "--compare="],
        ["merge", "a.json", "-o", ""],
        ["merge", "", "-o", "b.json"],
        ["report", "1", "--html="],
        ["report", "1", "--storage="],
        ["show", ""],
        ["show", "1", "--sort="],
        ["show", "1", "-m", ""],
        ["compare", "1", " "],
        ["cache", "show", "--cache-dir="],
    ],
)
def test_an_empty_value_of_a_command_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and "the value is empty" in result.output, result.output
    assert list(tmp_path.iterdir()) == []


THRESHOLDS = [
    ("", "expected a mapping"),
    ("{}", "empty; add at least one rule"),
    ("'*': {}", "empty; add at least one rule"),
    ("'*':", "expected a mapping"),
    ("'*': {m: }", "expected a mapping"),
    ("'*': {m: {}}", "removes a gate, but no rule sets one"),
    ("awq: {m: {}}\nmemit: {m: {min: 1}}", "awq: m: {} removes a gate, but no rule sets one"),
    ("'*': {m: {min: []}}", "min is an empty list"),
    ("'*': {m: {max_drop: []}}", "max_drop is an empty list"),
    ("'*': {m: {min: null}}", "min is None"),
    ("'*': {m: {min: yes}}", "min is True"),
    ("'*': {m: {min: '0.9'}}", "min is '0.9'"),
    ("'*': {m: {min: 0,9}}", "expected a mapping with text keys"),
    ("'*': {m: {min: 1:30}}", "min is '1:30'"),
    ("'*': {m: {min: .nan}}", "min is nan"),
    ("'*': {m: {max: .inf}}", "max is inf"),
    ("'*': {m: {max: -.inf}}", "max is -inf"),
    ("'*': {m: {min: [0.5, x]}}", "min is 'x'"),
    ("'*': {m: {min: [[0.5]]}}", r"min is \[0.5\]"),
    ("'*': {m: {min: {value: 1, of: base}}}", "min takes a number, not a reference"),
    ("'*': {m: {mim: 1}}", "unknown bound 'mim'.*Did you mean min"),
    ("'*': {m: {max_dorp: 1}}", "Did you mean max_drop"),
    ("'*': {m: {1: 1}}", "expected a mapping with text keys"),
    ("'*': {m: {min: 0.9, max: 0.1}}", "min 0.9 and max 0.1: no value satisfies both"),
    ("'*': {m: {min: [0.1, 0.9], max: 0.5}}", "no value satisfies both"),
    ("'*': {m: {min_ratio: 2, max_ratio: 1}}", "no value satisfies both"),
    ("'*': {m: {min_ratio_of_base: 2, max_ratio_of_base: 1}}", "no value satisfies both"),
    ("'*': {m: {min_ratio: -1}}", "min_ratio is -1, expected a number above 0"),
    ("'*': {m: {min_ratio_of_base: 0}}", "expected a number above 0"),
    ("'*': {m: {max_ratio: 0}}", "expected a number above 0"),
    ("'*': {m: {max_drop: -0.1}}", "max_drop is -0.1, expected a number of at least 0"),
    ("'*': {m: {max_loss: -1}}", "expected a number of at least 0"),
    ("'*': {m: {max_loss: 0se}}", "expected standard errors above 0"),
    ("'*': {m: {max_loss: 3sd}}", "the limit is '3sd'"),
    ("'*': {m: {max_loss: p0}}", "the level is 0"),
    ("'*': {m: {max_loss: p1}}", "the level is 1"),
    ("'*': {m: {max_loss: nan}}", "the limit is 'nan'"),
    ("'*': {m: {no_drop_p: 0}}", "expected a level of significance"),
    ("'*': {m: {no_drop_p: 1}}", "expected a level of significance"),
    ("'*': {m: {no_drop_p: 2}}", "expected a level of significance"),
    ("'*': {m: {no_drop_p: .nan}}", "no_drop_p is nan"),
    ("'*': {m: {max_drop: {of: base}}}", "expected the keys value and of"),
    ("'*': {m: {max_drop: {value: 1, off: base}}}", "expected the keys value and of"),
    ("'*': {m: {max_drop: {value: 1, of: [base]}}}", "expected base, single"),
    ("'*': {m: {max_drop: {value: 1, of: 'awq['}}}", "expected base, single"),
    ("'*': {m: {min: 1}, m: {min: 2}}", "'m' is defined twice"),
    ("- a", "expected a mapping"),
    ("'*': {m: [1]}", "expected a mapping"),
    ("'*': {m: {min: 1}", "while parsing"),
    ("mmit: {m: {min: 1}}", "no method matches 'mmit'. Did you mean memit"),
    ("rtnn*: {m: {min: 1}}", "no method matches 'rtnn"),
    ("'*memitt*': {m: {min: 1}}", "no method matches"),
    ("'memit+aqw*': {m: {min: 1}}", "no method matches 'aqw"),
    ("'awq[bits=3': {m: {min: 1}}", "not a composition"),
    ("'a*q[bits=3': {m: {min: 1}}", "a bracket is not closed"),
    ("'?wq]': {m: {min: 1}}", "unexpected bracket"),
    ("'awq[[*': {m: {min: 1}}", "unexpected bracket"),
    ("'awq+': {m: {min: 1}}", "not a composition"),
]


@pytest.mark.parametrize(("text", "message"), THRESHOLDS)
def test_thresholds_that_judge_nothing_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "thresholds.yaml"
    path.write_text(text)
    with pytest.raises(ThresholdError, match=message) as error:
        check_compositions(read_rules(path), path, methods())
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "'*': {m: {min: 1e-6, max: 1E3}}",
        "'*': {m: {min: -1, max: [.5, 1.]}}",
        "'*': {m: {min: 0.5, max: 0.5}}",
        "'*': {m: {max_loss: [0, 5%, 3se, p0.05]}}",
        "'*': {'*': {min: 0}}\n'*awq': {'re*': {}}",
        "'memit*': {m: {min: 1}}\n'*+awq': {m: {}}",
        "base: {m: {min: 1}}",
        "'ba*': {m: {min: 1}}",
        "'m*q': {m: {min: 1}}",
        "'awq[bits=?]': {m: {min: 1}}",
        "'awq[*': {m: {min: 1}}",
        "'*]': {m: {min: 1}}",
        "'*+*': {m: {min: 1}}",
        "'?wq[bits=3]+m????': {m: {min: 1}}",
        "'awq[bits=3,group_size=64]+memit': {m: {min: 1}}",
    ],
)
def test_thresholds_that_may_hold_are_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "thresholds.yaml"
    path.write_text(text)
    check_compositions(read_rules(path), path, methods())


@pytest.mark.parametrize("path", sorted((CONF / "thresholds").iterdir()), ids=lambda path: path.name)
def test_the_suites_own_thresholds_may_hold(path: Path) -> None:
    check_compositions(read_rules(path), path, methods())


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a*", "*b", True),
        ("a*", "b*", False),
        ("", "*", True),
        ("", "?", False),
        ("a?c", "ab*", True),
        ("a?c", "abb*", False),
        ("*a*", "b", False),
        ("***", "", True),
    ],
)
def test_globs_that_overlap(one: str, other: str, expected: bool) -> None:
    assert overlap(one, other) is expected and overlap(other, one) is expected


@pytest.mark.parametrize("text", ["recall:0se", "recall:p0", "recall:p1", "recall:nan", "recall:", ":5%", "recall:-5%"])
def test_expressions_that_judge_nothing_are_refused(text: str) -> None:
    with pytest.raises(ThresholdError, match=re.escape(text)):
        read_expression(text)


def test_expressions_of_no_method_are_refused() -> None:
    assert "Did you mean rtn" in str(impossible("rtnn*", methods()))
    with pytest.raises(ThresholdError, match=r"--lmcompose-compare-fail='rtnn\*::recall:1%': no method matches 'rtnn"):
        check_compositions([read_expression("rtnn*::recall:1%")], Path("x"), methods())


STORED = Baseline(Path("0001_v1.json"), typed(report({name: {"m": [1.0]} for name in ("base", "awq", "memit")})))


@pytest.mark.parametrize(
    ("text", "tested", "problem"),
    [
        ("m:1%", ["awq", "memit"], None),
        ("awq::m:1%", ["awq"], None),
        ("*+rtn::m:1%", ["awq"], None),
        ("m:1%", ["awq"], "the baseline 0001_v1 has memit, which no test covers"),
        ("mem*::m:1%", ["awq"], "the baseline 0001_v1 has memit, which no test covers"),
    ],
)
def test_a_composition_of_the_stored_run_that_is_dropped(text: str, tested: list[str], problem: str | None) -> None:
    found = list(dropped([read_expression(text)], tested, STORED))
    assert len(found) == (problem is not None) and (problem or "") in "".join(found)


@pytest.mark.parametrize(("text", "judged"), [("mem*::m:1%", ["awq"]), ("m:1%", []), ("rtn*::m:1%", ["awq", "memit"])])
def test_an_expression_that_matches_no_composition(text: str, judged: list[str]) -> None:
    (found,) = unmatched([read_expression(text)], judged)
    assert f"{text!r}: matches no composition that a test judges" in found
    assert not list(unmatched([read_expression("awq::m:1%")], ["awq"]))


def test_an_expression_without_a_gate_is_idle() -> None:
    records = [typed_record(composition("awq", {}, gates=[gate("recall")])), typed_record(composition("memit", {}))]
    rules = [read_expression(text) for text in ("re*:1", "mem*::re*:1", "recal:1", "awq::recall:1%")]
    assert idle(rules, records) == ["mem*::re*:1", "recal:1"]


def test_a_run_whose_comparison_leaves_something_out_fails(project: Project) -> None:
    fail = "--lmcompose-compare-fail=perplexity:50%"
    assert project.run("--lmcompose-save=v1", compose=("nudge", "round")).ret == pytest.ExitCode.OK
    result = project.run(fail, compose=("round",))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1)
    said = "--lmcompose-compare-fail='perplexity:50%': the baseline 0001_v1 has nudge, which no test covers"
    assert f"failed: {said}" in result.stdout.str()
    assert project.run(fail.replace("=", "=round::"), compose=("round",)).ret == pytest.ExitCode.OK
    assert project.run(fail, "--lmcompose-update-baseline", compose=("round",)).ret == pytest.ExitCode.OK
    assert project.run(fail, compose=("round",)).ret == pytest.ExitCode.OK


def test_a_test_that_asks_for_no_gates_judges_nothing(project: Project) -> None:
    assert project.run("--lmcompose-save=v1", compose=("nudge",)).ret == pytest.ExitCode.OK
    project.pytester.makepyfile(test_inner="def test_it(composition, measurements): ...")
    result = project.run("--lmcompose-compare-fail=perplexity:50%", compose=("nudge",))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "matches no composition that a test judges" in result.stdout.str() + result.stderr.str()


@pytest.mark.parametrize(
    ("right", "gates", "level", "judged"),
    [(3, 1, 0.05, False), (5, 1, 0.05, True), (5, 2, 0.05, False), (6, 2, 0.05, True), (0, 1, 0.05, True)],
)
def test_a_paired_gate_that_could_never_fail_does(
    tmp_path: Path, right: int, gates: int, level: float, judged: bool
) -> None:
    """With three right answers to lose, the exact test reaches p = 1/8 at best."""
    (tmp_path / "t.yaml").write_text(f"'*': {{m: {{no_drop_p: {level}}}}}")
    rules = read_rules(tmp_path / "t.yaml")
    same = Measurement.mean("m", [1.0] * right + [0.0] * 20)
    known = {"base": Reference("the base model", [same], [[same]])}
    (verdict,) = judge(rules, "awq", [same], known, gates=gates)
    (final,) = settle({"awq": [verdict] * gates})["awq"][:1]
    assert final.passed is judged
    assert ("can never fail" in final.message) is not judged


def mutate(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return what sets one value deep in a document, whose place is named as in `compositions.0.id`; ... removes it."""

    def change(found: dict[str, Any]) -> None:
        inner: Any = found
        *above, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in above:
            inner = inner[key]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value

    return change


GATE = "compositions.1.gates.0"
MEASURED = "compositions.1.measurements.0"
DAMAGED: list[tuple[str, Any, str]] = [
    ("schema_version", "1", "report schema '1'"),
    ("schema_version", True, "report schema True"),
    ("schema_version", 2, "install the pytest-lmcompose that wrote it"),
    ("schema_version", [1], r"report schema \[1\]"),
    ("schema_minor", "3", ""),
    ("status", 5, ""),
    ("status", "done", ""),
    ("finished", 12, ""),
    ("finished", "yesterday", "'yesterday' is not a time"),
    ("started", ..., "missing required field `started`"),
    ("seed", "0", ""),
    ("seed", -1, ""),
    ("seed", True, ""),
    ("seed", 10**400, ""),
    ("repeats", 0, ""),
    ("environment", [], ""),
    ("environment.packages", None, ""),
    ("environment.packages.torch", 2, r"at `\$.environment.packages\[...\]`"),
    ("environment.python", 3.11, ""),
    ("model", "tiny", ""),
    ("model.weight_hash", 5, ""),
    ("model.weight_hash", "x", ""),
    ("model.id", None, ""),
    ("recipe", "main", ""),
    ("recipe.evaluate", [], ""),
    ("compositions", {}, ""),
    ("compositions.1", "memit", ""),
    ("compositions.1.id", 5, ""),
    ("compositions.1.id", "base", "two results of the composition 'base'"),
    ("compositions.1.requested", "memit", ""),
    ("compositions.1.requested", ["memit["], r"'memit\[' is not a composition"),
    ("compositions.1.status", None, ""),
    ("compositions.1.error", 1, ""),
    ("compositions.1.steps", None, ""),
    ("compositions.1.evaluate_seconds", "1 s", ""),
    ("compositions.1.data", [], ""),
    (MEASURED, [], ""),
    (f"{MEASURED}.metric", ..., "missing required field `metric`"),
    (f"{MEASURED}.value", "0.9", ""),
    (f"{MEASURED}.value", True, ""),
    (f"{MEASURED}.n", 0, ""),
    (f"{MEASURED}.n", 2.5, ""),
    (f"{MEASURED}.samples", "1111", ""),
    (f"{MEASURED}.samples.0", "x", ""),
    (f"{MEASURED}.samples.0", [1], ""),
    (f"{MEASURED}.weights", [1.0], r"1 weights for \d+ samples"),
    (f"{MEASURED}.clusters", [0], r"1 clusters for \d+ samples"),
    (f"{MEASURED}.note", None, ""),
    (f"{MEASURED}.higher_is_better", 1, ""),
    (GATE, None, ""),
    (f"{GATE}.passed", "yes", ""),
    (f"{GATE}.gate", 1, ""),
    (f"{GATE}.message", ["a"], ""),
    (f"{GATE}.threshold", "0.9", ""),
    ("composability", [], ""),
    ("composability", {}, "missing required field `confidence` - at `\\$.composability`"),
    ("prompts", {"a": 1}, ""),
    ("prompts", [{"seed": 0, "metrics": ["m"], "texts": [1]}], r"at `\$.prompts\[0\].texts\[0\]`"),
    ("shard", "1/2", ""),
    ("shard", {"index": 3, "count": 2}, "shard 3 of 2"),
    ("plan", [], ""),
    ("merged", {}, ""),
    ("stored", True, ""),
    ("comparison", "v1", ""),
    ("drift", [1], ""),
    ("unused_rules", "none", ""),
    ("model.id", "\ud800", "JSON is malformed"),
]


@pytest.fixture(scope="module")
def rich() -> dict[str, Any]:
    found = json.loads(json.dumps(rich_document()))
    gate = {"metric": "m", "gate": "min", "threshold": 0.5, "passed": True, "message": "", "value": 1.0}
    found["compositions"][1]["gates"] = [gate | {"base_value": None}]
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(("place", "value", "message"), DAMAGED)
def test_a_damaged_report_is_refused_in_one_line(
    tmp_path: Path, rich: Mapping[str, Any], place: str, value: Any, message: str
) -> None:
    found = copy.deepcopy(dict(rich))
    mutate(place, value)(found)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(found))
    where = re.sub(r"\.(\d+)", r"[\1]", place)
    with pytest.raises(StorageError, match=message or re.escape(f"at `$.{where}`")) as error:
        read_run(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


BROKEN = {
    "empty": b"",
    "cut": b'{"schema_version": 1, "compositions": [',
    "binary": bytes(range(256)),
    "number": b"5",
    "text": b'"report"',
    "list": b"[]",
    "nothing": b"null",
    "nan": b'{"schema_version": NaN}',
    "deep": b"[" * 100_000,
    "huge": b'{"schema_version": ' + b"9" * 5000 + b"}",
    "utf-16": '{"schema_version": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_command_shows_a_traceback_of_a_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rich: Mapping[str, Any], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_bytes(BROKEN[name])
    Path("good.json").write_text(json.dumps(rich))
    for words in (
        ["show", "bad.json"],
        ["compare", "good.json", "bad.json"],
        ["report", "bad.json", "--markdown=-"],
        ["report", "good.json", "--baseline=bad.json", "--html=-"],
        ["merge", "good.json", "bad.json", "-o", "out.json"],
    ):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (words, result.exception)
        assert result.output.startswith("Error: bad.json ") and result.output.count("\n") == 1, result.output


def test_a_report_of_a_later_minor_version_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rich: Mapping[str, Any]
) -> None:
    """It may have properties, gates and methods that are not known here."""
    monkeypatch.chdir(tmp_path)
    found = copy.deepcopy(dict(rich))
    found |= {"schema_minor": 99, "novel": {"a": 1}}
    record = found["compositions"][1]
    record["gates"][0] |= {"gate": "median", "novel": 1}
    record |= {"requested": ["notaknownmethod[x=1]"], "id": "notaknownmethod[x=1]"}
    Path("later.json").write_text(json.dumps(found))
    for words in (
        ["show", "later.json", "--group=category"],
        ["report", "later.json", "--latex=x.tex", "--markdown=x.md"],
        ["compare", "later.json", "later.json"],
    ):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, (result.output, result.exception)


HOSTILE = "a_b|c`d\\e&f%g$h#i{j}k~l^m<script>n\x1b[31mo\u202ep\nq\x00r"


def hostile(value: Any, key: str = "") -> Any:
    """Return a document with a hostile end to every text that is shown."""
    if isinstance(value, dict):
        return {name: hostile(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [hostile(item, key) for item in value]
    fixed = ("id", "requested", "executed", "step", "prefix", "composition", "steps", "metric", "metrics")
    return value + HOSTILE if isinstance(value, str) and key not in (*fixed, "status", "verdict", "best") else value


@pytest.fixture(scope="module")
def nasty(rich: Mapping[str, Any]) -> dict[str, Any]:
    found = hostile(dict(rich))
    found["compositions"][1]["error"] = HOSTILE
    for record, old in zip(found["compositions"], rich["compositions"], strict=True):
        record["state_hash"] = old["state_hash"]
        for measured, before in zip(record["measurements"], old["measurements"], strict=True):
            measured |= {"nonfinite": before["nonfinite"]} if "nonfinite" in before else {}
    found["model"]["weight_hash"] = rich["model"]["weight_hash"]
    found["compositions"][1]["status"] = "failed"
    return found  # type: ignore[no-any-return]


def check_plain(text: str) -> None:
    assert not [char for char in text if ord(char) < 32 and char not in "\n\t"], "control characters"
    assert "\u202e" not in text


def test_markdown_escapes_every_field(nasty: dict[str, Any]) -> None:
    text = markdown.render(typed(nasty), typed(nasty))
    check_plain(text)
    assert "<script>n" not in re.sub("`[^`]*`", "", text)
    assert r"a\_b\|c\`d" in text and text.splitlines()[2].endswith(".")


def test_latex_escapes_every_field(nasty: dict[str, Any]) -> None:
    text = latex.render(typed(nasty))
    check_plain(text)
    second = text.splitlines()[1]
    assert second.startswith("% Run of ") and second.count(r"a\_b\textbar{}c") == 1 and second.endswith("finished.")
    for line in text.splitlines()[2:]:
        assert not re.search(r"(?<!\\)[#$%_~^]", line.replace(r"$\rightarrow$", "")), line
    nothing = latex.render(typed({**nasty, "composability": None}))
    assert all(line.startswith("%") for line in nothing.splitlines())


def test_a_cell_of_latex_that_starts_with_a_bracket_is_no_option_of_the_line_before() -> None:
    assert (
        latex._text("[2cm]") == "{}[2cm]" and latex._text("*") == "{}*" and latex._text("awq[bits=3]") == "awq[bits=3]"
    )


def test_html_escapes_every_field(nasty: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "drawing", lambda plot: "")  # which takes seconds
    text = html.render(typed(nasty), typed(nasty))
    assert "<script>n" not in text and "\u202e" not in text and "\x1b" not in text and "\x00" not in text
    assert r"\x1b[31mo\u202ep" in text


def test_the_terminal_escapes_every_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nasty: dict[str, Any], rich: Mapping[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = {**copy.deepcopy(nasty), "status": "finished", "seed": 0}
    for key in ("started", "finished", "schema_version"):
        found[key] = rich[key]
    found["model"] = {**rich["model"], "id": HOSTILE}
    for record, kept in zip(found["compositions"], rich["compositions"], strict=True):
        record["measurements"] = copy.deepcopy(kept["measurements"])
        record["state_hash"] = kept["state_hash"]
        for step, old in zip(record["steps"], kept["steps"], strict=True):
            step["category"] = old["category"]
        for judged, old in zip(record["gates"], kept["gates"], strict=True):
            judged |= {key: old[key] for key in ("gate", "paired") if key in old}
    for key in ("comparison", "drift", "prompts", "composability", "stored"):
        if key in rich:
            found[key] = rich[key]
    Path("x.json").write_text(json.dumps(found))
    for words in (["show", "x.json", "--all"], ["compare", "x.json", "x.json", "--all"]):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, (result.output, result.exception)
        check_plain(result.output)
    assert "a_b|c`d" in CliRunner().invoke(main, ["show", "x.json"]).output


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢 ✅", "plain é 漢 ✅"),
        ("a\nb\r\tc", "a b  c"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\u202e\u2066\u200b\ufeff", r"\u202e\u2066\u200b\ufeff"),
        ("a\xa0b", "a\xa0b"),
        ("\x00\x7f\x9b", r"\x00\x7f\x9b"),
        ("a\u2028b", "a b"),
    ],
)
def test_text_moves_nothing_and_hides_nothing(text: str, shown: str) -> None:
    assert visible(text) == shown
