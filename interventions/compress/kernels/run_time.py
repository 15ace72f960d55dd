"""The part of quantisation that happens while the model runs: inputs of layers, keys and values.

Scales that are not found as the model runs come from the greatest magnitudes on calibration text, in a pass through the
model with its new weights and nothing else rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.compress.bases import GridQuantiser
from interventions.compress.kernels.chosen import chosen_schemes
from interventions.compress.schemes import CACHES
from interventions.context import Context
from interventions.early_exit import head_on_one_token, run_until_seen
from interventions.rounded_attention import let_attention_round, watched
from interventions.rounding import Cached, Rounded, Rounding, calibrated, rounding_of, set_rounding_, unrounded
from interventions.statistics import window_batches
from interventions.structure import module_device, within_context
from interventions.types import InterventionError, Resources

_SAMPLES, _TOKENS = 128, 512
"""Windows of calibration text, and tokens of each, for methods that read none otherwise."""
_BATCH_TOKENS = 4096

Greatest = dict[str, float]


@torch.no_grad()
def round_as_it_runs_(
    model: nn.Module, tokenizer: Any, settings: GridQuantiser, resources: Resources, context: Context
) -> dict[str, Any]:
    """Make the model round what the settings say, beside what it rounds already; return what for the report.

    Raises InterventionError for missing calibration text, and for attention whose keys and values cannot be rounded.
    """
    modules = dict(model.named_modules())
    schemes = chosen_schemes(model, settings)
    wanted = {name: scheme.inputs for name, scheme in schemes.items() if scheme is not None and scheme.inputs}
    inputs = {name: scheme for name, scheme in wanted.items() if name in modules}
    if len(inputs) < len(wanted):
        context.warn(
            f"{settings.name}: the inputs of {len(wanted) - len(inputs)} layers of fused experts are not rounded"
        )
    cache = None if settings.kv_cache is None else CACHES[settings.kv_cache]
    if not inputs and cache is None:
        return {}
    if cache is not None:
        let_attention_round(model)
    fixed = {name: modules[name] for name, scheme in inputs.items() if scheme.calibrated}
    reads = bool(fixed) or cache is not None
    greatest, keys, values = _greatest(model, tokenizer, settings, resources, fixed) if reads else ({}, {}, {})
    before = rounding_of(model)
    caches = dict(before.caches)
    if cache is not None:
        if not keys:
            raise InterventionError(
                f"{settings.name}.kv_cache={settings.kv_cache}: no attention of {type(model).__name__} goes through "
                "transformers' attention functions; leave kv_cache out"
            )
        dtype = next(model.parameters()).dtype
        caches = {name: Cached(*(calibrated(cache, found[name], dtype) for found in (keys, values))) for name in keys}
    rounded = {
        name: calibrated(scheme, greatest[name], modules[name].weight.dtype) if name in greatest else Rounded(scheme)
        for name, scheme in inputs.items()
    }
    set_rounding_(model, Rounding({**before.inputs, **rounded}, caches))
    return {"rounded_inputs": len(rounded), "rounded_caches": len(keys) if cache is not None else 0}


def _greatest(
    model: nn.Module,
    tokenizer: Any,
    settings: GridQuantiser,
    resources: Resources,
    linears: Mapping[str, nn.Module],
) -> tuple[Greatest, Greatest, Greatest]:
    """Return the greatest magnitudes of the inputs of linears, and of the keys and values of attention, by module."""
    if not resources.calibration:
        raise InterventionError(
            f"{settings.name} needs calibration texts for the scales of "
            f"{'keys and values' if settings.kv_cache else f'scheme={settings.scheme}'}: give `calibration`"
        )
    batches = window_batches(
        tokenizer,
        resources.calibration,
        samples=getattr(settings, "samples", _SAMPLES),
        max_tokens=within_context(model, getattr(settings, "max_tokens", _TOKENS)),
        batch_tokens=_BATCH_TOKENS,
    )
    names = {id(module): name for name, module in model.named_modules()}
    inputs: Greatest = {}
    keys: Greatest = {}
    values: Greatest = {}
    mask = torch.empty(0)

    def see(found: Greatest, name: str, x: Tensor) -> None:
        """Note the greatest magnitude of x (batch, tokens, ...) without padding."""
        real = x.reshape(*mask.shape, -1)[mask.to(x.device)]
        found[name] = max(found.get(name, 0.0), float(real.abs().max()))

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, arguments: see(inputs, name, arguments[0])

    def watch(module: nn.Module, key: Tensor, value: Tensor) -> None:
        if id(module) in names:
            see(keys, names[id(module)], key.transpose(1, 2))
            see(values, names[id(module)], value.transpose(1, 2))

    device = module_device(model)
    with ExitStack() as stack:
        stack.enter_context(unrounded(model))
        stack.enter_context(head_on_one_token(find_anatomy(model).head))
        stack.enter_context(watched(watch))
        for name, module in linears.items():
            stack.enter_context(module.register_forward_pre_hook(hook(name)))
        for batch in batches:
            mask = batch["attention_mask"].bool()
            run_until_seen(model, {key: value.to(device) for key, value in batch.items()})
    return inputs, keys, values
