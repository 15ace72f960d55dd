"""Where reports are written: regular files are replaced, streams written, and nothing else is touched."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pytest_lmcompose.baseline.storage import Storage
from pytest_lmcompose.cli import main
from pytest_lmcompose.report.files import TargetError, append_text, check_folder, check_targets, write_text
from tests.plugin.conftest import Project
from tests.plugin.documents import report, typed

Make = Callable[[Path], None]


def node(path: Path, kind: int, device: int = 0) -> None:
    try:
        os.mknod(path, kind | 0o666, device)
    except PermissionError:
        pytest.skip("only root may make devices")


def listening(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(f"/proc/self/fd/{folder}/{path.name}")  # since a socket's path may only have 107 characters
    os.close(folder)


SPECIAL: dict[str, tuple[Make, str]] = {
    "pipe": (os.mkfifo, "named pipe"),
    "socket": (listening, "socket"),
    "folder": (os.mkdir, "folder"),
    "device": (lambda path: node(path, stat.S_IFBLK, os.makedev(7, 250)), "block device"),
}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_and_stays(tmp_path: Path, kind: str, linked: bool) -> None:
    make, message = SPECIAL[kind]
    make(path := tmp_path / "special")
    before = os.lstat(path)
    if linked:
        (tmp_path / "link").symlink_to("special")
        path = tmp_path / "link"
    with pytest.raises(TargetError, match=f"--json=.*: this is a {message}"):
        check_targets({"--json": path}, {})
    for write in (write_text, append_text):
        with pytest.raises(TargetError, match=message):
            write(path, "text")
    after = os.lstat(tmp_path / "special")
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)


@pytest.mark.parametrize("linked", [False, True])
def test_a_device_such_as_null_is_written_and_stays(tmp_path: Path, linked: bool) -> None:
    path = tmp_path / "null"
    node(path, stat.S_IFCHR, os.makedev(1, 3))
    if linked:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    check_targets({"--json": path, "--html": path}, {})
    write_text(path, "text")
    append_text(path, "text")
    assert stat.S_ISCHR(path.stat().st_mode) and sorted(p.name for p in tmp_path.iterdir()) == sorted(
        {"null", path.name}
    )


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_a_report_goes_to_the_standard_output(tmp_path: Path, name: str) -> None:
    """Also where that is a file, of which nothing is lost."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = (
        "from pathlib import Path\nfrom pytest_lmcompose.report.files import *\n"
        f"path = Path({name!r})\ncheck_targets({{'--json': path}}, {{}})\n"
        "print('before')\nwrite_text(path, 'text\\n')\nappend_text(path, 'more\\n')\nprint('after')"
    )
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "before\ntext\nmore\nafter\n"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).stdout.count(b"\n") == 4


def test_a_file_keeps_its_permissions_and_a_link_its_target(tmp_path: Path) -> None:
    path, link, dangling = tmp_path / "report.json", tmp_path / "link", tmp_path / "dangling"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to("report.json")
    dangling.symlink_to("made.json")
    for target in (link, dangling):
        check_targets({"--json": target}, {})
        write_text(target, "new")
        assert target.is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and path.read_text() == "new"
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "made.json", "link", "dangling"}


@pytest.mark.parametrize("name", ["none/x", "file/x", "gone", "circle", "x" * 300, "a\0b"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to("none/x")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(TargetError) as error:
        check_targets({"--json": tmp_path / name}, {})
    assert str(error.value).startswith("--json=") and "\n" not in str(error.value)


@pytest.mark.parametrize("other", ["a", "./a", "sub/../a", "link", "hard", "A"])
def test_two_outputs_never_go_to_one_file(tmp_path: Path, other: str) -> None:
    (tmp_path / "sub").mkdir()
    if other in ("link", "hard"):
        (tmp_path / "a").write_text("")
        (tmp_path / "link").symlink_to("a")
        (tmp_path / "hard").hardlink_to(tmp_path / "a")
    with pytest.raises(TargetError, match=r"--html=.*: --json writes to the same file"):
        check_targets({"--json": tmp_path / "a", "--html": tmp_path / other}, {})
    with pytest.raises(TargetError, match=r"--json=.*: this is the file of --junitxml, which"):
        check_targets({"--json": tmp_path / "a"}, {"the file of --junitxml": tmp_path / other})


def test_an_output_is_no_file_of_a_folder_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("")
    (tmp_path / "link").symlink_to("model/config.json")
    for name in ("model/config.json", "link"):
        with pytest.raises(TargetError, match="this is the model, which the report would overwrite"):
            check_targets({"--json": tmp_path / name}, {"the model": tmp_path / "model"})
    check_targets({"--json": tmp_path / "model" / "report.json"}, {"the model": tmp_path / "model"})


@pytest.mark.parametrize("name", ["file", "file/x", "gone", "pipe"])
def test_what_is_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to("none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TargetError, match="this is not a folder"):
        check_folder(tmp_path / name)
    check_folder(tmp_path / "new" / "folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lmcompose-json=pipe"], "--lmcompose-json=*/pipe: this is a named pipe"),
        (["--lmcompose-html=pipe"], "--lmcompose-html=*/pipe: this is a named pipe"),
        (["--lmcompose-json=thresholds.yaml"], "this is the file of thresholds"),
        (["--lmcompose-markdown=pytest.ini"], "this is the file of pytest's settings"),
        (["--lmcompose-latex=.lmcompose/0001_v1.json"], "this is the stored run 0001_v1"),
        (["--lmcompose-json=a", "--lmcompose-html=./a"], "--lmcompose-json writes to the same file"),
        (["--lmcompose-json=a", "--junitxml=a"], "this is the file of --junitxml"),
        (["--lmcompose-storage=pytest.ini/x"], "--lmcompose-storage: this is not a folder"),
    ],
)
def test_a_run_refuses_them_before_any_work(
    project: Project, refused: Callable[..., str], arguments: list[str], message: str
) -> None:
    os.mkfifo(project.path / "pipe")
    (project.path / "pytest.ini").write_text("[pytest]\n")
    Storage(project.path / ".lmcompose").save(typed(report({"base": {"recall": [1.0]}})), "v1")
    head, _, tail = message.partition("*")
    error = refused(*arguments, compose=("nudge",))
    assert head in error and tail in error, error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "1.json", "-o", "pipe"], "--output=pipe: this is a named pipe"),
        (["merge", "1.json", "-o", "1.json"], "--output=1.json: this is the report 1.json"),
        (["merge", "1.json", "-o", "hard.json"], "--output=hard.json: this is the report 1.json"),
        (["merge", "pipe", "-o", "x.json"], "pipe cannot be read: it is not a file"),
        (["merge", ".", "-o", "x.json"], ". cannot be read: it is not a file"),
        (["report", "1.json", "--html=pipe"], "--html=pipe: this is a named pipe"),
        (["report", "1.json", "--html=x", "--latex=./x"], "--latex=x: --html writes to the same file"),
        (["report", "1.json", "--html=-", "--latex=/dev/stdout"], "--html writes to the same file"),
        (["report", "1.json", "--markdown=1.json"], "--markdown=1.json: this is the run 1.json"),
        (["report", "1.json", "--baseline=2.json", "--latex=2.json"], "--latex=2.json: this is the run 2.json"),
        (["init", "gate", "--force"], "thresholds.yaml=gate/thresholds.yaml: this is a named pipe"),
        (["init", "1.json"], "is a file"),
    ],
)
def test_a_command_refuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    import json

    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("gate").mkdir()
    os.mkfifo("gate/thresholds.yaml")
    for name in ("1.json", "2.json"):
        Path(name).write_text(json.dumps(report({"base": {"recall": [1.0]}})))
    Path("hard.json").hardlink_to("1.json")
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and message in result.output, result.output
    assert stat.S_ISFIFO(os.stat("pipe").st_mode) and json.loads(Path("1.json").read_text())["schema_version"] == 1
