"""Run a compression method with an engine in a separate process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.compress.engines.exchange import Answer, probe_logits, read_answer, write_job
from interventions.compress.engines.table import OWN, Engine, find_engine, interpreter
from interventions.compress.kernels.blockwise import check_enough, check_weights, unscaled
from interventions.context import Context
from interventions.statistics import Batch, window_batches
from interventions.structure import within_context
from interventions.types import InterventionError, Resources

TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}
"""Maximum relative difference between the logits of the engine's compressed model and of ours with its weights.
Engines store scales in float16, which makes 0.0005."""
ROUNDED_TOLERANCE = 0.05
"""The same for models in float16 and bfloat16."""

WORKERS = Path(__file__).parent
"""The folder of `engine_workers`."""

_START = (
    "import sys, runpy; folder, worker = sys.argv[1:3]; sys.path = [p for p in sys.path if p] + [folder]; "
    "sys.argv = [worker, *sys.argv[3:]]; runpy.run_module('engine_workers.' + worker, run_name='__main__')"
)


@torch.no_grad()
def run_engine(
    method: str, model: nn.Module, tokenizer: Any, settings: Any, resources: Resources, context: Context
) -> dict[str, Any]:
    """Compress the linear layers of every decoder block by `settings.engine`, in place.

    The engine works on the CPU, in float32, on the tokens that our own method would read; its
    weights are written back de-quantised and rounded once. Returns its versions and seconds, the
    number of calibration tokens and how far our model with its weights is from its own.

    Raises InterventionError for an engine that is absent, refuses, crashes, leaves a layer out, or
    whose weights do not compute what its own model computes.
    """
    engine = find_engine(method, settings.engine)
    python = interpreter(engine, settings.engine_python)
    who = f"{method}: the engine {engine.name}"
    tokens = calibration_tokens(method, model, tokenizer, settings, resources, context)
    blocks = find_anatomy(model).blocks
    if method == "awq" and (names := unscaled(blocks, method, context)):
        raise InterventionError(
            f"{who} may fold scales into the operation before {names[0]}, which changes what this model computes: "
            f"use engine={OWN}, which leaves them out there"
        )
    linears = tuple(linear.name for block in blocks for linear in block.linears)
    parameter_names = [linear.parameter_name for block in blocks for linear in block.linears]
    with tempfile.TemporaryDirectory(prefix=f"lmcompose-{engine.name}-") as path:
        folder = Path(path)
        probe = write_job(folder, model, tokens, method=method, settings=settings, linears=linears, seed=context.seed)
        context.progress(f"{method}: {engine.name} runs in a process of its own")
        work(engine, python, folder, who)
        answer = read_answer(folder, model, who)
    lacking = [name for name in parameter_names if name not in answer.weights]
    if lacking:
        raise InterventionError(f"{who} left out {', '.join(lacking[:5])}; does it know {type(model).__name__}?")
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


def calibration_tokens(
    method: str, model: nn.Module, tokenizer: Any, settings: Any, resources: Resources, context: Context
) -> Batch:
    """Return the calibration tokens as one batch, after the checks that our own methods make."""
    if not resources.calibration:
        raise InterventionError(f"{method} needs calibration texts: give `calibration`")
    blocks = find_anatomy(model).blocks
    for block in blocks:
        check_weights(block, method)
    (tokens,) = window_batches(
        tokenizer,
        resources.calibration,
        samples=settings.samples,
        max_tokens=within_context(model, settings.max_tokens),
    )
    check_enough(blocks, [tokens], method, settings.samples, context)
    return tokens


def work(engine: Engine, python: str, folder: Path, who: str) -> None:
    """Start the engine's worker on the job in `folder` and wait for it.

    Raises InterventionError with the reason it gave, or the last lines it wrote.
    """
    log = folder / "log"
    with log.open("w") as stream:
        done = subprocess.run(
            [python, "-c", _START, str(WORKERS), engine.name, str(folder)],
            cwd=folder,  # engines leave files where they stand
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

    It has no settings of this interpreter or of a test run, no access to the hub, and threads that do not spin.
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
    """Return the relative difference between the logits of our model and of the engine's own model.

    Raises InterventionError if that is more than rounding explains: de-quantisation went wrong.
    """
    ours = probe_logits(model, probe)
    if ours.shape != answer.logits.shape:
        raise InterventionError(f"{who} answered the probe with logits of shape {tuple(answer.logits.shape)}")
    difference = float((ours - answer.logits).norm() / answer.logits.norm())
    dtype = next(model.parameters()).dtype
    allowed = TOLERANCE.get(dtype, ROUNDED_TOLERANCE)
    if not difference <= allowed:
        raise InterventionError(
            f"{who} gave weights that do not compute what its own model computes: relative difference of the "
            f"logits {difference:.3g}, allowed {allowed}"
        )
    return difference


def _reason(refused: Path) -> str | None:
    try:
        return str(json.loads(refused.read_text())["reason"])
    except (OSError, ValueError):
        return None  # none was given, or the process ended while it wrote


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-lines:])
