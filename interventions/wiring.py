"""Find out, by running a decoder block, what its linear layers read, and what each one's output reaches.

Names do not tell, and values may be anything: NaN, or zeros after pruning. Layers that read the same tensor share an
input. To see where a layer's output goes, the block runs on random hidden states, with all linear layers pinned to
random outputs, and one changed at one token: the layers whose input changes read its output with no other linear layer
between, and if other tokens change as well, tokens are mixed on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from interventions.early_exit import replaced_forward
from interventions.structure import Linear, is_linear
from interventions.trace import ModuleCall, same, tensors

_NOISE = 1e-5
"""Changes of an input below this share of its size are rounding."""
_TOLERANCE = 0.02
"""A doubled output must double what it feeds up to this share: bfloat16 rounds by 0.004."""


@dataclass(eq=False)
class Site:
    """A linear layer of a block that runs once, on every token."""

    path: str
    """Inside the block."""
    linear: Linear
    input: Tensor
    output: Tensor
    order: int
    """Its place among the calls of the block."""
    feeds: dict[Site, bool] = field(default_factory=dict)
    """The layers that read its output with no other linear layer between, and whether other tokens reach them."""
    ends: bool | None = None
    """Whether its output reaches the block's output with no other linear layer between; True: other tokens do too."""
    attends: bool = False
    """Whether a softmax or an attention kernel ran between it and the layer called before it."""

    @property
    def reaches_end(self) -> bool:
        return self.ends is not None

    @property
    def read(self) -> tuple[int, ...]:
        """What tells the input apart from others: the same values of the same tensor."""
        return _identity(self.input)


@dataclass
class Wiring:
    """The linear layers of a block in the order of their calls, and what is left out, with the reason."""

    sites: list[Site]
    left: dict[str, str]
    norms: list[ModuleCall]
    """The calls of modules with a weight vector."""
    runs: _Runs
    called: set[str]
    """Paths of the modules that run once."""

    def feeding(self, site: Site) -> list[Site]:
        """Return the layers whose output reaches the input of `site` alone, in order."""
        return [other for other in self.sites if site in other.feeds and not other.reaches_end]

    def norm_before(self, site: Site) -> nn.Module | None:
        """Return the module with a weight vector whose output is the input of `site`."""
        rows = site.input.reshape(-1, site.linear.in_features)
        found = [norm for norm in reversed(self.norms) if norm.output.numel() == rows.numel()]
        found.sort(key=lambda norm: _identity(norm.output) != site.read)
        return next((norm.module for norm in found if same(norm.output.reshape(rows.shape), rows)), None)

    @property
    def ends(self) -> list[Site]:
        """The layers that put out what the block puts out, with others before them."""
        return [site for site in self.sites if site.reaches_end and self.feeding(site)]


def wire(
    name: str, call: ModuleCall, inner: Sequence[ModuleCall], tokens: int, known: set[int], apart: set[int]
) -> Wiring:
    """Return the wiring of the block `name`, which `call` ran and in which the calls `inner` took place.

    `known` are ids of weights that have been met before, `apart` ids of modules to leave out without a word.
    """
    block = call.module
    by_module: dict[int, list[ModuleCall]] = {}
    for one in inner:
        by_module.setdefault(id(one.module), []).append(one)
    order = {id(one): number for number, one in enumerate(inner)}
    sites, left = [], {}
    for path, module in block.named_modules():
        if not is_linear(module) or id(module) in apart:
            continue
        linear = Linear(f"{name}.{path}", module)
        if id(module.weight) in known:
            continue
        calls = by_module.get(id(module), [])
        reason = _reason(linear, calls, tokens)
        if reason is not None:
            left[linear.name] = reason
            continue
        known.add(id(module.weight))
        x = next(tensors((*calls[0].arguments, *calls[0].keywords.values())))
        sites.append(Site(path, linear, x, calls[0].output, order[id(calls[0])]))
    sites.sort(key=lambda site: site.order)
    runs = _Runs(block, call, sites, tokens)
    runs.connect()
    norms = [one for one in inner if _is_norm(one)]
    called = {path for path, module in block.named_modules() if len(by_module.get(id(module), ())) == 1}
    return Wiring(sites, left, norms, runs, called)


def _reason(linear: Linear, calls: Sequence[ModuleCall], tokens: int) -> str | None:
    """Return why a layer is left out, or None."""
    if not calls:
        return "it is not called"
    if len(calls) > 1:
        return f"it is called {len(calls)} times in one pass"
    if not isinstance(calls[0].output, Tensor) or not calls[0].inputs:
        return "it does not return a tensor"
    rows = calls[0].inputs[0].numel() // linear.in_features
    return None if rows == tokens else f"it reads {rows} rows for {tokens} tokens"


def _identity(x: Tensor) -> tuple[int, ...]:
    return (x.untyped_storage().data_ptr(), int(x.storage_offset()), x.numel(), x._version)


def _is_norm(call: ModuleCall) -> bool:
    weight = getattr(call.module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and isinstance(call.output, Tensor)


class _Softmax(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts softmaxes and attention kernels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        name = str(function)
        self.count += "softmax" in name or "attention" in name or "attn" in name
        return function(*arguments, **(keywords or {}))


class _Runs:
    """Runs of a block with all its linear layers pinned."""

    def __init__(self, block: nn.Module, call: ModuleCall, sites: Sequence[Site], tokens: int) -> None:
        self.block, self.sites, self.tokens = block, sites, tokens
        self.generator = torch.Generator().manual_seed(0)
        hidden = next(tensors((*call.arguments, call.keywords.get("hidden_states"), *call.keywords.values())))
        other = self.random(hidden)
        self.arguments = tuple(other if value is hidden else value for value in call.arguments)
        self.keywords = {name: other if value is hidden else value for name, value in call.keywords.items()}
        for site in sites:
            site.output = self.random(site.output)

    def random(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)

    def connect(self) -> None:
        """Fill in what the layers feed."""
        if not self.sites:
            return
        softmax = _Softmax()
        counts: list[int] = []
        with softmax:
            inputs, ends = self.run({}, lambda: counts.append(softmax.count))
        for site, before, after in zip(self.sites, [0, *counts], counts, strict=False):
            site.attends = after > before
        place = self.tokens // 2
        for site in self.sites:
            changed = site.output.clone(memory_format=torch.contiguous_format)
            changed.view(self.tokens, -1)[place] = self.random(changed.view(self.tokens, -1)[place])
            new_inputs, new_ends = self.run({site: changed})
            for other in self.sites:
                if other is not site:
                    tokens = self.changed(inputs[other], new_inputs[other])
                    if bool(tokens.any()):
                        site.feeds[other] = bool(tokens.sum() > 1)
            found = [self.changed(a, b) for a, b in zip(ends, new_ends, strict=True)]
            if any(bool(tokens.any()) for tokens in found):
                site.ends = any(bool(tokens.sum() > 1) for tokens in found)

    def doubles(self, site: Site, other: Site) -> bool:
        """Return whether doubling the last outputs of `site` doubles the input of `other`."""
        width = other.linear.in_features
        changed = site.output.clone(memory_format=torch.contiguous_format)
        changed.view(self.tokens, -1)[:, -width:] *= 2
        x = self.run({site: changed})[0][other].float()
        wanted = 2 * self.run({})[0][other].float()
        return float((x - wanted).norm()) <= _TOLERANCE * float(wanted.norm())

    def run(
        self, changed: Mapping[Site, Tensor], at: Callable[[], object] = lambda: None
    ) -> tuple[dict[Site, Tensor], list[Tensor]]:
        """Run the block; return the inputs of the layers and the block's outputs. Call `at` at every layer."""
        inputs: dict[Site, Tensor] = {}
        with ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(self.pinned(site, changed.get(site, site.output), inputs, at))
            output = self.block(*self.arguments, **self.keywords)
        for site in self.sites:
            inputs.setdefault(site, site.input)
        return inputs, list(tensors(output))[:1]

    @contextmanager
    def pinned(
        self, site: Site, output: Tensor, inputs: dict[Site, Tensor], at: Callable[[], object]
    ) -> Iterator[None]:
        def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            at()
            inputs[site] = x.clone()
            return output.clone()

        with replaced_forward(site.linear.module, forward):
            yield

    def changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Return which tokens changed, (tokens,) bool; all of them for values that cannot be told apart by token."""
        if before.shape != after.shape or before.numel() % self.tokens:
            return torch.ones(self.tokens, dtype=torch.bool)
        difference = (after.float() - before.float()).abs()
        axis = next((n for n, size in enumerate(before.shape) if size == self.tokens), None)
        rows = difference.reshape(self.tokens, -1) if axis is None else difference.movedim(axis, 0).flatten(1)
        return rows.amax(dim=1).cpu() > _NOISE * float(before.float().abs().max())
