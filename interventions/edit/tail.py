"""The blocks above one layer, run again and again from hidden states that change from one place on.

Optimising a vector at one layer and one token needs no computation below the layer, and none
before the token: what the blocks above make of the earlier tokens is kept as keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from interventions.anatomy import Anatomy, first_output, module_device
from interventions.padding import pad_left, pad_right


class Tail:
    """A model's blocks above `layer`, its final norm and its head, for one fixed batch of texts.

    `rows` are token ids, and `begins` names for each the place from which its hidden states will
    change. The texts are laid out so that those places stand in one column; from it on they are
    the *suffixes*, (rows, longest suffix), padded on the right with `pad`. The batch runs
    through the model once; what the blocks are called with besides the hidden states (masks,
    rotary embeddings, earlier keys and values) is kept, as it does not depend on them.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        layer: int,
        rows: Sequence[Sequence[int]],
        begins: Sequence[int],
        pad: int,
    ) -> None:
        self._blocks = [block.module for block in anatomy.blocks[layer + 1 :]]
        self._norm = anatomy.final_norm
        # Some sizes of OPT have narrower embeddings, and a projection before the head.
        narrow: list[Any] = [getattr(module, "project_out", None) for module in model.modules()]
        self._head = nn.Sequential(*filter(None, narrow), anatomy.head)
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hidden: list[Tensor] = []

        def keep_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            self._arguments.append((args[1:], others))

        def keep_hidden(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden.append(first_output(output).detach())

        device = module_device(model)
        pairs = list(zip(rows, begins, strict=True))
        # A column more than needed: with padding in every row, no model takes a shortcut that does without masks.
        width = max(begins) + 1
        before, before_mask = pad_left([row[:begin] for row, begin in pairs], pad, device, width=width)
        self.ids, after_mask = pad_right([row[begin:] for row, begin in pairs], pad, device)
        """Token ids of the suffixes, (rows, longest suffix)."""
        whole = torch.cat([before_mask, after_mask], dim=1)
        places = (whole.cumsum(dim=1) - 1).clamp_min(0)
        with torch.no_grad():
            config: Any = model.config
            cache = DynamicCache(config=config)
            arguments = {"attention_mask": before_mask, "position_ids": places[:, :width]}
            model(input_ids=before, **arguments, past_key_values=cache, use_cache=True)
            handles = [block.register_forward_pre_hook(keep_arguments, with_kwargs=True) for block in self._blocks]
            handles.append(anatomy.blocks[layer].module.register_forward_hook(keep_hidden))
            arguments = {"attention_mask": whole, "position_ids": places[:, width:]}
            try:
                model(input_ids=self.ids, **arguments, past_key_values=_Fixed(cache), use_cache=True)
            finally:
                for handle in handles:
                    handle.remove()
        self.hidden = hidden[0]
        """Output of block `layer` on the suffixes, (rows, longest suffix, hidden)."""

    def logits(self, hidden: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Return the logits (n, vocabulary) float32 at n pairs of a row and a place in its suffix.

        `hidden`, of the shape of `self.hidden`, stands for the output of block `layer`.
        """
        for block, (args, kwargs) in zip(self._blocks, self._arguments, strict=True):
            hidden = first_output(block(hidden, *args, **kwargs))
        logits: Tensor = self._head(self._norm(hidden[rows, places])).float()
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


class _Fixed(Cache):
    """Keys and values of earlier tokens that later ones are joined to, but never added to."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(layers=cache.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        keys = torch.cat([layer.keys, key_states], dim=-2)
        return keys, torch.cat([layer.values, value_states], dim=-2)
