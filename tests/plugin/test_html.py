"""The page of a run: what it says, and how it looks and behaves in a real browser."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import vl_convert  # noqa: F401  here, since it cannot be imported again when pytester has forgotten it
from lxml import html as lxml_html

from evaluators.registry import BUILT_IN
from pytest_lmcompose.report import html
from pytest_lmcompose.report.collect import SCHEMA_PATH
from pytest_lmcompose.report.options import Outputs
from pytest_lmcompose.report.write import write_reports
from tests.plugin import documents
from tests.plugin.browser import CHROMIUM, Page, browser
from tests.plugin.conftest import Project
from tests.plugin.documents import typed
from tests.plugin.rich_documents import broken_off, compared, rich
from tests.plugin.tiny import SUBJECTS

WIDTHS = (390, 1440)


@pytest.fixture(scope="module")
def new() -> dict[str, Any]:
    document = rich(harm=0.25)
    jsonschema.validate(document, json.loads(SCHEMA_PATH.read_text()))
    return document


@pytest.fixture(scope="module")
def text(new: dict[str, Any]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "LARGE", 10**9)
        return html.render(typed(new), typed(rich()))


@pytest.fixture(scope="module")
def tree(text: str) -> Any:
    return lxml_html.fromstring(text)


@pytest.fixture(scope="module")
def file(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "small.html"
    path.write_text(html.render(typed(rich(("base", "awq", "memit", "rmu+awq", "rmu+relearn")))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH; on Debian: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def words(element: Any) -> str:
    return " ".join(element.text_content().split())


def test_every_part_is_there(tree: Any) -> None:
    assert [words(heading) for heading in tree.iter("h2")] == [
        "Why",
        "Cheapest fix",
        "How sure",
        "Compositions",
        "Changes since the baseline",
        "Composability",
        "Survival and return",
        "Effect of bits and sparsity",
        "Time and memory",
        "All measurements",
        "Compositions in detail",
        "All failures",
        "Run",
    ]
    figures = {figure.get("id"): figure for figure in tree.iter("figure")}
    assert set(figures) == {
        *("order_sensitivity", "order_free_error", "interference", "survival", "returned"),
        *("curves-bits", "curves-sparsity", "costs"),
    }
    curves = [[words(cell) for cell in row] for row in figures["curves-bits"].xpath(".//tbody/tr")]
    of = {bits: value for name, bits, metric, value in curves if (name, metric) == ("memit+awq[bits=·]", "recall")}
    assert list(of) == ["2", "3", "4"] and of["4"].startswith("0.542 ± ")


def test_failed_cells_say_so_in_words(tree: Any, new: dict[str, Any]) -> None:
    table = tree.get_element_by_id("table-compositions").getparent()
    failed = {
        (record["id"], gate["metric"])
        for record in new["compositions"]
        for gate in record["gates"]
        if not gate["passed"]
    }
    head = [words(cell).split(" ")[0] for cell in table.xpath(".//thead//th")]
    marked = {
        (words(row[0]), head[place])
        for row in table.xpath(".//tbody/tr")
        for place, cell in enumerate(row)
        if place > 1 and "failed" in words(cell)
    }
    assert marked == failed and len(failed) == 9
    assert tree.xpath("//title")[0].text.startswith("Do not ship: 9 of 42 gates failed")
    told = [words(item) for item in tree.xpath("//section[@class='failed']//li")]
    assert told[1] == "memit+awq[bits=2] recall is 0.342, but must be at least 0.700" and len(told) == 5
    told = [words(item) for item in tree.xpath("//section[@aria-labelledby='failures']//li")]
    assert any(line.startswith("memit+awq[bits=2] recall = 0.341667 misses min 0.7") for line in told)
    assert len(told) == 9


def test_against_the_baseline(tree: Any) -> None:
    table = tree.get_element_by_id("table-baseline").getparent()
    first = [words(cell) for cell in table.xpath(".//tbody/tr")[0]]
    assert first[:6] == ["memit", "recall", "worse", "0.992", "0.742", "-0.250"]
    verdicts = [words(row[2]) for row in table.xpath(".//tbody/tr")]
    assert verdicts[:18] == ["worse"] * 18 and "worse" not in verdicts[18:]


def test_what_the_run_itself_said_of_stored_ones() -> None:
    document = compared()
    jsonschema.validate(document, json.loads(SCHEMA_PATH.read_text()))
    tree = lxml_html.fromstring(html.render(typed(document)))
    (section,) = tree.xpath("//section[@aria-labelledby='comparison']")
    assert "Compared with 0007_main.json, a run of 2025-12-30" in words(section.find("p"))
    assert "versions: torch: 2.12.0 -> 2.13.0" in words(section.find("ul"))
    rows = [[words(cell) for cell in row] for row in section.xpath(".//tbody/tr")]
    assert rows[0][:6] == ["memit", "recall", "worse", "0.950", "0.900", "-0.050"]
    assert rows[1][:3] == ["memit", "edit_success_exact", "same"]
    assert rows[2] == ["memit", "recall", "0.060", "0.009", "0.960 → 0.950 → 0.940 → 0.920 → 0.900"]
    assert "rmu* recall: nothing matches" in words(tree.xpath("//section[@aria-labelledby='run']/ul")[0])


def test_samples_that_changed_with_their_prompts(tree: Any) -> None:
    (memit,) = [d for d in tree.xpath("//details[@class='composition']") if words(d.find("summary/h3")) == "memit"]
    headings = [words(heading) for heading in memit.iter("h4")]
    assert "Samples that changed since the base model" in headings
    assert "Samples that changed since the baseline" in headings
    changed = [words(summary) for summary in memit.xpath(".//details/summary")]
    assert "edit_success_exact: 0 got worse, 13 better, of 20" in changed
    assert "recall: 30 got worse, 0 better, of 120" in changed
    assert not any(line.startswith("average_bits") for line in changed)
    samples = [words(cell) for cell in memit.xpath(".//th[@class='prose']")]
    assert any("was born in → Place" in sample for sample in samples)
    assert any(sample.startswith("Fact ") for sample in samples)
    assert any(sample.startswith("sample ") for sample in samples)  # of accuracy/harmless, whose prompts are not known


def test_names_of_models_and_samples_stay_text(tree: Any, text: str) -> None:
    assert tree.xpath("//img") == []
    assert len(tree.xpath("//script")) == 1
    assert text.lower().count("</script>") == 1
    assert "owned" in words(tree.xpath("//header//dd")[0])


def test_nothing_comes_from_outside(tree: Any) -> None:
    policy = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")[0]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy and "http" not in policy
    links = tree.xpath("//@href | //@src")
    assert all(link.startswith(("#", "data:")) for link in links)


def test_tables_and_figures_can_be_heard(tree: Any) -> None:
    for table in tree.iter("table"):
        assert words(table.find("caption"))
        assert all(cell.get("scope") == "col" for cell in table.xpath("./thead//th"))
        assert all(row[0].tag == "th" and row[0].get("scope") == "row" for row in table.xpath("./tbody/tr"))
    for figure in tree.iter("figure"):
        assert words(figure.find("figcaption/p"))
        assert figure.xpath("./details//table/tbody/tr")
        assert all(plot.get("role") == "img" and plot.get("aria-label") for plot in figure.xpath(".//*[svg]"))
    ids = tree.xpath("//@id")
    assert len(ids) == len(set(ids))
    assert set(tree.xpath("//@aria-labelledby")) <= set(ids)
    assert tree.get("lang") == "en"
    assert [element.tag for element in tree.body if element.tag in ("header", "nav", "main", "footer")] == [
        *("header", "nav", "main", "footer"),
    ]


def test_size_without_samples(new: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "SAMPLES", 0)
    assert len(html.render(typed(new), typed(rich())).encode()) < 300_000


def packed_page(new: dict[str, Any]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "LARGE", 1000)
        return html.render(typed(new), typed(rich()))


def test_a_large_page_is_compressed_without_loss(new: dict[str, Any], text: str) -> None:
    packed = packed_page(new)
    (notice,) = lxml_html.fromstring(packed).xpath("//*[@id='packed']")
    assert "allow this page its script" in words(notice)
    rest = gzip.decompress(base64.b64decode(notice.get("data-gzip"))).decode()
    whole = re.sub('<p class="notice" id="packed".*?</p>', lambda _: rest, packed)
    one, other = (re.sub(r"clip\d+", "clip", page) for page in (whole, text))  # numbered as they are drawn
    assert one == other
    assert len(packed) < len(text) / 2


def test_a_large_page_unpacks_itself(page: Page, new: dict[str, Any], file: Path, tmp_path: Path) -> None:
    found = []
    (tmp_path / "packed.html").write_text(packed_page(new), encoding="utf-8")
    for name in (file, tmp_path / "packed.html"):
        page.open(name, 1440)
        assert page.complaints() == [] and page.requests() == [name.as_uri()]
        found.append(page.run("document.querySelector('main').textContent.replace(/\\s+/g, ' ')"))
    assert found[0] == found[1]


def test_a_run_that_broke_off_in_the_oldest_format() -> None:
    tree = lxml_html.fromstring(html.render(typed(broken_off())))
    assert words(tree.xpath("//h1")[0]).startswith("Do not ship: 1 composition not measured")
    assert "The run was interrupted" in words(tree.xpath("//main/p")[0])
    assert "rmu was not measured: KeyboardInterrupt" in words(tree.xpath("//section[@class='failed']")[0])


def test_a_run_without_anything() -> None:
    empty = {**broken_off(), "model": None, "compositions": []}
    tree = lxml_html.fromstring(html.render(typed(empty)))
    assert words(tree.xpath("//h1")[0]) == "No verdict: no gate judged anything"


def test_a_baseline_that_says_nothing_is_refused_in_words() -> None:
    other = rich(("base",))
    other["model"]["parameters"] = 5
    tree = lxml_html.fromstring(html.render(typed(rich(("base",))), typed(other)))
    assert any("Not comparable: another model" in words(p) for p in tree.iter("p"))


@pytest.mark.parametrize("width", WIDTHS)
def test_in_a_browser(page: Page, file: Path, width: int) -> None:
    page.open(file, width)
    assert page.complaints() == []
    assert page.requests() == [file.as_uri()]
    assert page.run("document.title").startswith("Do not ship: 9 of 42")
    assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.run("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    canvases = page.run("document.querySelectorAll('.canvas').length")
    assert canvases >= 18
    assert page.run("document.querySelectorAll('.canvas svg').length") == canvases
    # Whatever is wider than its box can be scrolled in it.
    assert page.run("[...document.querySelectorAll('table, svg')].every((part) => part.closest('.scroll') !== null)")
    assert [pair for pair in page.run(CONTRASTS) if pair[1] < 4.5] == []
    label = "getComputedStyle(document.querySelector('#costs svg text:not([fill])')).fill"
    light = page.run(label)
    page.colours("dark")
    page.wait(f"{label} !== '{light}'")
    assert [pair for pair in page.run(CONTRASTS) if pair[1] < 4.5] == []
    assert page.complaints() == []


def suite_with_twenty_metrics() -> dict[str, Any]:
    """Return a report of compositions with gates on twenty metrics: one failed, one a known loss."""
    names = [metric.name for evaluator in BUILT_IN for metric in evaluator.metrics if "*" not in metric.name]
    metrics = sorted(names, key=len)[-20:]  # the longest names
    document = rich()
    for record in document["compositions"]:
        record["measurements"] = [documents.measurement(m, 0.123, 0.01, [0.1, 0.2], better=True) for m in metrics]
        record["gates"] = [documents.gate(metric) for metric in metrics]
    last = document["compositions"][-1]
    last["gates"][-1] |= {"passed": False, "message": "misses"}
    last["gates"][-2] |= {"gate": "lost", "message": "is lost, as is known"}
    return document | {"composability": None}


def test_twenty_metrics_fit_on_a_screen(page: Page, tmp_path: Path) -> None:
    document, file = suite_with_twenty_metrics(), tmp_path / "wide.html"
    file.write_text(html.render(typed(document)), encoding="utf-8")
    page.open(file, 1440)
    table = "document.getElementById('table-compositions').parentElement"
    edges = page.run(f"[...{table}.tHead.rows[0].cells].map((cell) => cell.getBoundingClientRect().right)")
    assert len(edges) == 24 and max(edges) <= 1440
    assert page.run(f"{table}.parentElement.scrollWidth <= {table}.parentElement.clientWidth")
    overlaps = f"[...{table}.querySelectorAll('th, td')].filter((cell) => cell.scrollWidth > cell.clientWidth).length"
    assert page.run(overlaps) == 0
    heads = page.run(f"[...{table}.tHead.rows[0].cells].map((cell) => cell.querySelector('span').textContent)")
    gates = document["compositions"][-1]["gates"]
    assert heads[2:4] == [gates[-1]["metric"], gates[-2]["metric"]]  # the failed one, then the known loss


def test_known_losses_are_a_state_of_their_own() -> None:
    document = rich(("base", "memit"))
    for gate in document["compositions"][1]["gates"]:
        gate |= {"gate": "lost", "message": "memit  recall is lost, as is known", "passed": True}
    tree = lxml_html.fromstring(html.render(typed(document)))
    assert words(tree.find(".//h1")) == "Ship: all 2 gates passed, 2 known losses"
    base, memit = (
        [words(cell) for cell in row]
        for row in tree.get_element_by_id("table-compositions").getparent().xpath(".//tbody/tr")
    )
    assert base[1] == "passed" and memit[1] == "known loss 2 known losses"
    assert sum("known loss" in text for text in memit[2:]) == 2 and not any("known loss" in text for text in base)


def test_sorting_by_keyboard(page: Page, small: Path) -> None:
    page.open(small, 1440)
    column = "[...document.querySelectorAll('#table-compositions ~ tbody > tr')].map((r) => r.cells[{}].textContent)"
    page.run("document.getElementById('filter').focus()")
    for _ in range(4):  # the table's box, then headings: composition, gates, recall
        page.press("Tab")
    focused = "document.activeElement"
    assert page.run(f"{focused}.textContent").startswith("recall")
    assert page.run(f"getComputedStyle({focused}).outlineStyle") == "solid"
    page.press("Enter")
    assert page.run(f"{focused}.closest('th').getAttribute('aria-sort')") == "ascending"
    values = [float(text.split()[0]) for text in page.run(column.format(2))]
    assert values == sorted(values)
    page.press("Enter")
    assert page.run(f"{focused}.closest('th').getAttribute('aria-sort')") == "descending"
    assert [float(text.split()[0]) for text in page.run(column.format(2))] == sorted(values, reverse=True)
    assert page.run("document.querySelectorAll('#table-compositions ~ thead [aria-sort=none]').length") == 9


def test_finding_a_composition_and_going_to_it(page: Page, small: Path) -> None:
    page.open(small, 390)
    page.run(
        "(() => { const box = document.getElementById('filter'); box.value = 'RMU+'; "
        "box.dispatchEvent(new Event('input')); })()"
    )
    rows = "[...document.querySelectorAll('#table-compositions ~ tbody > tr')].filter((row) => !row.hidden)"
    assert page.run(f"{rows}.map((row) => row.cells[0].textContent.trim())") == ["rmu+awq", "rmu+relearn"]
    assert page.run("document.getElementById('filter-status').textContent") == "2 of 5 shown"
    page.run(f"{rows}[1].querySelector('a').click()")
    page.wait("document.getElementById('c5').open")
    assert page.run("document.querySelector('#c5 > summary h3').textContent") == "rmu+relearn"


def test_written_by_a_run_with_prompts_and_opened(project: Project, request: pytest.FixtureRequest) -> None:
    result = project.run(
        "--lmcompose-html=report.html",
        "--lmcompose-json=report.json",
        "--lmcompose-set=evaluate.questions=true",
        "--lmcompose-set=evaluate.question_limit=3",
        compose=("base", "nudge", "nudge+round"),
    )
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines([f"lmcompose report: {project.path / 'report.html'}"])
    report = json.loads((project.path / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA_PATH.read_text()))
    asked = {metric: prompts["texts"] for prompts in report["prompts"] for metric in prompts["metrics"]}
    for record in report["compositions"]:
        for measured in record["measurements"]:
            if measured["metric"] in asked:
                assert len(asked[measured["metric"]]) == len(measured["samples"])
    assert {"edit_success_exact", "edit_locality_agreement", "recall", "perplexity_qa"} <= set(asked)
    assert asked["accuracy/hazardous"] == [f"Where is {subject} from?" for subject in SUBJECTS[:3]] * 2
    assert asked["accuracy/tinyworld_music"] == asked["accuracy/hazardous"][:3]
    assert "perplexity" not in asked  # windows of running text
    assert all(" was born in → " in line for line in asked["edit_success_exact"])
    page: Page = request.getfixturevalue("page")  # what needs no browser has been tested by now
    page.open(project.path / "report.html", 390)
    assert page.complaints() == []
    assert page.run("[...document.querySelectorAll('summary h3')].map((h) => h.textContent)") == [
        *("base", "nudge", "nudge+round"),
    ]


@pytest.mark.parametrize("flag", ["html", "markdown", "latex"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(refused: Callable[..., str], flag: str) -> None:
    assert f"--lmcompose-{flag}" in (error := refused(f"--lmcompose-{flag}=no/report"))
    assert "does not exist" in error
    assert "this is a folder" in refused(f"--lmcompose-{flag}=.")


CONTRASTS = """
(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return numbers(getComputedStyle(document.body).backgroundColor);
  };
  const kinds = ["body", "a", "caption", "dt", "th small", "td.bad", ".mark.bad", ".mark.good", ".mark", ".failed li",
    "figcaption p", ".notice", "pre", "footer p", "tbody th"];
  return kinds.flatMap((kind) => [...document.querySelectorAll(kind)].slice(0, 3).map((element) => {
    const [one, other] = [numbers(getComputedStyle(element).color), behind(element)].map(light).sort((a, b) => b - a);
    return [kind, (one + 0.05) / (other + 0.05)];
  }));
})()
"""


def test_without_the_extra_the_page_has_no_figures_and_says_which_extra_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vl_convert" else found(name))
    told: list[str] = []
    assert write_reports(Outputs(html=tmp_path / "page.html"), rich(("memit", "memit+awq")), None, told.append)
    page = (tmp_path / "page.html").read_text()
    assert "<svg" not in page and "<figure" not in page
    assert "memit+awq" in page and "pip install &#39;pytest-lmcompose[html]&#39;" in page
    assert told == [
        f"lmcompose: {tmp_path / 'page.html'}: no figures; install the extra html: pip install 'pytest-lmcompose[html]'"
    ]


def test_the_page_draws_how_edits_survive_their_sequence() -> None:
    samples = {"edit_survival/1-2": [0, 1], "edit_survival/3-4": [1, 1]}
    page = html.render(typed(documents.report({"base": {}, "memit": samples, "rome": {"edit_survival/1": [0]}})))
    (figure,) = lxml_html.fromstring(page).xpath("//figure[@id='sequence']")
    rows = [[cell.text_content().strip() for cell in row] for row in figure.xpath(".//tbody/tr")]
    assert [row[:2] for row in rows] == [["memit", "1-2"], ["memit", "3-4"], ["rome", "1"]]
    assert rows[1][2].startswith("1")


@pytest.mark.slow
def test_no_accessibility_violation(page: Page, tmp_path: Path) -> None:
    """Checked by the rules of axe-core, in light and dark colours, with everything open."""
    axe = importlib.util.find_spec("axe_core_python")
    if axe is None or axe.origin is None:
        pytest.skip("axe-core-python is not installed")
    script, file = (Path(axe.origin).parent / "axe.min.js").read_text(encoding="utf-8"), tmp_path / "page.html"
    ids = ("base", "awq", "memit", "memit+awq", "awq+memit", "memit+awq[bits=2]")
    file.write_text(html.render(typed(rich(ids, harm=0.25)), typed(rich(ids))), encoding="utf-8")
    for scheme in ("light", "dark"):
        page.open(file, 1280, scheme)
        page.run("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        page.run(f"{script}; 0")
        found = page.run(
            "axe.run({resultTypes: ['violations']})"
            ".then((found) => ({bad: found.violations.map((v) => v.id), good: found.passes.length}))"
        )
        assert found["bad"] == [] and found["good"] > 30
