"""What can go wrong while a model is loaded or a composition is built."""

from __future__ import annotations


class BuildError(Exception):
    """A step that failed; its cause is the method's own exception."""


class ModelError(ValueError):
    """A model that cannot be used as it is stored; the message names the file or tensor and what to do."""
