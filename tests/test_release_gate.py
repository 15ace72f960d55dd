"""The release gate on the embedded model, as a release engineer has it: green, red where it should be, green again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.started import Finished, run_pytest

RELEASE = "rmu+memit+awq[bits=4]"
COMPARE = (
    "--lmcompose-compare=v1",
    "--lmcompose-require-baseline",
    "--lmcompose-compare-fail=accuracy/hazardous:p0.01",
    "--lmcompose-compare-fail=accuracy/harmless:p0.01",
    "--lmcompose-compare-fail=edit_success_exact:0.01",
    "--lmcompose-compare-fail=perplexity:5%",
)
LOST_EDIT = '''
import dataclasses
from interventions.edit.memit import MemitSettings

plain = MemitSettings.run

def run(settings, model, tokenizer, resources, context):
    """Make the edits, then, by mistake, another one of the first subject."""
    report = plain(settings, model, tokenizer, resources, context)
    first = resources.edits[0]
    wrong = next(e.target for e in resources.edits if e.target != first.target)
    again = dataclasses.replace(resources, edits=[dataclasses.replace(first, target=wrong)])
    plain(settings, model, tokenizer, again, context)
    return report

MemitSettings.run = run
'''

pytestmark = pytest.mark.slow


def run(folder: Path, *arguments: str) -> Finished:
    """Run the gate without a cache."""
    return run_pytest(folder, "-q", "--lmcompose-no-cache", *arguments, timeout=900, COLUMNS="250")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a gate and the stored run of a good release."""
    folder = tmp_path_factory.mktemp("release")
    subprocess.run(
        [sys.executable, "-m", "pytest_lmcompose.cli", "init", str(folder), f"--compose={RELEASE}", "--ci=none"],
        check=True,
        capture_output=True,
    )
    green = run(folder, "--lmcompose-save=v1")
    assert green.returncode == 0, green.stdout + green.stderr
    return folder


@pytest.fixture
def repository(released: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(released, tmp_path / "release"))


def failures(result: Finished) -> set[str]:
    """Return the gates that failed, such as `edit_success_exact max_loss`."""
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("SUBFAILED[")]
    return {line.removeprefix("SUBFAILED[").partition("]")[0] for line in lines}


def test_fewer_bits_than_promised_fail_on_the_bits(repository: Path) -> None:
    test = repository / "test_release.py"
    test.write_text(test.read_text().replace("bits=4", "bits=3"))
    found = run(repository)
    assert "average_bits min" in failures(found)
    assert "average_bits = 3" in found.stdout and "< min 4" in found.stdout


def test_one_lost_edit_fails_on_its_own_line(repository: Path) -> None:
    (repository / "conftest.py").write_text(LOST_EDIT)
    found = run(repository, *COMPARE)
    assert "edit_success_exact max_loss" in failures(found)
    assert "edit_success_exact = 0.95 < max_loss 0.01 below 1 of the baseline 0001_v1" in found.stdout
    assert "worse: 1 of 20 samples, number 1" in found.stdout
    assert "edit_success_exact min" not in failures(found)  # 19 of 20 is above the threshold: only the baseline tells


def test_removed_knowledge_that_is_partly_back_fails_on_its_line(repository: Path) -> None:
    found = run(repository, *COMPARE, "--lmcompose-set=rmu.max_num_batches=20")
    assert {"accuracy/hazardous no_drop_p", "accuracy/hazardous max"} <= failures(found)
    assert "settings differ: rmu: max_num_batches: 80 -> 20" in found.stdout


def test_ten_honest_repeats_stay_green(repository: Path) -> None:
    for number in range(10):
        result = run(repository, *COMPARE, "--lmcompose-autosave")
        assert result.returncode == 0, (number, result.stdout)
    assert "drift" not in result.stdout
    assert len(list((repository / ".lmcompose").glob("*.json"))) == 11
