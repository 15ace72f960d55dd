"""The formats of compressed-tensors, through its package: `pack-quantized`, and those of floating-point numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluators.float_grids import Layout
from pytest_lmcompose.checkpoints.float_layers import float_arguments, float_format
from pytest_lmcompose.checkpoints.schemes import WHOLE_ROW, Codes, Format, Scheme
from pytest_lmcompose.errors import CheckpointError

if TYPE_CHECKING:
    from interventions.compress.schemes import Scheme as Inputs
    from interventions.rounding import Rounding


class CompressedTensors(Format):
    """Scales have the model's dtype, so that float32 models are stored exactly."""

    name = "compressed-tensors"
    mixed = True
    by_width = True
    floats = True
    experts = True

    def __init__(self) -> None:
        try:
            import compressed_tensors  # noqa: F401
        except ImportError:
            raise CheckpointError(
                'compressed-tensors: the package is missing: pip install "pytest-lmcompose[checkpoints]"'
            ) from None

    def scale_dtype(self, weight: torch.dtype) -> torch.dtype:
        """Return the model's dtype, which loaders expect."""
        return weight

    def problem(self, rows: int, cols: int, bits: int) -> str | None:
        """Any shape can be stored."""
        return None

    def config(self, layers: Mapping[str, Scheme | Layout], left: Iterable[str], rounding: Rounding) -> dict[str, Any]:
        """Return one config group for each grid and rounding of inputs; `ignore` names all other linear modules."""
        import compressed_tensors
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

        from pytest_lmcompose.checkpoints.run_time import arguments

        grids: dict[tuple[Scheme | Layout, Inputs | None], list[str]] = defaultdict(list)
        for name, scheme in layers.items():
            rounded = rounding.inputs.get(name)
            grids[scheme, None if rounded is None else rounded.scheme].append(name)
        formats = {grid: "pack-quantized" if isinstance(grid, Scheme) else float_format(grid) for grid, _ in grids}
        groups = {
            f"group_{number}": QuantizationScheme(
                targets=["Linear"] if len(grids) == 1 else names,
                weights=_arguments(grid) if isinstance(grid, Scheme) else float_arguments(grid),
                input_activations=None if inputs is None else arguments(inputs),
                format=formats[grid],
            )
            for number, ((grid, inputs), names) in enumerate(grids.items())
        }
        several = len(set(formats.values())) > 1
        cached = next(iter(rounding.caches.values()), None)
        config = QuantizationConfig(
            config_groups=groups,
            format="mixed-precision" if several else next(iter(formats.values())),
            quantization_status="compressed",
            ignore=list(left),
            kv_cache_scheme=None if cached is None else arguments(cached.keys.scheme),
        )
        return {**config.model_dump(mode="json"), "version": compressed_tensors.__version__}

    def store(self, codes: Codes) -> dict[str, Tensor]:
        """Return the tensors; levels and zero points are packed as signed numbers."""
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        bits = codes.scheme.bits
        middle = 2 ** (bits - 1)
        stored = {
            "weight_packed": pack_to_int32((codes.levels - middle).to(torch.int8), bits),
            "weight_scale": codes.scales,
            "weight_shape": torch.tensor(codes.levels.shape),
        }
        if not codes.scheme.symmetric:
            stored["weight_zero_point"] = pack_to_int32((codes.zeros - middle).to(torch.int8), bits, packed_dim=0)
        return stored


def _arguments(scheme: Scheme) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    whole = scheme.group_size == WHOLE_ROW
    return QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="channel" if whole else "group",
        group_size=None if whole else scheme.group_size,
    )
