"""Rotate the residual stream of a model: row vectors x become x Q, and everything computes the same in that basis.

A norm commutes with Q once its gain is 1: a root mean square does not depend on the basis, and a layer norm's mean does
not if Q keeps the mean. So gains are folded into the linear layers that read the norm; then readers get W Q, and the
layers that write into the stream Q^T W. Which norm feeds which layers is found by running a block. Whether nothing else
stands in between is tested by running it again, in the new basis.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from interventions.compress.kernels.capture import Call, catch_block_calls
from interventions.compress.kernels.folding import gain_offset
from interventions.compress.kernels.precision import matmul_precision
from interventions.structure import (
    Anatomy,
    Block,
    Linear,
    first_output,
    module_device,
    placement,
    within_context,
)
from interventions.tying import tied_head, untie_head_
from interventions.types import InterventionError

READERS = ("attention_in", "mlp_in")
WRITERS = ("attention_out", "mlp_out")
TOKENS = 16
"""Tokens of the trial runs."""
TOLERANCE = 1e-3
"""Greatest change in float32: of a block's output in the new basis, relative to what the block adds to the stream, of
the embeddings and of the logits. Right rotations are below 1e-4, wrong ones above 0.1."""
LARGE = 2.0**10
ROUNDED = 0.2
"""The same for embeddings and logits of models in 16 bits, whose rotated weights are rounded again."""


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


def work_device(model: nn.Module, block: Block) -> torch.device:
    """Return the device that computes a block."""
    where = placement(model)
    return where.device if where.streamed else module_device(block.module)


@contextmanager
def float_copy(model: nn.Module, block: Block, *, write: bool = False) -> Iterator[Block]:
    """Yield a float32 copy of a block, on the device that computes it; `write` stores its weights at the end."""
    work = copy.deepcopy(block)
    work.module.to(work_device(model, block)).float().eval()
    with matmul_precision("highest"):
        yield work
    if write:
        for stored, new in zip(block.module.parameters(), work.module.parameters(), strict=True):
            stored.copy_(new)


def precise(Q: Tensor, device: torch.device) -> Tensor:
    """Return a matrix on a device in float64, or what the device has."""
    return Q.to(device, torch.float32 if device.type == "mps" else torch.float64)


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


@dataclass
class Reading:
    """What the linear layers of a block read."""

    readers: dict[nn.Module | None, list[Linear]] = field(default_factory=dict)
    """By norm the linear layers that read its output; None: those that read the stream, or what no norm makes."""
    problem: str | None = None
    """Why the stream cannot be rotated, as far as the structure tells."""


def trace_norms(block: Block, call: Call) -> Reading:
    """Run a block and find out which norms its linear layers read."""
    readers = {g.linears[0].module: g.linears for g in block.linear_groups if g.role in READERS}
    writers = {linear.module: linear for g in block.linear_groups if g.role in WRITERS for linear in g.linears}
    linears = {linear.module for linear in block.linears}
    made: dict[int, nn.Module] = {}
    """Whose output a storage is; the innermost module's where several return it."""
    read: list[tuple[nn.Module, int]] = []
    kept: list[Tensor] = []  # so that no storage is used twice

    def seen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        result = first_output(output)
        kept.extend(tensor for tensor in (*inputs[:1], result) if isinstance(tensor, Tensor))
        if inputs and isinstance(inputs[0], Tensor):
            read.append((module, _place(inputs[0])))
        if isinstance(result, Tensor):
            made.setdefault(_place(result), module)

    handles = [module.register_forward_hook(seen) for module in block.module.modules() if module is not block.module]
    try:
        call(block.module)
    finally:
        for handle in handles:
            handle.remove()
    names = {module: f"{block.name}.{name}" for name, module in block.module.named_modules()}
    width = call.hidden.shape[-1]
    found = Reading()
    for module, place in read:
        source = made.get(place)
        if module in readers:
            norm = source if source is not None and is_norm(source, width) else None
            found.readers.setdefault(norm, []).extend(readers[module])
        elif source is not None and source in writers and is_norm(module, width):
            found.problem = f"{names[module]} normalises what {writers[source].name} adds to the stream"
    for module, place in read:
        source = made.get(place)
        weighs = next(module.parameters(recurse=False), None) is not None
        if weighs and source is not None and source in found.readers and module not in linears:
            found.problem = f"{names[module]} reads what {names[source]} puts out, and this step leaves it as it is"
    return found


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_norm(module: nn.Module, width: int) -> bool:
    """Tell whether a module normalises vectors of `width`: it has no matrices, and twice the input gives the same."""
    if next(module.children(), None) is not None or any(p.dim() != 1 for p in module.parameters()):
        return False
    found = _outputs(module, width, lambda x: (x, 2 * x))
    return found is not None and bool(found[0].any()) and torch.allclose(*found, rtol=1e-3, atol=1e-3)


def subtracts_mean(norm: nn.Module, width: int) -> bool:
    """Tell whether a norm subtracts the mean of its input, so that it commutes only with rotations that keep it."""
    found = _outputs(norm, width, lambda x: (x, x + 1))
    return found is not None and torch.allclose(*found, rtol=1e-3, atol=1e-3)


def _outputs(
    module: nn.Module, width: int, inputs: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """Return a float32 copy's outputs for two inputs; None if it does not take one vector and return one."""
    module = copy.deepcopy(module).float()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    probe = torch.linspace(-3.0, 5.0, width, device=device).view(1, 1, -1)
    try:
        one, two = (module(x) for x in inputs(probe))
    except Exception:  # other arguments, or other widths
        return None
    return (one, two) if isinstance(one, Tensor) and one.shape == probe.shape else None


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


def moved(found: Tensor, wanted: Tensor, scale: Tensor) -> float:
    """Return the norm of the difference of two outputs, over that of `scale`."""
    return float((found - wanted).norm() / scale.norm().clamp(min=torch.finfo(torch.float32).tiny))


def head_width(model: nn.Module, block: Block) -> int:
    """Return the width of an attention head's values, as the attention's output layer reads them; 0 if unknown."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    outputs = [group.in_features for group in block.linear_groups if group.role == "attention_out"]
    return outputs[0] // heads if outputs and isinstance(heads, int) else 0


def rotate_values_(block: Block, call: Call, R: Tensor) -> bool:
    """Rotate each head's values by R (head width, head width), and back in the attention's output layer, in place.

    Return whether the block's output stays. If not, nothing changes: something stands between values and output.
    """
    output = block.group("attention_out").linears[0]
    R = precise(R, call.hidden.device)
    for values, rows in _value_rows(block, output.in_features, len(R)):
        kept = [part.clone() for part in (*_parts(values), *_parts(output))]
        before = _outputs_of_values(block, call, values, rows)
        weight, bias = values.weight, values.bias
        weight[rows] = (R.t() @ weight[rows].to(R.dtype)).to(weight.dtype)  # (heads, head width, in)
        if bias is not None:
            bias[rows] = (bias[rows].to(R.dtype) @ R).to(bias.dtype)
        by_head = output.weight.to(R.dtype).reshape(output.out_features, -1, len(R))
        output.set_weight_((by_head @ R).flatten(1))
        after = _outputs_of_values(block, call, values, rows)
        if all(moved(new, old, old - call.hidden) <= TOLERANCE for new, old in zip(after, before, strict=True)):
            return True
        for part, former in zip((*_parts(values), *_parts(output)), kept, strict=True):
            part.copy_(former)
    return False


def _outputs_of_values(block: Block, call: Call, values: Linear, rows: Tensor) -> list[Tensor]:
    """Return the block's outputs with its values as they are, and so large that a clip after them shows."""
    outputs = []
    for factor in (1.0, LARGE):
        for part in _parts(values):
            part[rows] *= factor
        outputs.append(call(block.module))
        for part in _parts(values):
            part[rows] /= factor
    return outputs


def _parts(linear: Linear) -> list[Tensor]:
    return [linear.weight] if linear.bias is None else [linear.weight, linear.bias]


def _value_rows(block: Block, inputs: int, head: int) -> Iterator[tuple[Linear, Tensor]]:
    """Yield where the rows of values may be, (heads, head width): in a layer of their own, or at the end of a fused one
    or of each of its heads."""
    linears = next((group.linears for group in block.linear_groups if group.role == "attention_in"), ())
    if len(linears) == 3:
        rows = linears[2].out_features
        if rows % head == 0:
            yield linears[2], torch.arange(rows).view(-1, head)
    elif len(linears) == 1:
        rows = linears[0].out_features
        heads, rest = divmod(rows - inputs, 2 * head)
        if rest == 0 and heads > 0:
            yield linears[0], torch.arange(rows)[rows - heads * head :].view(-1, head)
            if rows % (heads * head) == 0:
                yield linears[0], torch.arange(rows).view(heads, -1, head)[:, -1]
