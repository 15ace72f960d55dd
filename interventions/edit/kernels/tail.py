"""Rerun the upper part of a model with changed hidden states at one layer, from one token on.

Optimising a vector at one layer and token needs no computation below the layer or before the token: keys and values
of earlier tokens are cached. Everything else is the model's own forward pass, so the logits are exact for any model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from interventions.early_exit import accepted, head_on_one_token, replaced_forward
from interventions.edit.kernels.arrival import add_at
from interventions.logits import logits_at
from interventions.padding import pad_left, pad_right
from interventions.structure import Anatomy, Block, first_output, module_device
from interventions.types import InterventionError


class Tail:
    """A model from block `layer` on, for one fixed batch of texts.

    `rows` are token ids; `begins` are the first positions whose value changes: the output of the block or, with
    `inside`, of its MLP or, with `attention`, of its attention's output projection; then the MLP's output can
    change at these positions too. The tokens from there on are *suffixes*, (rows, longest suffix), padded on the right
    with `pad`. The batch runs through the model once; later passes skip the layers below. With `cached`,
    keys and values of earlier tokens are cached too; otherwise every pass runs whole texts. `open_tail` tells which
    works for a model.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        layer: int,
        rows: Sequence[Sequence[int]],
        begins: Sequence[int],
        pad: int,
        *,
        inside: bool = False,
        attention: bool = False,
        cached: bool = True,
    ) -> None:
        self._model, self._head = model, anatomy.head
        block = anatomy.blocks[layer]
        self._site = block.memory.module if inside else block.module
        self._also: nn.Module | None = None
        if attention:
            self._site, self._also = attention_and_mlp(block)
        below = [block.module for block in anatomy.blocks[:layer]]
        device = module_device(model)
        self.ids, after_mask = pad_right([row[begin:] for row, begin in zip(rows, begins, strict=True)], pad, device)
        """Token ids of the suffixes, (rows, longest suffix)."""
        self._begins = torch.zeros(len(rows), dtype=torch.int64, device=device)
        with torch.no_grad(), head_on_one_token(self._head):
            if cached:
                self._arguments = self._after_prefixes(rows, begins, pad, after_mask)
            else:
                self._begins += torch.tensor(begins, device=device)
                # A row of padding, long enough to leave room for the longest suffix in every row.
                room = [pad] * (max(begins) + self.ids.shape[1])
                ids, mask = (padded[:-1] for padded in pad_right([*rows, room], pad, device))
                self._arguments = accepted(model, {"input_ids": ids, "attention_mask": mask, "use_cache": False})
            kept: dict[nn.Module, Any] = {}
            also = [] if self._also is None else [self._also]
            every = torch.arange(len(rows), device=device)
            with _watching([*below, self._site, *also], kept):
                model(**self._arguments)
        self.also = [_by_rows(first_output(kept.pop(module)), len(rows))[every, self._begins] for module in also]
        """With `attention`: the MLP's outputs at the first token of each suffix, one tensor (rows, hidden)."""
        self._output = kept.pop(self._site)
        self._below = kept
        self._columns = self._begins[:, None] + torch.arange(self.ids.shape[1], device=device)
        self._whole = _by_rows(first_output(self._output), len(rows))
        self.hidden = self._whole.gather(1, self._columns[:, :, None].expand(-1, -1, self._whole.shape[-1]))
        """Unchanged values on the suffixes, (rows, longest suffix, hidden)."""

    def _after_prefixes(
        self, rows: Sequence[Sequence[int]], begins: Sequence[int], pad: int, after_mask: Tensor
    ) -> dict[str, Any]:
        """Run the tokens before the suffixes; return the arguments of a pass over the suffixes."""
        model: Any = self._model
        # One extra column, so that every row has padding and no model skips its masks.
        width = max(begins) + 1
        prefixes = [row[:begin] for row, begin in zip(rows, begins, strict=True)]
        before, before_mask = pad_left(prefixes, pad, after_mask.device, width=width)
        whole = torch.cat([before_mask, after_mask], dim=1)
        places = (whole.cumsum(dim=1) - 1).clamp_min(0)
        cache = DynamicCache(config=model.config)
        arguments = {"attention_mask": before_mask, "position_ids": places[:, :width]}
        cached = {"past_key_values": cache, "use_cache": True}
        if accepted(model, cached).keys() != cached.keys():
            raise InterventionError(f"{type(model).__name__} takes no cache of keys and values")
        model(**accepted(model, {"input_ids": before, **arguments, **cached}))
        arguments = {"attention_mask": whole, "position_ids": places[:, width:]}
        return accepted(model, {"input_ids": self.ids, **arguments, **cached, "past_key_values": _Fixed(cache)})

    def logits(self, hidden: Tensor, rows: Tensor, places: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the logits (n, vocabulary) float32 at n pairs of a row and a position in its suffix.

        `hidden` replaces `self.hidden` and has the same shape. With `attention`, `added` (rows, hidden) is added to the
        MLP's outputs at the first tokens.
        """
        if self._whole.shape != hidden.shape:
            every = torch.arange(len(hidden), device=hidden.device)[:, None]
            hidden = self._whole.index_put((every, self._columns), hidden)
        hidden = hidden.reshape(first_output(self._output).shape)
        output = (hidden, *self._output[1:]) if isinstance(self._output, tuple | list) else hidden
        with _returning({**self._below, self._site: output}), self._adding(added):
            return logits_at(self._model, self._head, self._arguments, rows, places + self._begins[rows])

    @contextmanager
    def _adding(self, added: Tensor | None) -> Iterator[None]:
        if self._also is None or added is None:
            yield
            return
        with self._also.register_forward_hook(lambda module, args, output: add_at(output, self._begins, added)):
            yield


def attention_and_mlp(block: Block) -> tuple[nn.Module, nn.Module]:
    """Return the output projections of a block's attention and MLP; InterventionError for a block without both."""
    attention, mlp = block.group("attention_out").linears[0].module, block.memory.module
    if attention is mlp:
        raise InterventionError(f"{block.name}: attention without an MLP; choose other layers")
    return attention, mlp


def open_tail(
    model: nn.Module,
    anatomy: Anatomy,
    layer: int,
    rows: Sequence[Sequence[int]],
    begins: Sequence[int],
    pad: int,
    *,
    inside: bool = False,
    attention: bool = False,
) -> bool:
    """Return whether a `Tail` of these texts can be cached, after comparing its logits with the model's on a few texts.

    Raises InterventionError if the logits differ with and without caching.
    """
    suffixes = [len(row) - begin for row, begin in zip(rows, begins, strict=True)]
    chosen = sorted({key(range(len(rows)), key=of.__getitem__) for key in (min, max) for of in (begins, suffixes)})
    some = [rows[n] for n in chosen], [begins[n] for n in chosen]
    pairs = [(n, place) for n, number in enumerate(chosen) for place in range(suffixes[number])]
    numbers, places = torch.tensor(pairs, device=module_device(model)).t()
    network: Any = model
    with torch.no_grad():
        passes = [
            network(
                **accepted(model, {"input_ids": torch.tensor([row], device=numbers.device), "use_cache": False})
            ).logits[0, begin:]
            for row, begin in zip(*some, strict=True)
        ]
        own = torch.cat(passes).float()
        problems = []
        for cached in (True, False):
            try:
                tail = Tail(model, anatomy, layer, *some, pad, inside=inside, attention=attention, cached=cached)
                found = tail.logits(tail.hidden, numbers, places)
                error = float((found - own).norm() / own.norm())
            except Exception as failure:  # a model's code can raise anything for arguments that it does not support
                problems.append(f"{type(failure).__name__}: {failure}".splitlines()[0])
                continue
            if error <= torch.finfo(passes[0].dtype).eps ** 0.5 or not bool(own.isfinite().all()):
                return cached
            problems.append(f"relative error {error:.2g}")
    raise InterventionError(
        f"{type(model).__name__}: rerun from layer {layer}, the model does not reproduce its own logits "
        f"(with cached keys and values: {problems[0]}; without: {problems[1]}); edit it with ft or lora instead"
    )


class _Fixed(Cache):
    """Keys and values of earlier tokens; later ones are appended to the result but not stored."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(layers=cache.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        keys = torch.cat([layer.keys, key_states], dim=-2)
        return keys, torch.cat([layer.values, value_states], dim=-2)


def _copied(output: Any) -> Any:
    """Return an output with copies of its tensors: some models add to them in place."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(map(_copied, output)) if type(output) in (tuple, list) else output


def _by_rows(values: Tensor, rows: int) -> Tensor:
    """Return values as (rows, tokens, width), even if rows and tokens are flattened."""
    return values.reshape(rows, -1, values.shape[-1])


@contextmanager
def _watching(modules: Sequence[nn.Module], outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """Record the outputs of modules in `outputs`."""

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs[module] = _copied(output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _returning(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Make modules return the given outputs without computing anything."""

    def constant(output: Any) -> Any:
        return lambda *args, **kwargs: _copied(output)

    with ExitStack() as stack:
        for module, output in outputs.items():
            stack.enter_context(replaced_forward(module, constant(output)))
        yield
