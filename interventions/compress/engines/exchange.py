"""The files that this process and an engine exchange, in one folder.

There: `job.json` (method, settings, names), `config/`, `state.safetensors` (every parameter by name),
`tokens.safetensors` (`ids` (texts, longest) and `lengths` (texts,)) and `probe.safetensors` (`ids`
(1, tokens) and what the model says to them, `logits` (1, tokens, vocabulary) float32).
Back: `answer.safetensors` (changed parameters by name, ordinary de-quantised weights) and
`answer.json` (details, versions, seconds), `engine.safetensors` (what the engine's own compressed
model says to the probe), or `refused.json` with a sentence that says why not.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interventions.statistics import Batch
from interventions.structure import module_device
from interventions.types import InterventionError

PROBE_TOKENS = 64


class Answer(NamedTuple):
    """An engine's answer to a job."""

    weights: dict[str, Tensor]
    logits: Tensor
    """(1, tokens, vocabulary) float32: logits of the engine's own compressed model for the probe."""
    report: dict[str, Any]


@torch.no_grad()
def probe_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits for `ids` (1, tokens): (1, tokens, vocabulary) float32, on the CPU."""
    output = model(input_ids=ids.to(module_device(model)), use_cache=False)
    return output.logits.float().cpu()  # type: ignore[no-any-return]


def write_job(
    folder: Path, model: nn.Module, tokens: Batch, *, method: str, settings: Any, linears: tuple[str, ...], seed: int
) -> Tensor:
    """Write everything that an engine needs; return the ids of the probe.

    `tokens` is one batch, padded on the right; `linears` names the layers that are to be compressed.
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
    """Add the names that transformers before 5 uses to a config of transformers 5."""
    added = dict(config)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        added["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            added["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    # Compressed weights come back as float32 and are rounded here.
    return added | {"dtype": "float32", "torch_dtype": "float32"}


def read_answer(folder: Path, model: nn.Module, who: str) -> Answer:
    """Read what an engine wrote and check that it fits the model.

    Raises InterventionError that names `who` and the parameter for an answer that is missing, that
    has unknown names or other shapes, or NaN or infinite values.
    """
    files = [folder / name for name in ("answer.safetensors", "answer.json", "engine.safetensors")]
    lacking = [file.name for file in files if not file.exists()]
    if lacking:
        raise InterventionError(f"{who} ended without an answer: no {', '.join(lacking)}")
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
