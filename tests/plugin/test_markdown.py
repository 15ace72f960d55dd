"""The summary for a CI service."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from pytest_lmcompose.report import markdown
from pytest_lmcompose.report.files import append_text
from tests.plugin.conftest import Project
from tests.plugin.documents import typed
from tests.plugin.rich_documents import broken_off, compared, rich
from tests.plugin.test_junit import check


def cells(text: str, head: str) -> list[list[str]]:
    """Return the rows of the table that begins with `head`."""
    lines = text[text.index(f"| {head}") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_failed_gates_first_in_words_then_the_table() -> None:
    text = markdown.render(typed(rich()))
    lines = text.splitlines()
    assert lines[0] == "## ❌ lmcompose: 5 of 42 gates failed"
    assert lines[4].startswith("- `awq[bits=2]` perplexity = inf misses max 8.0")
    rows = cells(text, "composition")
    assert rows[0] == ["composition", "gates", "recall", "perplexity"]
    assert ["`awq[bits=3]`", "1 of 2 failed", "0.833", "8.290 ❌ failed"] in rows
    assert ["`memit`", "2 passed", "0.992", "4.831"] in rows
    orders = cells(text, "steps")
    assert orders[2][:2] == ["awq \\& memit", "recall"]
    assert re.fullmatch(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", orders[2][3])
    sensitivity = [float(row[3].split()[0]) for row in orders[2:]]
    assert sensitivity == sorted(sensitivity, reverse=True)
    assert len(text) < 6000


def test_what_changed_since_the_baseline() -> None:
    text = markdown.render(typed(rich(harm=0.25)), typed(rich()))
    assert "**Compared with the baseline** of 2026-01-02T03:04:05+00:00: 18 worse, 9 better" in text
    (_, _, first, *_) = [row for row in cells(text[text.index("**Compared") :], "composition")]
    assert first[:6] == ["`memit`", "recall", "worse", "0.992", "0.742", "-0.250"]
    other = rich(("base",))
    other["model"]["parameters"] = 5
    assert "nothing can be compared" in markdown.render(typed(rich(("base",))), typed(other))


def test_what_the_run_itself_said_of_stored_ones() -> None:
    text = markdown.render(typed(compared()))
    assert "**Compared with 0007\\_main.json** of 2025-12-30T00:00:00+00:00: 1 worse, 0 better" in text
    assert "- versions: torch: 2.12.0 -\\> 2.13.0" in text
    assert "| `memit` | recall | worse | 0.950 | 0.900 | -0.050 | 0.001 |" in text
    assert "- `memit` recall got worse over 5 stored runs, by 0.060 in all" in text


def test_names_stay_text() -> None:
    text = markdown.render(typed(rich(harm=0.25)), typed(rich()))
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "<img" not in shown and "</script>" not in shown
    assert "&lt;img src=x" in shown
    assert shown.count("<table>") == 3


def test_a_run_that_broke_off_and_one_without_gates() -> None:
    text = markdown.render(typed(broken_off()))
    assert text.startswith("## ❌ lmcompose: 1 composition not measured, all 2 gates passed\n")
    assert "- `rmu` was not measured: KeyboardInterrupt" in text
    assert "| `rmu` | interrupted | - | - |" in text
    empty = {**broken_off(), "model": None, "compositions": []}
    assert markdown.render(typed(empty)).startswith("## ⚠️ lmcompose: no gate judged anything")


def test_known_losses_are_a_state_of_their_own() -> None:
    document = rich(("base", "memit"))
    document["compositions"][1]["gates"][0] |= {"gate": "lost", "message": "memit  recall is lost, as is known"}
    text = markdown.render(typed(document))
    assert text.startswith("## ⚠️ lmcompose: all 3 gates passed, 1 known loss\n")
    assert ["`memit`", "1 passed, 1 known loss", "0.992 ⚠️ known loss", "4.831"] in cells(text, "composition")
    assert ["`base`", "2 passed", "0.992", "4.831"] in cells(text, "composition")


def test_of_many_compositions_those_that_failed_stay() -> None:
    document = rich(("base", "awq", "awq[bits=3]"))
    base, fine, failed = document["compositions"]
    many = [{**fine, "id": f"awq[bits={bits}]"} for bits in range(4, 150)]
    rows = cells(markdown.render(typed({**document, "compositions": [base, *many, failed]})), "composition")
    assert len(rows) == 2 + markdown.ROWS
    assert rows[2][:2] == ["`awq[bits=3]`", "1 of 2 failed"]


def test_appended_to_what_others_wrote(tmp_path: Path) -> None:
    real, link = tmp_path / "real.md", tmp_path / "link.md"
    real.write_text("earlier step\n")
    link.symlink_to(real)
    append_text(link, "## one\n")
    append_text(link, "## two\n")
    assert real.read_text() == "earlier step\n\n## one\n\n## two\n"
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.md", "real.md"]


@pytest.mark.slow
def test_all_files_of_a_run_on_two_workers(project: Project) -> None:
    (project.path / "summary.md").write_text("earlier step\n")
    files = ("--lmcompose-markdown=summary.md", "--lmcompose-latex=tables.tex", "--lmcompose-html=page.html")
    checked = ("--lmcompose-json=report.json", "--junitxml=junit.xml")
    result = project.run_apart(*files, *checked, "-n2", compose=("base", "nudge", "nudge+round", "round+nudge"))
    assert result.ret == pytest.ExitCode.OK
    text = (project.path / "summary.md").read_text()
    assert text.startswith("earlier step\n\n## ✅ lmcompose: all 8 gates passed\n")
    assert {row[0] for row in cells(text, "composition")[2:]} == {
        *("`base`", "`nudge`", "`nudge+round`", "`round+nudge`"),
    }
    assert "nudge \\& round" in text
    assert "nudge \\& round" in (project.path / "tables.tex").read_text()
    assert "round+nudge" in (project.path / "page.html").read_text()
    check(project.path, failed=False)
    for name in ("report.json", "summary.md", "tables.tex", "page.html"):
        result.stdout.fnmatch_lines([f"lmcompose report: {project.path / name}"])


def test_written_of_an_interrupted_run_too(project: Project) -> None:
    result = project.run(
        "--lmcompose-markdown=summary.md", "--lmcompose-latex=tables.tex", compose=("nudge", "nudge+interrupt")
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED
    text = (project.path / "summary.md").read_text()
    assert text.startswith("## ❌ lmcompose: 1 composition not measured, all 2 gates passed")
    assert "run interrupted" in text
    assert "nothing to compare" in (project.path / "tables.tex").read_text()


def test_a_file_that_cannot_be_written_in_the_end_fails_the_run_and_hinders_no_other(project: Project) -> None:
    project.pytester.makepyfile(
        test_inner="""
        import pathlib

        def test_it(composition, gates):
            pathlib.Path("summary.md").mkdir()
        """
    )
    result = project.run("--lmcompose-markdown=summary.md", "--lmcompose-latex=tables.tex", compose=("nudge",))
    assert result.ret == pytest.ExitCode.INTERNAL_ERROR
    result.stdout.fnmatch_lines(["lmcompose: the report *summary.md could not be written: *this is a folder*"])
    assert (project.path / "tables.tex").is_file()
