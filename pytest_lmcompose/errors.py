"""What can go wrong while a composition is built."""

from __future__ import annotations


class BuildError(Exception):
    """A step that failed; its cause is the method's own exception."""
