"""Generate a release repository: a test, thresholds, pytest settings, and an example for each CI service.

The thresholds follow from what the steps of the composition promise.
"""

from __future__ import annotations

import configparser
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from interventions.categories import Category, categories
from interventions.intervention import ZEROS
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.gate.promises import Promise, broken, promises
from pytest_lmcompose.recipe import Recipe
from pytest_lmcompose.report.files import check_targets, write_text

CI = {"github": ".github/workflows/release-gate.yml", "gitlab": ".gitlab-ci.yml"}
"""The file that each service reads."""
TEST = "test_release.py"
THRESHOLDS = "thresholds.yaml"
SETTINGS = "pytest.ini"
IGNORED = ".gitignore"


class AlreadyThere(Exception):
    """Files would be overwritten; the message names them."""


def files(
    recipe: Recipe, named: Mapping[str, str], composition: Composition, services: tuple[str, ...]
) -> dict[str, str]:
    """Return the text of each file, by its path in the repository; `named` are settings by their names."""
    values = {
        "NAMED": "\n".join(f"lmcompose_{name} = {value}" for name, value in named.items()),
        "COMPOSITION": str(composition),
        "VERSION": version("pytest-lmcompose"),
        "COMPARE": "\n".join(f"    {expression}" for expression in expressions(recipe, composition)),
    }
    texts = {
        TEST: _template("test_release.txt"),
        THRESHOLDS: _thresholds(recipe, composition),
        SETTINGS: _template("pytest_ini.txt"),
        IGNORED: _template("gitignore.txt"),
    }
    texts |= {CI[service]: _template(f"{service}.yaml") for service in services}
    for name, text in texts.items():
        for key, value in values.items():
            text = text.replace(f"@{key}@", value)
        texts[name] = text
    return texts


def model_file(path: str) -> str:
    """Return the text of a model's preset; `path` is a hub id, or a folder relative to the file."""
    return _template("model.txt").replace("@PATH@", json.dumps(path))


def world_file() -> str:
    """Return the text of a world to fill in."""
    return _template("world.txt")


def _template(name: str) -> str:
    """Return a template of the folder `release`, with @NAMES@ as placeholders."""
    return Path(__file__).with_name("release").joinpath(name).read_text(encoding="utf-8")


def expressions(recipe: Recipe, composition: Composition) -> Iterator[str]:
    """Yield expressions for `--lmcompose-compare-fail`: on what the steps promise, and on what they must preserve."""
    held = {promise.category for promise in promises(recipe, composition) if not (promise.metric or promise.broken_by)}
    yield from (expression for category in categories().values() if category in held for expression in category.compare)
    yield from ("accuracy/harmless:p0.01", "perplexity:5%")


def write(folder: Path, texts: dict[str, str], *, force: bool = False) -> tuple[list[str], list[str]]:
    """Write files under `folder`; return their names, and lines that say what else to do.

    Raises AlreadyThere, before any file is written, if a file exists with another text.
    """
    notes = []
    texts = dict(texts)
    if (found := configured(folder)) is not None:
        section = "[tool.pytest.ini_options]" if found == "pyproject.toml" else "pytest's section"
        notes.append(f"{found} already configures pytest, so {SETTINGS} is not written; add these lines to {section}:")
        notes += [f"  {line}" for line in _settings(texts.pop(SETTINGS), toml=found.endswith(".toml"))]
    if (folder / IGNORED).is_file() and not force:
        there = (folder / IGNORED).read_text(encoding="utf-8").splitlines()
        if left := [line for line in texts.pop(IGNORED).splitlines() if line not in there]:
            notes += [f"{IGNORED} exists and is not changed; add these lines:", *(f"  {line}" for line in left)]
    taken = [name for name, text in texts.items() if os.path.lexists(folder / name) and not _holds(folder / name, text)]
    if taken and not force:
        raise AlreadyThere(f"{', '.join(str(folder / name) for name in taken)} would be overwritten; see --force")
    for name in texts:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    check_targets({name: folder / name for name in texts}, {})
    for name, text in texts.items():
        write_text(folder / name, text)
    return list(texts), notes


def _settings(text: str, *, toml: bool) -> Iterator[str]:
    """Yield the settings of an ini file as lines for an ini or a TOML file."""
    for line in text.splitlines():
        if not toml:
            if not line.startswith("["):
                yield line
        elif line.startswith(" "):
            yield f"    {json.dumps(line.strip())},"
        elif line.endswith(" ="):
            yield f"{line} ["
        elif " = " in line:
            name, value = line.split(" = ", 1)
            yield f"{name} = {json.dumps(value)}"
    if toml:
        yield "]"


def configured(folder: Path) -> str | None:
    """Return the file in `folder` that configures pytest, except pytest.ini, or None."""
    for name, section in (("tox.ini", "pytest"), ("setup.cfg", "tool:pytest")):
        parser = configparser.ConfigParser(interpolation=None)
        if (folder / name).is_file() and parser.read(folder / name, encoding="utf-8") and parser.has_section(section):
            return name
    for name in ("pytest.toml", ".pytest.toml"):
        if (folder / name).is_file():
            return name
    path = folder / "pyproject.toml"
    if path.is_file() and "pytest" in tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}):
        return "pyproject.toml"
    return None


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _thresholds(recipe: Recipe, composition: Composition) -> str:
    """Return thresholds with a block for each promise that holds at the end."""
    blocks = [_template("thresholds.yaml")]
    kept: dict[Category | str, list[Promise]] = {}
    for promise in promises(recipe, composition):
        if promise.broken_by is None:
            kept.setdefault(promise.metric or promise.category, []).append(promise)
    for what, found in kept.items():
        said = "".join(f"  # {promise.step} promises {promise.words}.\n" for promise in dict.fromkeys(found))
        if isinstance(what, str):
            bounds = {what: _bounds_of(what, [promise.value or 0.0 for promise in found])}
        else:
            bounds = {name: _braced(limits) for name, limits in what.bounds.items()}
        blocks.append(said + "".join(f"  {name}: {text}\n" for name, text in bounds.items()))
    if reasons := broken(recipe, composition):
        blocks.append("".join(f"  # Not required: {reason}\n" for reason in reasons))
    return "\n".join(blocks)


def _bounds_of(metric: str, promised: Sequence[float]) -> str:
    """Return bounds for a metric whose value the settings promise."""
    if metric == "average_bits":  # fewer bits would be a surprise too
        return _braced({"min": promised[-1], "max": promised[-1] + 0.1})
    if metric in ZEROS:
        return _braced({"min": max(promised) - 0.01})
    return "{promised: 0.01}"  # the better direction is known only when it is measured


def _braced(bounds: Mapping[str, float]) -> str:
    return f"{{{', '.join(f'{kind}: {value:.4g}' for kind, value in bounds.items())}}}"
