"""Read models in full precision and quantised ones. Imports torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D

from interventions.checkpoint.reading.kinds import ReadingError, quantisation
from interventions.checkpoint.reading.stored import Lazy, Packed, Shards
from interventions.known_grids import KnownGrid, tensor_digest
from interventions.rounding import set_rounding_

_FORMATS = {
    "awq": "awq",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed",
    "fp8": "fp8",
    "gptq": "gptq",
}
"""The module of each quantisation."""
_LOADING = ("device_map", "max_memory")
_PROBLEMS = {
    "missing_keys": "the model {0} lacks {1}",
    "unexpected_keys": "the model {0} stores {1}, which its config.json does not describe",
    "mismatched_keys": "the model {0} has the wrong shape of {1}",
    "error_msgs": "the model {0} could not be read: {1}",
}


def read_plain(place: str, options: Mapping[str, Any]) -> Any:
    """Return a model whose weights are stored in full precision; raises ReadingError if some are missing."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(place, use_safetensors=True, output_loading_info=True, **options)
    check_complete(place, loaded[1])
    return loaded[0]


def read_quantised(folder: Path, kind: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, KnownGrid]]:
    """Return a model from a folder of quantised weights; each is de-quantised when it is put into the model."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=options.get("trust_remote_code", False))
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    empty: Any = _empty_model(config, options)
    shards = Shards(folder)
    format = import_module(f"interventions.checkpoint.reading.{_FORMATS[kind]}")
    packed: dict[str, Packed] = format.find_packed(shards, quantisation(folder) or {})
    if not packed:
        raise ReadingError(f"{folder} says that its weights are stored as {kind}, but no tensor is")
    used = {part for weight in packed.values() for part in weight.parts.values()}
    is_extra = getattr(format, "is_extra", lambda name: False)
    state = {name: shards[name] for name in shards if name not in used and not is_extra(name)}
    for name, weight in packed.items():
        state[name] = Lazy(partial(_oriented, weight, shards, _is_transposed(empty, name)))
    dtype = options.get("dtype")
    if dtype in (None, "auto"):
        dtype = config.dtype or _stored_dtype(shards)
    loading = {key: options[key] for key in _LOADING if key in options}
    model, found = type(empty).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **loading
    )
    check_complete(str(folder), found)
    _restore_names(model, folder)
    if hasattr(format, "find_rounding"):
        names = {id(module): name for name, module in model.named_modules()}
        find = partial(_find, model)
        settings = quantisation(folder) or {}
        set_rounding_(model, format.find_rounding(shards, settings, lambda name: names.get(id(find(name)))))
    return model, _grids(model, packed, shards)


def _oriented(weight: Packed, shards: Shards, transposed: bool) -> Tensor:
    found = weight.read(shards)
    return found.t().contiguous() if transposed else found


def _empty_model(config: Any, options: Mapping[str, Any]) -> Any:
    """Return the model of a config without weights."""
    trusted = options.get("trust_remote_code", False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(config), trust_remote_code=trusted
        )


def _is_transposed(model: nn.Module, name: str) -> bool:
    """Return whether the model keeps a weight as (in, out)."""
    module = _find(model, name.rpartition(".")[0])
    return isinstance(module, Conv1D)


def _find(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module that a checkpoint calls `name`, with or without the prefix of the model's body."""
    modules = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return next((modules[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in modules), None)


def _stored_dtype(shards: Shards) -> torch.dtype:
    """Return the dtype of the weights that are stored in full precision, float16 if there are none."""
    known = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    return next((known[kind] for name in shards if (kind := shards[name].get_dtype()) in known), torch.float16)


def _restore_names(model: Any, folder: Path) -> None:
    """Set what transformers reads from a folder beside the weights."""
    model.config._name_or_path = model.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _grids(model: nn.Module, packed: Mapping[str, Packed], shards: Shards) -> dict[str, KnownGrid]:
    """Return the grids of the model's weights by parameter name."""
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for stored, weight in packed.items():
        module = _find(model, stored.rpartition(".")[0])
        if module is None or not isinstance(getattr(module, "weight", None), Tensor):
            continue  # merged into another parameter
        found[f"{names[id(module)]}.weight"] = KnownGrid(
            weight.bits, weight.group_size, weight.groups, weight.overhead_bits(shards), digest_of(module)
        )
    return found


def digest_of(module: nn.Module) -> str:
    """Return the digest of a linear layer's weight (out, in)."""
    weight: Any = module.weight
    return tensor_digest(weight.t() if isinstance(module, Conv1D) else weight)


def check_complete(location: str, found: Any) -> None:
    """Raise ReadingError if the stored tensors do not match the config; `found` is transformers' loading info."""
    for kind, problem in _PROBLEMS.items():
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in found.get(kind) or ())
        if names:
            which = names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
            what = problem.format(location, which)
            raise ReadingError(f"{what}: weights and config.json do not match; save or download both again")
