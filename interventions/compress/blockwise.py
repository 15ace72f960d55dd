"""Walk through a model's decoder blocks on calibration text, and change their linears on the way.

GPTQ, SparseGPT, Wanda and AWQ do the same round: catch what reaches the first block, then block by
block look at the inputs of the linears, change them, and hand on what the block puts out. Beside
the model's weights there is one block in float32, its Gram matrices and one hidden state a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import Block, Linear, LinearGroup, find_anatomy, module_device, within_context
from interventions.compress.capture import Call, catch_block_calls, keep_calls
from interventions.early_exit import SeenEnough
from interventions.statistics import InputStatistics, token_batches
from interventions.step import Context
from interventions.types import InterventionError, Resources

CPU_BYTES = 64 << 20
"""What the activations of a batch may take on a CPU; larger batches are slower there."""
ACCELERATOR_BYTES = 2 << 30

Work = Callable[[LinearGroup, InputStatistics], list[dict[str, Any]]]


@torch.no_grad()
def walk_blocks(
    model: nn.Module,
    tokenizer: Any,
    resources: Resources,
    context: Context,
    *,
    method: str,
    samples: int,
    max_tokens: int,
    sequential: bool,
    true_sequential: bool,
    work: Work,
) -> list[dict[str, Any]]:
    """Call `work` for every group of linears that share an input, in order; return all it returned.

    `work(group, statistics)` changes the weights of the group's linears in place, which are
    float32 copies that are written back, rounded once, when the block is done; it leaves the
    statistics as they are and returns plain data, as a rule one dict for each linear.

    With `sequential` a block is calibrated on what the changed blocks before it put out, otherwise
    on what they put out before they were changed. With `true_sequential` the same holds between
    the groups of a block: at the price of more forward passes, a group sees the changed ones
    before it. `method` names the step in messages; for the errors see `float_blocks`.
    """
    details: list[dict[str, Any]] = []
    for block in float_blocks(
        model,
        tokenizer,
        resources,
        context,
        method=method,
        samples=samples,
        max_tokens=max_tokens,
        sequential=sequential,
    ):
        if true_sequential:
            for group in block.groups:
                details += work(group, block.collect([group])[group.role])
        else:
            statistics = block.collect(block.groups)
            for group in block.groups:
                details += work(group, statistics.pop(group.role))
    return details


@torch.no_grad()
def float_blocks(
    model: nn.Module,
    tokenizer: Any,
    resources: Resources,
    context: Context,
    *,
    method: str,
    samples: int,
    max_tokens: int,
    sequential: bool,
    batch_tokens: int | None = None,
) -> Iterator[FloatBlock]:
    """Give each block of the model as a float32 copy, with the calls that reach it on the text.

    What the caller changes in the copy is written back when it asks for the next one. The first
    `samples` texts are read, `max_tokens` of each, in batches of `batch_tokens` (None: as the
    memory set aside for activations allows).

    Raises InterventionError, naming layer and setting, for no or empty text, for fewer tokens than
    a linear has columns, and for NaN or infinite weights or inputs.
    """
    for name, value in (("samples", samples), ("max_tokens", max_tokens)):
        if value < 1:
            raise InterventionError(f"{method}: {name} must be at least 1, not {value}")
    if not resources.calibration:
        raise InterventionError(f"{method} needs calibration texts: give `calibration`")
    blocks = find_anatomy(model).blocks
    for block in blocks:
        check_weights(block, method)
    batches = token_batches(
        tokenizer,
        resources.calibration,
        max_tokens=within_context(model, max_tokens),
        batch_tokens=batch_tokens or affordable_tokens(blocks[0]),
        max_texts=samples,
    )
    check_enough(blocks, sum(int(batch["attention_mask"].sum()) for batch in batches), method)
    masks = [batch["attention_mask"].bool() for batch in batches]
    calls = catch_block_calls(model, batches, blocks)
    hidden = [call.hidden for call in calls[0]]
    for block, block_calls in zip(blocks, calls, strict=True):
        context.progress(f"{method}: block {block.index + 1} of {len(blocks)}")
        given = [call.on(h) for call, h in zip(block_calls, hidden, strict=True)]
        block_calls.clear()
        hidden.clear()
        work = FloatBlock(block, given, masks, method, keep_outputs=not sequential)
        yield work
        work.write_back()
        if block is not blocks[-1]:
            hidden = work.hand_on()


class FloatBlock:
    """A float32 copy of one decoder block, and the calls that reach it on the calibration text."""

    def __init__(
        self, block: Block, calls: Sequence[Call], masks: Sequence[Tensor], method: str, *, keep_outputs: bool
    ) -> None:
        self.stored = block
        self.block = copy.deepcopy(block)
        self.block.module.float()
        device = module_device(block.module)
        self.calls = [call.to(device) for call in calls]
        self.masks = [mask.to(device) for mask in masks]
        """(batch, tokens) bool each: true where there is no padding."""
        self.method = method
        self.keep_outputs = keep_outputs
        self.outputs: list[Tensor] = []
        """What the block put out before it was changed, if that is to be handed on."""

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.block.linear_groups

    def collect(
        self, groups: Sequence[LinearGroup], scopes: dict[str, list[Call]] | None = None
    ) -> dict[str, InputStatistics]:
        """Run the block, as it is now, on all the text and return the groups' statistics by role.

        Padding does not count. `scopes` is filled, by role, with the calls of the modules that the
        groups stand in. The pass ends at the last of the groups, unless the block's outputs are
        still to be kept. Raises InterventionError for inputs that are NaN or infinite.
        """
        device = self.calls[0].hidden.device
        statistics: dict[str, InputStatistics] = {
            group.role: InputStatistics.zeros(group.in_features, device) for group in groups
        }
        to_end = self.keep_outputs and not self.outputs
        waiting: set[str] = set()

        def see(role: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
                x = arguments[0]
                statistics[role].add_(x.reshape(-1, x.shape[-1])[real])
                waiting.discard(role)
                if not waiting and not to_end:
                    raise SeenEnough

            return add

        handles = [group.linears[0].module.register_forward_pre_hook(see(group.role)) for group in groups]
        if scopes is not None:
            handles += [keep_calls(group.scope, scopes.setdefault(group.role, [])) for group in groups if group.scope]
        try:
            for call, mask in zip(self.calls, self.masks, strict=True):
                real = mask.reshape(-1)  # for the hooks
                waiting.update(statistics)
                with suppress(SeenEnough):
                    output = call(self.block.module)
                    if to_end:
                        self.outputs.append(output)
        finally:
            for handle in handles:
                handle.remove()
        for group in groups:
            self._check_inputs(group, statistics[group.role])
        return statistics

    def _check_inputs(self, group: LinearGroup, statistics: InputStatistics) -> None:
        if not bool(torch.isfinite(statistics.gram.diagonal()).all()):
            raise InterventionError(
                f"{self.method}: what reaches {group.linears[0].name} on the calibration text is NaN or infinite "
                "in float32: does the model still work after the steps before?"
            )

    def write_back(self) -> None:
        """Round the copy's values once into the model's own block, and keep those in the copy."""
        for stored, new in zip(self.stored.module.parameters(), self.block.module.parameters(), strict=True):
            stored.copy_(new)
            new.copy_(stored)

    def hand_on(self) -> list[Tensor]:
        """Return the hidden states for the next block; the calls are used up."""
        if not self.keep_outputs:
            self.calls.reverse()
            while self.calls:  # one by one, so that each input is freed before the next output is made
                self.outputs.append(self.calls.pop()(self.block.module))
        self.calls.clear()
        return self.outputs


def affordable_tokens(block: Block) -> int:
    """Return how many tokens fit in the memory set aside for a batch's activations, at least 1."""
    width = sum(
        group.in_features + sum(linear.out_features for linear in group.linears) for group in block.linear_groups
    )
    budget = CPU_BYTES if module_device(block.module).type == "cpu" else ACCELERATOR_BYTES
    return max(1, budget // (2 * 4 * width))  # float32, and as much again for what lies between the linears


def check_weights(block: Block, method: str) -> None:
    """Raise InterventionError, naming the layer, if a weight of the block is NaN or infinite."""
    for linear in block.linears:
        if not bool(torch.isfinite(linear.weight).all()):
            raise InterventionError(
                f"{method}: {linear.parameter_name} has NaN or infinite values: load the model again, "
                "or see which step before left them"
            )


def check_enough(blocks: Sequence[Block], tokens: int, method: str) -> None:
    """Raise InterventionError, naming the layer, if there are fewer tokens than a linear has columns."""
    for group in (group for block in blocks for group in block.linear_groups):
        if tokens < group.in_features:
            raise InterventionError(
                f"{method}: {tokens} calibration tokens are too few for the {group.in_features} columns of "
                f"{group.linears[0].name}: give more or longer texts, or raise samples or max_tokens"
            )


def each_linear(model: nn.Module, context: Context, method: str) -> Iterator[Linear]:
    """Give every linear of the decoder blocks, in order, once all their weights are known to be finite.

    Raises InterventionError like `check_weights`.
    """
    blocks = find_anatomy(model).blocks
    for block in blocks:
        check_weights(block, method)
    for block in blocks:
        context.progress(f"{method}: block {block.index + 1} of {len(blocks)}")
        yield from block.linears
