"""Define the plugin's flags and ini values, and read them into `Options`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pytest_lmcompose.baseline.options import (
    COMPARE,
    COMPARE_METAVAR,
    FAIL,
    LATEST,
    SWITCHES,
    VALUES,
    BaselineOptions,
    read_baseline_options,
)
from pytest_lmcompose.cache.folder import DEFAULT_LIMIT, default_folder
from pytest_lmcompose.cache.remote import check_url, front_folder, is_url, local_path
from pytest_lmcompose.checkpoints.options import FORMATS, PLAIN, ExportOptions
from pytest_lmcompose.costs import SECONDS
from pytest_lmcompose.distribute.shard import Shard, read_shard
from pytest_lmcompose.report import github
from pytest_lmcompose.report.files import TargetError, check_folder, is_file, path_of
from pytest_lmcompose.report.options import FLAGS, Outputs, read_outputs

SUITE_FOLDER = Path(__file__).resolve().parent.parent / "compositions"
"""The installed suite: recipes, thresholds and the embedded world. Located relative to the plugin, because your project
may also have a folder of that name."""

COMPRESSION_ENGINES = ("autoawq", "gptqmodel", "llmcompressor", "auto_gptq")
"""Names of `interventions.compress.engines`, repeated here so that importing this module does not import them."""
LOCAL = "local"
"""Name of the default engine, pytest's own loop."""
BUDGET = r"(?=.*[1-9])\d{1,5}(\.\d{1,3})?(s|min|h)"
_DEVICE = r"auto|cpu|mps|cuda(:(0|[1-9][0-9]{0,3}))?"


@dataclass(frozen=True)
class Options:
    """The plugin's options; a flag overrides its ini value."""

    model: str | None
    world: str | None
    conf: Path | None
    """Folder of the user's presets."""
    suite: str | None
    compose: tuple[str, ...]
    overrides: tuple[str, ...]
    thresholds: Path | None
    """None: those of the world."""
    seed: int
    repeats: int
    """Number of times to measure each composition, with seeds seed, seed + 1, ... for edits and methods."""
    device: str
    gpus_per_worker: int
    """For pytest-xdist; 0: every worker sees all GPUs."""
    json: Path | None
    engine: str
    """The engine that runs the tests: `local`, or one of a plugin; see `hookspec`."""
    shard: Shard | None
    """The part of the compositions to test; None: all."""
    plan: bool
    """Whether to print the plan instead of running it."""
    cache_dir: Path | None
    """Folder of the cache; None: no cache."""
    cache_url: str | None
    """URL of a remote cache; `cache_dir` is then its local copy."""
    cache_size: int
    """Maximum size of the cache in bytes."""
    resume: bool
    budget: float | None
    """Seconds that the run may take; None: any."""
    allow_commands: bool
    """Whether steps may run the user's commands."""
    engines: tuple[tuple[str, str], ...]
    """Default interpreters of compression engines, as pairs of environment variable and path."""
    folder: Path
    """Folder where pytest was called; relative paths start here."""
    baselines: BaselineOptions
    """Which runs to store and compare."""
    export: ExportOptions | None
    """Where to export compositions; None: nowhere."""
    outputs: Outputs
    """Reports other than JSON, and the layout of the terminal's tables."""
    given: bool
    """Whether any option is set; if so, check the recipe before collection."""

    @property
    def targets(self) -> dict[str, Path]:
        """The files of all reports, by flag."""
        return {**({} if self.json is None else {"--lmcompose-json": self.json}), **self.outputs.files}


def add_options(parser: pytest.Parser) -> None:
    """Define the flags and their ini values."""
    group = parser.getgroup("lmcompose", "lmcompose: build, measure and gate compositions of interventions")

    def add(name: str, help: str, metavar: str, ini: Any = "string", **kwargs: Any) -> None:
        group.addoption(f"--lmcompose-{name}", dest=_key(name), help=help, metavar=metavar, **kwargs)
        ini_help = f"{help} (default of --lmcompose-{name})"
        parser.addini(_key(name), ini_help, type=ini, default=[] if ini == "linelist" else "")

    add("model", "preset, YAML file of one, folder with config.json, or hub id (default: tinyworld)", "MODEL")
    add("world", "data to measure on: preset, or YAML file of one (default: the model preset's)", "WORLD")
    add("conf", "folder of presets with the layout of compositions/conf, searched first", "DIR")
    suites = ", ".join(sorted(path.stem for path in (SUITE_FOLDER / "conf" / "suite").glob("*.yaml")))
    add("suite", f"suite to test: {suites} (default: main)", "NAME")
    add(
        "compose",
        "test this composition, e.g. 'awq[bits=3]+memit', instead of the suite's (repeatable)",
        "ID",
        "linelist",
        action="append",
    )
    add(
        "set",
        "override a recipe key in Hydra syntax, e.g. memit.layers=[2,3] (repeatable)",
        "KEY=VALUE",
        "linelist",
        action="append",
    )
    add("thresholds", "YAML file of thresholds (default: the world's)", "PATH")
    add("seed", "seed of the run; all other seeds follow from it (default: 0)", "N")
    add("repeats", "number of times to measure each composition, with seeds SEED, SEED+1, ... (default: 1)", "N")
    add("device", "auto, cpu, mps, cuda, cuda:1, ... (default: auto)", "DEVICE")
    add(
        "gpus-per-worker",
        "GPUs for each worker of -n; -n auto starts as many workers as fit; 0: share all GPUs (default: 1)",
        "N",
    )
    add("shard", "test part K of N of the compositions; `lmcompose merge` joins the reports", "K/N")
    add(
        "budget",
        "time for the run, e.g. 90s or 10min: what tells most goes first, and what does not fit is left out",
        "TIME",
    )
    add("engine", "where the tests run: local, ray, or an engine of another plugin (default: local)", "ENGINE")
    add("json", "write the report as JSON to this file", "PATH")
    add("export", "write each composition to a folder in DIR that from_pretrained loads, with a model card", "DIR")
    add("export-format", f"format of the exported weights: {', '.join(FORMATS)} (default: {PLAIN})", "FORMAT")
    for name, help, metavar in FLAGS:
        add(name, help, metavar)
    for name, help, metavar in VALUES:
        add(name, help, metavar)
    add("compare", COMPARE, COMPARE_METAVAR, nargs="?", const=LATEST)
    add("compare-fail", FAIL, "EXPR", "linelist", action="append")
    add("cache-dir", "folder or URL of the cache of states and measurements (default: ~/.cache/lmcompose)", "PATH")
    add("cache-size", "maximum size of the cache in GiB; the least recently used entries go first (default: 20)", "GIB")

    def flag(name: str, help: str) -> None:
        group.addoption(f"--lmcompose-{name}", dest=_key(name), help=help, action="store_true", default=None)

    flag("no-cache", "ignore the cache; store nothing")
    parser.addini("lmcompose_no_cache", "ignore the cache; store nothing", type="bool", default=False)
    flag("no-github", "in GitHub Actions: no annotations of failed gates, and no job summary")
    parser.addini("lmcompose_no_github", "default of --lmcompose-no-github", type="bool", default=False)
    flag("allow-commands", "permit steps such as command[run=...] to run the commands in their settings")
    flag("sequential", "ask the questions of a state in parts, and stop once its gates on them are decided")
    flag("resume", "resume an interrupted run with the same options and report its progress")
    for name, help in SWITCHES:
        flag(name, help)
        parser.addini(_key(name), f"{help} (default of --lmcompose-{name})", type="bool", default=False)
    flag("plan", "print the states to build and the expected cost, then exit")
    for engine in COMPRESSION_ENGINES:
        help = f"interpreter of the engine {engine} if {_engine_variable(engine)} is not set (see docs/engines.md)"
        parser.addini(_key(f"{engine}_python"), help, type="string", default="")


def read_options(config: pytest.Config) -> Options:
    """Read and check the options; raises pytest.UsageError."""
    names = ("model", "world", "conf", "suite", "thresholds", "seed", "repeats", "device", "shard", "json", "cache_dir")
    values = {name: _value(config, name) for name in (*names, "cache_size", "engine", "export", "export_format")}
    compose, overrides = _values(config, "compose"), _values(config, "set")
    if config.getoption("lmcompose_sequential"):
        overrides = (*overrides, "evaluate.sequential=true")
    folder = config.invocation_params.dir
    thresholds, conf = path_of(values["thresholds"], folder), path_of(values["conf"], folder)
    if thresholds is not None and not is_file(thresholds):
        raise pytest.UsageError(f"--lmcompose-thresholds: no such file: {thresholds}")
    if conf is not None and not os.path.isdir(conf):
        raise pytest.UsageError(f"--lmcompose-conf: no such folder: {conf}")
    seed = _checked("seed", values["seed"] or "0", r"\d{1,18}", "a whole number from 0 up")
    repeats = _checked("repeats", values["repeats"] or "1", r"[1-9]\d{0,3}", "a whole number from 1 to 9999")
    device = _checked("device", values["device"] or "auto", _DEVICE, "auto, cpu, mps, cuda or cuda:N")
    gpus = _checked("gpus-per-worker", _value(config, "gpus_per_worker") or "1", r"\d{1,4}", "a whole number from 0 up")
    baselines = read_baseline_options(
        lambda name: _value(config, name.replace("-", "_")),
        lambda name: _switch(config, name),
        _values(config, "compare_fail"),
        folder,
        config.rootpath,
    )
    outputs = read_outputs(
        lambda name: _value(config, _key(name).removeprefix("lmcompose_")),
        folder,
        github=github.active() and not _switch(config, "no_github"),
    )
    return Options(
        model=values["model"],
        world=values["world"],
        conf=conf,
        suite=values["suite"],
        compose=compose,
        overrides=overrides,
        thresholds=thresholds,
        seed=int(seed),
        repeats=int(repeats),
        device=device,
        gpus_per_worker=int(gpus),
        json=path_of(values["json"], folder),
        engine=values["engine"] or LOCAL,
        shard=_shard(values["shard"]),
        plan=bool(config.getoption("lmcompose_plan")),
        cache_dir=_cache_dir(config, values["cache_dir"], folder),
        cache_url=values["cache_dir"] if is_url(values["cache_dir"] or "") else None,
        cache_size=_cache_size(values["cache_size"]),
        resume=bool(config.getoption("lmcompose_resume")),
        budget=_budget(config),
        allow_commands=bool(config.getoption("lmcompose_allow_commands")),
        engines=_engines(config),
        folder=folder,
        baselines=baselines,
        export=_export(config, values["export"], values["export_format"], folder),
        outputs=outputs,
        given=any(values.values()) or bool(compose or overrides) or baselines.wanted or outputs.wanted,
    )


def _checked(flag: str, value: str, pattern: str, expected: str) -> str:
    """Return `value`; raises pytest.UsageError if it does not match `pattern`."""
    if not re.fullmatch(pattern, value):
        raise pytest.UsageError(f"--lmcompose-{flag}: expected {expected}, not {value!r}")
    return value


def _cache_dir(config: pytest.Config, value: str | None, folder: Path) -> Path | None:
    """Return the folder of the cache, or None without a cache; a flag overrides an ini value."""
    flag: str | None = config.getoption("lmcompose_cache_dir")
    off: bool | None = config.getoption("lmcompose_no_cache")
    if off and flag is not None:
        raise pytest.UsageError("--lmcompose-no-cache and --lmcompose-cache-dir cannot be combined")
    if off or (flag is None and config.getini("lmcompose_no_cache")):
        if config.getoption("lmcompose_resume"):
            raise pytest.UsageError("--lmcompose-resume needs the cache: remove --lmcompose-no-cache")
        return None
    if value and is_url(value):
        try:
            check_url(value)
        except ValueError as error:
            raise pytest.UsageError(f"--lmcompose-cache-dir: {error}") from None
        return front_folder(value, os.environ)
    path = folder / os.path.expanduser(local_path(value)) if value else default_folder(os.environ)
    try:
        check_folder(path)
    except TargetError as error:
        raise pytest.UsageError(f"--lmcompose-cache-dir: {error}") from None
    return path


def _export(config: pytest.Config, value: str | None, format: str | None, folder: Path) -> ExportOptions | None:
    if format is not None and format not in FORMATS:
        raise pytest.UsageError(f"--lmcompose-export-format: expected {', '.join(FORMATS)}, not {format!r}")
    path = path_of(value, folder)
    if path is None and config.getoption("lmcompose_export_format") is not None:
        raise pytest.UsageError("--lmcompose-export-format requires --lmcompose-export=DIR")
    return None if path is None else ExportOptions(path, format or PLAIN)


def _shard(value: str | None) -> Shard | None:
    try:
        return read_shard(value) if value else None
    except ValueError as error:
        raise pytest.UsageError(f"--lmcompose-shard: {error}") from None


def _budget(config: pytest.Config) -> float | None:
    value = _value(config, "budget")
    if value is None:
        return None
    expected = "a time such as 90s, 10min or 1.5h"
    number, unit = re.fullmatch(r"([\d.]+)(s|min|h)", _checked("budget", value, BUDGET, expected)).groups()  # type: ignore[union-attr]
    workers = any(getattr(config.option, name, None) for name in ("numprocesses", "tx"))
    if workers or (_value(config, "engine") or LOCAL) != LOCAL:
        raise pytest.UsageError("--lmcompose-budget: one process decides what fits: run without -n and other engines")
    return float(number) * SECONDS[unit]


def _engines(config: pytest.Config) -> tuple[tuple[str, str], ...]:
    """Return the interpreters in the ini file; relative paths are relative to it."""
    folder = config.rootpath if config.inipath is None else config.inipath.parent
    given = [(_engine_variable(name), str(config.getini(_key(f"{name}_python")))) for name in COMPRESSION_ENGINES]
    return tuple((variable, str(folder / os.path.expanduser(path))) for variable, path in given if path)


def _cache_size(value: str | None) -> int:
    if value is None:
        return DEFAULT_LIMIT
    positive = r"(?=.*[1-9])\d{1,6}(\.\d{1,3})?"
    return int(float(_checked("cache-size", value, positive, "a number of GiB, such as 20 or 0.5")) * 1024**3)


def asked_for_distribution(config: pytest.Config) -> bool:
    """Return whether the user passed --dist or -d of pytest-xdist; -n alone does not count."""
    given = config.known_args_namespace
    return getattr(given, "dist", "no") != "no" or bool(getattr(given, "distload", False))


def _key(name: str) -> str:
    """Return the ini name of a flag, which is also its `dest`."""
    return f"lmcompose_{name.replace('-', '_')}"


def _engine_variable(name: str) -> str:
    """Return the environment variable for the interpreter of an engine."""
    return f"LMCOMPOSE_{name.upper()}_PYTHON"


def _value(config: pytest.Config, name: str) -> str | None:
    """Return the value of the flag, or of the ini file; None if both are unset."""
    flag: str | None = config.getoption(f"lmcompose_{name}")
    if flag is not None:
        return _filled(name, flag)
    return str(config.getini(f"lmcompose_{name}")).strip() or None


def _filled(name: str, flag: str) -> str:
    """Return `flag`; raises pytest.UsageError if it is empty, for example from an unset shell variable."""
    if not flag.strip(" \t\r\n,"):
        raise pytest.UsageError(
            f"--lmcompose-{name.replace('_', '-')}={flag}: the value is empty; give one or remove the flag"
        )
    return flag


def _switch(config: pytest.Config, name: str) -> bool:
    return bool(config.getoption(_key(name)) or config.getini(_key(name)))


def _values(config: pytest.Config, name: str) -> tuple[str, ...]:
    flags: list[str] | None = config.getoption(f"lmcompose_{name}")
    for flag in flags or ():
        _filled(name, flag)
    ini: list[str] = [line for line in config.getini(f"lmcompose_{name}") if line.strip()]
    # Flags are appended to the ini file's overrides, and the last one wins; other flags replace ini values.
    return (*ini, *(flags or ())) if name == "set" else tuple(flags or ini)
