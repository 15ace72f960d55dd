"""Check the installation, and say how to fix what is missing or broken.

Reads versions from package metadata. Imports only torch, in the last group, to list devices.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, MutableMapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.markers import UndefinedEnvironmentName
from packaging.requirements import Requirement

from interventions.compress.engines.table import ENGINES, Engine, interpreter
from interventions.types import InterventionError
from pytest_lmcompose.cache.folder import Cache, default_folder
from pytest_lmcompose.costs import size
from pytest_lmcompose.distribute.threads import WORKER_COUNT, available_cores, torch_threads
from pytest_lmcompose.options import SUITE_FOLDER

DISTRIBUTION = "pytest-lmcompose"
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w.-]+)['"]""")


class Check(NamedTuple):
    """The result of one check."""

    name: str
    state: Literal["ok", "absent", "broken"]
    """absent: not installed; only some features need it."""
    detail: str
    advice: str = ""
    """How to fix it."""


def checks(cache_dir: Path | None = None) -> Iterator[tuple[str, list[Check]]]:
    """Yield the heading and the checks of each group; the last group imports torch."""
    needed, extras = requirements()
    yield "python", [_python()]
    yield "packages", [_package(requirement) for requirement in needed]
    yield "suite", [_suite()]
    yield "extras", [_extra(name, wanted) for name, wanted in sorted(extras.items())]
    yield "engines", [_engine(engine) for engine in ENGINES]
    yield "programs", [_program("git", "reports and baselines would name the tested commit")]
    yield "cache", [_cache(cache_dir or default_folder(os.environ))]
    yield "devices and threads", [*_threads(os.environ), *_devices()]


def requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Return the requirements for this platform: the mandatory ones, and those of each extra."""
    always: list[Requirement] = []
    extras: dict[str, list[Requirement]] = {}
    for text in requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        found = _EXTRA.search(str(requirement.marker or ""))
        if _holds(requirement, "" if found is None else found[1]):
            (always if found is None else extras.setdefault(found[1], [])).append(requirement)
    return always, extras


def _holds(requirement: Requirement, extra: str) -> bool:
    try:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
    except UndefinedEnvironmentName:
        return True


def _python() -> Check:
    found = f"{platform.python_version()}, {sys.executable}"
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return Check("python", "ok", found)
    return Check("python", "broken", found, "use Python 3.11, 3.12 or 3.13")


def _package(requirement: Requirement) -> Check:
    found, problem = _installed(requirement)
    if problem is None:
        return Check(requirement.name, "ok", found)
    return Check(requirement.name, "broken", problem, f'pip install "{requirement.name}{requirement.specifier}"')


def _extra(name: str, wanted: Sequence[Requirement]) -> Check:
    problems = [f"{r.name}: {problem}" for r in wanted if (problem := _installed(r)[1]) is not None]
    if not problems:
        return Check(name, "ok", ", ".join(f"{r.name} {_installed(r)[0]}" for r in wanted))
    return Check(name, "absent", "; ".join(problems), f'pip install "{DISTRIBUTION}[{name}]"')


def _installed(requirement: Requirement) -> tuple[str, str | None]:
    """Return the installed version and the problem with it, if any."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return "", "not installed"
    if requirement.specifier.contains(found, prereleases=True):
        return found, None
    return found, f"{found} is installed, but {requirement.specifier} is required"


def _suite() -> Check:
    """Check that the package's data files are installed."""
    wanted = ("conf/recipe.yaml", "conf/thresholds/relative.yaml", "tinyworld/model/config.json")
    missing = [name for name in wanted if not (SUITE_FOLDER / name).is_file()]
    if not missing:
        return Check("compositions", "ok", str(SUITE_FOLDER))
    detail = f"missing in {SUITE_FOLDER}: {', '.join(missing)}"
    return Check("compositions", "broken", detail, f"pip install --force-reinstall {DISTRIBUTION}")


def _engine(engine: Engine) -> Check:
    methods = ", ".join(sorted(engine.settings))
    try:
        path = interpreter(engine, None)
    except InterventionError as error:
        named = os.environ.get(engine.variable)
        if named:
            return Check(engine.name, "broken", str(error), f"correct or unset {engine.variable}")
        extra = "" if engine.own_environment else f'pip install "{DISTRIBUTION}[{engine.name}]", or '
        advice = f"{extra}make {engine.target}, then set {engine.variable} to its interpreter"
        return Check(engine.name, "absent", f"for {methods}", advice)
    return Check(engine.name, "ok", f"for {methods}: {path}")


def _program(name: str, use: str) -> Check:
    path = shutil.which(name)
    return Check(name, "absent", use) if path is None else Check(name, "ok", path)


def _cache(folder: Path) -> Check:
    """Check that the cache folder, or the folder to create it in, is writable."""
    place = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    advice = "choose a writable folder with --lmcompose-cache-dir, or use --lmcompose-no-cache"
    if not place.is_dir():
        return Check("folder", "broken", f"{place} is not a folder", advice)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Check("folder", "broken", f"{place}: {error.strerror}", advice)
    held = sum(entry.bytes for entry in Cache(folder, 0, lambda _: None).entries()) if folder.is_dir() else 0
    free = shutil.disk_usage(place).free
    return Check("folder", "ok", f"{folder}: {size(held)} used, {size(free)} free on the disk")


def _threads(environ: MutableMapping[str, str]) -> Iterator[Check]:
    yield Check("cores", "ok", f"{available_cores()} available to this process")
    policy, count = environ.get("OMP_WAIT_POLICY"), torch_threads(environ)
    workers = environ.get(WORKER_COUNT)
    threads = f"{count} (OMP_NUM_THREADS)" if count is not None else "torch's default"
    yield Check("threads", "ok", threads + (f"; {workers} workers" if workers else ""))
    waiting = "passive" if policy is None else policy
    advice = "" if waiting.lower() == "passive" else "unset OMP_WAIT_POLICY: spinning threads make times vary"
    yield Check("waiting", "ok" if not advice else "absent", waiting, advice)


def _devices() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # for example a missing shared library
        advice = "reinstall torch; see https://pytorch.org/get-started/locally/"
        yield Check("torch", "broken", f"cannot be imported: {type(error).__name__}: {error}", advice)
        return
    yield Check("cpu", "ok", torch.backends.cpu.get_cpu_capability())
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            yield Check(f"cuda:{index}", "ok", f"{facts.name}, {size(facts.total_memory)}")
    else:
        built = torch.version.cuda or torch.version.hip
        detail = "torch finds no device" if built else "this torch is built without CUDA"
        yield Check("cuda", "absent", detail, "" if not built else "check the driver with nvidia-smi")
    if torch.backends.mps.is_available():
        yield Check("mps", "ok", "")
