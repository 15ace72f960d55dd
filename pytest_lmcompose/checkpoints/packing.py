"""Pack the linear layers that lie on a grid, as engines load them. Imports no torch by itself.

Which layers lie on a grid is read from the weights, not from what steps say they did. A layer that a later step moved
off its grid is stored in full precision, and so is what packed formats do not know: the Conv1D modules of GPT-2, layers
tied to others, and most experts that share a parameter, see `pytest_lmcompose.checkpoints.packed_experts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_lmcompose.checkpoints.schemes import BITS, Format, Found, choose_schemes
from pytest_lmcompose.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from interventions.rounding import Rounding
    from pytest_lmcompose.checkpoints.float_layers import FloatLayer
    from pytest_lmcompose.checkpoints.integer_layers import PackedLayer

FORMATS = tuple(BITS)


class Packing:
    """What is stored instead of the weights of packed layers. Holds no weights, but their scales."""

    def __init__(
        self,
        format: Format,
        layers: Mapping[str, PackedLayer],
        floats: Mapping[str, FloatLayer],
        experts: Mapping[str, PackedLayer],
        left: Mapping[str, str],
        config: dict[str, Any],
        rounding: Rounding,
    ):
        self.config = config
        """`quantization_config` of config.json."""
        self.layers = dict(layers)
        """Layers of integers, by parameter name."""
        self.experts = dict(experts)
        """Layers of integers of all experts that share parameters, by checkpoint name; or none of them."""
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
        """Return what is stored instead of a parameter, or of the weight of an expert, by checkpoint name."""
        from pytest_lmcompose.checkpoints.float_layers import stored_floats
        from pytest_lmcompose.checkpoints.integer_layers import encode
        from pytest_lmcompose.checkpoints.run_time import input_tensors

        module = name.removesuffix("weight")
        if name in self.floats:
            stored = stored_floats(weight, self.floats[name])
        else:
            layer = self.experts[name] if name in self.experts else self.layers[name]
            stored = self._format.store(encode(weight, layer, self._format))
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
        from pytest_lmcompose.checkpoints.integer_layers import decode, encode

        if name in self.floats:
            return loaded_floats(weight, self.floats[name])
        return decode(encode(weight, self.layers[name], self._format)).to(weight.dtype)


def plan_packing(model: nn.Module, format: str, moved: Callable[[str], str | None]) -> Packing:
    """Find out which layers of a model can be packed, and how.

    `moved` names the last step that changed a parameter, as "step 2, memit", or None. Raises
    CheckpointError if no layer can be packed.
    """
    from evaluators.grids import find_grid
    from interventions.rounding import rounding_of
    from pytest_lmcompose.checkpoints.float_layers import plan_floats
    from pytest_lmcompose.checkpoints.integer_layers import PackedLayer, recover_layer, regroup, scale_problem
    from pytest_lmcompose.checkpoints.packed_experts import EXPERTS, plan_experts
    from pytest_lmcompose.checkpoints.run_time import check_storable

    form = _format(format)
    _check_readable(model, format)
    weights, merged, left = _linear_weights(model)
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
        result = recover_layer(weight, grid, form)
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
        packed = PackedLayer(scheme, regroup(scales[name], found[name], scheme))
        problem = form.problem(found[name].rows, found[name].cols, scheme.bits)
        problem = problem or scale_problem(packed, form, weights[name])
        if problem is None:
            layers[name] = packed
        else:
            left[name] = problem
    experts = plan_experts(model, merged, form)
    if isinstance(experts, str):
        left |= dict.fromkeys(merged, experts)
        experts = {}
    if not layers and not floats and not experts:
        reasons = "; ".join(f"{count} with {reason}" for reason, count in Counter(left.values()).most_common())
        raise CheckpointError(
            f"{format}: no linear layer can be packed: {reasons}. Choose another format, quantise last, or "
            "export in full precision"
        )
    modules: dict[str, Any] = {name.removesuffix(".weight"): layer.scheme for name, layer in layers.items()}
    modules |= {name.removesuffix(".weight"): layer.layout for name, layer in floats.items()}
    rest = [name for name in _linear_modules(model) if name not in modules]
    if experts:
        modules[EXPERTS] = next(iter(experts.values())).scheme
    rounding = rounding_of(model)
    check_storable(rounding, format, modules)
    return Packing(form, layers, floats, experts, left, form.config(modules, rest, rounding), rounding)


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


def _linear_weights(model: nn.Module) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
    """Return the weights of the decoder's linear layers that a format may know, experts, and why others are left out.

    Experts are layers that share a parameter with others: its name, followed by a number.
    """
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
    merged: list[str] = []
    left: dict[str, str] = {}
    for name, weight in linears.items():
        module = modules.get(name.removesuffix(".weight"))
        if module is None:
            merged.append(name)
        elif not isinstance(module, nn.Linear):
            left[name] = f"{type(module).__name__} modules, which no packed format knows"
        elif uses[id(module.weight)] > 1:
            left[name] = "weights tied to another layer"
        else:
            weights[name] = weight
    return weights, merged, left
