"""Benchmarks of the plugin run it on the same tiny project as its tests do."""

from tests.plugin.conftest import heavy_modules, project, tiny_model, tiny_world

__all__ = ["heavy_modules", "project", "tiny_model", "tiny_world"]
