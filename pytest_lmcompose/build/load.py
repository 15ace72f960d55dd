"""Load a model and its tokenizer safely, and identify its weights. Imports torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interventions.checkpoint.reading import ReadingError, read_model, read_tokenizer
from interventions.known_grids import KnownGrid
from interventions.known_grids import tensor_digest as tensor_digest
from interventions.offload import offload
from interventions.rounding import rounding_of
from interventions.structure import limit_memory
from pytest_lmcompose.build.checkpoint import check_folder
from pytest_lmcompose.devices import check_device
from pytest_lmcompose.distribute.threads import torch_threads
from pytest_lmcompose.errors import ModelError
from pytest_lmcompose.recipe import RecipeError
from pytest_lmcompose.settings import ModelSettings


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, with its tokenizer."""

    model: Any
    tokenizer: Any
    revision: str | None
    """Commit on the hub; None for a folder."""
    grids: Mapping[str, KnownGrid] = field(default_factory=dict)
    """How the checkpoint stored its quantised weights, by parameter name."""


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is CUDA if available, otherwise the CPU.

    Raises RecipeError if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    return torch.device(name)


def load_model(settings: ModelSettings, location: str, device: torch.device) -> Loaded:
    """Load the model at `location`, a folder, GGUF file or hub id, on `device`, or as placed by `model.device_map`.

    Only safetensors and GGUF files are read. The model's own code runs only with `model.trust_remote_code=true`. Raises
    ModelError if the model cannot be loaded completely.
    """
    if Path(location).exists():
        check_folder(Path(location))
    threads = torch_threads(os.environ)
    if threads is not None and device.type == "cpu":
        torch.set_num_threads(threads)
    spread = settings.device_map not in (None, "host")
    model, tokenizer, grids = _read(settings, location, device, spread)
    if spread:
        _check_held(model, settings)
    elif settings.device_map is None:
        model.to(device)
    model.eval()
    check_model(model, tokenizer, location)
    budget = _bytes(settings.memory_budget)
    if settings.device_map == "host":
        offload(model, device, budget)
    elif budget is not None and not spread:
        limit_memory(model, budget)
    return Loaded(model, tokenizer, getattr(model.config, "_commit_hash", None), grids)


def load_tokenizer(settings: ModelSettings, location: str) -> Any:
    """Load the tokenizer of the model at `location`; raises ModelError."""
    with _reading(settings, location) as options:
        return read_tokenizer(location, options)


def _read(
    settings: ModelSettings, location: str, device: torch.device, spread: bool
) -> tuple[Any, Any, dict[str, KnownGrid]]:
    """Return a model, its tokenizer and how its weights were stored; raises ModelError."""
    with _reading(settings, location) as options:
        options |= {"dtype": _dtype(settings.dtype, device), **_spread_over(settings, spread)}
        model, grids = read_model(location, options)
    return model, load_tokenizer(settings, location), grids


@contextmanager
def _reading(settings: ModelSettings, location: str) -> Iterator[dict[str, Any]]:
    """Explain errors of reading a model, and yield the options of every `from_pretrained`."""
    try:
        yield {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    except ReadingError as error:
        raise ModelError(str(error)) from error
    except Exception as error:  # transformers, the hub and a model's own code raise all kinds
        raise ModelError(_explained(location, error, settings.trust_remote_code)) from error


def _explained(location: str, error: Exception, trusted: bool) -> str:
    """Return why a model could not be loaded and how to fix it, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0][:300] if lines else type(error).__name__
    text = str(error)
    if "ignore_mismatched_sizes" in text:
        return (
            f"the model {location} has tensors of other shapes than its config.json describes; save or download both "
            "again"
        )
    if "trust_remote_code" in text and not trusted:
        return f"the model {location} comes with its own code: set model.trust_remote_code=true if you trust it"
    if "Unrecognized configuration class" in text:
        return f"the model {location} is not a causal language model: {reason.partition(' for this kind')[0]}"
    return f"the model {location} cannot be loaded: {type(error).__name__}: {reason}"


@torch.no_grad()
def check_model(model: Any, tokenizer: Any, location: str) -> None:
    """Raise ModelError for a tokenizer with too many tokens, for NaN or infinite weights, and for a model that is not a
    decoder: one whose output at a token depends on later tokens."""
    embeddings = model.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", None)
    words = getattr(tokenizer, "vocab_size", None)
    if isinstance(size, int) and isinstance(words, int) and words > size:
        raise ModelError(
            f"the tokenizer of {location} has {words} tokens, but the model embeds {size}: use the model's "
            "own tokenizer"
        )
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise ModelError(
            f"{location}: {len(broken)} weights contain NaN or infinite values, such as {broken[0]}; save the model "
            "again, or use another one"
        )
    parameter = next(model.parameters())
    if parameter.device.type == "cpu" and parameter.dtype in (torch.float16, torch.bfloat16):
        return  # a forward pass in half precision on a CPU would take minutes
    ids = torch.arange(1, 7, device=embeddings.weight.device) % (size or 7)
    other = ids.clone()
    other[-1] = 0
    one, two = (model(input_ids=row.unsqueeze(0), use_cache=False).logits[0, :-1].float() for row in (ids, other))
    if float((one - two).norm()) > (1e-4 if parameter.dtype == torch.float32 else 1e-2) * float(one.norm()):
        raise ModelError(
            f"the model {location} reads text in both directions ({type(model).__name__}): it is an encoder, or its "
            "config.json lacks is_decoder"
        )


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else max(1, int(gib * 2**30))


def _spread_over(settings: ModelSettings, spread: bool) -> dict[str, Any]:
    """Return the options for accelerate to spread a model over devices."""
    if not spread:
        return {}
    budget = _bytes(settings.memory_budget)
    gpus = torch.cuda.device_count()
    memory = {"max_memory": dict.fromkeys(range(gpus), budget)} if budget is not None and gpus else {}
    return {"device_map": settings.device_map, **memory}


def _check_held(model: nn.Module, settings: ModelSettings) -> None:
    """Raise RecipeError if accelerate left weights on the host or on disk, where no step can change them."""
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise RecipeError(
            f"model.device_map={settings.device_map}: {len(left)} weights do not fit on the devices, such as "
            f"{left[0]}: use more or larger devices, raise model.memory_budget, or keep the weights on the host with "
            "model.device_map=host"
        )


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state: sorted names, dtypes, shapes and bytes, and what it rounds as it runs."""
    digests = {name: tensor_digest(tensor) for name, tensor in model.state_dict().items()}
    return hash_digests({**digests, **rounding_of(model).digests()})


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors, independent of order, device and memory layout."""
    return hash_digests({name: tensor_digest(tensor) for name, tensor in tensors.items()})


def hash_digests(digests: Mapping[str, str]) -> str:
    """Return the result of `hash_tensors` from the digests of the tensors."""
    return hashlib.sha256("".join(f"{name}\n{digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        # Without AMX a CPU multiplies bfloat16 matrices a hundred times slower than float32.
        return torch.float32 if device.type == "cpu" else "auto"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
