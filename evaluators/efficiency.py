"""Storage and compute cost of a model, read from its weights, not from settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from evaluators.data import EvaluationData
from evaluators.encoding import check_length
from evaluators.grids import Grid, find_grid
from evaluators.measurement import EvaluationError, Measurement
from evaluators.passes import run_once
from evaluators.settings import PassSettings
from evaluators.state import borrowed
from interventions.known_grids import KnownGrid, tensor_digest
from interventions.parts import PartsWatch, Place, plain_experts, stacks_under
from interventions.rounded_bits import cache_bits, input_bits


class Layer(NamedTuple):
    """How a linear layer can be stored."""

    name: str
    weights: int
    zeros: int
    full_bits: int
    """Bits of its dtype."""
    grid: Grid | KnownGrid | None
    two_of_four: bool
    """Whether at most two of each four neighbouring columns are non-zero."""

    @property
    def bits(self) -> int:
        """Bits of a stored weight: those of the grid, or of the dtype without a grid."""
        return self.full_bits if self.grid is None else self.grid.bits

    @property
    def average_bits(self) -> float:
        """Average bits per weight, as in published tables.

        Zeros of a layer without a grid count 1 bit, for a mask, if the mask pays off.
        """
        pays = self.grid is None and self.zeros * self.bits > self.weights
        zeros = self.zeros if pays else 0
        return (zeros + (self.weights - zeros) * self.bits) / self.weights

    @property
    def overhead_bits(self) -> int:
        """Bits of scales and zero points, and of what else a checkpoint stores with them."""
        return 0 if self.grid is None else self.grid.overhead_bits

    @property
    def packed_bits(self) -> int:
        """Bits on disk: the smallest of dense, with a mask, or 2:4 with two index bits per value."""
        sizes = [self.weights * self.bits, self.weights + (self.weights - self.zeros) * self.bits]
        if self.two_of_four:
            sizes.append(self.weights // 2 * (self.bits + 2))
        return min(sizes) + self.overhead_bits


def decoder_linears(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights (out, in) of the linear layers inside the decoder blocks, by name.

    Each layer of an expert counts for itself; where a parameter stacks those of all experts, its name is followed by
    the expert's number. Routers and other gates of experts are left out. The decoder is the outermost module list with
    the most linear weights. Raises EvaluationError if there is none.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    found = {name: _linears_under(model.get_submodule(name), name) for name in outer}
    stacked = {name: stacks_under(model.get_submodule(name), name) for name in outer}
    sizes = {
        name: sum(weight.numel() for weight in (*linears.values(), *stacked[name].values()))
        for name, linears in found.items()
    }
    if not any(sizes.values()):
        raise EvaluationError(f"{type(model).__name__}: no list of blocks with linear layers; pass `weights` by name")
    decoder = max(sizes, key=lambda name: sizes[name])
    if not stacked[decoder]:
        return found[decoder]
    places = _places(model, stacked[decoder])
    counts = {_block(name, decoder): place.count for name, place in places.items()}
    linears = {
        name: weight
        for name, weight in found[decoder].items()
        if len(weight) not in (1, counts.get(_block(name, decoder)))
    }
    for name, place in places.items():
        for expert in range(place.count):
            linears[f"{name}.{expert}"] = Place(expert, place.count, place.transposed).within(
                stacked[decoder][name].detach()
            )
    return linears


def _block(name: str, decoder: str) -> str:
    return name.removeprefix(f"{decoder}.").partition(".")[0]


def _places(model: nn.Module, stacked: Mapping[str, Tensor]) -> dict[str, Place]:
    """Return how the parameters that a short run uses part by part are stored."""
    places: dict[str, Place] = {}
    device = next(iter(stacked.values())).device
    ids = torch.arange(4, device=device).unsqueeze(0)
    with borrowed(model, None), plain_experts(model), PartsWatch(stacked, lambda p: places.setdefault(*p[:2])):
        run_once(model, ids)
    return places


def _linears_under(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    weights = {}
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear | Conv1D):
            weight = child.weight.detach()
            weights[f"{name}.weight"] = weight.t() if isinstance(child, Conv1D) else weight
    return weights


def read_layers(weights: Mapping[str, Tensor], known: Mapping[str, KnownGrid] | None = None) -> list[Layer]:
    """Analyse how each weight (out, in) can be stored; `known` are the grids of weights as they were loaded."""
    layers = []
    for name, weight in weights.items():
        zeros = weight.numel() - int(weight.count_nonzero())
        two_of_four = (
            weight.shape[1] % 4 == 0
            and 2 * zeros >= weight.numel()
            and bool(((weight == 0).reshape(len(weight), -1, 4).sum(dim=2) >= 2).all())
        )
        full = torch.finfo(weight.dtype).bits
        stored = (known or {}).get(name)
        same = stored is not None and stored.digest == tensor_digest(weight)
        grid = stored if same else find_grid(weight)
        layers.append(Layer(name, weight.numel(), zeros, full, grid, two_of_four))
    return layers


def evaluate(model: Any, tokenizer: Any, settings: PassSettings, data: EvaluationData) -> list[Measurement]:
    """Measure storage and compute; see `measure_efficiency`."""
    return measure_efficiency(model, length=settings.latency_length, known=data.grids)


def measure_efficiency(
    model: Any,
    *,
    weights: Mapping[str, Tensor] | None = None,
    length: int = 128,
    known: Mapping[str, KnownGrid] | None = None,
) -> list[Measurement]:
    """Measure storage and compute from the weights; there is one sample per layer and no randomness.

    - `average_bits` per weight of the decoder's linear layers: b if all values of the layer are on a
      grid of 2**b levels, otherwise the bits of its dtype, also if a later step moved it off its grid;
      zeros of a pruned layer without a grid count 1 bit.
    - `overhead_bits` per weight: a 16-bit scale and a zero point of the grid's bits per group; what a
      checkpoint really stores, if that is known.
    - `sparsity`: the share of exact zeros. `sparsity_2_4`: the share of weights in layers with at
      most two non-zero values in each group of four in a row.
    - `packed_megabytes` (10^6 bytes) of all parameters, with these layers packed.
    - `input_bits`, `kv_cache_bits` where the model rounds inputs, keys and values as it runs: see `measure_rounding`.
    - `flops_per_token` of a forward pass over `length` tokens with dense kernels.

    `weights` (out, in) by parameter name replaces `decoder_linears`. `known` says how the checkpoint stored weights,
    which counts for those whose values are still the same. Raises EvaluationError for no
    layers and for NaN or infinite weights.
    """
    linears = decoder_linears(model) if weights is None else weights
    for name, weight in linears.items():
        if not all(map(math.isfinite, map(float, weight.aminmax()))):  # NaN spreads to both
            raise EvaluationError(f"{name}: NaN or infinite values; the model's weights are broken")
    layers = read_layers(linears, known)
    total = sum(layer.weights for layer in layers)
    zeros = sum(layer.zeros for layer in layers)
    gridded = [layer for layer in layers if layer.grid is not None]
    patterned = [layer for layer in layers if layer.two_of_four]
    grids = sorted({(layer.grid.bits, layer.grid.group_size) for layer in gridded if layer.grid is not None})
    what = f"{len(gridded)} of {len(layers)} linear layers on a grid"
    what += "".join(f", {bits} bits in groups of {size}" for bits, size in grids)
    rest = sum(8 * p.numel() * p.element_size() for p in model.parameters()) - sum(
        layer.weights * layer.full_bits for layer in layers
    )
    packed = rest + sum(layer.packed_bits for layer in layers)

    def read(metric: str, value: float, samples: list[float], better_high: bool, note: str) -> Measurement:
        return Measurement(metric, value, 0.0, len(layers), better_high, tuple(samples), f"{note}; read, not sampled")

    return [
        read(
            "average_bits",
            sum(layer.average_bits * layer.weights for layer in layers) / total,
            [layer.average_bits for layer in layers],
            False,
            what,
        ),
        read(
            "overhead_bits",
            sum(layer.overhead_bits for layer in layers) / total,
            [layer.overhead_bits / layer.weights for layer in layers],
            False,
            "16-bit scale and a zero point of the grid's bits by group, or what the checkpoint stores",
        ),
        read(
            "sparsity",
            zeros / total,
            [layer.zeros / layer.weights for layer in layers],
            True,
            "exact zeros, those that are a level of a grid among them",
        ),
        read(
            "sparsity_2_4",
            sum(layer.weights for layer in patterned) / total,
            [float(layer.two_of_four) for layer in layers],
            True,
            f"{len(patterned)} of {len(layers)} linear layers in the 2:4 pattern",
        ),
        read(
            "packed_megabytes",
            packed / 8e6,
            [layer.packed_bits / 8e6 for layer in layers],
            False,
            f"samples: the {len(layers)} linear layers; all other parameters as they are",
        ),
        *measure_rounding(model, {layer.name.removesuffix(".weight"): layer.weights for layer in layers}),
        measure_flops(model, length=length),
    ]


def measure_rounding(model: nn.Module, sizes: Mapping[str, int]) -> list[Measurement]:
    """Measure `input_bits` and `kv_cache_bits` of a model that rounds them while it runs.

    `input_bits` is the mean over the linear layers, weighted by their `sizes`: those whose inputs are not rounded count
    with the bits of the model's dtype.
    """
    inputs, caches = input_bits(model), cache_bits(model)
    found = []
    if inputs:
        full = torch.finfo(next(model.parameters()).dtype).bits
        bits = {name: inputs.get(name, full) for name in sizes}
        mean = sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
        note = f"{len(inputs)} of {len(sizes)} linear layers; read, not sampled"
        found.append(Measurement("input_bits", mean, 0.0, len(sizes), False, tuple(map(float, bits.values())), note))
    if caches:
        samples = tuple(map(float, caches.values()))
        note = "attention that rounds keys and values; read, not sampled"
        found.append(Measurement("kv_cache_bits", sum(samples) / len(samples), 0.0, len(samples), False, samples, note))
    return found


def measure_flops(model: Any, *, length: int = 128) -> Measurement:
    """Count the floating-point operations per token of a forward pass over `length` tokens.

    Counts the matrix products that run, with attention over the full square; a multiplication and an
    addition count one operation each.
    """
    check_length(model, length, f"flops: a text of {length} tokens")
    ids = torch.zeros((1, length), dtype=torch.long, device=model.device)
    # The counter does not know every fused attention kernel, so use plain matrix products.
    with (
        borrowed(model, None),
        _frozen(model),  # the counter fails on modules that are called with parameters that need gradients
        plain_experts(model),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        run_once(model, ids)
    value = counter.get_total_flops() / length
    if not value:
        raise EvaluationError(f"flops: {type(model).__name__} ran no matrix product that torch counts")
    note = f"dense kernels, one text of {length} tokens, torch.utils.flop_counter; counted, not sampled"
    return Measurement("flops_per_token", value, 0.0, 1, False, (value,), note)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
