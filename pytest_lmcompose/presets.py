"""Find the preset files of a recipe, choose those that apply, and read them. No torch.

Presets lie in folders with the layout of compositions/conf: a folder for each group. Hydra's defaults lists say which
ones apply; a preset may also be any YAML file. A relative path in a user's file starts at the folder of that file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pytest_lmcompose.errors import RecipeError
from pytest_lmcompose.settings import SOURCE_SETS, SOURCES

Conf: TypeAlias = Path | tuple[Path, ...]
"""A folder of presets, or several: the first one that has a preset counts."""
SUFFIXES = (".yaml", ".yml")
THRESHOLDS = "thresholds"
"""The subfolder of threshold files."""
_PACKAGE = re.compile(r"^#\s*@package\s+(\S+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Preset:
    """The values of one file, with the sections that they belong to."""

    name: str
    """Its group and name, such as `world/paper`, or `world/` and its path."""
    path: Path
    values: dict[str, Any]


@dataclass
class Files:
    """The preset files that are named by their path, by the name that stands for them in Hydra's lists."""

    paths: dict[str, Path] = field(default_factory=dict)

    def add(self, group: str, path: Path) -> str:
        """Make a file a preset of a group and return its name; raises RecipeError."""
        name = f"file_{len(self.paths)}"
        text, values = _read(path)
        found = _PACKAGE.search(text)
        package = found[1] if found else None
        ConfigStore.instance().store(group=group, name=name, node=OmegaConf.create(values), package=package)
        self.paths[f"{group}/{name}"] = path
        return name

    def named(self, text: str) -> str:
        """Return a message with the paths of the files in place of their names."""
        for name, path in self.paths.items():
            text = text.replace(name, str(path))
        return text


def folders(conf: Conf) -> tuple[Path, ...]:
    """Return the folders of presets in the order of the search."""
    return (conf,) if isinstance(conf, Path) else conf


def presets(conf: Conf, group: str) -> tuple[str, ...]:
    """Return the names of the presets of a group."""
    return tuple(sorted({path.stem for folder in folders(conf) for path in (folder / group).glob("*.yaml")}))


def find(conf: Conf, name: str) -> Path | None:
    """Return the file `name`, such as `world/paper.yaml`, of the first folder that has it.

    The recipe itself is that of the last folder.
    """
    places = folders(conf) if "/" in name else folders(conf)[-1:]
    return next((path for folder in places if (path := folder / name).is_file()), None)


def is_preset_file(name: str) -> bool:
    """Say whether a name is the path of a preset file."""
    return name.endswith(SUFFIXES)


def chosen(conf: Conf, overrides: Sequence[str], files: Files) -> tuple[Preset, ...]:
    """Return the presets that the groups' overrides choose, in the order in which they apply. Raises RecipeError.

    Hydra chooses again only if a file of presets is new or has changed.
    """
    places = folders(conf)
    every = {path for folder in places for pattern in ("*.yaml", "*/*.yaml") for path in folder.glob(pattern)}
    found = {path: path.stat() for path in sorted({*every, *files.paths.values()})}
    stamps = tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in found.items())
    return _choose(places, tuple(overrides), tuple(files.paths.items()), stamps)


@lru_cache(maxsize=64)
def _choose(
    places: tuple[Path, ...], overrides: tuple[str, ...], given: tuple[tuple[str, Path], ...], stamps: object
) -> tuple[Preset, ...]:
    """Return what `chosen` returns; `given` are the files by name, `stamps` tell states of all files apart."""
    *others, last = places
    files = Files(dict(given))
    try:
        with initialize_config_dir(str(last), job_name="lmcompose", version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            for folder in reversed(others):
                loader.get_search_path().prepend("lmcompose", f"file://{folder}")
            # With this override, Hydra reads the search path again.
            found = loader.compute_defaults_list("recipe", ["hydra.searchpath=[]", *overrides], RunMode.RUN)
    except RecursionError:
        raise RecipeError(f"the recipe: presets inherit from each other in a circle: {', '.join(overrides)}") from None
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        for there in (there for folder in others for there in sorted(folder.glob("*/*.yaml"))):
            _read(there)  # a file that cannot be read has a better message
        raise RecipeError(f"the recipe: {files.named(str(error).splitlines()[0])}") from None
    presets = []
    for one in found.defaults:
        if one.config_path is None or one.config_path.startswith("hydra/"):
            continue
        own = files.paths.get(one.config_path)
        path = own or find(places, f"{one.config_path}.yaml")
        assert path is not None, one.config_path  # Hydra has found it
        name = one.config_path if own is None else f"{one.config_path.partition('/')[0]}/{own}"
        values: Any = {key: value for key, value in _read(path)[1].items() if key != "defaults"}
        for part in reversed((one.package or "").split(".")):
            values = {part: values} if part else values
        presets.append(Preset(name, path, values))
    return tuple(presets)


def anchored(values: Mapping[str, Any], folder: Path, inherited: str) -> dict[str, Any]:
    """Return the values of a world with relative paths that start at `folder`, the folder of its file.

    A world without a folder of its own keeps the one it inherits: then only what lies in `folder` starts there.
    """
    found = dict(values)
    sources = [key for key in (*SOURCES, "tasks") if found.get(key) is not None]
    own = found.get("folder", "" if not inherited else None)
    if own is not None:
        found["folder"] = str(folder / os.path.expanduser(own))
    else:
        found |= {key: _beside(found[key], folder) for key in sources}
        for key in SOURCE_SETS:
            if isinstance(sets := found.get(key), Mapping):
                found[key] = {name: _beside(source, folder) for name, source in sets.items()}
    if isinstance(name := found.get(THRESHOLDS), str) and (folder / name).is_file():
        found[THRESHOLDS] = str(folder / name)
    return found


def _beside(value: Any, folder: Path) -> Any:
    """Return a source with an absolute path if it lies in `folder`."""
    if isinstance(value, list):
        return [_beside(one, folder) for one in value]
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return {**value, "path": _beside(value["path"], folder)}
    if not isinstance(value, str) or not value:
        return value
    path, mark, options = value.partition("?")
    return f"{folder / path}{mark}{options}" if (folder / path).exists() else value


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text and the values of a preset file; raises RecipeError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = OmegaConf.to_container(OmegaConf.create(text) if text.strip() else OmegaConf.create())
    except FileNotFoundError:
        raise RecipeError(f"no such preset file: {path}") from None
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise RecipeError(f"{path}: not YAML: {reason}") from None
    if not isinstance(found, dict) or (found and ":" not in text):
        raise RecipeError(f"{path}: expected a mapping from keys to values")
    return text, {str(key): value for key, value in found.items()}
