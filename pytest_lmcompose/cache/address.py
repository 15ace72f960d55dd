"""Content addresses: hashes of everything a state or a measurement depends on. Imports no torch."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import json
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from importlib.machinery import all_suffixes
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evaluators import registry
from evaluators.registry import evaluators
from evaluators.settings import UnlearningSettings
from interventions.contents import hash_files as hash_files
from interventions.registry import Method

if TYPE_CHECKING:
    from pytest_lmcompose.data.run_data import RunData
    from pytest_lmcompose.settings import EvaluateSettings, ModelSettings, WorldSettings

METHOD_LIBRARIES = (
    *("torch", "transformers", "tokenizers", "peft", "accelerate", "numpy", "scipy"),
    *("compressed-tensors", "gguf"),
)
"""Libraries whose version may change the result of a step."""
EVALUATOR_LIBRARIES = (*METHOD_LIBRARIES, "lm_eval", "datasets")
_UNKNOWN = secrets.token_hex()
GUARD = "interventions.step"
"""The code that runs every method."""
_NO_RESULT = re.compile(
    r"interventions|(interventions|evaluators)\.(registry|names|ranges|types)"
    r"|interventions\.(categories|intervention)"
)
"""Modules that only look up, describe and check: their code does not affect results."""


def address(**parts: Any) -> str:
    """Return the SHA-256 of named parts: plain data, dataclasses, and mappings and sequences of them.

    Raises TypeError for anything else.
    """
    text = json.dumps(_plain(parts), sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def method_code(method: Method) -> str:
    """Return the hash of the source that `method` runs: its modules, everything they import, and the guard."""
    return source_hash((*method.modules, GUARD))


def source_hash(modules: tuple[str, ...]) -> str:
    """Return the hash of the source of `modules` and of everything they import from their own packages.

    Imports are read from the source, also inside functions; a module that is only named in a string is not found.
    Other packages count by their versions, see `versions`.
    """
    packages = {name.partition(".")[0] for name in modules} | {"interventions", "evaluators"}
    sources: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in sources or (_NO_RESULT.fullmatch(name) and name not in modules):
            continue
        module = read_module(name)
        if module is not None:
            sources[name] = module.digest
            waiting += [n for n in module.imports if n.partition(".")[0] in packages]
        elif name in modules:  # from a notebook, for example: the source is unknown, so nothing is reused
            sources[name] = _UNKNOWN
    return address(sources=sources)


class Module(NamedTuple):
    """The source of a module."""

    digest: str
    imports: tuple[str, ...]
    """Names in its import statements that are, or may be, modules."""


@cache
def read_module(name: str) -> Module | None:
    """Read the source of a module, once per process; None if there is no such module or file."""
    source = _source(name)
    if source is None:
        return None
    path, content = source
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imports = dict.fromkeys(_imports(content, package)) if path.suffix == ".py" else ()
    return Module(hashlib.sha256(content).hexdigest(), tuple(imports))


def data_address(data: RunData, files: str, retain_model: str = "") -> str:
    """Return the content address of the evaluators' data; `files` is the hash of the files of the question tasks.

    `retain_model` identifies the model that unlearning is compared with.

    Datasets that a task fetches from a hub count by the text of the task alone.
    """
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data) if field.name != "tasks"}
    return address(files=files, retain_model=retain_model, **fields)


def measurements_address(state: str, data: str, alike: Mapping[str, Any]) -> str:
    """Return the content address of the measurements of a state; `state` and `data` are addresses.

    `alike` is what all states of a run have alike, see `measured_alike`.
    """
    return address(state=state, data=data, **alike)


def measured_alike(world: WorldSettings, evaluate: EvaluateSettings, asked: str | None = None) -> dict[str, Any]:
    """Return what the measurements of all states of a run depend on.

    `asked` is a prompt in the chat template, which may contain today's date; None for plain prompts.
    """
    return {
        "world": world.without_data(),
        "evaluate": evaluate,
        "asked": asked,
        "code": source_hash(("pytest_lmcompose.measure", *_modules(evaluate))),
        "libraries": versions(EVALUATOR_LIBRARIES),
    }


def retained_address(
    model: str, settings: ModelSettings, data: RunData, evaluate: EvaluateSettings, device: str, asked: str | None
) -> str:
    """Return the content address of the results of the retain model; `model` identifies it.

    `asked` is a prompt in the chat template, which may contain today's date; None for plain prompts.
    """
    return address(
        model=model,
        settings=dataclasses.replace(settings, path="", revision=None),
        data=data.unlearning,
        evaluate={field.name: getattr(evaluate, field.name) for field in dataclasses.fields(UnlearningSettings)},
        chat=evaluate.chat,
        asked=asked,
        device=device,
        code=source_hash(("evaluators.unlearning",)),
        libraries=versions(EVALUATOR_LIBRARIES),
    )


def _modules(evaluate: EvaluateSettings) -> Iterator[str]:
    """Yield the modules of the evaluators that run; no import statement names them."""
    for name, evaluator in evaluators().items():
        if name in evaluate.also or (evaluator in registry.BUILT_IN and getattr(evaluate, name)):
            yield from evaluator.modules


def versions(libraries: Collection[str]) -> dict[str, str]:
    """Return the versions of `libraries`, empty for those not installed."""
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):  # JSON would make 1 and "1" the same
            return {"mapping": sorted([[repr(key), _plain(item)] for key, item in value.items()])}
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a content address")


def _source(name: str) -> tuple[Path, bytes] | None:
    """Return the path and content of a module; None if there is no such module or file.

    Python looks up only the top-level package: to look up a submodule, it would import its parents.
    """
    top, *below = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    candidates = [Path(spec.origin)] if not below and spec.origin is not None else []
    if below:
        for location in spec.submodule_search_locations or ():
            path = Path(location, *below)
            candidates.append(path / "__init__.py")
            candidates += [path.with_name(path.name + suffix) for suffix in all_suffixes()]
    found = next((path for path in candidates if path.is_file()), None)
    return None if found is None else (found, found.read_bytes())


def _statements(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield statements with those inside them; unlike `ast.walk`, no expressions, which contain no statement."""
    for node in nodes:
        yield node
        for field in ("body", "handlers", "cases", "orelse", "finalbody"):
            yield from _statements(getattr(node, field, ()))


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Yield names that may be modules in the import statements of `source`, a module in `package`."""
    for node in _statements(ast.parse(source).body):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))  # the packages are run too
