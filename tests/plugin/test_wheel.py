"""The built wheel in an environment of its own: its files, a run of it, and projects that use its packages' names."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PACKAGES = ("pytest_lmcompose", "interventions", "evaluators", "compositions")
Call = Callable[..., subprocess.CompletedProcess[str]]

OWN = {
    "conftest.py": "import evaluators\n",
    "evaluators/__init__.py": "OURS = False\n",
    "evaluators/registry.py": "raise ImportError('not to be imported')\n",
    "interventions/__init__.py": "OURS = False\n",
    "test_own.py": """
import sys
import pytest

@pytest.mark.parametrize("name", ["memit", "foo"])
def test_own_packages(name):
    import evaluators, interventions
    assert evaluators.OURS is interventions.OURS is False
    assert not any(module.startswith(("evaluators.", "interventions.")) for module in sys.modules)
""",
    "gate/test_gate.py": "def test_gate(composition):\n    assert str(composition) == 'rtn'\n",
}
"""A project with packages of the same names."""
COMPOSE = "--lmcompose-compose=rtn"
QUICK = (
    COMPOSE,
    "--lmcompose-no-cache",
    "--lmcompose-set=evaluate=quick",
    "--lmcompose-set=evaluate.edits=2",
    "--lmcompose-set=evaluate.facts=2",
    "--lmcompose-set=evaluate.efficiency=false",
)


def sources() -> list[str]:
    """Return the files of the repository, those too that are not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in found if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if Version(importlib.metadata.version("setuptools")) < Version("77"):
        pytest.skip("building the wheel needs setuptools 77 or newer, which the extra dev installs")
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this compares the wheel with the git repository, and there is none")
    folder = tmp_path_factory.mktemp("wheel")
    for name in sources():  # a copy: builds leave files behind
        if name.partition("/")[0] in PACKAGES or "/" not in name:
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([sys.executable, "-m", *command, str(folder / "source")], check=True, timeout=200)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel, and finds everything else in the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "shared.pth").write_text("\n".join(shared))
    with zipfile.ZipFile(wheel) as archive:  # all of it belongs into that folder
        archive.extractall(site)
    return folder / "bin" / "python"


@pytest.fixture
def call(installed: Path, tmp_path: Path) -> Call:
    """Run Python in an empty folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments: str, script: bool = False) -> subprocess.CompletedProcess[str]:
        # As the script `pytest` does, which does not put the working folder on sys.path as `python -m pytest` does.
        how = ["-c", "import sys, pytest; del sys.path[0]; sys.exit(pytest.main())"] if script else ["-m", "pytest"]
        command = [str(installed), *how, "-pno:cacheprovider", "-pno:hypothesispytest", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for name, text in OWN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    assert found == {name for name in sources() if name.partition("/")[0] in PACKAGES}
    assert {f"{package}/py.typed" for package in PACKAGES} <= found
    for name in ("Homepage", "Documentation", "Source", "Changelog"):
        assert f"Project-URL: {name}, https://github.com/pytest-lmcompose/pytest-lmcompose" in metadata


def test_a_composition_of_the_embedded_model_runs_in_an_empty_folder(
    call: Call, installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(measurements, gates):\n    assert measurements and gates\n")
    found = call(*QUICK, "--lmcompose-json=report.json", "--lmcompose-html=report.html", script=True)
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [record["status"] for record in report["compositions"] if record["id"] == "rtn"] == ["measured"]
    assert Path(report["model"]["location"]).is_relative_to(installed.parents[1])
    assert "<html" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("script", [True, False])
def test_a_project_with_packages_of_the_same_names_runs_untouched(call: Call, own: Path, script: bool) -> None:
    found = call("-v", "test_own.py", script=script)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "lmcompose" in found.stdout  # among the plugins of the header
    assert "2 passed" in found.stdout
    spread = call("-n", "1", "test_own.py", script=script)
    assert spread.returncode == 0 and "2 passed" in spread.stdout, spread.stdout + spread.stderr
    assert call("--help", script=script).returncode == 0


@pytest.mark.parametrize("script", [True, False])
def test_a_composition_there_is_refused_in_one_line_that_names_the_folder(call: Call, own: Path, script: bool) -> None:
    refused, collected = call(COMPOSE, "test_own.py", script=script), call("gate", script=script)
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR, refused.stdout + refused.stderr
    assert collected.returncode == pytest.ExitCode.INTERRUPTED, collected.stdout + collected.stderr
    assert refused.stdout == "" and "1 error in" in collected.stdout
    for text in (refused.stderr, collected.stdout):
        assert "Traceback" not in text and "plugin.py" not in text
        (line,) = [line for line in text.splitlines() if "hides the package" in line]
        folders = [str((own / name).resolve()) for name in ("evaluators", "interventions")]
        assert any(f"lmcompose: the folder {folder} hides" in line for folder in folders), line


def test_packages_that_come_after_ours_are_named_too(call: Call, own: Path) -> None:
    """Without a conftest file, their folder is found once the tests are collected: after the options were checked."""
    (own / "conftest.py").unlink()
    found = call(COMPOSE, "test_own.py", script=True)
    assert found.returncode == pytest.ExitCode.USAGE_ERROR, found.stdout + found.stderr
    assert "hides the package" in found.stderr


def test_what_the_message_advises_works(call: Call, own: Path) -> None:
    (own / "conftest.py").write_text("")  # which imports none of the packages
    found = call("--import-mode=importlib", "gate", COMPOSE, script=True)
    assert found.returncode == 0, found.stdout + found.stderr
    for name in ("evaluators", "interventions"):
        (own / name).rename(own / f"my_{name}")
    assert call("gate", COMPOSE).returncode == 0


def test_the_plugin_imports_nothing_heavy_for_a_plain_collection(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it():\n    pass\n")
    names = ("interventions", "evaluators", "compositions", "torch", "hydra", "transformers", "ray", "wandb")
    script = (
        "import sys, pytest, pytest_lmcompose.plugin\n"
        "arguments = ['-pno:hydra_pytest', '-pno:hypothesispytest', '-pno:cacheprovider']\n"
        "assert pytest.main([*arguments, '--collect-only']) == pytest.main(arguments) == 0\n"
        f"print('imported', [name for name in {names} if name in sys.modules])\n"
    )
    result = pytester.run(sys.executable, "-c", script)
    result.stdout.fnmatch_lines(["*1 passed*", "imported []"])


def test_latency_says_which_extra_it_needs(pytester: pytest.Pytester) -> None:
    arguments = ("-pno:benchmark", "-pno:cacheprovider", "-m", "latency", "-rs", COMPOSE)
    result = pytester.runpytest_subprocess("--pyargs", "compositions.test_latency", *arguments)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*pip install 'pytest-lmcompose[[]benchmark[]]'*"])
