"""Recipes: Hydra chooses among the groups of compositions/conf, and their values become frozen, typed settings.

Keys and types are those of the dataclasses in `pytest_lmcompose.settings` and of the settings of every registered
intervention, so an unknown key, a wrong type or a value out of range is an error before any work. Values are literal:
interpolation is rejected. Importing this module imports Hydra, but no torch.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException

from evaluators.registry import UnknownEvaluator, find_evaluator
from interventions import names
from interventions.categories import categories, find_category
from interventions.intervention import check_given, misplaced, read_compositions
from interventions.ranges import (
    SettingError,
    check_settings,
    check_value,
    field_name,
    field_types,
    parts_of,
    setting_name,
)
from interventions.registry import UnknownMethod, find_method, methods
from interventions.types import InterventionError
from pytest_lmcompose.composition import Composition, CompositionError, Step, parse, permutations
from pytest_lmcompose.errors import RecipeError as RecipeError
from pytest_lmcompose.presets import Conf, Files, Preset, anchored, chosen, folders, is_preset_file
from pytest_lmcompose.presets import presets as presets
from pytest_lmcompose.settings import EvaluateSettings, ModelSettings, SuiteSettings, WorldSettings

near_names = partial(names.near_names, cutoff=0.5)

_UNSET = "???"
"""What Hydra's users write for a value that is still to be set."""
_SECTIONS: dict[str, type] = {
    "model": ModelSettings,
    "world": WorldSettings,
    "evaluate": EvaluateSettings,
    "suite": SuiteSettings,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The checked settings of a run."""

    model: ModelSettings
    world: WorldSettings
    evaluate: EvaluateSettings
    suite: SuiteSettings
    world_name: str
    """The preset of the world, or its file."""
    config: dict[str, dict[str, Any]] = dataclasses.field(repr=False)
    """The composed sections, including those of the methods, with the names of fields as keys."""
    _settings: dict[Step, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)
    """Settings by step: thousands of compositions share a few steps."""
    _others: dict[Step, dict[str, Composition]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def settings(self, step: Step) -> Any:
        """Return the settings of `step`: the method's section, updated with the step's own settings.

        Raises RecipeError for an unknown method or key, or an invalid value.
        """
        if step not in self._settings:
            self._settings[step] = self._read_settings(step)
        return self._settings[step]

    def _read_settings(self, step: Step) -> Any:
        try:
            settings_type = find_method(step.method).settings_type()
        except UnknownMethod as error:
            raise RecipeError(str(error)) from None
        section = copy.deepcopy(self.config[step.method])
        for key, value in step.settings:
            text = f"{step.method}.{key}={value}"
            override = _parse_override(text)
            _check_override(text, override)
            _assign(section, key.split("."), override.value(), field_types(settings_type))
        settings = _instance(settings_type, section, step.method)
        try:
            check_given(settings, [key for key, _ in step.settings])
        except SettingError as error:
            raise RecipeError(f"{step.method}.{error}") from None
        return settings

    def plain(self) -> dict[str, Any]:
        """Return all sections as plain data."""
        sections = copy.deepcopy(self.config)
        return {name: {setting_name(key): value for key, value in keys.items()} for name, keys in sections.items()}

    def others(self, step: Step) -> Mapping[str, Composition]:
        """Return the compositions that a step reads the weights of, by the text in its settings; raises RecipeError."""
        if step not in self._others:
            try:
                self._others[step] = {text: parse(text) for text in read_compositions(self.settings(step))}
            except CompositionError as error:
                raise RecipeError(f"{step}: {error}") from None
        return self._others[step]

    def reads(self, step: Step) -> Iterable[Composition]:
        """Return the compositions that a step reads the weights of; raises RecipeError."""
        return self.others(step).values()

    def check(self, composition: Composition, above: tuple[Composition, ...] = ()) -> Composition:
        """Return `composition` after checking every step's method and settings.

        `above` are the states whose steps read this one. Raises RecipeError.
        """
        for size, step in enumerate(composition.steps):
            others = self.others(step)
            state = Composition(composition.steps[: size + 1])
            if state in above:
                raise RecipeError(f"{step} reads a composition that has this step itself: {state}")
            for other in others.values():
                try:
                    self.check(other, (*above, state))
                except RecipeError as error:
                    raise RecipeError(f"{step}: {error}") from None
            before = Composition(composition.steps[:size]).id
            for problem in misplaced(self.settings(step), before, {text: other.id for text, other in others.items()}):
                raise RecipeError(f"{step}: {problem}")
        return composition

    def read(self, text: str) -> Composition:
        """Parse and check a composition id; raises RecipeError."""
        try:
            return self.check(parse(text))
        except CompositionError as error:
            raise RecipeError(str(error)) from None

    def suite_compositions(self) -> tuple[Composition, ...]:
        """Return the compositions of the suite, named ones first; raises RecipeError."""
        named = [self.read(text) for text in self.suite.compositions]
        steps = [self._single_step(text) for text in self.suite.permute]
        category = (lambda step: find_method(step.method).category) if self.suite.across_categories else None
        return tuple(dict.fromkeys([*named, *permutations(steps, self.suite.max_steps, category)]))

    def _single_step(self, text: str) -> Step:
        """Read and check an entry of suite.permute."""
        steps = self.read(text).steps
        if len(steps) != 1:
            raise RecipeError(f"suite.permute: {text!r} is not one step, such as awq or awq[bits=3]")
        return steps[0]


def load_recipe(
    conf: Conf, overrides: Sequence[str] = (), stored: Mapping[str, Mapping[str, Any]] | None = None
) -> Recipe:
    """Compose the presets of `conf`, folders with the layout of compositions/conf, with `overrides` in Hydra's grammar.

    `stored` are sections of an earlier recipe, which replace those of the presets. Later overrides win. A mapping or
    list replaces that of a preset; one for a section sets the keys that it has. A group takes the name of a preset, or
    the path of a YAML file. Raises RecipeError for an unknown key or preset, or a value of the wrong type or out of its
    range.
    """
    texts, values, files = [], [], Files()
    for text in overrides:
        override = _parse_override(text)
        if override.key_or_group in groups():
            texts.append(_choice(text, conf, override, files))
        else:
            _check_override(text, override)
            values.append(override)
    kinds = _kinds()
    config = {name: _defaults(kind) for name, kind in kinds.items()}
    world_name = ""
    for preset in chosen(conf, texts, files):
        group, _, name = preset.name.partition("/")
        world_name = name if group == "world" else world_name
        _merge(config, preset, own=preset.path.is_relative_to(folders(conf)[-1]))
    for name, given in (stored or {}).items():
        try:
            check_value(name, _SECTIONS[name], given)
        except SettingError as error:
            raise RecipeError(f"the stored recipe: {error}") from None
        _assign(config, [name], given, kinds)
    for override in values:
        _assign(config, override.key_or_group.split("."), override.value(), kinds)
    sections: dict[str, Any] = {name: _instance(kind, config[name], name) for name, kind in _SECTIONS.items()}
    also = {name: _of_evaluator(name, values) for name, values in sections["evaluate"].also.items()}
    sections["evaluate"] = dataclasses.replace(sections["evaluate"], also=also)
    for name, method in methods().items():  # also unused ones: a wrong setting is always an error
        _instance(method.settings_type(), config[name], name)
        try:
            find_category(method.category)
        except ValueError as error:
            raise RecipeError(f"the intervention {name!r}: {error}") from None
    return Recipe(**sections, world_name=world_name, config=config)


def _merge(config: dict[str, dict[str, Any]], preset: Preset, *, own: bool) -> None:
    """Set the values of a preset; relative paths in a file of the user's, which is not `own`, start at its folder."""
    kinds, path = _kinds(), preset.path
    for section, given in preset.values.items():
        if section not in kinds:
            raise RecipeError(f"{path}: unknown section {section!r}.{near_names(section, kinds)}".removesuffix("."))
        if not isinstance(given, dict):
            raise RecipeError(f"{path}: {section}: expected a mapping from keys to values")
        kind = kinds[section]
        if unknown := [key for key in given if key not in field_types(kind)]:
            hint = near_names(unknown[0], field_types(kind))
            if set(unknown) <= set(kinds):
                hint = " To set several sections, start the file with the line '# @package _global_'."
            raise RecipeError(f"{path}: unknown key {unknown[0]!r} of {section}.{hint}".removesuffix("."))
        if _interpolates(given):
            raise RecipeError(f"{path}: {section}: ${{...}} is not resolved; write the value itself")
        try:
            check_value(section, kind, given)
        except SettingError as error:
            raise RecipeError(f"{path}: {error}") from None
        if section == "world" and not own:
            given = anchored(given, path.parent, config["world"]["folder"])
        if given.get("path") and not own and (path.parent / str(given["path"])).exists():
            given = {**given, "path": str(path.parent / str(given["path"]))}
        _assign(config, [section], given, kinds)


def groups() -> tuple[str, ...]:
    """Return the names of the groups with presets."""
    return ("model", "world", *categories(), "evaluate", "suite")


def quoted(value: str) -> str:
    """Return `value` as a quoted string of Hydra's override grammar."""
    # Backslashes are literal in this grammar except before a quote, where each is doubled.
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _kinds() -> dict[str, type]:
    """Return the settings dataclass of each section."""
    return {**_SECTIONS, **{name: method.settings_type() for name, method in methods().items()}}


def _defaults(kind: type) -> dict[str, Any]:
    """Return the default of each field of a settings dataclass as plain data; none for a field without a default."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        if item.default_factory is not dataclasses.MISSING:
            found[item.name] = item.default_factory()
        elif item.default is not dataclasses.MISSING:
            found[item.name] = item.default
        else:
            continue
        if dataclasses.is_dataclass(found[item.name]):
            found[item.name] = dataclasses.asdict(found[item.name])
        found[item.name] = _converted(field_types(kind)[setting_name(item.name)], found[item.name])
    return found


def _instance(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """Return settings of `kind` with `values`, by the names of fields; raises RecipeError."""
    hints = field_types(kind)
    complete = {}
    for name, value in values.items():
        hint, key = hints[setting_name(name)], f"{where}.{setting_name(name)}"
        if value == _UNSET:
            raise RecipeError(f"{key}={_UNSET}: expected a value")
        nested = dataclasses.is_dataclass(hint)
        complete[name] = _instance(typing.cast(type, hint), value, key) if nested else copy.deepcopy(value)
    try:
        settings = kind(**complete)
        check_settings(settings)
    except SettingError as error:
        raise RecipeError(f"{where}.{error}") from None
    except (TypeError, ValueError, InterventionError) as error:  # from checks of other packages
        raise RecipeError(f"{where}: {error}") from None
    return settings


def _of_evaluator(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Check the settings of an external evaluator; return them as plain data with its defaults."""
    where = f"evaluate.also.{name}"
    try:
        kind = find_evaluator(name).settings_type()
    except UnknownEvaluator as error:
        raise RecipeError(f"{where}: {error}") from None
    try:
        check_value(where, kind, values)
    except SettingError as error:
        raise RecipeError(str(error)) from None
    section = _defaults(kind)
    for key, value in values.items():
        _assign(section, [key], value, field_types(kind))
    return dataclasses.asdict(_instance(kind, section, where))


def _assign(node: dict[str, Any], path: Sequence[str], value: Any, hints: Mapping[str, Any]) -> None:
    """Set what lies at `path` below `node`, whose keys have the types `hints`; keys of a mapping have none.

    A mapping or list replaces the one that is there, except that a dataclass keeps its other fields.
    """
    name, *below = path
    key, hint = (field_name(name) if name in hints else name), hints.get(name, Any)
    inner = field_types(typing.cast(type, hint)) if dataclasses.is_dataclass(hint) else {}
    if not below and not (inner and isinstance(value, Mapping)):
        node[key] = _converted(hint, value)
        return
    if not isinstance(node.get(key), dict):
        node[key] = {}
    for further, item in [(below, value)] if below else [([one], item) for one, item in value.items()]:
        _assign(node[key], further, item, inner)


def _converted(hint: Any, value: Any) -> Any:
    """Return a copy of a value in which whole numbers are floats where the type `hint` says so."""
    kind, _, _ = parts_of(hint)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(kind) is list and isinstance(value, list | tuple):
        return [_converted(typing.get_args(kind)[0], item) for item in value]
    if typing.get_origin(kind) is dict and isinstance(value, Mapping):
        return {key: _converted(typing.get_args(kind)[1], item) for key, item in value.items()}
    return copy.deepcopy(value)


def _check_override(text: str, override: Override) -> None:
    """Check key and value of an override; raises RecipeError for an unknown key or an invalid value."""
    parts = override.key_or_group.split(".")
    known: dict[str, Any] = dict(_kinds())
    hint: Any = None
    in_mapping = False
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if in_mapping:
            kind = parts_of(hint)[0]
            if kind is Any:
                return
            if typing.get_origin(kind) is not dict:
                raise RecipeError(f"{text!r}: {above} has no keys of its own")
            hint = typing.get_args(kind)[1]
            continue
        if depth and not dataclasses.is_dataclass(hint):
            raise RecipeError(f"{text!r}: {above} has no keys of its own")
        if part not in known:
            hint = near_names(part, sorted({*known, *groups()}) if depth == 0 else known)
            what = f"unknown key {part!r} of {above}" if depth else f"unknown section {part!r} of the recipe"
            raise RecipeError(f"{text!r}: {what}.{hint} Known: {', '.join(known)}.")
        hint = known[part]
        in_mapping = parts_of(hint)[0] is Any or typing.get_origin(parts_of(hint)[0]) is dict
        known = field_types(typing.cast(type, hint)) if dataclasses.is_dataclass(hint) else {}
    try:
        check_value(override.key_or_group, hint, override.value())
    except SettingError as error:
        raise RecipeError(str(error)) from None


def _choice(text: str, conf: Conf, override: Override, files: Files) -> str:
    """Check the choice of a group's presets and return it with names for files; raises RecipeError."""
    group, value = override.key_or_group, override.value()
    known = presets(conf, group)
    own = [name for name, method in methods().items() if method.category == group]
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    for place, name in enumerate(names):
        if name in known:
            continue
        if is_preset_file(name):
            names[place] = files.add(group, Path(name).expanduser().absolute())
            continue
        raise RecipeError(
            f"{text!r}: no preset {name!r} in {' or '.join(str(folder / group) for folder in folders(conf))}."
            f"{near_names(name, [*known, *own])} Known: {', '.join(known) or 'none'}."
            + (" Methods need no preset: name them in a composition." if own else "")
        )
    if names == [str(value)]:
        return text
    return f"{group}=[{','.join(names)}]" if isinstance(value, list) else f"{group}={names[0]}"


def _parse_override(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except (OverrideParseException, HydraException) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"{text!r}: not an override key=value in Hydra's grammar: {reason}") from None
    if override.type is None or override.type.name != "CHANGE" or override.package is not None:
        raise RecipeError(f"{text!r}: only key=value is allowed; keys cannot be added or removed")
    if override.is_sweep_override():
        raise RecipeError(f"{text!r}: several values; write a list as [1,2], or one composition per value")
    if _interpolates(text) or _interpolates(override.value()):
        raise RecipeError(f"{text!r}: ${{...}} is not resolved; write the value itself")
    return override


def _interpolates(value: Any) -> bool:
    """Return whether a value contains ${...}, which could put a secret into the report."""
    if isinstance(value, dict):
        return any(_interpolates(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(map(_interpolates, value))
    return isinstance(value, str) and "${" in value
