"""Load a model and its tokenizer safely, and identify its weights. Imports torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interventions.offload import limit_memory, offload
from pytest_lmcompose.parallel.threads import torch_threads
from pytest_lmcompose.recipe import RecipeError
from pytest_lmcompose.settings import ModelSettings


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, and where it came from."""

    model: Any
    tokenizer: Any
    revision: str | None
    """Commit on the hub; None for a folder."""


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is CUDA where there is one, else the CPU.

    Raises RecipeError for CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"--lmcompose-device={name}: torch finds no CUDA device here")
    return torch.device(name)


def load_model(settings: ModelSettings, location: str, device: torch.device) -> Loaded:
    """Load the model at `location`, a folder or hub id, on `device`, or placed as `model.device_map` says.

    Only safetensors are read, and code of the model's own runs only with
    `model.trust_remote_code=true`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    threads = torch_threads(os.environ)
    if threads is not None and device.type == "cpu":
        torch.set_num_threads(threads)
    options: dict[str, Any] = {
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
    }
    spread = settings.device_map not in (None, "host")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            location,
            use_safetensors=True,
            dtype=_dtype(settings.dtype, device),
            **options,
            **_spread_over(settings, spread),
        )
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    _check_finite(model, location)
    if spread:
        _check_held(model, settings)
    elif settings.device_map is None:
        model.to(device)
    model.eval()
    budget = _bytes(settings.memory_budget)
    if settings.device_map == "host":
        offload(model, device, budget)
    elif budget is not None and not spread:
        limit_memory(model, budget)
    return Loaded(model, tokenizer, getattr(model.config, "_commit_hash", None))


def _check_finite(model: nn.Module, location: str) -> None:
    """Raise RecipeError for weights that are NaN or infinite: whatever is measured on them is nothing."""
    broken = [n for n, p in model.named_parameters() if not p.is_meta and not bool(torch.isfinite(p.detach()).all())]
    if broken:
        raise RecipeError(
            f"{location}: {len(broken)} weights hold NaN or infinite values, {broken[0]} among them; "
            "save the model again, or take another one"
        )


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else max(1, int(gib * 2**30))


def _spread_over(settings: ModelSettings, spread: bool) -> dict[str, Any]:
    """Return the options that let accelerate spread a model."""
    if not spread:
        return {}
    budget = _bytes(settings.memory_budget)
    gpus = torch.cuda.device_count()
    memory = {"max_memory": dict.fromkeys(range(gpus), budget)} if budget is not None and gpus else {}
    return {"device_map": settings.device_map, **memory}


def _check_held(model: nn.Module, settings: ModelSettings) -> None:
    """Raise RecipeError for weights that accelerate left on the host or on disk: no step could change them."""
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise RecipeError(
            f"model.device_map={settings.device_map}: {len(left)} weights do not fit on the devices, {left[0]} among "
            "them: use more or larger ones, raise model.memory_budget, or keep the weights on the host by "
            "model.device_map=host"
        )


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state: sorted names, dtypes, shapes and bytes."""
    return hash_tensors(model.state_dict())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors, whatever their order, device or memory layout."""
    return hash_digests({name: tensor_digest(tensor) for name, tensor in tensors.items()})


def hash_digests(digests: Mapping[str, str]) -> str:
    """Return what `hash_tensors` returns for the tensors of these digests."""
    return hashlib.sha256("".join(f"{name}\n{digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and values."""
    tensor = tensor.detach().to("cpu").contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}\n{tuple(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        # Without AMX a CPU multiplies bfloat16 matrices a hundred times slower than float32.
        return torch.float32 if device.type == "cpu" else "auto"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
