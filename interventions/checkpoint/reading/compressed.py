"""Checkpoints of compressed-tensors, unpacked by the package of that name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from interventions.checkpoint.reading.kinds import ReadingError
from interventions.checkpoint.reading.stored import Packed, Shards
from interventions.compress.schemes import Scheme
from interventions.rounding import Cached, Rounded, Rounding

_ORDER = "weight_g_idx"
_CODES = ("weight_packed", "weight")
_SCALES = (torch.float16, torch.bfloat16)


def find_packed(shards: Shards, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """Return the packed weights of a checkpoint by name; raises ReadingError for one that cannot be unpacked."""
    from compressed_tensors.quantization import QuantizationConfig

    try:
        config = QuantizationConfig.model_validate(_current(settings))
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ReadingError(f"quantization_config is not one of compressed-tensors: {reason}") from None
    found = {}
    for stored in shards:
        if not stored.endswith("weight_scale"):
            continue
        name = stored.removesuffix("weight_scale").removesuffix(".")
        held = {role: f"{name}.{role}" for role in _roles(shards, name)}
        codes = next((role for role in _CODES if role in held), None)
        if codes is None:
            raise ReadingError(f"{stored} has neither {name}.weight_packed nor {name}.weight: it is incomplete")
        scheme = _scheme(config, name)
        shape = tuple(shards.read(held["weight_shape"]).tolist()) if "weight_shape" in held else None
        shape = shape or _shape(shards.shape(held[codes]), codes, scheme.weights.num_bits)
        _check_packed(shards, held, shape, scheme.weights.num_bits)
        scales = shards.shape(stored)
        columns = -(-shape[-1] // scales[-1]) if len(scales) > 1 else shape[-1]
        unpack = partial(unpack_weight, scheme=scheme, format=_format(config, scheme))
        found[f"{name}.weight"] = Packed(held, shape, scheme.weights.num_bits, columns, prod(scales), unpack)
    return found


def find_rounding(shards: Shards, settings: Mapping[str, Any], find: Callable[[str], str | None]) -> Rounding:
    """Return what the model rounds while it runs; `find` gives a module's name in the model.

    What is no symmetric rounding of groups of a token's channels, or by one scale, is left out.
    """
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(_current(settings))
    inputs: dict[str, Rounded] = {}
    caches: dict[str, Cached] = {}
    for stored in shards:
        module, _, part = stored.rpartition(".")
        name = find(module)
        if part == "weight_scale" and name is not None:
            arguments = _scheme(config, module).input_activations
            scheme = None if arguments is None else _scheme_of(arguments)
            scale = _scale(shards, module, "input_global_scale", "input_scale")
            if scheme is not None and (scale is not None or not scheme.calibrated):
                inputs[name] = Rounded(scheme, scale if scheme.calibrated else None)
        if part == "k_scale" and name is not None and config.kv_cache_scheme is not None:
            scheme = _scheme_of(config.kv_cache_scheme)
            keys, values = _scale(shards, module, "k_scale"), _scale(shards, module, "v_scale")
            if scheme is not None and keys is not None and values is not None:
                caches[name] = Cached(Rounded(scheme, keys), Rounded(scheme, values))
    return Rounding(inputs, caches)


def _scale(shards: Shards, module: str, *parts: str) -> float | None:
    """Return the first of the parts of a module that is stored, if it is one number."""
    found = next((shards.read(f"{module}.{part}") for part in parts if f"{module}.{part}" in shards), None)
    return float(found) if found is not None and found.numel() == 1 else None


def _scheme_of(arguments: Any) -> Scheme | None:
    """Return the scheme of rounded activations."""
    if not arguments.symmetric:
        return None
    bits, floats, group = arguments.num_bits, arguments.type == "float", arguments.group_size
    if arguments.strategy == "tensor_group":
        return Scheme(bits, group, floats=floats, scales="two-level", calibrated=True)
    if arguments.strategy == "tensor" and arguments.dynamic is False:
        return Scheme(bits, floats=floats, calibrated=True)
    if arguments.dynamic is not True:
        return None
    if arguments.strategy == "group":
        return Scheme(bits, group, floats=floats, scales="power" if arguments.scale_dtype == torch.uint8 else "number")
    return Scheme(bits, floats=floats) if arguments.strategy == "token" else None


def _current(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without what later versions of the package refuse or unpacking does not need."""
    found = {key: value for key, value in settings.items() if key not in ("sparsity_config", "transform_config")}
    groups = found.get("config_groups")
    if isinstance(groups, Mapping):
        found["config_groups"] = {name: _without_order(group) for name, group in groups.items()}
    return found


def _without_order(group: Any) -> Any:
    """Return a config group without the order of activations, which `weight_g_idx` has."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return group
    return {**group, "weights": {key: value for key, value in weights.items() if key != "actorder"}}


def is_extra(name: str) -> bool:
    """Return whether a tensor only serves activations or the KV cache."""
    last = name.rpartition(".")[2]
    return last.startswith(("input_", "output_", "k_", "v_", "q_")) and last.endswith(("scale", "zero_point", "g_idx"))


def _roles(shards: Shards, name: str) -> list[str]:
    known = ("packed", "scale", "shape", "zero_point", "g_idx", "global_scale")
    return [role for role in ("weight", *(f"weight_{part}" for part in known)) if f"{name}.{role}" in shards]


def _scheme(config: Any, name: str) -> Any:
    """Return the scheme of a module: the one that names it, else the one of its class."""
    from compressed_tensors.utils.match import match_name

    schemes = [scheme for scheme in config.config_groups.values() if scheme.weights is not None]
    for scheme in schemes:
        if any(match_name(name, target) for target in scheme.targets):
            return scheme
    classes = [scheme for scheme in schemes if {"Linear", "Embedding"} & set(scheme.targets)]
    if len(schemes) == 1 or classes:
        return (classes or schemes)[0]
    raise ReadingError(f"{name} is stored quantised, but no config group of quantization_config has it as a target")


def _format(config: Any, scheme: Any) -> str:
    from compressed_tensors.compressors.format import infer_module_format

    given = getattr(scheme.format, "value", scheme.format) or config.format
    usable = given not in (None, "mixed-precision", "dense", "fakequant")
    return str(given if usable else infer_module_format(torch.nn.Linear, scheme).value)


def _shape(stored: tuple[int, ...], codes: str, bits: int) -> tuple[int, ...]:
    return stored if codes == "weight" else (*stored[:-1], stored[-1] * 8 // bits)


def _check_packed(shards: Shards, held: Mapping[str, str], shape: tuple[int, ...], bits: int) -> None:
    if "weight_shape" not in held or "weight_packed" not in held:
        return
    stored = shards.shape(held["weight_packed"])
    if stored != (*shape[:-1], -(-shape[-1] * bits // 32)):
        raise ReadingError(
            f"{held['weight_packed']} {stored} does not hold {shape} in {bits} bits: it is damaged, or another version "
            "of compressed-tensors packed it"
        )


def unpack_weight(parts: Mapping[str, Tensor], *, scheme: Any, format: str) -> Tensor:
    """Return the weight (out, in) of the tensors of a layer."""
    from compressed_tensors.compressors import BaseCompressor

    # Scales in half precision would round every product.
    state = {role: part.float() if part.dtype in _SCALES else part for role, part in parts.items()}
    order = state.pop(_ORDER, None)
    compressor: Any = BaseCompressor.get_value_from_registry(format)
    if order is None or bool((order < 0).any()):
        return compressor.decompress(state, scheme)["weight"].float()  # type: ignore[no-any-return]
    columns = torch.argsort(order, stable=True)
    return _in_order(state, scheme, columns)


def _in_order(state: Mapping[str, Tensor], scheme: Any, columns: Tensor) -> Tensor:
    """Return the weight whose groups are those of `columns`, neighbours in the order of activations."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    bits, scale, zero = scheme.weights.num_bits, state["weight_scale"], state.get("weight_zero_point")
    codes = state.get("weight")
    if codes is None:
        codes = unpack_from_int32(state["weight_packed"], bits, torch.Size(state["weight_shape"].tolist()))
        if zero is not None:
            zero = unpack_from_int32(zero, bits, scale.shape, packed_dim=0)
    weight = torch.empty(codes.shape)
    weight[:, columns] = dequantize(codes[:, columns], scale, zero, scheme.weights).float()
    return weight
