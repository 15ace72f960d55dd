"""Exceptions of recipes, models and builds."""

from __future__ import annotations


class BuildError(Exception):
    """A step failed; `__cause__` is the method's exception."""


class RecipeError(ValueError):
    """A recipe is invalid; the message names the key and suggests similar ones."""


class ModelError(RecipeError):
    """A stored model is unusable; the message names the file or tensor and the fix."""


class CheckpointError(RecipeError):
    """A checkpoint folder cannot be written or read; the message says why and how to fix it."""
