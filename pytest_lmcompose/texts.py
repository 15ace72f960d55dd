"""Counts and lists of names in messages."""

from __future__ import annotations

from collections.abc import Sequence


def counted(n: int, what: str) -> str:
    """Format a count with its noun in the right number."""
    return f"{n} {what}" if n == 1 else f"{n} {what}{'es' if what.endswith('s') else 's'}"


def first_names(names: Sequence[str], most: int) -> str:
    """Return the first names, `most` at most, and how many more there are: "a, b and 3 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
