"""Text of a report as people may see it: nothing in it moves the cursor, turns the reading round, or hides."""

from __future__ import annotations

import unicodedata
from typing import Any

_SPACES = "\n\r\t\v\f\x85\u2028\u2029"


def visible(text: str, *, lines: bool = False) -> str:
    """Return `text` in one line, with control and formatting characters written out, as in \\x1b.

    With `lines`, breaks of lines and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _written(char, lines) for char in text)


def cleaned(value: Any) -> Any:
    """Return plain data with `visible` texts, of lines as they were, and visible keys."""
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
