"""Rotate the residual stream of a model: row vectors x become x Q, and everything computes the same in that basis.

A norm commutes with Q once its gain is 1: a root mean square does not depend on the basis, and a layer norm's mean does
not if Q keeps the mean. So gains are folded into the linear layers that read the norm; then readers get W Q, and the
layers that write into the stream Q^T W. Which norm feeds which layers is found by running a block. Whether nothing else
stands in between is tested by running it again, in the new basis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from interventions.compress.kernels.capture import Call, catch_block_calls
from interventions.compress.kernels.folding import gain_offset
from interventions.compress.kernels.norm_tracing import WRITERS, is_norm, subtracts_mean, trace_norms
from interventions.compress.kernels.trials import TOLERANCE, float_copy, moved, precise, work_device
from interventions.structure import Anatomy, Block, Linear, module_device, within_context
from interventions.tying import tied_head, untie_head_
from interventions.types import InterventionError

TOKENS = 16
"""Tokens of the trial runs."""
ROUNDED = 0.2
"""What `TOLERANCE` is for embeddings and logits of models in 16 bits, whose rotated weights are rounded again."""


class Residual:
    """The residual stream of a model, from the embeddings to the head."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Run the model on a few tokens."""
        self.model, self.anatomy, self.blocks = model, anatomy, anatomy.blocks
        embeddings = cast(Tensor, anatomy.embeddings.weight)
        self._ids = torch.arange(within_context(model, TOKENS)).remainder(len(embeddings)).unsqueeze(0)
        self._tolerance = TOLERANCE if embeddings.dtype == torch.float32 else ROUNDED
        self._calls = [call for (call,) in self._catch(self.blocks)]
        self._start = self._calls[0].hidden
        self.width = self._start.shape[-1]
        self._logits = self._run()

    def check_ends(self) -> None:
        """Raise InterventionError where embeddings or head do not touch the stream, or are one module."""
        if self.anatomy.head is self.anatomy.embeddings:
            raise InterventionError("rotate: embeddings and head are one module: they cannot have weights of their own")
        for part, module in (("embeddings", self.anatomy.embeddings), ("head", self.anatomy.head)):
            if (width := cast(Tensor, module.weight).shape[1]) != self.width:
                raise InterventionError(
                    f"rotate: the {part} are {width} wide, the residual stream {self.width}: the layer between them "
                    "cannot be rotated; leave this step out for this model"
                )

    def subtracts_mean(self) -> bool:
        """Return whether norms subtract the mean of their input: those of the first block and the last one."""
        block, call = next(self.calls())
        with float_copy(self.model, block) as work:
            norms = [*trace_norms(work, call).readers, self.anatomy.final_norm]
            return any(norm is not None and subtracts_mean(norm, self.width) for norm in norms)

    def rotate_ends_(self, Q: Tensor) -> bool:
        """Rotate embeddings and head, in place; return whether the head was given weights of its own.

        Raises InterventionError if rotated embeddings do not rotate the stream.
        """
        norm, head = self.anatomy.final_norm, Linear("the head", self.anatomy.head)
        gain = getattr(norm, "weight", None)
        tied = tied_head(self.model) is not None
        untied = tied and isinstance(gain, Tensor) and bool((gain != gain[0]).any())
        if untied:
            untie_head_(self.model)
        inside = {module for block in self.blocks for module in block.module.modules()}
        for module in self.model.modules():  # of tokens, and of positions
            if isinstance(module, nn.Embedding) and module not in inside and module.weight.shape[1] == self.width:
                turn_(module.weight, Q)
        ((call,),) = self._catch(self.blocks[:1])
        if not moved(call.hidden, self._start @ Q.to(self._start), self._start) <= self._tolerance:
            raise InterventionError(
                "rotate: rotated embeddings do not rotate the residual stream: something stands between them and the "
                "first block; leave this step out for this model"
            )
        if not tied or untied:
            absorb_(norm if is_norm(norm, self.width) else None, [head], precise(Q, head.weight.device))
        elif isinstance(bias := getattr(norm, "bias", None), Tensor):  # an even gain commutes with every rotation
            turn_(bias, Q)
        return untied

    def calls(self) -> Iterator[tuple[Block, Call]]:
        """Yield every block with a call of it on random hidden states."""
        hidden = torch.randn(self._start.shape, generator=torch.Generator().manual_seed(0))
        for block, call in zip(self.blocks, self._calls, strict=True):
            yield block, call.on(hidden).to(work_device(self.model, block))

    def check_logits(self) -> float:
        """Return how far the trial run's logits moved, relative to their spread.

        Raises InterventionError if that is more than rounding.
        """
        change = moved(self._run(), self._logits, self._logits - self._logits.mean())
        if not change <= self._tolerance:
            raise InterventionError(
                f"rotate: the logits of the rotated model are others, by {change:.1%} of their spread; leave this step "
                "out for this model"
            )
        return change

    def _catch(self, blocks: Sequence[Block]) -> list[list[Call]]:
        return catch_block_calls(self.model, [{"input_ids": self._ids}], blocks)

    def _run(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self._ids.to(module_device(self.model)), use_cache=False).logits
        return logits.float()


def turn_(vectors: Tensor, Q: Tensor) -> None:
    """Rotate row vectors, or one vector, in place."""
    Q = precise(Q, vectors.device)
    vectors.copy_(vectors.to(Q.dtype) @ Q)


def rotate_block_(block: Block, call: Call, Q: Tensor) -> Call:
    """Make a block work on x Q and add y Q where it worked on x and added y, in place; return its call on x Q.

    Raises InterventionError if the block does not compute the same.
    """
    wanted, reading = call(block.module), trace_norms(block, call)
    Q = precise(Q, call.hidden.device)
    for norm, readers in reading.readers.items():
        absorb_(norm, readers, Q)
    for group in block.linear_groups:
        if group.role in WRITERS:
            for linear in group.linears:
                linear.set_weight_(Q.t() @ linear.weight.to(Q.dtype))
                if linear.bias is not None:
                    turn_(linear.bias, Q)
    turn = Q.to(call.hidden.dtype)
    turned = call.on(call.hidden @ turn)
    if reading.problem or not moved(turned(block.module), wanted @ turn, wanted - call.hidden) <= TOLERANCE:
        raise InterventionError(
            f"rotate: {reading.problem or block.name + ' does not compute the same on rotated hidden states'}; leave "
            "this step out for this model"
        )
    return turned


def absorb_(norm: nn.Module | None, readers: Sequence[Linear], Q: Tensor) -> None:
    """Fold a norm's gain into the layers that read it, and let both work in the new basis, in place.

    The bias goes into the readers' biases if all have one. Otherwise the norm keeps it, divided by the gain. Raises
    InterventionError for a bias where the gain is 0, and for a norm of another kind.
    """
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    offset = gain_offset(cast(nn.Module, norm)) if isinstance(weight, Tensor) else 0.0
    gain = weight.to(Q.dtype) + offset if isinstance(weight, Tensor) else torch.ones_like(Q[0])
    shift = bias.to(Q.dtype) if isinstance(bias, Tensor) else torch.zeros_like(gain)
    if all(linear.bias is not None for linear in readers):
        for linear in readers:
            cast(Tensor, linear.bias).add_(linear.weight.to(Q.dtype) @ shift)
        shift = torch.zeros_like(shift)
    for linear in readers:
        linear.set_weight_((linear.weight.to(Q.dtype) * gain) @ Q)
    if isinstance(weight, Tensor):
        weight.fill_(1 - offset)
    if isinstance(bias, Tensor):
        rest = torch.where(shift == 0, 0, shift / gain)
        if not bool(torch.isfinite(rest).all()):
            raise InterventionError(
                f"rotate: the norm before {readers[0].name} has a bias where its gain is 0, and not all layers after "
                "it have a bias to take it up; leave this step out for this model"
            )
        bias.copy_(rest @ Q)
