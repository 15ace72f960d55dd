"""Compress a model block by block, from statistics of the inputs of its linears on calibration text.

GPTQ, SparseGPT, Wanda and AWQ share this loop: run a block on the calibration text, collect statistics, change the
linears, and pass the block's outputs to the next one. Beyond the model's weights, memory holds one block in
float32, its Gram matrices and one hidden state per token; with a memory budget (see `interventions.offload`)
hidden states stay on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
    inputs_of,
    keep_calls,
)
from interventions.compress.kernels.precision import pass_precision
from interventions.compress.kernels.reach import Reach
from interventions.compress.kernels.working_memory import WorkingMemory, working_memory
from interventions.context import Context
from interventions.early_exit import StopForward
from interventions.experts import ExpertLayer, every_token, find_experts
from interventions.parts import plain_experts
from interventions.shared_statistics import BlockStatistics, Entry, Sums
from interventions.statistics import Batch, scarce, window_batches
from interventions.structure import Block, Linear, LinearGroup, module_device, placement, within_context
from interventions.types import InterventionError, Resources

BUNCH = 2**26
"""Elements of Gram matrices that are worked on at a time."""
Work = Callable[[LinearGroup, Sums], list[dict[str, Any]]]
StageWork = Callable[[Sequence[LinearGroup], Sequence[Sums]], list[dict[str, Any]]]


def walk_blocks(
    model: nn.Module,
    tokenizer: Any,
    settings: Sequential,
    resources: Resources,
    context: Context,
    work: Work[Sums],
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

    def each(groups: Sequence[LinearGroup], statistics: Sequence[Sums]) -> list[dict[str, Any]]:
        return [detail for group, own in zip(groups, statistics, strict=True) for detail in work(group, own)]

    return walk_stages(model, tokenizer, settings, resources, context, each, sums)


@torch.no_grad()
def walk_stages(
    model: nn.Module,
    tokenizer: Any,
    settings: Sequential,
    resources: Resources,
    context: Context,
    work: StageWork[Sums],
    sums: type[Sums],
) -> list[dict[str, Any]]:
    """Do what `walk_blocks` does, but give `work` all groups of a role at once: those of all experts."""
    details: list[dict[str, Any]] = []
    true_sequential = getattr(settings, "true_sequential", False)
    options: dict[str, Any] = {"true_sequential": true_sequential, "reads": sums}
    options["paired"] = getattr(settings, "asymmetric_calibration", False)
    for block in float_blocks(model, tokenizer, settings, resources, context, settings.sequential, **options):
        statistics = {} if true_sequential else block.collect(block.groups, sums=sums)
        for groups in block.block.stages:
            if true_sequential:
                statistics = block.collect(groups, sums=sums)
            details += work(groups, [statistics.pop(group.key) for group in groups])
            if true_sequential:
                block.finish(groups)
    return details


def in_bunches(work: StageWork[Sums], *, together: bool) -> StageWork[Sums]:
    """Give `work` the groups of a stage in bunches of the same shapes: as many as fit in memory, or one by one."""

    def bunched(groups: Sequence[LinearGroup], statistics: Sequence[Sums]) -> list[dict[str, Any]]:
        details: list[dict[str, Any]] = []
        by_shape: dict[tuple[torch.Size, ...], list[int]] = {}
        for number, group in enumerate(groups):
            by_shape.setdefault(tuple(linear.weight.shape for linear in group.linears), []).append(number)
        for numbers in by_shape.values():
            size = max(1, BUNCH // groups[numbers[0]].in_features ** 2) if together else 1
            for low in range(0, len(numbers), size):
                chosen = numbers[low : low + size]
                details += work([groups[number] for number in chosen], [statistics[number] for number in chosen])
        return details

    return bunched


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
    warn_of_left(blocks, method, context)
    if scaled:
        warn_of_unscaled(unscaled(blocks, method, context), method, context)
        warn_of_experts(blocks, method, context)
    every = settings.calibrate_all_experts
    shared = None if paired else context.statistics
    known = BlockStatistics(shared, batches, sequential=sequential, every=every)
    reach = Reach()
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
            reach=reach,
            every_expert=every,
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
    for warning in reach.warnings(method):
        context.warn(warning)


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
        reach: Reach,
        every_expert: bool,
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
        self.reach = reach
        self.experts: list[ExpertLayer] = find_experts(block.name, self.block.module) if every_expert else []
        """Layers whose experts all get every token while statistics are collected."""
        self.keep_outputs = keep_outputs
        self.outputs: list[Tensor] = []
        """Outputs of the unchanged block, if the next block needs them."""
        self.changed = False
        self.replayed: dict[str, ReplayedModule] = {}
        self.unreached: frozenset[str] = frozenset()
        """Keys of the groups of experts that no token reached."""

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.block.linear_groups

    def replay(self, shapes: Shapes) -> None:
        """Record inputs of the last linears of attention and MLP, so that later passes can start there."""
        for role, module in find_replayable(self.groups, shapes).items():
            if 4 * self.tokens * module.last.in_features <= self.memory.kept:
                self.replayed[role] = module

    def finish(self, groups: Sequence[LinearGroup]) -> None:
        """Mark the weights of these groups, and of the groups before them, as final."""
        self.changed = True
        for group in groups:
            if group.key in self.replayed:
                self.replayed[group.key].final = True

    def collect(
        self,
        groups: Sequence[LinearGroup],
        scopes: dict[str, list[Call]] | None = None,
        *,
        sums: type[Sums],
    ) -> dict[str, Sums]:
        """Run the block in its current state and return the groups' statistics by key, without padding.

        `scopes` receives the calls of the modules that contain the groups, by key. The pass ends at the last group,
        unless the block's outputs are still needed. Statistics may come from the cache: do not change them. Those of
        an expert that no token reached give every column the same weight. Raises InterventionError for inputs that
        are NaN or infinite.
        """
        to_end = self.keep_outputs and not self.outputs
        statistics = {} if self.changed else self.known.find(self.block, groups, sums, self.device)
        wanted = [group for group in groups if group.key not in statistics]
        fresh: dict[str, Sums] = {group.key: sums.zeros(group.in_features, self.device) for group in wanted}
        statistics |= fresh
        observed = groups if scopes is not None else wanted
        if observed or to_end:
            self._observe(observed, fresh, scopes, to_end=to_end)
        for group in wanted:
            self._check_inputs(group, statistics[group.key])
        if not self.changed:
            self.known.keep(self.block, fresh)
        for group in groups:
            if not self.reach.reached(self.block, group, statistics[group.key].count):
                statistics[group.key] = sums.even(group.in_features, self.device)
                self.unreached |= {group.key}
        return {group.key: statistics[group.key] for group in groups}

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
        to_end = to_end or any(group.routed for group in groups)  # some experts may get no token

        def add(key: str, x: Tensor) -> None:
            if key in statistics:
                flat = x.reshape(-1, x.shape[-1])
                statistics[key].add_(flat if rows is None else flat[rows])
            if key in self.replayed:
                self.replayed[key].keep(x)
            waiting.discard(key)
            if not waiting and not to_end:
                raise StopForward

        with ExitStack() as stack:
            heard = stack.enter_context(self._every_token())
            stack.enter_context(inputs_of(groups, lambda group, x: add(group.key, x) if heard(group) else None))
            for group in groups:
                if scopes is not None and group.scope is not None:
                    hook = keep_calls(group.scope, scopes.setdefault(group.key, []), self.resting)
                    stack.callback(hook.remove)
            for number in range(len(self.calls)):
                rows = self.rows[number]  # for `add`
                waiting.update(group.key for group in groups)
                if self.unchanged is not None:
                    self.unchanged.expect(number, {group: statistics[group.key] for group in groups}, rows)
                with suppress(StopForward):
                    output = self._run(number, self.calls[number])
                    if self.keep_outputs and len(self.outputs) == number:
                        self.outputs.append(output)

    @contextmanager
    def _every_token(self) -> Iterator[Callable[[LinearGroup], bool]]:
        """Let experts get every token as well, if so set; yields whether a group's inputs count at the moment."""
        with every_token(self.block.module, self.experts, self.method) as listening:
            yield lambda group: not group.routed or not self.experts or listening()

    def _run(self, batch: int, call: Call) -> Tensor:
        """Return the block's output on one batch; hooks run in the same matmul precision."""
        with ExitStack() as stack:
            stack.enter_context(pass_precision(self.device, self.stored.linears[0].weight.dtype))
            stack.enter_context(plain_experts(self.block.module))
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
    routed = next((group.expert for group in block.linear_groups if group.routed), None)
    width = sum(
        group.in_features + sum(linear.out_features for linear in group.linears)
        for group in block.linear_groups
        if not group.routed or group.expert == routed  # a token goes through few of the experts
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

    Without `batch_tokens`, all windows are in one batch. With it, batches of a model with routed experts have no
    padding: what reaches an expert does not show which tokens are padding.
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
        padded=batch_tokens is None or not any(group.routed for block in blocks for group in block.linear_groups),
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
    every = [group for block in blocks for group in block.linear_groups if not group.routed]
    for group in every:
        if tokens < group.in_features:
            raise InterventionError(
                f"{method}: {tokens} calibration tokens are too few for the {group.in_features} columns of "
                f"{group.linears[0].name}: give more or longer texts, or raise samples or max_tokens"
            )
    all_read = sum(len(batch["input_ids"]) for batch in batches) < samples
    columns: dict[str, int] = {group.key: group.in_features for group in every}
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


def warn_of_experts(blocks: Sequence[Block], method: str, context: Context) -> None:
    """Warn, in one sentence, that what routed experts read is not scaled."""
    layers = [block.name for block in blocks if any(g.routed and g.declared is None for g in block.linear_groups)]
    if layers:
        context.warn(
            f"{method}: no scales for the inputs of the experts of {len(layers)} blocks, {layers[0]} first: the router "
            "reads the same input and stays as it is"
        )


def warn_of_left(blocks: Sequence[Block], method: str, context: Context) -> None:
    """Warn, in one sentence, about the linear layers of the blocks that stay as they are."""
    left = [f"{name} ({reason})" for block in blocks for name, reason in block.left.items()]
    if left:
        others = f" and {len(left) - 1} more layers" if len(left) > 1 else ""
        context.warn(f"{method}: {left[0]}{others} of the decoder blocks stay as they are")


def each_linear(model: nn.Module, context: Context, method: str) -> Iterator[Linear]:
    """Yield every linear of the decoder blocks, in order, after checking that all weights are finite.

    Raises InterventionError like `check_weights`.
    """
    blocks = find_anatomy(model).blocks
    for block in blocks:
        check_weights(block, method)
    warn_of_left(blocks, method, context)
    for block in blocks:
        context.progress(f"{method}: block {block.index + 1} of {len(blocks)}")
        yield from block.linears
