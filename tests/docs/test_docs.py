"""The documentation says what the code does: flags, keys, names, and a site that builds and asks no network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import types
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md")
INCLUDE = re.compile(r'^--8<-- "([^"\n]+)"$', re.MULTILINE)
FLAG = re.compile(r"--lmcompose-[a-z][a-z-]*[a-z]")


def module(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # which dataclasses look up
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def generate() -> Any:
    return module(DOCS / "generate.py")


def text_of(page: Path, generate: Any) -> str:
    found: str = generate.on_page_markdown(page.read_text(encoding="utf-8"))
    return found


def test_the_page_of_flags_names_each_flag_of_the_parser_and_no_other(generate: Any) -> None:
    command = [sys.executable, "-m", "pytest", "--help", "-pno:cacheprovider"]
    help_text = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=True).stdout
    defined = set(re.findall(r"^  (--lmcompose-[a-z-]+)", help_text, re.MULTILINE))
    assert len(defined) > 20
    assert set(FLAG.findall(text_of(DOCS / "flags.md", generate))) == defined
    keys = set(re.findall(r"^  (lmcompose_\w+) \(", help_text, re.MULTILINE))
    assert set(re.findall(r"`(lmcompose_\w+)`", generate.flags())) == keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_a_flag_that_is_not_there(page: Path, generate: Any) -> None:
    from pytest_lmcompose.cli.flags import plugin_flags

    known = {f"--lmcompose-{flag.name}" for flag in plugin_flags()[0]}
    assert set(FLAG.findall(page.read_text(encoding="utf-8"))) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_override_and_composition_of_a_page_is_one(page: Path) -> None:
    from pytest_lmcompose.options import SUITE_FOLDER
    from pytest_lmcompose.recipe import load_recipe

    conf = SUITE_FOLDER / "conf"
    text = re.sub(r"\s*\\\n\s*", " ", page.read_text(encoding="utf-8"))
    overrides = re.findall(r"""--lmcompose-set[ =](?:"([^"\n]+)"|([^\s`,"]+))""", text)
    for quoted, plain in overrides:
        override = quoted or plain
        if override.startswith("evaluate.also.") or override == "KEY=VALUE":  # of the example package, or a placeholder
            continue
        load_recipe(conf, [override])
    recipe = load_recipe(conf)
    for words in re.findall(r"""--lmcompose-compose[ =](?:'([^'\n]+)'|"([^"\n]+)"|([^\s`,"]+))""", text):
        composition = "".join(words)
        if composition != "ID" and not composition.startswith("clip"):
            recipe.read(composition)


def test_settings_have_every_key_of_a_recipe_with_its_default(generate: Any) -> None:
    from pytest_lmcompose.options import SUITE_FOLDER
    from pytest_lmcompose.recipe import load_recipe

    keys = set(re.findall(r"^\| `([\w.]+)` \|", generate.settings(), re.MULTILINE))

    def walk(section: Any, prefix: str) -> Any:
        for key, value in section.items():
            inner = isinstance(value, dict) and f"{prefix}{key}" not in keys
            yield from walk(value, f"{prefix}{key}.") if inner else [f"{prefix}{key}"]

    # Entries of mappings such as world.forget are data.
    recipe = load_recipe(SUITE_FOLDER / "conf").plain()
    assert set(walk(recipe, "")) == keys
    assert "| `awq.bits` | `4` |" in generate.settings()


def test_the_schema_page_has_every_property(generate: Any) -> None:
    import json

    from pytest_lmcompose.report.collect import SCHEMA_PATH

    def names(node: Any) -> Any:
        if isinstance(node, dict):
            yield from node.get("properties", {})
            for value in node.values():
                yield from names(value)
        elif isinstance(node, list):
            for value in node:
                yield from names(value)

    found = {name.rpartition(".")[2] for name in re.findall(r"^\| `([^`]+)` \|", generate.schema(), re.MULTILINE)}
    assert set(names(json.loads(SCHEMA_PATH.read_text()))) == found


def test_an_unknown_mark_is_an_error(generate: Any) -> None:
    with pytest.raises(KeyError, match="flgas"):
        generate.on_page_markdown("<!-- generated: flgas -->")


class Requests(HTMLParser):
    """Collects what a browser would fetch for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.found.add(values.get("href") or "")
        if tag in ("script", "img", "iframe", "source", "video"):
            self.found.add(values.get("src") or "")


def test_the_site_builds_without_a_warning_and_asks_no_network(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed; `make docs` does it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    pages = sorted(tmp_path.glob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in DOCS.glob("*.md")}
    requests = Requests()
    for page in pages:
        requests.feed(page.read_text(encoding="utf-8"))
    assert not {found for found in requests.found if "//" in found}
    styles = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.css"))
    assert not re.findall(r"url\(\s*[\"']?(?:https?:)?//", styles)
    assert "<!-- generated:" not in "".join(page.read_text(encoding="utf-8") for page in pages)
    for page in DOCS.glob("*.md"):
        shown = without_space(page_text((tmp_path / f"{page.stem}.html").read_text(encoding="utf-8")))
        for name in INCLUDE.findall(page.read_text(encoding="utf-8")):
            included = next(folder / name for folder in (DOCS, ROOT) if (folder / name).is_file())
            assert without_space(included.read_text(encoding="utf-8")) in shown, f"{page.name} does not show {name}"


def test_every_include_of_a_page_is_written_as_one() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"--\s*8\s*<\s*--", text)) == len(INCLUDE.findall(text)), page.name
    assert INCLUDE.findall((DOCS / "extending.md").read_text(encoding="utf-8"))


def page_text(html: str) -> str:
    """Return the text of a page, without its marks."""
    return unescape(re.sub(r"<[^>]*>", "", html))


def without_space(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_the_picture_asks_no_network() -> None:
    picture = (DOCS / "images" / "run.svg").read_text(encoding="utf-8")
    assert not re.findall(r"(?:url\(|href=)[\"']?https?:", picture)
    assert len(picture) < 100_000
    assert "memit+awq" in picture.replace("&#43;", "+")


def test_the_tutorial_shows_what_its_commands_printed() -> None:
    record = module(DOCS / "record.py") if importlib.util.find_spec("rich") else pytest.skip("rich is not installed")
    tutorial = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    for command in record.COMMANDS:
        for line in command.line.split(" && "):
            assert line in tutorial, f"the tutorial does not have {line!r}, whose output it shows"
        text = (DOCS / "outputs" / f"{command.name}.txt").read_text(encoding="utf-8")
        assert text.strip() and "/tmp/" not in text and "\x1b" not in text
    shown = re.findall(r'--8<-- "outputs/(\w+)\.txt"', tutorial)
    assert set(shown) <= {command.name for command in record.COMMANDS}


def test_the_citation_is_complete_and_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software" and citation["message"] and citation["authors"]
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"],
        project["version"],
        project["license"],
    )
    for person in citation["authors"]:
        assert person.keys() <= {"name", "given-names", "family-names", "orcid", "affiliation", "email", "website"}


def test_the_documentations_extra_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines}
    for requirement in project["optional-dependencies"]["docs"]:
        assert re.split(r"[>=<]", requirement)[0].lower() in pinned
