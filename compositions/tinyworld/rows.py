"""Tables of measured properties: rows with their noise and bounds, put into a document between two marks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- table -->", "<!-- end of table -->"
_HEAD = "| what | value ± standard error | n | needed | met |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """A line of the table: what was measured, its value with noise, and the bounds asked of it."""

    name: str
    value: float
    stderr: float | None
    n: int
    least: float | None = None
    most: float | None = None

    @staticmethod
    def mean(name: str, values: Sequence[float], least: float | None = None, most: float | None = None) -> Row:
        """Return the row of a mean over repeats, with the standard error between them."""
        noise = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return Row(name, statistics.fmean(values), noise, len(values), least, most)

    @property
    def met(self) -> bool:
        """Say whether the value is within its bounds."""
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def markdown(self) -> str:
        """Return the row as Markdown."""
        noise = "" if self.stderr is None else f" ± {self.stderr:.3f}"
        bounds = [f">= {self.least}"] * (self.least is not None) + [f"<= {self.most}"] * (self.most is not None)
        met = ("yes" if self.met else "**no**") if bounds else ""
        return f"| {self.name} | {self.value:.3f}{noise} | {self.n} | {', '.join(bounds)} | {met} |"


def around_table(path: Path) -> tuple[str, str]:
    """Return what stands before and after the table of a document; ValueError if the marks are not there."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path}: the marks {BEGIN} and {END} must stand there once each")
    return text.split(BEGIN)[0], text.split(END)[1]


def put_table(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows between the marks of a document."""
    before, after = around_table(path)
    table = "\n".join([_HEAD, *(row.markdown() for row in rows)])
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
