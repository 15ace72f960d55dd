"""The plugin's flags as data, recorded from `add_options`."""

from __future__ import annotations

from typing import Any, NamedTuple

PREFIX = "--lmcompose-"


class Flag(NamedTuple):
    """One flag, as defined for pytest's parser."""

    name: str
    """Name without the common prefix."""
    help: str
    metavar: str | None
    """Placeholder for the value; None if the flag takes no value."""
    repeatable: bool
    alone: str | None
    """Value of the flag without `=VALUE`; None if a value is required."""

    def __str__(self) -> str:
        value = "" if self.metavar is None else f"={self.metavar}"
        return f"{PREFIX}{self.name}" + (value if self.alone is None else f"[{value}]")


class _Recorder:
    """Stands in for pytest's parser and its groups, and records the options."""

    def __init__(self) -> None:
        self.flags: list[Flag] = []
        self.ini: dict[str, str] = {}

    def getgroup(self, *_: Any, **__: Any) -> _Recorder:
        return self

    def addini(self, name: str, help: str, *_: Any, **__: Any) -> None:
        self.ini[name] = _unescaped(help)

    def addoption(self, *names: str, **attributes: Any) -> None:
        name = next(name for name in names if name.startswith(PREFIX)).removeprefix(PREFIX)
        action = str(attributes.get("action", "store"))
        self.flags.append(
            Flag(
                name,
                _unescaped(str(attributes.get("help", ""))),
                None if action.startswith("store_") else str(attributes.get("metavar") or "VALUE"),
                action == "append",
                attributes.get("const") if attributes.get("nargs") == "?" else None,
            )
        )


def _unescaped(help: str) -> str:
    """Return a help text without argparse's escapes."""
    return help.replace("%%", "%")


def plugin_flags() -> tuple[list[Flag], dict[str, str]]:
    """Return the plugin's flags, and its ini keys with their help texts."""
    from pytest_lmcompose.options import add_options

    recorder = _Recorder()
    add_options(recorder)  # type: ignore[arg-type]
    return recorder.flags, recorder.ini
