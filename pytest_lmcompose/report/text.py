"""Make text safe to show: escape control characters, bidirectional overrides and invisible characters."""

from __future__ import annotations

import unicodedata
from typing import Any

_SPACES = "\n\r\t\v\f\x85\u2028\u2029"


def visible(text: str, *, lines: bool = False) -> str:
    """Return `text` in one line with unprintable characters escaped, such as \\x1b; `lines` keeps newlines and tabs."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _written(char, lines) for char in text)


def cleaned(value: Any) -> Any:
    """Apply `visible` to all texts and keys of plain data; newlines and tabs stay."""
    if isinstance(value, str):
        return visible(value, lines=True)
    if isinstance(value, dict):
        return {visible(key): cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):  # lists of thousands of samples hold no text
        return value if value and isinstance(value[0], (int, float)) else [cleaned(item) for item in value]
    return value


def _written(char: str, lines: bool) -> str:
    if lines and char in "\n\t":
        return char
    if char in _SPACES:
        return " "
    return char if unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode("ascii")
