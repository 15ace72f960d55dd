"""Rotate hidden states by Hadamard matrices that are folded into the weights (QuaRot: Ashkboos et al., NeurIPS 2024,
arXiv 2404.00456; R1 and R2 of SpinQuant: Liu et al., ICLR 2025, arXiv 2405.16406).

Outliers of activations and weights lie in few channels. In a basis whose every channel is a sum of all the old ones
with random signs there are none, and fewer bits are enough. Two bases can change at no cost when the model runs:

- of the residual stream: embeddings and head, and all layers that read the stream or write into it, once the gains
  of norms are folded into the layers that read them;
- of the values of an attention head: the rows that make them, and the columns of the output layer that read them.

A head that shares the weights of the embeddings gets its own: only it takes up the gain of the last norm. QuaRot's
rotations at run time (inside the MLP, of queries and keys) are not made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from interventions.intervention import Context, Intervention, Model, Resources, without_gradients
from interventions.ranges import Choice

if TYPE_CHECKING:
    import torch

    from interventions.compress.kernels.hadamard import Rotation


@dataclass(frozen=True)
class RotateSettings(Intervention):
    """Rotations folded into the weights (Ashkboos et al., 2024); leaves the function of the model as it is."""

    name = "rotate"
    category = "compress"

    matrix: Annotated[str, Choice("hadamard", "orthogonal")] = "hadamard"
    """`hadamard`: entries of equal magnitude with random signs, or a random orthogonal matrix if none of that size is
    known; `orthogonal`: a random orthogonal matrix in any case."""
    stream: bool = True
    """Rotate the residual stream. Where gains of norms keep large channels of the stream small, rounded weights get
    worse by it, because the gains are folded into them."""
    values: bool = True
    """Rotate the values of attention heads, where nothing stands between them and the output layer."""

    def problems(self) -> Iterator[str]:
        """Yield that nothing is left to rotate."""
        if not self.stream and not self.values:
            yield "values=false: nothing is left to rotate beside stream=false; set one of them to true"

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Rotate embeddings, decoder blocks and head, in place; no text is read.

        Returns the kinds of the matrices, whether the head was given weights of its own, and how far the logits of a
        trial run moved, relative to their spread. Raises InterventionError where the model would compute something
        else.
        """
        from interventions.anatomy import find_anatomy
        from interventions.compress.kernels.head_values import head_width, rotate_values_
        from interventions.compress.kernels.residual import Residual, rotate_block_
        from interventions.compress.kernels.trials import float_copy

        generator = context.generator("rotate")
        stream = Residual(model, find_anatomy(model))
        kinds: dict[str, str] = {}
        left, untied = [], False
        if self.stream:
            stream.check_ends()
            rotation = self.draw(stream.width, generator, keeps_mean=stream.subtracts_mean())
            kinds["stream"] = rotation.kind
        for block, call in stream.calls():
            context.progress(f"rotate: block {block.index + 1} of {len(stream.blocks)}")
            with float_copy(model, block, write=True) as work:
                if self.stream:
                    call = rotate_block_(work, call, rotation.matrix)
                if self.values:
                    width = head_width(model, work)
                    heads = self.draw(width, generator) if width else None
                    if heads is not None and rotate_values_(work, call, heads.matrix):
                        kinds["values"] = heads.kind
                    else:
                        left.append(block.name)
        if self.stream:
            untied = stream.rotate_ends_(rotation.matrix)
        if left:
            context.warn(
                f"rotate: the values of {len(left)} of {len(stream.blocks)} blocks, such as {left[0]}, stay as they "
                "are: something stands between them and the attention's output layer"
            )
        return {"matrices": kinds, "head_untied": untied, "logits_moved": stream.check_logits()}

    def draw(self, width: int, generator: torch.Generator, *, keeps_mean: bool = False) -> Rotation:
        """Return a random matrix of the chosen kind."""
        from interventions.compress.kernels.hadamard import random_rotation

        return random_rotation(width, generator, hadamard=self.matrix == "hadamard", keeps_mean=keeps_mean)
