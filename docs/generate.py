"""Fills in what the pages of the site say of the code: flags, settings, names, the report's schema, help texts.

A hook of MkDocs: a line `<!-- generated: NAME -->` in a page becomes what `PARTS[NAME]` returns.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import click

from interventions.ranges import describe, field_types, searched, setting_name
from interventions.registry import methods
from pytest_lmcompose.cli import main
from pytest_lmcompose.cli.flags import plugin_flags
from pytest_lmcompose.cli.listing import KINDS
from pytest_lmcompose.report.collect import SCHEMA_PATH
from pytest_lmcompose.settings import EvaluateSettings, ModelSettings, SuiteSettings, WorldSettings

MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
SECTIONS: dict[str, type] = {
    "model": ModelSettings,
    "world": WorldSettings,
    "evaluate": EvaluateSettings,
    "suite": SuiteSettings,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page; raises KeyError for a name that nothing generates."""
    return MARK.sub(lambda match: PARTS[match[1]](), markdown)


def flags() -> str:
    """Return a table of all flags, then one of the ini keys that have no flag."""
    found, ini = plugin_flags()
    keys = {flag.name: f"lmcompose_{flag.name.replace('-', '_')}" for flag in found}
    rows = []
    for flag in found:
        key = keys[flag.name]
        rows.append((code(str(flag)), code(key) if key in ini else "", flag.help))
    others = [(code(key), help) for key, help in ini.items() if key not in keys.values()]
    return table(("flag", "ini key", "what it does"), rows) + "\n" + table(("ini key alone", "what it does"), others)


def settings() -> str:
    """Return a table of keys for each section of the recipe, the methods' own last."""
    parts = []
    for name, kind in SECTIONS.items():
        parts.append(f"## {name}\n\n{summary(kind)}\n\n{keys_of(name, kind)}")
    for name, method in methods().items():
        kind = method.settings_type()
        parts.append(f"## {name}\n\n{method.category}. {summary(kind)}\n\n{keys_of(name, kind)}")
    return "\n".join(parts)


def keys_of(section: str, kind: type) -> str:
    """Return the table of a section's keys."""
    rows = [(code(f"{section}.{key}"), code(default), *others) for key, default, *others in fields(kind)]
    return table(("key", "default", "values", "meaning"), rows) if rows else "It has no settings.\n"


def fields(kind: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield key, default, values and description of every field of a settings dataclass, those inside of it too."""
    hints, described = field_types(kind), descriptions(kind)
    for field in dataclasses.fields(kind):
        name = setting_name(field.name)
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            yield from fields(typing.cast(type, hint), f"{prefix}{name}.")
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        shown = "null" if default is None else json.dumps(default, ensure_ascii=False)
        yield f"{prefix}{name}", shown, describe(hint), described.get(field.name, "")


def descriptions(kind: type) -> dict[str, str]:
    """Return the texts that stand below the fields of a dataclass and of those it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for before, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(before.target, ast.Name) and isinstance(after.value, ast.Constant)
                found[before.target.id] = one_line(str(after.value.value))
    return found


def summary(kind: type) -> str:
    """Return the description of a settings dataclass."""
    return one_line(inspect.getdoc(kind) or "")


def searched_settings() -> str:
    """Return a table of the settings that `lmcompose repair` and `tune` search, from their defaults."""
    rows = []
    for name, method in methods().items():
        for key, value, hint, search in searched(method.settings_type()()):
            options = [str(one) for one in search.options(value, hint)] or [
                *(form.format("LAYER") for form in search.layers),
                *(f"{shift:+d}" for shift in search.plus),
                *(f"{factor:g} times" for factor in search.times),
            ]
            rows.append((code(f"{name}.{key}"), ", ".join(options)))
    return table(("setting", "values"), rows)


def schema() -> str:
    """Return a table of properties for each kind of object in a report."""
    document = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    parts = [f"Version {document['properties']['schema_version']['enum'][0]}. {document['description']}\n"]
    parts += [described("The document", document)]
    parts += [described(name, definition) for name, definition in document["$defs"].items()]
    return "\n".join(parts)


def described(title: str, node: Mapping[str, Any]) -> str:
    """Return heading, description and table of one kind of object."""
    text = f"## {title}\n\n"
    if title != "The document" and "description" in node:
        text += f"{node['description']}\n\n"
    rows = list(properties(node))
    return text + (table(("property", "type", "always", "meaning"), rows) if rows else f"{of_type(node)}\n")


def properties(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield a row for each property of an object, those of objects inside of it too."""
    required = node.get("required", ())
    for name, value in node.get("properties", {}).items():
        always = "yes" if name in required else ""
        yield code(prefix + name), of_type(value), always, value.get("description", "")
        for below, mark in inside(value):
            yield from properties(below, f"{prefix}{name}{mark}.")


def inside(node: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the objects that a property holds itself, or in a list."""
    for one in node.get("anyOf", (node,)):
        if "properties" in one:
            yield one, ""
        if "properties" in (items := one.get("items", {})):
            yield items, "[]"


def of_type(node: Mapping[str, Any]) -> str:
    """Return the type of a property, for a reader."""
    if "$ref" in node:
        where, _, name = node["$ref"].rpartition("/")
        return f"[{name}](#{name.lower()})" if where == "#/$defs" else f"as `{name}`"
    if "const" in node:
        return code(json.dumps(node["const"]))
    if "enum" in node:
        return " or ".join(code(json.dumps(value)) for value in node["enum"])
    for many in ("anyOf", "oneOf"):
        if many in node:
            return " or ".join(of_type(one) for one in node[many])
    kind = node.get("type", "anything")
    if kind == "array":
        return f"list of {of_type(node.get('items', {}))}"
    if kind == "object" and isinstance(node.get("additionalProperties"), dict):
        return f"object of {of_type(node['additionalProperties'])}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def commands() -> str:
    """Return the help text of every command."""
    parts = []

    def add(command: click.Command, name: str, parent: click.Context | None) -> None:
        context = click.Context(command, info_name=name, parent=parent, terminal_width=100, **command.context_settings)
        below = getattr(command, "commands", {})
        if parent is not None and not below:
            parts.append(f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n")
        for key in sorted(below):
            add(below[key], key, context)

    add(main, "lmcompose", None)
    return "\n".join(parts)


def names(kind: str) -> str:
    """Return the table of what `lmcompose list` prints."""
    rows = [(code(row[0]), *(code(cell) if "=" in cell else cell for cell in row[1:])) for row in KINDS[kind]()]
    heads = {"methods": ("method", "category", "what it is"), "suites": ("suite", "size", "compositions")}
    heads |= {"evaluators": ("evaluator", "key", "what it measures"), "presets": ("preset", "what it is")}
    return table(heads[kind], rows)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(escaped(cell) for cell in line)} |\n" for line in lines)


def code(text: str) -> str:
    """Return text as code."""
    return f"`{text}`"


def escaped(cell: str) -> str:
    """Return a cell whose bars and angle brackets stand for themselves."""
    cell = cell.replace("|", "\\|")
    return cell if cell.startswith("`") else cell.replace("<", "&lt;")


def one_line(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.split())


PARTS: dict[str, Callable[[], str]] = {
    "flags": flags,
    "settings": settings,
    "searched": searched_settings,
    "schema": schema,
    "commands": commands,
    **{kind: (lambda kind=kind: names(kind)) for kind in KINDS},
}
