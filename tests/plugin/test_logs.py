"""`lmcompose gate OLD NEW`: evaluation logs of other tools, in the forms that these write."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from pyarrow import parquet

from pytest_lmcompose.cli import main
from pytest_lmcompose.logs.log import LogError
from pytest_lmcompose.logs.read import read_log
from pytest_lmcompose.results import encode
from tests.plugin import documents

RIGHT = [float(i % 10 != 0) for i in range(300)]
WORSE = [float(i % 10 > 1) for i in range(300)]
"""30 more wrong answers."""


def lm_eval(
    folder: Path, samples: Sequence[float], *, first: int = 0, filter: str = "none", model: str = "some__model"
) -> Path:
    folder = folder / model
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"doc_id": first + i, "doc": {"q": "?"}, "target": "0", "resps": [[["-1.0", "False"]]], "filter": filter}
        | {
            "metrics": ["acc", "nll"],
            "doc_hash": hashlib.sha256(str(first + i).encode()).hexdigest(),
            "acc": value,
            "nll": 2 - value,
        }
        for i, value in enumerate(samples)
    ]
    text = "\n".join(map(json.dumps, rows)) + "\n"
    (folder / "samples_toy_task_2026-01-01T00-00-00.000000.jsonl").write_text(text)
    better = {"higher_is_better": {"toy_task": {"acc": True, "nll": False}}, "results": {}}
    (folder / "results_2026-01-01T00-00-00.000000.json").write_text(json.dumps(better))
    return folder.parent


def inspect(file: Path, samples: Sequence[float], *, epochs: int = 1, **more: Any) -> Path:
    header = {"version": 2, "status": "success", "eval": {"task": "toy", "model": "m"}} | more
    rows = [
        {
            "id": f"q{i}",
            "epoch": epoch,
            "input": [{"id": f"{file.name}-{i}", "content": f"Is {i} even?", "role": "user"}],
            "scores": {"match": {"value": "C" if value else "I"}, "both": {"value": {"a": value}}},
        }
        for i, value in enumerate(samples)
        for epoch in range(1, epochs + 1)
    ]
    if file.suffix == ".json":
        file.write_text(json.dumps(header | {"samples": rows}))
    else:
        members = {"header.json": header, "summaries.json": rows}
        write_zstandard(file, {name: json.dumps(value).encode() for name, value in members.items()})
    return file


def write_zstandard(file: Path, members: dict[str, bytes]) -> None:
    """Write an archive as Inspect does: compressed by Zstandard, method 93, which `zipfile` cannot write."""
    body, directory = b"", b""
    for name, data in members.items():
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        packed = sink.getvalue().to_pybytes()
        common = struct.pack("<HHHHHIIIHH", 45, 0, 93, 0, 33, zlib.crc32(data), len(packed), len(data), len(name), 0)
        start = len(body)
        body += b"PK\3\4" + common + name.encode() + packed
        directory += (
            b"PK\1\2" + struct.pack("<H", 45) + common + struct.pack("<HHHII", 0, 0, 0, 0, start) + name.encode()
        )
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    file.write_bytes(body + directory + b"PK\5\6" + end)


def lighteval(folder: Path, samples: Sequence[float], *, model: str = "some/model") -> Path:
    """Write details as LightEval does: metrics over the whole corpus are structs, and rows are in random order."""
    date = "2026-01-01T00-00-00.000000"
    (folder / "details" / model / date).mkdir(parents=True)
    rows = [
        {
            "doc": {
                "query": f"Is {i} even?",
                "choices": [" yes", " no"],
                "gold_index": 1,
                "images": None,
                "id": str(i),
            },
            "metric": {"em": int(v), "rouge1": v, "bleu": {"golds": [" no"], "preds": [" yes"]}},
            "model_response": {"text": []},
        }
        for i, v in enumerate(samples)
    ]
    random.Random(0).shuffle(rows)
    file = folder / "details" / model / date / f"details_toy|0_{date}.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return folder


def gate(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(main, ["gate", *map(str, arguments)])


def both(tool: str, folder: Path) -> tuple[Path, Path]:
    if tool == "lm_eval":
        return lm_eval(folder / "old", RIGHT), lm_eval(folder / "new", WORSE)
    if tool == "lighteval":
        return lighteval(folder / "old", RIGHT), lighteval(folder / "new", WORSE)
    return inspect(folder / f"old.{tool}", RIGHT), inspect(folder / f"new.{tool}", WORSE)


@pytest.mark.parametrize(
    ("tool", "metrics"),
    [
        ("lm_eval", {"toy_task/acc": True, "toy_task/nll": False}),
        ("eval", {"toy/match": True, "toy/both/a": True}),
        ("json", {"toy/match": True, "toy/both/a": True}),
        ("lighteval", {"toy|0/em": True, "toy|0/rouge1": True}),
    ],
)
def test_a_later_log_is_judged_by_an_earlier_one(tmp_path: Path, tool: str, metrics: dict[str, bool]) -> None:
    old, new = both(tool, tmp_path)
    assert {name: m.higher_is_better for name, m in read_log(old).metrics.items()} == metrics
    found = gate(old, new)
    assert found.exit_code == 1, found.output
    for name in metrics:
        assert f"  {name} = " in found.output
    assert "p = 9.31e-10" in found.output and "(exact McNemar, n = 300" in found.output  # 2^-30
    assert f"{new}: {len(metrics)} of {len(metrics)} gate" in found.output
    assert gate(new, old).exit_code == 0
    first = next(iter(metrics))
    assert gate(old, new, "--fail", f"{first}:0.2").exit_code == 0
    evidence = gate(old, old, "--fail", f"{first}:n0.01")
    assert (evidence.exit_code, "of 1 gate failed" in evidence.output) == (0, True)
    assert "needs about" in gate(old, old, "--fail", f"{first}:n0.001").output


def test_samples_are_paired_by_id_in_any_order_and_epochs_are_averaged(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    inspect(old, RIGHT, epochs=2)
    document = json.loads(inspect(new, RIGHT, epochs=3).read_text())
    random.Random(0).shuffle(document["samples"])
    new.write_text(json.dumps(document))
    assert gate(old, new, "--all").output.count("+0") == 2


def test_samples_that_only_one_log_has_are_refused_or_left_out(tmp_path: Path) -> None:
    old, new = lm_eval(tmp_path / "old", RIGHT), lm_eval(tmp_path / "new", RIGHT[:200])
    found = gate(old, new)
    assert found.exit_code == 2
    assert (
        f"100 samples are only in {old}, 0 only in {new}, 200 in both; to judge by those in both, add" in found.output
    )
    common = gate(old, new, "--common")
    assert common.exit_code == 0 and "left out: 200 samples" in common.output
    other = lm_eval(tmp_path / "other", RIGHT, first=1000)
    assert "0 in both" in gate(old, other, "--common").output


def test_filters_of_one_task_are_metrics_of_their_own(tmp_path: Path) -> None:
    log = read_log(lm_eval(tmp_path / "x", RIGHT, filter="strict-match"))
    assert set(log.metrics) == {"toy_task/acc,strict-match", "toy_task/nll,strict-match"}


def test_reports_are_judged_composition_by_composition(tmp_path: Path) -> None:
    for name, samples in (("old", RIGHT), ("new", WORSE)):
        report = documents.typed(documents.report({"base": {"recall": RIGHT}, "memit": {"recall": samples}}))
        (tmp_path / f"{name}.json").write_text(encode(report))
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    found = gate(old, new, "--fail", "recall:p0.01")
    assert found.exit_code == 1 and "failed: memit  recall = 0.8 is worse than 0.9 of" in found.output
    assert "1 of 2 gates failed" in found.output
    assert gate(old, new, "--fail", "base::recall:p0.01").exit_code == 0
    assert "name what fails a report" in gate(old, new).output


def test_the_logs_that_lm_eval_writes_now(tmp_path: Path) -> None:
    """The harness itself, with a model that answers at random."""
    lm_eval_api = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    class Random(LM):  # type: ignore[misc]
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.random = random.Random(seed)

        def loglikelihood(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return [(-self.random.random(), False) for _ in requests]

        loglikelihood_rolling = generate_until = loglikelihood

    rows = "".join(json.dumps({"q": f"Is {i} even?", "c": ["yes", "no"], "a": i % 2}) + "\n" for i in range(30))
    (tmp_path / "toy.jsonl").write_text(rows)
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/toy.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\n"
        "doc_to_target: '{{a}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    values = []
    for seed in (0, 1):
        tracker = EvaluationTracker(output_path=str(tmp_path / f"log{seed}"))
        results = lm_eval_api.simple_evaluate(
            model=Random(seed), tasks=["toy"], task_manager=manager, log_samples=True, bootstrap_iters=0
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        tracker.save_results_samples(task_name="toy", samples=samples["toy"])
        values.append(results["results"]["toy"]["acc,none"])
    found = gate(tmp_path / "log0", tmp_path / "log1", "--all", "--fail", "toy/acc:1")
    assert found.exit_code == 0, found.output
    cells = next(line for line in found.output.splitlines() if "toy/acc " in line).partition("toy/acc ")[2].split()
    assert [float(cell) for cell in cells[:2]] == pytest.approx(values, abs=5e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "no evaluation log: expected a folder of lm-evaluation-harness"),
        (lambda path: path.write_text("{"), "cannot be read as a log of Inspect"),
        (lambda path: inspect(path.with_suffix(".json"), RIGHT).rename(path) and _cut(path), "cannot be read as a log"),
        (lambda path: lm_eval(path, RIGHT) and _broken(path), "line 1: no sample of lm-evaluation-harness"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "log")
    with pytest.raises(LogError, match=message) as error:
        read_log(tmp_path / "log")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _broken(path: Path) -> None:
    (file,) = path.rglob("samples_*")
    file.write_text('{"doc": 1}\n')


def test_unfinished_logs_and_samples_with_errors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="did not finish: its status is started"):
        read_log(inspect(tmp_path / "a.json", RIGHT, status="started"))
    file = inspect(tmp_path / "b.json", RIGHT[:2])
    document = json.loads(file.read_text())
    document["samples"][1] |= {"error": {"message": "no network"}, "scores": {}}
    file.write_text(json.dumps(document))
    with pytest.raises(LogError, match="sample q1 ended in an error"):
        read_log(file)
    with zipfile.ZipFile(tmp_path / "c.eval", "w") as archive:
        archive.writestr("_journal/start.json", "{}")
    with pytest.raises(LogError, match="no finished log of Inspect"):
        read_log(tmp_path / "c.eval")


def test_logs_and_folders_of_models_are_told_apart(tmp_path: Path) -> None:
    old, new = lm_eval(tmp_path / "old", RIGHT), lm_eval(tmp_path / "new", RIGHT)
    assert "--baseline and --as are for a model's folder" in gate(old, new, "--baseline", "x").output
    assert "name a log NEW to judge by FOLDER" in gate(old).output
    assert "matches no metric of both logs: toy_task/acc" in gate(old, new, "--fail", "exact:1").output


def test_prompts_that_differ_are_refused_unless_you_say_so(tmp_path: Path) -> None:
    old, new = (lm_eval(tmp_path / name, RIGHT) for name in ("old", "new"))
    (file,) = new.rglob("samples_*")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[7]["prompt_hash"] = "another"  # as with another number of examples
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = gate(old, new)
    assert found.exit_code == 2
    assert f"1 of 300 samples had another prompt in {new} than in {old}, such as sample 7" in found.output
    assert gate(old, new, "--any-prompt").exit_code == 0
    files = [inspect(tmp_path / f"{name}.json", RIGHT[:20]) for name in ("a", "b")]
    assert gate(*files).exit_code == 0  # the ids of messages are new in every run
    files[1].write_text(files[1].read_text().replace("Is 3 even?", "Is 3 odd?"))
    assert "1 of 20 samples had another prompt" in gate(*files).output


def test_lm_eval_rows_that_do_not_name_their_metrics(tmp_path: Path) -> None:
    """As written before version 0.4.5."""
    old, new = lm_eval(tmp_path / "old", RIGHT), lm_eval(tmp_path / "new", RIGHT)
    (file,) = new.rglob("samples_*")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(
        "".join(json.dumps({k: v for k, v in r.items() if k not in ("metrics", "filter")}) + "\n" for r in rows)
    )
    assert read_log(new).metrics == read_log(old).metrics


def test_rows_of_one_file_may_have_different_metrics(tmp_path: Path) -> None:
    folder = lm_eval(tmp_path / "old", RIGHT[:4])
    (file,) = folder.rglob("samples_*")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2] |= {"metrics": ["acc", "f1"], "f1": 0.25}
    rows[3]["acc"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_log(folder).metrics
    assert {name: metric.samples for name, metric in found.items()} == {
        "toy_task/acc": ["0", "1", "2"],
        "toy_task/f1": ["2"],
        "toy_task/nll": ["0", "1", "2", "3"],
    }
    rows[2] = {"metrics": ["acc"], "acc": 1.0}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LogError, match=r"line 3: no sample of lm-evaluation-harness: .*doc_id"):
        read_log(folder)


def test_details_of_lighteval_before_docs(tmp_path: Path) -> None:
    rows = [{"full_prompt": f"Is {i} even?", "metrics": {"acc": v}} for i, v in enumerate(RIGHT[:5])]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "details_toy|0_2024-01-01T00-00-00.parquet")
    (metric,) = read_log(tmp_path).metrics.values()
    assert (metric.name, metric.prompts[1], metric.values) == ("toy|0/acc", "Is 1 even?", RIGHT[:5])


def test_mixed_logs_are_one_line(tmp_path: Path) -> None:
    lm_eval(tmp_path / "a", RIGHT[:3])
    lm_eval(tmp_path / "a", RIGHT[:3], model="other__model")
    lighteval(tmp_path / "b", RIGHT[:3])
    lighteval(tmp_path / "b", RIGHT[:3], model="other/model")
    (tmp_path / "c").mkdir()
    for model in ("x", "y"):
        inspect(tmp_path / "c" / f"{model}.json", RIGHT[:3], eval={"task": model, "model": model})
    inspect(lighteval(tmp_path / "d", RIGHT[:3]) / "x.eval", RIGHT[:3])
    report = tmp_path / "report.json"
    report.write_text(encode(documents.typed(documents.report({"base": {"recall": RIGHT[:3]}}))))
    cut = inspect(tmp_path / "e.eval", RIGHT)
    cut.write_bytes(cut.read_bytes()[:-30])
    for path, message in {
        "a": "logs in 2 folders, of several models or runs; name one, such as .*/a/other__model",
        "b": "logs in 2 folders, of several models or runs; name one, such as .*/b/details/other/model",
        "c": "logs of 2 models, x, y; name one of the files",
        "d": "logs of several tools; name the file or folder of one",
        "e.eval": "is a truncated archive; copy it again",
        "report.json": "is a report of lmcompose: compare it with another report",
    }.items():
        found = gate(tmp_path / path, tmp_path / path if path != "report.json" else tmp_path / "e.eval")
        assert found.exit_code == 2 and found.output.count("\n") == 1, found.output
        assert re.search(message, found.output), found.output


def test_perplexities_are_read_from_log_likelihoods(tmp_path: Path) -> None:
    """A sample of word_perplexity is its log-likelihood with its words, one of perplexity is a log-likelihood."""
    texts = [(-30.0 - i % 7, 10 + i % 5) for i in range(50)]
    for name, worse in (("old", 0.0), ("new", 0.5)):
        folder = lm_eval(tmp_path / name, RIGHT[:50])
        (file,) = folder.rglob("samples_*")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row, (likelihood, words) in zip(rows, texts, strict=True):
            pair = [likelihood - worse * words, words]
            row |= {"metrics": ["word_perplexity", "bits_per_byte", "perplexity"], "perplexity": pair[0]}
            row |= {"word_perplexity": pair, "bits_per_byte": pair}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        better = {"toy_task": {"word_perplexity": False, "bits_per_byte": False, "perplexity": False}}
        (results,) = folder.rglob("results_*")
        results.write_text(json.dumps({"higher_is_better": better}))
    found = gate(tmp_path / "old", tmp_path / "new", "--all")
    assert found.exit_code == 1 and "3 of 3 gates failed" in found.output
    values = {line.split()[1]: line.split()[2:4] for line in found.output.splitlines() if "toy_task/" in line[:300]}
    per_word = -sum(likelihood for likelihood, _ in texts) / sum(words for _, words in texts)
    assert values["toy_task/word_perplexity!"] == [f"{math.exp(per_word + worse):.3f}" for worse in (0, 0.5)]
    assert values["toy_task/bits_per_byte!"] == [f"{(per_word + worse) / math.log(2):.3f}" for worse in (0, 0.5)]
    assert gate(tmp_path / "new", tmp_path / "old").exit_code == 0


def test_perplexities_of_lighteval(tmp_path: Path) -> None:
    rows = [
        {"doc": {"id": str(i), "query": "?"}, "metric": {"ppl": pair, "word_perplexity": pair}}
        for i in range(4)
        for pair in [{"logprobs": -float(i), "weights": 2}]
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "details_toy|0_2026-01-01T00-00-00.parquet")
    found = read_log(tmp_path).metrics
    assert all(metric.exponential and not metric.higher_is_better for metric in found.values())
    by_text, by_word = found["toy|0/ppl"], found["toy|0/word_perplexity"]
    assert (by_text.values, by_text.weights) == ([0.0, 1.0, 2.0, 3.0], [1.0] * 4)
    assert (by_word.values, by_word.weights) == ([0.0, 0.5, 1.0, 1.5], [2.0] * 4)


def test_nan_fails_the_gate_and_is_no_broken_log(tmp_path: Path) -> None:
    old, new = lm_eval(tmp_path / "old", RIGHT), lm_eval(tmp_path / "new", RIGHT)
    (file,) = new.rglob("samples_*")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[5]["nll"] = math.nan
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = gate(old, new)
    assert found.exit_code == 1 and "toy_task/nll = nan" in found.output and "1 of 2 gates failed" in found.output
    files = [inspect(tmp_path / f"{name}.json", RIGHT[:20]) for name in ("a", "b")]
    document = json.loads(files[1].read_text())
    document["samples"][3]["scores"]["match"]["value"] = math.nan  # what Inspect writes for a sample that has no score
    files[1].write_text(json.dumps(document))
    assert "1 samples are only in" in gate(*files).output
