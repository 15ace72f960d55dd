"""Record the calls of a model's modules in float32, and replay the outputs of finished modules.

`catch_block_calls` records how the model calls its decoder blocks without running them. A `ReplayedModule` is
an attention or MLP whose weights are final: later passes only run its last linear, on inputs already recorded.
The first batch checks that this gives the module's output; if not, the whole module runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interventions.early_exit import StopForward, replaced_forward, run_until_seen
from interventions.parts import PartsWatch, Product
from interventions.statistics import Batch
from interventions.structure import Block, Linear, LinearGroup, first_output, module_device


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module, with the hidden states apart."""

    hidden: Tensor
    """(batch, tokens, width) float32."""
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    in_keywords: bool
    """Whether the hidden states are passed by name."""

    @classmethod
    def of(
        cls, arguments: tuple[Any, ...], keywords: dict[str, Any], as_float: Callable[[Any], Any] | None = None
    ) -> Call:
        """Return the call with these arguments, floating-point tensors as float32."""
        as_float = as_float or to_float
        in_keywords = not arguments
        keywords = dict(keywords)
        hidden = keywords.pop("hidden_states") if in_keywords else arguments[0]
        return cls(
            hidden.detach().float(),
            tuple(as_float(a) for a in arguments[1:]),
            {key: as_float(value) for key, value in keywords.items()},
            in_keywords,
        )

    def __call__(self, module: nn.Module) -> Tensor:
        """Run the module on these arguments and return its (first) output."""
        if self.in_keywords:
            return first_output(module(*self.arguments, hidden_states=self.hidden, **self.keywords))
        return first_output(module(self.hidden, *self.arguments, **self.keywords))

    @property
    def alone(self) -> bool:
        """Whether the hidden states are the only tensor among the arguments."""
        return not any(isinstance(value, Tensor) for value in (*self.arguments, *self.keywords.values()))

    def on(self, hidden: Tensor) -> Call:
        """Return the same call on other hidden states."""
        return Call(hidden, self.arguments, self.keywords, self.in_keywords)

    def to(self, device: torch.device) -> Call:
        """Return the same call with all its tensors on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        return Call(
            self.hidden.to(device),
            tuple(_each(a, move) for a in self.arguments),
            {key: _each(value, move) for key, value in self.keywords.items()},
            self.in_keywords,
        )


def to_float(value: Any) -> Any:
    """Return floating-point tensors as float32, also inside tuples; return anything else unchanged."""
    return _each(value, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in a value."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_each(item, change) for item in value)
    return value


@torch.no_grad()
def catch_block_calls(model: nn.Module, batches: Sequence[Batch], blocks: Sequence[Block]) -> list[list[Call]]:
    """Return, for each block and each batch, how the model calls the block.

    Masks and position embeddings can differ between blocks, so each block has its own calls. Only the first block's
    calls have hidden states. The blocks are not run: each returns its input, and the last one ends the pass.
    """
    calls: list[list[Call]] = [[] for _ in blocks]
    recorder = _CallRecorder()
    device = module_device(model)
    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            options = {"with_hidden": number == 0, "last": number == len(blocks) - 1}
            stack.enter_context(recorder.recording(block.module, calls[number], **options))
        for batch in batches:
            recorder.converted.clear()
            run_until_seen(model, {key: value.to(device) for key, value in batch.items()})
    return calls


class _CallRecorder:
    """Replaces the forward functions of decoder blocks by functions that record the call and return the input."""

    def __init__(self) -> None:
        self.converted: dict[int, tuple[Any, Any]] = {}
        """Float32 copies by id of the original, which is kept so that its id stays unique; blocks share masks."""
        self.as_output: Callable[[Tensor], Any] | None = None

    @contextmanager
    def recording(self, module: nn.Module, calls: list[Call], *, with_hidden: bool, last: bool) -> Iterator[None]:
        forward = module.forward

        def record(*arguments: Any, **keywords: Any) -> Any:
            call = Call.of(arguments, keywords, self._as_float)
            calls.append(call if with_hidden else call.on(call.hidden.new_empty(0)))
            if last:
                raise StopForward
            if self.as_output is None:  # some blocks return a tuple: run the first one to find out
                output = forward(*arguments, **keywords)
                rest = output[1:] if isinstance(output, tuple | list) else None
                self.as_output = (lambda hidden: hidden) if rest is None else (lambda hidden: (hidden, *rest))
            return self.as_output(arguments[0] if arguments else keywords["hidden_states"])

        with replaced_forward(module, record):
            yield

    def _as_float(self, value: Any) -> Any:
        if id(value) not in self.converted:
            self.converted[id(value)] = (value, to_float(value))
        return self.converted[id(value)][1]


def keep_calls(module: nn.Module, found: list[Call], device: torch.device) -> RemovableHandle:
    """Append every call of the module to `found`, on a device, until the hook is removed."""

    def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append(Call.of(arguments, keywords).to(device))

    return module.register_forward_pre_hook(keep, with_kwargs=True)


@contextmanager
def inputs_of(groups: Sequence[LinearGroup], see: Callable[[LinearGroup, Tensor], None]) -> Iterator[None]:
    """Call `see` with every input of every group, while the modules run."""
    whole = [group for group in groups if group.linears[0].part is None]
    parts = {group.linears[0].name: group for group in groups if group.linears[0].part is not None}
    linears = [group.linears[0] for group in parts.values()]
    stacks = {linear.parameter_name: getattr(linear.module, linear.part.parameter) for linear in linears if linear.part}

    def product(found: Product) -> None:
        group = parts.get(f"{found.parameter}.{found.place.index}")
        if group is not None:
            see(group, found.inputs)

    def hook(group: LinearGroup) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, arguments: see(group, arguments[0])

    with ExitStack() as stack:
        for group in whole:
            stack.callback(group.linears[0].module.register_forward_pre_hook(hook(group)).remove)
        if stacks:
            stack.enter_context(PartsWatch(stacks, product))
        yield


Shapes = dict[type, int | None]
"""By module class: the number of values it returns, 0 for a tensor; None if its output is not its last linear's."""


class ReplayedModule:
    """An attention or MLP, its last linear, and the recorded inputs of that linear by batch."""

    def __init__(self, scope: nn.Module, last: Linear, shapes: Shapes) -> None:
        self.scope = scope
        self.last = last
        self.final = False
        """Whether the weights of all its linears are final."""
        self._shapes = shapes
        self._inputs: list[Tensor | None] = []
        self._outputs: list[Tensor | None] = []

    def keep(self, x: Tensor) -> None:
        """Record the input of the last linear for the next batch."""
        self._inputs.append(x)
        self._outputs.append(None)

    @property
    def usable(self) -> bool:
        return self.final and bool(self._inputs) and self._shapes.get(type(self.scope), 0) is not None

    @contextmanager
    def replaying(self, batch: int) -> Iterator[None]:
        """Make the module compute its output on a batch from its last linear alone."""
        forward = self.scope.forward

        def replay(*arguments: Any, **keywords: Any) -> Any:
            output = self._outputs[batch]
            if output is None:
                output = self._outputs[batch] = self.last.module(self._inputs[batch])
                self._inputs[batch] = None
            kind = type(self.scope)
            if kind not in self._shapes:
                found = forward(*arguments, **keywords)
                self._shapes[kind] = _shape(found, output)
                return found
            size = self._shapes[kind]
            return (output, *[None] * (size - 1)) if size else output

        with replaced_forward(self.scope, replay):
            yield


def _shape(found: Any, output: Tensor) -> int | None:
    """Return the number of values in `found`, 0 for a tensor; None if it holds more than `output`."""
    if isinstance(found, list):
        return None
    values = found[1:] if isinstance(found, tuple) else ()
    if any(value is not None for value in values) or not torch.equal(first_output(found), output):
        return None
    return len(found) if isinstance(found, tuple) else 0


def find_replayable(groups: Sequence[LinearGroup], shapes: Shapes) -> dict[str, ReplayedModule]:
    """Return the modules whose last linear is a group by itself, by the key of that group."""
    replayable: dict[str, ReplayedModule] = {}
    for scope in dict.fromkeys(group.scope for group in groups if group.scope is not None):
        inside = set(scope.modules())
        within = [group for group in groups if group.linears[0].module in inside]
        if within and len(within[-1].linears) == 1:
            replayable[within[-1].key] = ReplayedModule(scope, within[-1].linears[0], shapes)
    return replayable
