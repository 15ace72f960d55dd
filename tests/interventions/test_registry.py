"""A method is one file: found in its category's folder, and no other method's cached states notice."""

from __future__ import annotations

from pathlib import Path

import pytest

import interventions.edit
from interventions import registry
from interventions.categories import BUILT_IN, find_category
from interventions.types import Resources
from pytest_lmcompose.cache.address import method_code, read_module

NEW = '''
from dataclasses import dataclass
from interventions.edit.bases import Rewriter

@dataclass(frozen=True)
class NewSettings(Rewriter):
    """A new method."""
    name = "new"
    factor: float = 2.0
'''


def test_a_new_file_in_a_category_is_a_new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: method_code(method) for name, method in registry.methods().items()}
    (tmp_path / "new.py").write_text(NEW)
    monkeypatch.setattr(interventions.edit, "__path__", [*interventions.edit.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_table", {})
    registry._load.cache_clear()
    read_module.cache_clear()
    assert set(registry.methods()) == {*before, "new"}
    found = registry.find_method("new")
    assert (found.category, found.settings_type()().factor) == ("edit", 2.0)
    assert {name: method_code(registry.find_method(name)) for name in before} == before


def test_every_built_in_method_is_one_file_of_its_category() -> None:
    for name, method in registry.methods().items():
        if method.modules[0].startswith("interventions."):
            assert method.modules == (f"interventions.{method.category}.{name}",)


def test_what_categories_read_are_resources() -> None:
    for category in BUILT_IN:
        assert category.summary and set(category.reads) <= {field for field in Resources.__dataclass_fields__}
    with pytest.raises(ValueError, match="unknown category 'tun'; known: edit, unlearn, compress"):
        find_category("tun")


@pytest.mark.parametrize(
    ("name", "settings", "promised", "kept"),
    [
        ("awq", {"bits": 3}, {"average_bits": 3}, {"sparsity", "sparsity_2_4"}),
        ("rtn", {}, {"average_bits": 4}, {"sparsity", "sparsity_2_4"}),
        ("gptq", {}, {"average_bits": 4}, {"sparsity", "sparsity_2_4"}),
        ("gptq", {"preserve_mask": False}, {"average_bits": 4}, set()),
        ("wanda", {}, {"sparsity": 0.5}, {"average_bits", "sparsity", "sparsity_2_4"}),
        ("magnitude", {"pattern": "2:4"}, {"sparsity": 0.5, "sparsity_2_4": 1.0}, None),
        ("wanda", {"pattern": "4:8"}, {"sparsity": 0.5}, None),
        ("sparsegpt", {}, {"sparsity": 0.5}, {"sparsity", "sparsity_2_4"}),
        ("sparsegpt", {"preserve_mask": False}, {"sparsity": 0.5}, set()),
        ("memit", {}, {}, set()),
        ("ft", {"preserve_mask": True}, {}, {"sparsity", "sparsity_2_4"}),
        ("rmu", {"preserve_mask": True}, {}, {"sparsity", "sparsity_2_4"}),
        ("relearn", {}, {}, set()),
    ],
)
def test_settings_say_what_they_promise_and_keep(
    name: str, settings: dict[str, object], promised: dict[str, float], kept: set[str] | None
) -> None:
    made = registry.find_method(name).settings_type()(**settings)
    assert dict(made.promises()) == promised
    if kept is not None:
        assert {m for m in ("average_bits", "sparsity", "sparsity_2_4", "recall") if made.keeps(m)} == kept


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> object:
    yield
    monkeypatch.undo()
    registry._load.cache_clear()
    read_module.cache_clear()
