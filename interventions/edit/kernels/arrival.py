"""Measure how a change of an MLP's output changes the output of its block.

Most blocks add the MLP's output to the hidden state. Some multiply it by a constant first; some normalise it or the
sum, so that the change is no longer linear. Running the block shows which case applies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interventions.early_exit import StopForward, run_until_seen
from interventions.edit.kernels.prompts import TokenisedPrompt
from interventions.padding import pad_right
from interventions.structure import Block, first_output, module_device
from interventions.types import InterventionError

_BATCH = 32
_SMALL = 0.1
_EXACT = 0.01


class Gain(NamedTuple):
    """How a change of the MLP's output changes the block's output."""

    factor: float
    """Norm of the change of the block's output, relative to that of a small change of the MLP's output."""
    linear: bool
    """Whether any change is multiplied by `factor`."""
    aligned: bool = True
    """Whether both have the same features; not where a block passes on several hidden states for a token."""


ADDED = Gain(1.0, linear=True)
"""The gain of a block that adds the MLP's output to the hidden state."""


class Arrival:
    """One block of a model with its calls on some prompts; later changes of the model below it have no effect."""

    def __init__(self, model: nn.Module, block: Block, prompts: Sequence[TokenisedPrompt], pad: int) -> None:
        self._block = block
        self._chunks: list[_Chunk] = []
        self._put_out = torch.empty(0)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))
            raise StopForward

        device = module_device(model)
        with block.module.register_forward_pre_hook(see, with_kwargs=True), torch.no_grad():
            for start in range(0, len(prompts), _BATCH):
                some = prompts[start : start + _BATCH]
                ids, mask = pad_right([prompt.ids for prompt in some], pad, device)
                run_until_seen(model, {"input_ids": ids, "attention_mask": mask})
                places = torch.tensor([prompt.subject_end for prompt in some], device=device)
                self._chunks.append(_Chunk(*calls.pop(), places, ids.shape[1]))

    @torch.no_grad()
    def outputs(self, changes: Tensor) -> Tensor:
        """Return the block's outputs at the subjects, (prompts, hidden) float32, with `changes` added to the MLP's."""
        parts = torch.split(changes, _BATCH)
        return torch.cat([self._run(chunk, part) for chunk, part in zip(self._chunks, parts, strict=True)])

    @torch.no_grad()
    def gain(self, width: int) -> Gain:
        """Measure the block's gain with random changes of its MLP's output, of `width` features.

        Changes with the norm of the block's output show whether it is linear; if not, small changes give the factor.
        Raises InterventionError if no change reaches the block's output.
        """
        chunk = self._chunks[0]
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(len(chunk.places), width, generator=generator).to(chunk.places.device)
        random /= random.norm(dim=1, keepdim=True)
        before = self._run(chunk, torch.zeros_like(random))
        aligned = before.shape[1] == width
        large = random * before.norm(dim=1, keepdim=True)
        arrives = self._run(chunk, large) - before
        if not bool(arrives.any()):
            raise InterventionError(
                f"{self._block.name}: changing the MLP's output does not change the block's output; edit other layers"
            )
        factor = float((arrives * large).sum() / (large * large).sum()) if aligned else 0.0
        eps = torch.finfo(next(self._block.module.parameters()).dtype).eps
        rounding = eps / 2 * float(before.norm())
        if aligned and float((arrives - factor * large).norm()) <= eps**0.5 * float(arrives.norm()) + rounding:
            return Gain(1.0 if abs(factor - 1) < min(eps**0.5, _EXACT) else factor, linear=True)
        small = _SMALL * random * self._put_out.norm(dim=1, keepdim=True)
        arrives = self._run(chunk, small) - before
        return Gain(float(arrives.norm() / small.norm()), linear=False, aligned=aligned)

    def _run(self, chunk: _Chunk, changes: Tensor) -> Tensor:
        """Run the block on one chunk; return its output at the subjects, (rows, hidden) float32."""
        every = torch.arange(len(chunk.places), device=chunk.places.device)

        def change(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = first_output(output).detach()
            self._put_out = hidden.reshape(len(every), -1, hidden.shape[-1])[every, chunk.places].float()
            return add_at(output, chunk.places, changes)

        with self._block.memory.module.register_forward_hook(change):
            output = first_output(self._block.module(*chunk.args, **chunk.kwargs))
        if output.shape[0] != len(every) or output.shape[1] < chunk.tokens:  # some models pad texts
            raise InterventionError(
                f"{self._block.name}: what it puts out for {len(every)} texts of {chunk.tokens} tokens has the shape "
                f"{tuple(output.shape)}, in which the subject's state is not known; edit the model with ft or lora "
                "instead"
            )
        return output[every, chunk.places].float().flatten(1)


def add_at(output: Any, places: Tensor, changes: Tensor) -> Any:
    """Return a module's output, in which rows and tokens may be flattened, with `changes` (rows, width) at `places`."""
    hidden = first_output(output)
    every = torch.arange(len(places), device=places.device)
    rows = hidden.reshape(len(places), -1, hidden.shape[-1])
    changed = rows.index_put((every, places), changes.to(hidden.dtype), accumulate=True).reshape(hidden.shape)
    return (changed, *output[1:]) if isinstance(output, tuple | list) else changed


class _Chunk(NamedTuple):
    """The call of the block on some prompts, and the position of each subject."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: Tensor
    tokens: int
    """Of each prompt, with padding."""
