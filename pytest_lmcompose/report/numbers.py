"""Numbers as every report for people writes them."""

from __future__ import annotations

from pytest_lmcompose.results import Interval, Measured

MISSING = "-"


def number(value: float) -> str:
    """Return a value."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def value_text(measured: Measured | None) -> str:
    """Return the value of a measurement; one that is not finite by its name."""
    return MISSING if measured is None else number(measured.number)


def with_error(value: float | None, error: float | None, sign: str = " ± ") -> str:
    """Return a value with its standard error."""
    if value is None:
        return MISSING
    return number(value) if error is None else f"{number(value)}{sign}{number(error)}"


def interval(found: Interval | None) -> str:
    """Return a value with its interval, where there is one."""
    if found is None:
        return MISSING
    if found.low is None or found.high is None:
        return number(found.value)
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"


def counted(n: int, what: str) -> str:
    """Return a number with what it counts."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
