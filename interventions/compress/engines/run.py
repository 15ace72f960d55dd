"""Run a compression method with an engine in a separate process.

Both processes share one folder. This one writes `job.json` (method, settings, names), `config/`,
`state.safetensors` (every parameter by name), `tokens.safetensors` (`ids` (texts, longest) and `lengths` (texts,))
and `probe.safetensors` (`ids` (1, tokens) and the model's `logits` for them (1, tokens, vocabulary) float32).
The engine writes `answer.safetensors` (changed parameters by name, de-quantised), `answer.json` (details, versions,
seconds) and `engine.safetensors` (the probe's logits from the engine's own compressed model), or `refused.json`
with the reason why it cannot run the job.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.compress.engines.table import OWN, Engine, find_engine, interpreter
from interventions.compress.kernels.blockwise import calibration_batches, unscaled
from interventions.context import Context
from interventions.statistics import Batch
from interventions.structure import module_device
from interventions.types import InterventionError, Resources

PROBE_TOKENS = 64
TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}
"""Maximum relative difference between the logits of the engine's compressed model and ours with its weights.
Float16 scales, as engines store them, cause about 0.0005."""
ROUNDED_TOLERANCE = 0.05
"""The same for models in float16 and bfloat16."""

WORKERS = Path(__file__).parent
"""The folder of `engine_workers`."""

_START = (
    "import sys, runpy; folder, worker = sys.argv[1:3]; sys.path = [p for p in sys.path if p] + [folder]; "
    "sys.argv = [worker, *sys.argv[3:]]; runpy.run_module('engine_workers.' + worker, run_name='__main__')"
)


class Answer(NamedTuple):
    """What an engine returns for a job."""

    weights: dict[str, Tensor]
    logits: Tensor
    """(1, tokens, vocabulary) float32: logits of the engine's own compressed model for the probe."""
    report: dict[str, Any]


@torch.no_grad()
def run_engine(
    method: str, model: nn.Module, tokenizer: Any, settings: Any, resources: Resources, context: Context
) -> dict[str, Any]:
    """Compress the linear layers of every decoder block by `settings.engine`, in place.

    The engine works on the CPU, in float32, with the same calibration tokens as our own kernels. Its de-quantised
    weights are rounded once to the model's dtype. Returns the engine's versions and seconds, the number of
    calibration tokens, and the relative difference between our model's logits and the engine's.

    Raises InterventionError if the engine is not installed, refuses, crashes, skips a layer, or returns weights that
    do not reproduce its own logits.
    """
    engine = find_engine(method, settings.engine)
    python = interpreter(engine, settings.engine_python)
    who = f"{method}: the engine {engine.name}"
    blocks = find_anatomy(model).blocks
    (tokens,) = calibration_batches(model, tokenizer, settings, resources, context, blocks)
    if method == "awq" and (names := unscaled(blocks, method, context)):
        raise InterventionError(
            f"{who} may fold scales into the operation before {names[0]}, which changes this model's output: "
            f"use engine={OWN}, which quantises these layers without scales"
        )
    stacked = [linear.name for block in blocks for linear in block.linears if linear.part is not None]
    if stacked:
        raise InterventionError(f"{who} does not find experts in one parameter, such as {stacked[0]}: use engine={OWN}")
    linears = tuple(linear.name for block in blocks for linear in block.linears)
    parameter_names = [linear.parameter_name for block in blocks for linear in block.linears]
    with tempfile.TemporaryDirectory(prefix=f"lmcompose-{engine.name}-") as path:
        folder = Path(path)
        probe = write_job(folder, model, tokens, method=method, settings=settings, linears=linears, seed=context.seed)
        context.progress(f"{method}: {engine.name} runs in a separate process")
        run_worker(engine, python, folder, who)
        answer = read_answer(folder, model, who)
    missing = [name for name in parameter_names if name not in answer.weights]
    if missing:
        raise InterventionError(f"{who} left out {', '.join(missing[:5])}; does it know {type(model).__name__}?")
    parameters = dict(model.named_parameters())
    for name, value in answer.weights.items():
        parameters[name].copy_(value)  # rounded once to the stored dtype
    difference = check_difference(model, probe, answer, who)
    return {
        "engine": engine.name,
        "calibration_tokens": int(tokens["attention_mask"].sum()),
        "difference": difference,
        **answer.report,
    }


@torch.no_grad()
def probe_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits for `ids` (1, tokens): (1, tokens, vocabulary) float32, on the CPU."""
    output = model(input_ids=ids.to(module_device(model)), use_cache=False)
    return output.logits.float().cpu()  # type: ignore[no-any-return]


def write_job(
    folder: Path, model: nn.Module, tokens: Batch, *, method: str, settings: Any, linears: tuple[str, ...], seed: int
) -> Tensor:
    """Write the job's files into `folder` and return the ids of the probe.

    `tokens` is one batch, padded on the right; `linears` names the layers to compress.
    """
    lengths = tokens["attention_mask"].sum(dim=1)
    ids = tokens["input_ids"]
    probe = ids[:1, : min(PROBE_TOKENS, int(lengths[0]))].contiguous()
    save_file({"ids": ids.contiguous(), "lengths": lengths}, folder / "tokens.safetensors")
    save_file({"ids": probe, "logits": probe_logits(model, probe)}, folder / "probe.safetensors")
    state = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(state, folder / "state.safetensors")
    job = {
        "method": method,
        "settings": dataclasses.asdict(settings),
        "linears": list(linears),
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps(readable_by_older(_config(model))))
    return probe


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None:
        raise InterventionError(f"{type(model).__name__}: without a config no engine can build the model again")
    return json.loads(config.to_json_string(use_diff=False))  # type: ignore[no-any-return]


def readable_by_older(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config of transformers 5 that older versions can read too."""
    added = dict(config)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        added["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            added["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    # The engine works in float32; its weights are rounded when they are written back.
    return added | {"dtype": "float32", "torch_dtype": "float32"}


def read_answer(folder: Path, model: nn.Module, who: str) -> Answer:
    """Read an engine's answer and check that it fits the model.

    Raises InterventionError, naming `who` and the parameter, for missing or unreadable files, unknown names, wrong
    shapes, and NaN or infinite values.
    """
    files = [folder / name for name in ("answer.safetensors", "answer.json", "engine.safetensors")]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise InterventionError(f"{who} ended without an answer: no {', '.join(missing)}")
    try:
        answer = Answer(load_file(files[0]), load_file(files[2])["logits"], json.loads(files[1].read_text()))
    except (SafetensorError, KeyError, ValueError) as error:
        raise InterventionError(f"{who} left an answer that cannot be read: {error}") from error
    parameters = dict(model.named_parameters())
    for name, value in answer.weights.items():
        if name not in parameters:
            raise InterventionError(f"{who} answered with {name}, which the model does not have")
        if value.shape != parameters[name].shape:
            raise InterventionError(
                f"{who} answered with {name} of shape {tuple(value.shape)}, not {tuple(parameters[name].shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise InterventionError(f"{who} left NaN or infinite values in {name}")
    return answer


def run_worker(engine: Engine, python: str, folder: Path, who: str) -> None:
    """Run the engine's worker on the job in `folder`.

    Raises InterventionError with the reason for a refusal, or with the last lines of the log.
    """
    log = folder / "log"
    with log.open("w") as stream:
        done = subprocess.run(
            [python, "-c", _START, str(WORKERS), engine.name, str(folder)],
            cwd=folder,  # some engines write files to the working folder
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )
    refused = _reason(folder / "refused.json")
    if refused is not None:
        raise InterventionError(f"{who} {refused} (interpreter: {python})")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise InterventionError(f"{who} was ended by {name}; is there enough memory?\n{_tail(log)}")
    if done.returncode:
        raise InterventionError(f"{who} failed (interpreter: {python}):\n{_tail(log)}")


def environment() -> dict[str, str]:
    """Return the environment variables for an engine's process.

    Drops variables of this interpreter and of the test run, disables GPUs and the hub, and limits threads.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PYTEST_", "COV_")) and name != "VIRTUAL_ENV"
    }
    threads = str(torch.get_num_threads())
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "passive",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }


def check_difference(model: nn.Module, probe: Tensor, answer: Answer, who: str) -> float:
    """Return the relative difference between the logits of our model and the engine's.

    Raises InterventionError if it exceeds rounding: de-quantisation went wrong.
    """
    ours = probe_logits(model, probe)
    if ours.shape != answer.logits.shape:
        raise InterventionError(f"{who} answered the probe with logits of shape {tuple(answer.logits.shape)}")
    difference = float((ours - answer.logits).norm() / answer.logits.norm())
    dtype = next(model.parameters()).dtype
    allowed = TOLERANCE.get(dtype, ROUNDED_TOLERANCE)
    if not difference <= allowed:
        raise InterventionError(
            f"{who} returned weights that do not reproduce its own logits: relative difference "
            f"{difference:.3g}, allowed {allowed}"
        )
    return difference


def _reason(refused: Path) -> str | None:
    try:
        return str(json.loads(refused.read_text())["reason"])
    except (OSError, ValueError):
        return None  # no refusal, or the process ended while writing it


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-lines:])
