"""Test, by running a block, into which operations the input scales of its linears can be folded.

Folding divides the output of one operation and multiplies the weight columns that read it. This is exact only if
everything between the two commutes with the scaling (a clip, a norm or an activation may not) and nothing else reads
that output. Module names do not tell, so a float32 copy of the block runs on random hidden states with random
weights: no dead channel or tiny weight can hide a wrong fold. The scales span six orders of magnitude to also
reach clipping bounds far from usual activations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from interventions.compress.kernels.capture import Call
from interventions.compress.kernels.folding import move_scales_
from interventions.compress.kernels.precision import matmul_precision
from interventions.modes import keep_modes
from interventions.rounding import Rounding, set_rounding_
from interventions.structure import Block, Linear, LinearGroup, is_linear, module_device, placement
from interventions.trace import ModuleCall
from interventions.types import InterventionError

TOKENS = 16
"""Tokens of a trial run of experts."""
MAGNITUDES = 3.0
"""Scales range from 10 ** -MAGNITUDES to 10 ** MAGNITUDES."""
TOLERANCE = 1e-3
"""Maximum change of the block's output, relative to the change from other weights in the group. Correct folds are
below 1e-5, wrong ones above 0.1."""


class FoldProof:
    """Tells which groups of linears can be scaled; tests a block at the first question about one of its groups."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], calls: Sequence[ModuleCall]) -> None:
        """Take the model's blocks, which may be added later, and a call of each."""
        self._where = placement(model)
        self._blocks, self._calls = blocks, calls
        self._proven: dict[str, bool] = {}
        """By the first linear of a group."""

    def __deepcopy__(self, memo: object) -> FoldProof:
        return self  # copies of a block have the same structure

    def __call__(self, group: LinearGroup) -> bool:
        """Return whether the group's input can be scaled; copies of a group share its result."""
        name = group.linears[0].name
        if name not in self._proven:
            block, seen = next(
                (block, seen)
                for block, seen in zip(self._blocks, self._calls, strict=True)
                if any(own.linears[0].name == name for own in block.linear_groups)
            )
            where = self._where.device if self._where.streamed else module_device(block.module)
            call = Call.of(seen.arguments, seen.keywords)
            hidden = torch.randn(call.hidden.shape, generator=torch.Generator().manual_seed(0))
            with keep_modes(block.module):
                self._proven |= prove_block(block, call.on(hidden), where)
        return self._proven[name]


@torch.no_grad()
def prove_block(block: Block, call: Call, device: torch.device) -> dict[str, bool]:
    """Return, for each group with a declared operation before it, whether scales can be folded into that operation.

    Groups are named by their first linear. The block runs on `call`, as a float32 copy on `device`.
    """
    block = copy.deepcopy(block)
    set_rounding_(block.module, Rounding())
    block.module.to(device).float().eval()
    call = call.to(device)
    candidates = [(g.declared, g.linears) for g in block.linear_groups if isinstance(g.declared, nn.Module)]
    generator = torch.Generator(device).manual_seed(0)
    operations = (operation for operation, _ in candidates)
    for module in dict.fromkeys([*filter(is_linear, block.module.modules()), *operations]):
        randomise_(module, generator)
    proven = {}
    with matmul_precision("highest"):
        wanted = call(block.module)
        for operation, linears in candidates:
            readers = [linear.module for linear in linears]
            with restored(readers):
                for module in readers:
                    randomise_(module, generator)
                share = float((call(block.module) - wanted).norm())
            with restored([operation, *readers]):
                folded = fold_random_(operation, linears, generator)
                change = float((call(block.module) - wanted).norm())
            proven[linears[0].name] = folded and share > 0 and change <= TOLERANCE * share
    return proven


def fold_random_(operation: nn.Module, linears: Sequence[Linear], generator: torch.Generator) -> bool:
    """Move random scales from the operation into the linears; return false for an unknown kind of operation."""
    exponents = torch.empty(linears[0].in_features, device=generator.device)
    exponents.uniform_(-MAGNITUDES, MAGNITUDES, generator=generator)
    try:
        move_scales_(operation, linears, 10**exponents)
    except InterventionError:
        return False
    return True


def randomise_(module: nn.Module, generator: torch.Generator) -> None:
    """Give a linear layer random weights that preserve the scale of its input, and a norm gains around 1."""
    if is_linear(module):
        linear = Linear("", module)
        bound = (3 / linear.in_features) ** 0.5
        linear.weight.uniform_(-bound, bound, generator=generator)
    else:
        module.weight.uniform_(0.5, 1.5, generator=generator)  # type: ignore[operator]
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.uniform_(-0.5, 0.5, generator=generator)


@contextmanager
def restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the modules' own weights at the end."""
    kept = [(p, p.clone()) for module in modules for p in module.parameters(recurse=False)]
    try:
        yield
    finally:
        for parameter, values in kept:
            parameter.copy_(values)
