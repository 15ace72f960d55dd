"""Identify a model before any step, by everything its answers depend on. Imports torch."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from interventions.structure import placement
from pytest_lmcompose.build.load import Loaded, hash_tensors
from pytest_lmcompose.cache.address import address, hash_files

_OF_PLACES = ("name_or_path", "vocab_file", "tokenizer_file", "merges_file", "special_tokens_map_file", "is_local")
"""Arguments of a tokenizer that only say where it came from."""


def base_address(loaded: Loaded, weights: str) -> str:
    """Return the content address of a model before any step.

    It depends on the weights and how they were stored, the config, the generation config, the model's own code, the
    tokenizer and the device.
    """
    model = loaded.model
    config = _settings_of(model.config)
    generation = getattr(model, "generation_config", None)
    where = placement(model)
    devices = {where.device, *(parameter.device for parameter in model.parameters())}
    names = {torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in devices}
    name = "+".join(sorted(names)) + ("" if where.budget is None else f", {where.budget} bytes for a block")
    return address(
        weights=weights,
        grids=loaded.grids,
        buffers=hash_tensors(dict(model.named_buffers())),
        config=config,
        attention=str(getattr(model.config, "_attn_implementation", None)),
        generation=None if generation is None else _settings_of(generation),
        code=[_own_code(type(model)), _own_code(type(loaded.tokenizer))],
        tokenizer=_describe(loaded.tokenizer),
        device=name,
    )


def _settings_of(config: Any) -> Any:
    """Return a transformers config as plain data, without where it came from."""
    found = json.loads(config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "transformers_version"):
        found.pop(key, None)
    return found


def _own_code(kind: type) -> str:
    """Return the hash of the source of a class that came with a model and of its package; empty for library classes."""
    package, _, _ = kind.__module__.rpartition(".")
    if kind.__module__.partition(".")[0] in ("transformers", "tokenizers"):
        return ""
    files = {
        Path(file)
        for name, module in list(sys.modules.items())
        if (name == kind.__module__ or (package and name.startswith(f"{package}.")))
        and (file := getattr(module, "__file__", None)) is not None
    }
    return hash_files(sorted(files))


def _describe(tokenizer: Any) -> dict[str, Any]:
    """Return everything that determines how a tokenizer works, as plain data."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = getattr(getattr(tokenizer, "sp_model", None), "serialized_model_proto", None)
    given = {key: repr(value) for key, value in getattr(tokenizer, "init_kwargs", {}).items()}
    return {
        "kind": type(tokenizer).__name__,
        "rules": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "pieces": None if pieces is None else hashlib.sha256(pieces()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": str(getattr(tokenizer, "chat_template", None)),
        "added": [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "padding_side")],
        "given": {key: value for key, value in sorted(given.items()) if key not in _OF_PLACES},
    }
