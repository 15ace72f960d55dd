"""Prove, by running a block, which of its groups of linears can take up a scaling of their input.

Whether it is safe to divide the output of one operation and to multiply the columns that read it depends on everything
between the two (a clip, a norm, an activation, rounding) and on what else reads that output. Names do not tell: blocks
of different families share them. It is a matter of structure, so a float32 copy of the block runs on random hidden
states with random weights in its linear layers, where no dead channel or tiny weight can hide a wrong fold. The scales
span six orders of magnitude, so that they also reach bounds that lie far from usual activations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from interventions.compress.kernels.capture import Call, catch_block_calls
from interventions.compress.kernels.folding import move_scales_
from interventions.compress.kernels.precision import matmul_precision
from interventions.modes import keep_modes
from interventions.structure import Block, Linear, LinearGroup, is_linear, module_device, placement, within_context
from interventions.types import InterventionError

TOKENS = 16
MAGNITUDES = 3.0
"""Scales are 10 to the power of minus this up to plus this."""
TOLERANCE = 1e-3
"""Largest change of the block's output, relative to what other weights in the group change: right folds stay below
1e-5, wrong ones above 0.1."""


class FoldProof:
    """Which groups of a model's blocks can take up a scaling; a block runs when one of its groups is first asked."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._model = model
        self._all = blocks
        self._blocks: dict[str, tuple[Block, Call]] = {}
        """By the first linear of a group: its block, and how the model calls that block."""
        self._proven: dict[str, bool] = {}

    def __deepcopy__(self, memo: object) -> FoldProof:
        return self  # a copy of a block has its structure

    def __call__(self, group: LinearGroup) -> bool:
        """Tell whether the group can take up a scaling; a copy of the group gets the answer of its original."""
        name = group.linears[0].name
        if name not in self._proven:
            block, call = (self._blocks or self._find_blocks())[name]
            where = placement(self._model)
            self._proven |= prove_block(block, call, where.device if where.streamed else module_device(block.module))
        return self._proven[name]

    def _find_blocks(self) -> dict[str, tuple[Block, Call]]:
        embeddings = self._model.get_input_embeddings()  # type: ignore[operator]
        vocabulary = next(embeddings.parameters()).shape[0]
        ids = torch.arange(within_context(self._model, TOKENS)).remainder(vocabulary).unsqueeze(0)
        with keep_modes(self._model):
            calls = catch_block_calls(self._model, [{"input_ids": ids}], self._all)
        hidden = torch.randn(calls[0][0].hidden.shape, generator=torch.Generator().manual_seed(0))
        for block, (call,) in zip(self._all, calls, strict=True):
            for group in block.linear_groups:
                self._blocks[group.linears[0].name] = (block, call.on(hidden))
        return self._blocks


@torch.no_grad()
def prove_block(block: Block, call: Call, device: torch.device) -> dict[str, bool]:
    """Return, by the first linear of each group with a declared operation before it, whether scales can be folded in.

    `call` is what the block runs on. Memory: a float32 copy of the block on `device`.
    """
    block = copy.deepcopy(block)
    block.module.to(device).float().eval()
    call = call.to(device)
    candidates = [(g.declared, g.linears) for g in block.linear_groups if g.declared is not None]
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
    """Move random scales from the operation into the linears; false where it is of an unknown kind."""
    exponents = torch.empty(linears[0].in_features, device=generator.device)
    exponents.uniform_(-MAGNITUDES, MAGNITUDES, generator=generator)
    try:
        move_scales_(operation, linears, 10**exponents)
    except InterventionError:
        return False
    return True


def randomise_(module: nn.Module, generator: torch.Generator) -> None:
    """Give a linear layer random weights that keep the size of what passes through, a norm gains around 1."""
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
    """Put back, at the end, the modules' own weights."""
    kept = [(p, p.clone()) for module in modules for p in module.parameters(recurse=False)]
    try:
        yield
    finally:
        for parameter, values in kept:
            parameter.copy_(values)
