"""The table of engines: their methods, supported settings and installation. Imports no torch.

An engine is another package that implements one of our methods. The module of `engine_workers` with the
name of the engine drives it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from interventions.names import near_names
from interventions.ranges import Range, shown
from interventions.types import InterventionError

OWN = "own"
"""The value of the setting `engine` that means this project's own kernels."""

_ALWAYS = frozenset({"engine", "engine_python", "samples", "max_tokens", "preserve_mask"})
"""Settings that work with every engine, because this project handles them."""


@dataclass(frozen=True)
class Engine:
    """One engine. `settings` holds, by method, the settings it can follow; others must stay at their defaults."""

    name: str
    package: str
    """The module to import; its presence is what makes the engine available to an interpreter."""
    distribution: str
    """The package's name on the package index, with the version that was tried."""
    settings: dict[str, frozenset[str]]
    own_environment: bool = False
    """Cannot be installed beside this project's transformers."""
    limits: dict[str, Range] = field(default_factory=dict)
    """Supported ranges, where smaller than those of our own kernels."""

    @property
    def variable(self) -> str:
        """The environment variable that names the interpreter to use."""
        return f"LMCOMPOSE_{self.name.upper()}_PYTHON"

    @property
    def target(self) -> str:
        """The make target that builds an environment for it."""
        return f"engine-{self.name.replace('_', '-')}"


_GPTQ = frozenset({"bits", "group_size", "symmetric", "act_order", "static_groups", "true_sequential", "damping"})
_PACKED = {"bits": Range(2, 4, also=(8,)), "damping": Range(above=0, below=1)}

ENGINES = (
    Engine(
        "autoawq",
        "awq",
        "autoawq==0.2.9",
        {"awq": frozenset({"bits", "group_size", "duo_scaling", "clip"})},
        limits={"bits": Range(4, 4), "group_size": Range(1)},
    ),
    Engine(
        "gptqmodel",
        "gptqmodel",
        "GPTQModel==7.6.0",
        {"gptq": _GPTQ},
        limits=_PACKED,
    ),
    Engine(
        "llmcompressor",
        "llmcompressor",
        "llmcompressor==0.14.0.1",
        {
            "awq": frozenset({"bits", "group_size", "grid", "duo_scaling"}),
            "gptq": _GPTQ,
            "wanda": frozenset({"sparsity", "pattern"}),
            "sparsegpt": frozenset({"sparsity", "pattern", "block_size", "damping"}),
        },
    ),
    Engine(
        "auto_gptq",
        "auto_gptq",
        "auto-gptq==0.7.1",
        {"gptq": _GPTQ},
        own_environment=True,
        limits=_PACKED,
    ),
)


def find_engine(method: str, name: str) -> Engine:
    """Return the engine called `name`, which must have `method`.

    Raises InterventionError with near names and all that have the method.
    """
    table = {engine.name: engine for engine in ENGINES if method in engine.settings}
    if name in table:
        return table[name]
    known = (OWN, *table)
    hint = near_names(name, known, n=2)
    raise InterventionError(f"{method} has no engine {name!r}.{hint} Known: {', '.join(known)}.")


def engine_problems(method: str, settings: Any) -> Iterator[str]:
    """Yield what the engine of `settings` cannot follow, each as `key=value: what to do`."""
    if settings.engine == OWN:
        return
    try:
        engine = find_engine(method, settings.engine)
    except InterventionError as error:
        yield f"engine={shown(settings.engine)}: {error}"
        return
    followed = engine.settings[method] | _ALWAYS
    for setting in dataclasses.fields(settings):
        value, name = getattr(settings, setting.name), setting.name
        if name not in followed and value != setting.default:
            yield (
                f"{name}={shown(value)}: the engine {engine.name} cannot follow {name}={value!r}; leave it at "
                f"{setting.default!r}, or use engine={OWN}"
            )
        elif name in engine.limits and not engine.limits[name].holds(value):
            yield f"{name}={value}: the engine {engine.name} takes {engine.limits[name]} only; or use engine={OWN}"


def interpreter(engine: Engine, named: str | None) -> str:
    """Return the Python to run the engine with.

    That is `named` (the setting `engine_python`), else what the engine's environment variable
    names, else the running one if the package is installed there. Raises InterventionError that
    says how to get the engine.
    """
    for path, origin in ((named, "engine_python"), (os.environ.get(engine.variable), engine.variable)):
        if path:
            if not os.access(path, os.X_OK) or os.path.isdir(path):
                raise InterventionError(f"engine {engine.name}: {origin} names {path}, which is no interpreter")
            return os.path.abspath(path)  # the process starts elsewhere
    if not engine.own_environment and importlib.util.find_spec(engine.package) is not None:
        return sys.executable
    extra = "" if engine.own_environment else f"install the extra pytest-lmcompose[{engine.name}], or "
    beside = ", which cannot be installed beside this project's transformers" if engine.own_environment else ""
    raise InterventionError(
        f"the engine {engine.name} needs {engine.distribution}{beside}: {extra}run `make {engine.target}` and name "
        f"that environment's interpreter by the setting engine_python or the variable {engine.variable}"
    )
