"""Deselect the latency tests unless you select them: timings on a busy machine mean nothing."""

from __future__ import annotations

import pytest

MARKER = "latency"


class WithoutBenchmark:
    """Replaces pytest-benchmark where it is not installed."""

    @pytest.fixture
    def benchmark(self) -> None:
        pytest.skip("this needs the extra benchmark: pip install 'pytest-lmcompose[benchmark]'")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARKER}: times a forward pass; run with -m {MARKER} or --benchmark-json=PATH")
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(WithoutBenchmark(), "lmcompose-without-benchmark")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the latency tests unless an expression, a path or a benchmark option selects them."""
    option = config.option
    texts = [option.markexpr, option.keyword, *map(str, config.args)]
    if any(MARKER in text for text in texts) or getattr(option, "benchmark_only", False):
        return
    if getattr(option, "benchmark_json", None) or getattr(option, "benchmark_save", None):
        return
    left_out = [item for item in items if item.get_closest_marker(MARKER)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker(MARKER)]
