"""What can go wrong before and while a composition is built."""

from __future__ import annotations


class BuildError(Exception):
    """A step that failed; its cause is the method's own exception."""


class RecipeError(ValueError):
    """A recipe that cannot be composed; the message names the key and lists near ones."""


class ModelError(RecipeError):
    """A model that cannot be used as it is stored; the message names the file or tensor and what to do."""
