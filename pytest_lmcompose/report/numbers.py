"""Format numbers for the reports that people read."""

from __future__ import annotations

from pytest_lmcompose.results import Interval, Measured

MISSING = "-"


def number(value: float) -> str:
    """Format a value."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def value_text(measured: Measured | None) -> str:
    """Format the value of a measurement; nan and inf by name."""
    return MISSING if measured is None else number(measured.number)


def with_error(value: float | None, error: float | None, sign: str = " ± ") -> str:
    """Format a value with its standard error."""
    if value is None:
        return MISSING
    return number(value) if error is None else f"{number(value)}{sign}{number(error)}"


def interval(found: Interval | None) -> str:
    """Format a value with its confidence interval, if it has one."""
    if found is None:
        return MISSING
    if found.low is None or found.high is None:
        return number(found.value)
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"
