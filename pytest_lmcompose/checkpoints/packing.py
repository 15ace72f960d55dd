"""Pack the linear layers that lie on a grid, as engines load them. Imports no torch by itself.

Which layers lie on a grid is read from the weights, not from what steps say they did. A layer that a later step moved
off its grid is stored in full precision, and so is what packed formats do not know: the Conv1D modules of GPT-2, fused
experts, and layers tied to others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_lmcompose.checkpoints.schemes import (
    BITS,
    WHOLE_ROW,
    Codes,
    Format,
    Found,
    Scheme,
    choose_schemes,
    fitting_size,
)
from pytest_lmcompose.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from evaluators.grids import Grid
    from interventions.rounding import Rounding
    from pytest_lmcompose.checkpoints.float_layers import FloatLayer

FORMATS = tuple(BITS)


class PackedLayer(NamedTuple):
    """How a layer is stored."""

    scheme: Scheme
    scales: Tensor
    """(rows, groups) float32."""


class Packing:
    """What is stored instead of the weights of packed layers. Holds no weights, but their scales."""

    def __init__(
        self,
        format: Format,
        layers: Mapping[str, PackedLayer],
        floats: Mapping[str, FloatLayer],
        left: Mapping[str, str],
        config: dict[str, Any],
        rounding: Rounding,
    ):
        self.config = config
        """`quantization_config` of config.json."""
        self.layers = dict(layers)
        """Layers of integers, by parameter name."""
        self.floats = dict(floats)
        """Layers of floating-point numbers, by parameter name."""
        self.left = dict(left)
        """Why each other linear layer of the decoder stays in full precision, by parameter name."""
        self.rounding = rounding
        """What the model rounds while it runs."""
        self._format = format

    def packs(self, name: str) -> bool:
        """Tell whether a parameter is packed."""
        return name in self.layers or name in self.floats

    def replace(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Return what is stored instead of a parameter, by checkpoint name."""
        from pytest_lmcompose.checkpoints.float_layers import stored_floats
        from pytest_lmcompose.checkpoints.run_time import input_tensors

        module = name.removesuffix("weight")
        if name in self.floats:
            stored = stored_floats(weight, self.floats[name])
        else:
            stored = self._format.store(_encode(weight, self.layers[name], self._format))
        rounded = self.rounding.inputs.get(module.removesuffix("."))
        if rounded is not None:
            stored = {**stored, **input_tensors(rounded, weight.dtype)}
        return {module + part: tensor for part, tensor in stored.items()}

    def beside(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what is stored for keys and values, by checkpoint name."""
        from pytest_lmcompose.checkpoints.run_time import cache_tensors

        return {
            f"{module}.{part}": tensor
            for module, cached in self.rounding.caches.items()
            for part, tensor in cache_tensors(cached, dtype).items()
        }

    def unpacked(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight that a loader computes from what is stored, in the weight's dtype."""
        from pytest_lmcompose.checkpoints.float_layers import loaded_floats

        if name in self.floats:
            return loaded_floats(weight, self.floats[name])
        return _decode(_encode(weight, self.layers[name], self._format)).to(weight.dtype)


def plan_packing(model: nn.Module, format: str, moved: Callable[[str], str | None]) -> Packing:
    """Find out which layers of a model can be packed, and how.

    `moved` names the last step that changed a parameter, as "step 2, memit", or None. Raises
    CheckpointError if no layer can be packed.
    """
    from evaluators.grids import find_grid
    from interventions.rounding import rounding_of
    from pytest_lmcompose.checkpoints.float_layers import plan_floats
    from pytest_lmcompose.checkpoints.run_time import check_storable

    form = _format(format)
    _check_readable(model, format)
    weights, left = _linear_weights(model)
    found: dict[str, Found] = {}
    floats: dict[str, FloatLayer] = {}
    scales: dict[str, Tensor] = {}
    for name, weight in weights.items():
        grid = find_grid(weight)
        if grid is not None and grid.floats is not None:
            layer = plan_floats(weight, grid.floats) if form.floats else "floating-point numbers, which it lacks"
            if isinstance(layer, str):
                left[name] = layer
            else:
                floats[name] = layer
            continue
        result = _recover(weight, grid, form)
        if isinstance(result, str):
            step = moved(name)
            left[name] = f"{result}, last changed by {step}" if step else f"{result}, changed by no step"
        elif result is None:
            left[name] = "groups that do not divide its columns evenly"
        else:
            found[name], scales[name] = result
    schemes, others = choose_schemes(found, form)
    left |= others
    layers: dict[str, PackedLayer] = {}
    for name, scheme in schemes.items():
        packed = PackedLayer(scheme, _regroup(scales[name], found[name], scheme))
        problem = form.problem(found[name].rows, found[name].cols, scheme.bits)
        problem = problem or _scale_problem(packed, form, weights[name])
        if problem is None:
            layers[name] = packed
        else:
            left[name] = problem
    if not layers and not floats:
        reasons = "; ".join(f"{count} with {reason}" for reason, count in Counter(left.values()).most_common())
        raise CheckpointError(
            f"{format}: no linear layer can be packed: {reasons}. Choose another format, quantise last, or "
            "export in full precision"
        )
    modules: dict[str, Any] = {name.removesuffix(".weight"): layer.scheme for name, layer in layers.items()}
    modules |= {name.removesuffix(".weight"): layer.layout for name, layer in floats.items()}
    rest = [name for name in _linear_modules(model) if name not in modules]
    rounding = rounding_of(model)
    check_storable(rounding, format, modules)
    return Packing(form, layers, floats, left, form.config(modules, rest, rounding), rounding)


def _format(name: str) -> Format:
    from pytest_lmcompose.checkpoints.pack_awq import Awq
    from pytest_lmcompose.checkpoints.pack_compressed_tensors import CompressedTensors
    from pytest_lmcompose.checkpoints.pack_gptq import Gptq

    formats: tuple[type[Format], ...] = (CompressedTensors, Gptq, Awq)
    return next(kind for kind in formats if kind.name == name)()


def _check_readable(model: nn.Module, format: str) -> None:
    """Raise CheckpointError if transformers replaces modules of the model by others when it reads the format.

    It does not find their weights then, and starts with random ones.
    """
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as PATCHED

    for module in model.modules():
        kind = type(module).__name__
        methods: Any = PATCHED.get(kind, {}).get("quantization_methods", ())
        if format in [method.value for method in methods]:
            raise CheckpointError(
                f"{format}: transformers reads the {kind} of a packed {type(model).__name__} as modules of their own, "
                "one for each expert, which the model does not have. Choose another format, or export in full precision"
            )


def _linear_modules(model: nn.Module) -> list[str]:
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _linear_weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights of the decoder's linear layers that a format may know, and why others are left out."""
    from torch import nn

    from evaluators.efficiency import decoder_linears
    from evaluators.measurement import EvaluationError

    try:
        linears = decoder_linears(model)
    except EvaluationError as error:
        raise CheckpointError(str(error)) from None
    modules = dict(model.named_modules())
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    weights: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for name, weight in linears.items():
        module = modules.get(name.removesuffix(".weight"))
        if module is None:
            left[name] = "fused experts, which no packed format knows"
        elif not isinstance(module, nn.Linear):
            left[name] = f"{type(module).__name__} modules, which no packed format knows"
        elif uses[id(module.weight)] > 1:
            left[name] = "weights tied to another layer"
        else:
            weights[name] = weight
    return weights, left


def _recover(weight: Tensor, grid: Grid | None, format: Format) -> tuple[Found, Tensor] | str | None:
    """Return a weight's grid and its scales, None if its groups cannot be stored, or what is wrong in words."""
    from pytest_lmcompose.checkpoints.grids import recover

    rows, cols = weight.shape
    recovered = None if grid is None else recover(weight, grid.bits, grid.group_size)
    if grid is None or recovered is None:
        return "no grid"
    size = fitting_size(grid.group_size, cols, format)
    if size is None:
        return None
    scales = recovered.scales
    if size != WHOLE_ROW and size != grid.group_size:
        scales = scales.repeat_interleave(grid.group_size // size, dim=1)[:, : cols // size]
    return Found(rows, cols, grid.bits, size, recovered.low, recovered.high), scales


def _regroup(scales: Tensor, found: Found, scheme: Scheme) -> Tensor:
    """Repeat scales for the smaller groups of the scheme that a layer is stored with."""
    groups = 1 if scheme.group_size == WHOLE_ROW else found.cols // scheme.group_size
    return scales.repeat_interleave(groups // scales.shape[1], dim=1)


def _scale_problem(layer: PackedLayer, format: Format, weight: Tensor) -> str | None:
    """Say that a format cannot store the scales, or return None."""
    import torch

    stored = layer.scales.to(format.scale_dtype(weight.dtype))
    near = (stored.float() - layer.scales).abs() <= torch.finfo(stored.dtype).eps * layer.scales
    return None if bool(near.all()) else f"scales out of the range of {str(stored.dtype).removeprefix('torch.')}"


def _encode(weight: Tensor, layer: PackedLayer, format: Format) -> Codes:
    import torch

    from pytest_lmcompose.checkpoints.grids import spread, steps, zero_points

    (bits, size, symmetric), scales = layer
    size = weight.shape[1] if size == WHOLE_ROW else size
    numbers = steps(weight, scales, size)
    if symmetric:
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.int16, device=weight.device)
    else:
        zeros = zero_points(numbers, size, bits)
    levels = (numbers + spread(zeros, size, weight.shape[1])).clamp_(0, 2**bits - 1)
    return Codes(levels, zeros, scales.to(format.scale_dtype(weight.dtype)), layer.scheme)


def _decode(codes: Codes) -> Tensor:
    """Return (level - zero) * scale, float32."""
    from pytest_lmcompose.checkpoints.grids import multiply, spread

    cols = codes.levels.shape[1]
    size = cols if codes.scheme.group_size == WHOLE_ROW else codes.scheme.group_size
    return multiply(codes.levels - spread(codes.zeros, size, cols), codes.scales.float(), size)
