"""Runs the tutorial's commands for real, and keeps what they print for its pages and its picture.

    python docs/record.py            # all of them, in a folder that is removed again
    python docs/record.py demo plan  # some of them

Writes docs/outputs/NAME.txt, shortened, and docs/images/run.svg.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
WIDTH = 110
ANSI = re.compile(r"\x1b\[[0-9;]*m")
CUT = "..."


@dataclass(frozen=True)
class Command:
    """One command of the tutorial."""

    name: str
    line: str
    """As a user types it."""
    code: int = 0
    """The exit code that it must have."""
    start: str | None = None
    """A pattern: what is printed before the first line with it is left out."""
    drop: str | None = None
    """A pattern: lines with it are left out."""
    most: int = 40
    """Lines."""


_NOISE = r"^(platform|rootdir|plugins|cachedir|configfile|benchmark:|hypothesis)"
COMMANDS = (
    Command("list", "lmcompose list methods"),
    Command("plan", "lmcompose plan --suite main"),
    Command(
        "run",
        'pytest compositions -k "memit and awq" --lmcompose-json=report.json',
        start="lmcompose",
        drop=_NOISE,
        most=70,
    ),
    Command("show", 'lmcompose show report.json --metric "edit_*_exact" --metric recall', drop=_NOISE),
    Command(
        "bits",
        'pytest compositions --lmcompose-compose "memit+awq[bits=2]" -q',
        code=1,
        start="short test summary",
        drop=_NOISE,
        most=8,
    ),
    Command("init", "lmcompose init gate"),
    Command("save", "cd gate && pytest --lmcompose-save=v1", start="== lmcompose", drop=_NOISE),
    Command(
        "worse",
        "cd gate && pytest --lmcompose-set awq.bits=3 --lmcompose-save=v2 --lmcompose-compare "
        '--lmcompose-compare-fail "perplexity:5%"',
        code=1,
        start="short test summary",
        drop=_NOISE,
        most=12,
    ),
    Command("compare", 'cd gate && lmcompose compare v1 v2 --metric perplexity --metric "accuracy/*"', drop=_NOISE),
)
PICTURE = "run"
"""The command whose output is the README's picture."""


def main(names: Iterable[str]) -> int:
    """Run the commands called `names`, all if there are none, each in the folder that the earlier ones left."""
    wanted = set(names)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.symlink(ROOT / "compositions", folder / "compositions")
        for command in COMMANDS:
            if not wanted or command.name in wanted:
                record(command, folder)
    return 0


def record(command: Command, folder: Path) -> None:
    """Run one command and keep its output; raises RuntimeError for another exit code than it must have."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": str(WIDTH),
        "PY_COLORS": "1",
        "FORCE_COLOR": "1",
        "PYTEST_ADDOPTS": f"-p no:cacheprovider --lmcompose-cache-dir={folder / 'store'}",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    done = subprocess.run(
        command.line,
        shell=True,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != command.code:
        raise RuntimeError(f"{command.line}: exit code {done.returncode}, not {command.code}\n{done.stdout}")
    output = done.stdout.replace(f"{folder}/", "").replace(str(folder), ".").replace(f"{ROOT}/", "")
    lines = shortened(output, command)
    (DOCS / "outputs").mkdir(exist_ok=True)
    text = "\n".join(ANSI.sub("", line).rstrip() for line in lines)
    (DOCS / "outputs" / f"{command.name}.txt").write_text(f"{text}\n", encoding="utf-8")
    if command.name == PICTURE:
        draw(lines, command.line)


def shortened(output: str, command: Command) -> list[str]:
    """Return the lines that are kept."""
    lines = output.splitlines()
    if command.start is not None:
        at = next((i for i, line in enumerate(lines) if re.search(command.start, ANSI.sub("", line))), 0)
        lines = lines[at:]
    if command.drop is not None:
        lines = [line for line in lines if not re.search(command.drop, ANSI.sub("", line))]
    while lines and not lines[0].strip():
        lines.pop(0)
    return lines if len(lines) <= command.most else [*lines[: command.most - 2], CUT, lines[-1]]


def draw(lines: list[str], title: str) -> None:
    """Write the picture of a terminal."""
    widest = max(len(ANSI.sub("", line)) for line in lines)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=max(widest, 60), file=nowhere, force_terminal=True, legacy_windows=False)
        for line in lines:
            console.print(Text.from_ansi(line), soft_wrap=True)
        picture = console.export_svg(title=title)
    # The picture must not ask a network for its fonts.
    picture = re.sub(r"@font-face\s*\{[^}]*\}", "", picture)
    (DOCS / "images").mkdir(exist_ok=True)
    (DOCS / "images" / "run.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
