"""Compress a model block by block, from statistics of the inputs of its linears on calibration text.

GPTQ, SparseGPT, Wanda and AWQ share this loop: run a block on the calibration text, collect statistics, change the
linears, and pass the block's outputs to the next one. Beyond the model's weights, memory holds one block in
float32, its Gram matrices and one hidden state per token; with a memory budget (see `interventions.offload`)
hidden states stay on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.compress.bases import Calibrated, Sequential
from interventions.compress.kernels.asymmetric import UnchangedPath
from interventions.compress.kernels.capture import (
    Call,
    ReplayedModule,
    Shapes,
    catch_block_calls,
    find_replayable,
    keep_calls,
)
from interventions.compress.kernels.precision import pass_precision
from interventions.compress.kernels.working_memory import WorkingMemory, working_memory
from interventions.context import Context
from interventions.early_exit import StopForward
from interventions.shared_statistics import BlockStatistics, Entry, Sums
from interventions.statistics import Batch, scarce, window_batches
from interventions.structure import Block, Linear, LinearGroup, module_device, placement, within_context
from interventions.types import InterventionError, Resources


@torch.no_grad()
def walk_blocks(
    model: nn.Module,
    tokenizer: Any,
    settings: Sequential,
    resources: Resources,
    context: Context,
    work: Callable[[LinearGroup, Sums], list[dict[str, Any]]],
    sums: type[Sums],
) -> list[dict[str, Any]]:
    """Call `work` for every group of linears that share an input, in order; return its results in one list.

    `work(group, statistics)` changes the group's weights in place and returns plain data, usually one dict per
    linear. The weights are float32 copies, rounded once into the model when the block is done. `work` must not
    change the statistics, which are of type `sums`.

    With `settings.sequential`, blocks are calibrated on the outputs of the compressed blocks before them, otherwise
    on those of the original blocks. `true_sequential` does the same for the groups inside a block. With
    `asymmetric_calibration`, statistics of type `PairedStatistics` compare both. For errors see `float_blocks`.
    """
    details: list[dict[str, Any]] = []
    true_sequential = getattr(settings, "true_sequential", False)
    options: dict[str, Any] = {"true_sequential": true_sequential, "reads": sums}
    options["paired"] = getattr(settings, "asymmetric_calibration", False)
    for block in float_blocks(model, tokenizer, settings, resources, context, settings.sequential, **options):
        if true_sequential:
            for group in block.groups:
                details += work(group, block.collect([group], sums=sums)[group.role])
                block.finish(group)
        else:
            statistics = block.collect(block.groups, sums=sums)
            for group in block.groups:
                details += work(group, statistics.pop(group.role))
    return details


@torch.no_grad()
def float_blocks(
    model: nn.Module,
    tokenizer: Any,
    settings: Calibrated,
    resources: Resources,
    context: Context,
    sequential: bool,
    *,
    true_sequential: bool = False,
    reads: type | None = None,
    batch_tokens: int | None = None,
    scaled: bool = False,
    paired: bool = False,
) -> Iterator[FloatBlock]:
    """Yield each block of the model as a float32 copy, with its calls on the calibration text.

    Changes of the copy are written back when the caller takes the next block. The text is read in
    `settings.samples` windows of `settings.max_tokens`, in batches that fit the memory for activations and have
    `batch_tokens` at most. If the caller reads nothing but statistics of type `reads`, blocks whose statistics are
    cached do not run. With `scaled`, a warning lists the groups whose input cannot be scaled. With `paired`, the
    unchanged model runs on the text beside the changed one, for `PairedStatistics`.

    Raises InterventionError, naming layer and setting, for missing or empty text, fewer tokens than a linear has
    columns, NaN or infinite weights or inputs, and a memory budget smaller than a block.
    """
    method = settings.name
    blocks = find_anatomy(model).blocks
    where = placement(model)
    memory = working_memory(blocks, where, method)
    affordable = affordable_tokens(blocks[0], memory)
    most = affordable if batch_tokens is None else min(batch_tokens, affordable)
    batches = calibration_batches(model, tokenizer, settings, resources, context, blocks, batch_tokens=most)
    if scaled:
        warn_of_unscaled(unscaled(blocks, method, context), method, context)
    known = BlockStatistics(None if paired else context.statistics, batches, sequential=sequential)
    all_known = not sequential and not true_sequential and reads is not None and known.cover(blocks, reads)
    masks = [batch["attention_mask"].bool() for batch in batches]
    calls = catch_block_calls(model, batches, blocks)
    hidden = [call.hidden for call in calls[0]]
    unchanged = UnchangedPath(hidden, blocks[0].linears[0].weight.dtype) if paired else None
    shapes: Shapes = {}
    for block, block_calls in zip(blocks, calls, strict=True):
        context.progress(f"{method}: block {block.index + 1} of {len(blocks)}")
        given = [call.on(h) for call, h in zip(block_calls, hidden, strict=True)]
        block_calls.clear()
        hidden.clear()
        work = FloatBlock(
            block,
            given,
            masks,
            method,
            device=where.device if where.streamed else module_device(block.module),
            memory=memory,
            known=known,
            keep_outputs=not sequential and not all_known,
            unchanged=unchanged,
        )
        if unchanged is not None:
            unchanged.enter(work.block, given, work.resting)
        if true_sequential:
            work.replay(shapes)
        yield work
        work.write_back()
        if block is not blocks[-1]:
            if unchanged is not None:
                unchanged.leave()
            hidden = [call.hidden for call in given] if all_known else work.hand_on()


class FloatBlock:
    """A float32 copy of one decoder block, and its calls on the calibration text."""

    def __init__(
        self,
        block: Block,
        calls: Sequence[Call],
        masks: Sequence[Tensor],
        method: str,
        *,
        device: torch.device,
        memory: WorkingMemory,
        known: BlockStatistics,
        keep_outputs: bool,
        unchanged: UnchangedPath | None = None,
    ) -> None:
        self.stored = block
        self.unchanged = unchanged
        self.block = copy.deepcopy(block)
        self.block.module.to(device).float()
        self.device = device
        self.memory = memory
        tokens = sum(call.hidden.shape[0] * call.hidden.shape[1] for call in calls)
        self.resting = memory.where_to_rest(tokens * calls[0].hidden.shape[-1] * 4, device)
        """Device that stores hidden states between passes."""
        self.tokens = tokens
        self.calls = [call.to(self.resting) for call in calls]
        self.masks = [mask.to(device) for mask in masks]
        """(batch, tokens) bool each: false for padding."""
        self.rows = [None if bool(mask.all()) else mask.reshape(-1) for mask in self.masks]
        self.method = method
        self.known = known
        self.keep_outputs = keep_outputs
        self.outputs: list[Tensor] = []
        """Outputs of the unchanged block, if the next block needs them."""
        self.changed = False
        self.replayed: dict[str, ReplayedModule] = {}

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.block.linear_groups

    def replay(self, shapes: Shapes) -> None:
        """Record inputs of the last linears of attention and MLP, so that later passes can start there."""
        for role, module in find_replayable(self.groups, shapes).items():
            if 4 * self.tokens * module.last.in_features <= self.memory.kept:
                self.replayed[role] = module

    def finish(self, group: LinearGroup) -> None:
        """Mark the weights of this group, and of the groups before it, as final."""
        self.changed = True
        if group.role in self.replayed:
            self.replayed[group.role].final = True

    def collect(
        self,
        groups: Sequence[LinearGroup],
        scopes: dict[str, list[Call]] | None = None,
        *,
        sums: type[Sums],
    ) -> dict[str, Sums]:
        """Run the block in its current state and return the groups' statistics by role, without padding.

        `scopes` receives the calls of the modules that contain the groups, by role. The pass ends at the last group,
        unless the block's outputs are still needed. Statistics may come from the cache: do not change them. Raises
        InterventionError for inputs that are NaN or infinite.
        """
        to_end = self.keep_outputs and not self.outputs
        statistics = {} if self.changed else self.known.find(self.block, groups, sums, self.device)
        wanted = [group for group in groups if group.role not in statistics]
        fresh: dict[str, Sums] = {group.role: sums.zeros(group.in_features, self.device) for group in wanted}
        statistics |= fresh
        observed = groups if scopes is not None else wanted
        if observed or to_end:
            self._observe(observed, fresh, scopes, to_end=to_end)
        for group in wanted:
            self._check_inputs(group, statistics[group.role])
        if not self.changed:
            self.known.keep(self.block, fresh)
        return {group.role: statistics[group.role] for group in groups}

    def _observe(
        self,
        groups: Sequence[LinearGroup],
        statistics: dict[str, Sums],
        scopes: dict[str, list[Call]] | None,
        *,
        to_end: bool,
    ) -> None:
        """Run the block until every group was reached, and add to their statistics."""
        waiting: set[str] = set()
        rows: Tensor | None = None

        def observe(role: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
                x: Tensor = arguments[0]
                if role in statistics:
                    flat = x.reshape(-1, x.shape[-1])
                    statistics[role].add_(flat if rows is None else flat[rows])
                if role in self.replayed:
                    self.replayed[role].keep(x)
                waiting.discard(role)
                if not waiting and not to_end:
                    raise StopForward

            return add

        handles = [group.linears[0].module.register_forward_pre_hook(observe(group.role)) for group in groups]
        if scopes is not None:
            handles += [
                keep_calls(group.scope, scopes.setdefault(group.role, []), self.resting)
                for group in groups
                if group.scope
            ]
        try:
            for number in range(len(self.calls)):
                rows = self.rows[number]  # for the hooks
                waiting.update(group.role for group in groups)
                if self.unchanged is not None:
                    self.unchanged.expect(number, {group: statistics[group.role] for group in groups}, rows)
                with suppress(StopForward):
                    output = self._run(number, self.calls[number])
                    if to_end:
                        self.outputs.append(output)
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, batch: int, call: Call) -> Tensor:
        """Return the block's output on one batch; hooks run in the same matmul precision."""
        with ExitStack() as stack:
            stack.enter_context(pass_precision(self.device, self.stored.linears[0].weight.dtype))
            for module in self.replayed.values():
                if module.usable:
                    stack.enter_context(module.replaying(batch))
            return call.to(self.device)(self.block.module).to(self.resting)

    def _check_inputs(self, group: LinearGroup, statistics: Entry) -> None:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in statistics.tensors):
            raise InterventionError(
                f"{self.method}: the inputs of {group.linears[0].name} on the calibration text are NaN or infinite "
                "in float32: check that the model still works after the earlier steps"
            )

    def write_back(self) -> None:
        """Round the copy's values once into the model's block, and keep the rounded values in the copy."""
        for stored, new in zip(self.stored.module.parameters(), self.block.module.parameters(), strict=True):
            stored.copy_(new)
            if stored.dtype != new.dtype:
                new.copy_(stored)

    def hand_on(self) -> list[Tensor]:
        """Return the hidden states for the next block, and free the calls."""
        if not self.keep_outputs:
            self.calls.reverse()
            while self.calls:  # one by one, to free each input before computing the next output
                self.outputs.append(self._run(len(self.outputs), self.calls.pop()))
        self.calls.clear()
        return self.outputs


def affordable_tokens(block: Block, memory: WorkingMemory) -> int:
    """Return how many tokens fit in the memory for a batch's activations, at least `memory.least_tokens`."""
    width = sum(
        group.in_features + sum(linear.out_features for linear in group.linears) for group in block.linear_groups
    )
    bytes_per_token = 2 * 4 * width  # float32, doubled for activations between the linears
    return max(memory.least_tokens, memory.batch // bytes_per_token)


def calibration_batches(
    model: nn.Module,
    tokenizer: Any,
    settings: Calibrated,
    resources: Resources,
    context: Context,
    blocks: Sequence[Block],
    *,
    batch_tokens: int | None = None,
) -> list[Batch]:
    """Return the calibration tokens of a method, after checking the texts, their number and the model's weights.

    Without `batch_tokens`, all windows are in one batch.
    """
    method = settings.name
    if not resources.calibration:
        raise InterventionError(f"{method} needs calibration texts: give `calibration`")
    for block in blocks:
        check_weights(block, method)
    batches = window_batches(
        tokenizer,
        resources.calibration,
        samples=settings.samples,
        max_tokens=within_context(model, settings.max_tokens),
        batch_tokens=batch_tokens,
    )
    check_enough(blocks, batches, method, settings.samples, context)
    return batches


def check_weights(block: Block, method: str) -> None:
    """Raise InterventionError, naming the layer, if a weight of the block is NaN or infinite."""
    for linear in block.linears:
        if not bool(torch.isfinite(linear.weight).all()):
            raise InterventionError(
                f"{method}: {linear.parameter_name} has NaN or infinite values: load the model again, "
                "or find the earlier step that left them"
            )


def check_enough(
    blocks: Sequence[Block], batches: Sequence[Batch], method: str, samples: int, context: Context
) -> None:
    """Raise InterventionError, naming the layer, if there are fewer tokens than a linear has columns.

    Warns if there are too few for reliable statistics, and whether to add text or raise `samples`.
    """
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for group in (group for block in blocks for group in block.linear_groups):
        if tokens < group.in_features:
            raise InterventionError(
                f"{method}: {tokens} calibration tokens are too few for the {group.in_features} columns of "
                f"{group.linears[0].name}: give more or longer texts, or raise samples or max_tokens"
            )
    all_read = sum(len(batch["input_ids"]) for batch in batches) < samples
    columns: dict[str, int] = {group.role: group.in_features for block in blocks for group in block.linear_groups}
    remedy = "give more calibration text" if all_read else f"raise {method}.samples or {method}.max_tokens"
    warning = scarce(method, tokens, columns, remedy)
    if warning is not None:
        context.warn(warning)


def unscaled(blocks: Sequence[Block], method: str, context: Context) -> list[str]:
    """Return the first linears of the groups whose input scales cannot be folded into the operation before them."""
    names = []
    for block in blocks:
        context.progress(f"{method}: testing scales in block {block.index + 1} of {len(blocks)}")
        names += [g.linears[0].name for g in block.linear_groups if g.declared is not None and g.previous is None]
    return names


def warn_of_unscaled(names: Sequence[str], method: str, context: Context) -> None:
    """Warn, in one sentence, about groups of linears that are quantised without scales."""
    if names:
        others = f" and {len(names) - 1} more groups of layers" if len(names) > 1 else ""
        context.warn(
            f"{method}: no scales for {names[0]}{others}, which are quantised without: in a trial run, folding "
            "scales into the operation before them changed the block's output"
        )


def each_linear(model: nn.Module, context: Context, method: str) -> Iterator[Linear]:
    """Yield every linear of the decoder blocks, in order, after checking that all weights are finite.

    Raises InterventionError like `check_weights`.
    """
    blocks = find_anatomy(model).blocks
    for block in blocks:
        check_weights(block, method)
    for block in blocks:
        context.progress(f"{method}: block {block.index + 1} of {len(blocks)}")
        yield from block.linears
