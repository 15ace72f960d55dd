"""Statistics of the inputs of linear layers on text, collected in one pass for all methods.

GPTQ and SparseGPT use the Gram matrix as Hessian, Wanda the channel norms, AWQ the Gram matrix and the mean absolute
value, MEMIT the second moment at the MLP output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from interventions.early_exit import StopForward, run_until_seen
from interventions.modes import keep_modes
from interventions.padding import pad_right, padding_id
from interventions.structure import Linear, module_device
from interventions.tokens import frame, running, windows
from interventions.types import InterventionError

Batch = dict[str, Tensor]

TOKENS_PER_COLUMN = 4
"""Minimum number of tokens per column of a linear; with fewer, its statistics are mostly noise."""


@dataclass
class InputNorms:
    """Sums for Wanda over the inputs of a linear layer of width d, without a Gram matrix."""

    square_sum: Tensor
    """(d,) float32: the sum of x^2."""
    count: int
    """Tokens, padding left out."""

    @classmethod
    def zeros(cls, width: int, device: torch.device | None = None) -> Self:
        return cls(torch.zeros(width, device=device), 0)

    @classmethod
    def even(cls, width: int, device: torch.device | None = None) -> Self:
        """Return the sums over one unit vector per column: all columns count the same."""
        return cls(torch.ones(width, device=device), width)

    def add_(self, x: Tensor) -> None:
        """Add tokens `x` of shape (n, d), in float32."""
        self.square_sum.add_(x.detach().float().square().sum(dim=0))
        self.count += x.shape[0]

    def to(self, device: torch.device) -> InputNorms:
        """Return the same sums on a device; those that are there are shared."""
        return InputNorms(self.square_sum.to(device), self.count)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.square_sum,)


@dataclass
class InputMaxima:
    """Greatest magnitudes for SmoothQuant over the inputs of a linear layer of width d."""

    abs_max: Tensor
    """(d,) float32: the greatest |x|."""
    count: int
    """Tokens, padding left out."""

    @classmethod
    def zeros(cls, width: int, device: torch.device | None = None) -> Self:
        return cls(torch.zeros(width, device=device), 0)

    @classmethod
    def even(cls, width: int, device: torch.device | None = None) -> Self:
        """Return the maxima over one unit vector per column: all columns count the same."""
        return cls(torch.ones(width, device=device), width)

    def add_(self, x: Tensor) -> None:
        """Add tokens `x` of shape (n, d), in float32."""
        if len(x):
            self.abs_max = torch.maximum(self.abs_max, x.detach().float().abs().amax(dim=0))
        self.count += x.shape[0]

    def to(self, device: torch.device) -> InputMaxima:
        """Return the same maxima on a device; those that are there are shared."""
        return InputMaxima(self.abs_max.to(device), self.count)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.abs_max,)


@dataclass
class InputStatistics:
    """Sums over the inputs of a linear layer of width d."""

    gram: Tensor
    """(d, d) float32: the sum of x x^T."""
    abs_sum: Tensor
    """(d,) float32: the sum of |x|."""
    square_sum: Tensor
    """(d,) float32: the sum of x^2, bit-identical to InputNorms; equals the diagonal of `gram` up to rounding."""
    count: int
    """Tokens, padding left out."""

    @classmethod
    def zeros(cls, width: int, device: torch.device | None = None) -> Self:
        def vector() -> Tensor:
            return torch.zeros(width, device=device)

        return cls(torch.zeros(width, width, device=device), vector(), vector(), 0)

    @classmethod
    def even(cls, width: int, device: torch.device | None = None) -> Self:
        """Return the sums over one unit vector per column: all columns count the same, and none replaces another."""
        ones = torch.ones(width, device=device)
        return cls(torch.eye(width, device=device), ones, ones.clone(), width)

    def add_(self, x: Tensor) -> None:
        """Add tokens `x` of shape (n, d), in float32."""
        x = x.detach().float()
        add_gram_(self.gram, x)
        self.abs_sum.add_(x.abs().sum(dim=0))
        self.square_sum.add_(x.square().sum(dim=0))
        self.count += x.shape[0]

    def to(self, device: torch.device) -> InputStatistics:
        """Return the same sums on a device; those that are there are shared."""
        return InputStatistics(self.gram.to(device), self.abs_sum.to(device), self.square_sum.to(device), self.count)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.gram, self.abs_sum, self.square_sum

    def second_moment(self) -> Tensor:
        """Return the mean of x x^T, (d, d) float32."""
        return self.gram / self.count

    def mean_abs(self) -> Tensor:
        """Return the mean of |x|, (d,) float32."""
        return self.abs_sum / self.count


STRIP = 256


def add_gram_(gram: Tensor, x: Tensor) -> None:
    """Add x^T x, for x (n, d), to the symmetric `gram` (d, d).

    Computes the upper half in strips and mirrors it: 5/8 of the full product for d = 1024.
    """
    width = gram.shape[0]
    for low in range(0, width, STRIP):
        high = min(low + STRIP, width)
        gram[low:high, low:].addmm_(x[:, low:high].t(), x[:, low:])
        gram[high:, low:high] = gram[low:high, high:].t()


def token_batches(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_tokens: int,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    least_tokens: int | None = None,
) -> list[Batch]:
    """Tokenise texts, in order, until there are `least_tokens`; cut each to `max_tokens`, batch them by length.

    A batch has at most `batch_size` rows and `batch_tokens` tokens including padding, but always one row; None: no
    limit.

    Each batch has `input_ids` and `attention_mask`, both (batch, longest) int64, padded on the right. The longest
    batches come first, so that running out of memory shows early. The tokenizer's padding and truncation settings
    are neither used nor changed.
    """
    _check_texts(texts)
    rows: list[list[int]] = []
    tokens = 0
    for text in texts:
        rows.append(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"][:max_tokens])
        tokens += len(rows[-1])
        if least_tokens is not None and tokens >= least_tokens:
            break
    return _batches(rows, padding_id(tokenizer), batch_size, batch_tokens)


def window_batches(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    samples: int,
    max_tokens: int,
    batch_tokens: int | None = None,
    padded: bool = True,
) -> list[Batch]:
    """Join the texts with blank lines and batch the first `samples` windows of `max_tokens` tokens.

    Each window starts with the tokenizer's special tokens. The last window may be shorter. Batches are like those of
    `token_batches`; without `padded`, a shorter window has a batch to itself, so that no batch has padding.
    """
    _check_texts(texts)
    size = max_tokens - len(frame(tokenizer).start)
    if size < 1:
        raise InterventionError(
            f"max_tokens={max_tokens} leaves no room for text beside the tokenizer's special tokens: raise it"
        )
    rows = windows(tokenizer, running(tokenizer, texts, most=samples * size), size)
    lengths = sorted({len(row) for row in rows}, reverse=True)
    parts = [rows] if padded else [[row for row in rows if len(row) == length] for length in lengths]
    return [batch for part in parts for batch in _batches(part, padding_id(tokenizer), None, batch_tokens)]


def scarce(method: str, tokens: int, columns: Mapping[str, int], remedy: str) -> str | None:
    """Return a warning if there are fewer than 4 `tokens` per column of a linear; `columns` is by name."""
    few = {name: width for name, width in columns.items() if tokens < TOKENS_PER_COLUMN * width}
    if not few:
        return None
    widest = max(few.values())
    return (
        f"{method}: {tokens} calibration tokens are {tokens / widest:.2f} for each of the {widest} columns of "
        f"{', '.join(few)}, fewer than {TOKENS_PER_COLUMN}: {remedy}"
    )


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise InterventionError("texts must be a sequence of strings, not one string")
    if not texts:
        raise InterventionError("no text to read: give at least one calibration text")
    for index, text in enumerate(texts):
        if not text.strip():
            raise InterventionError(f"text {index} is empty: remove it from the calibration texts")


def _batches(rows: list[list[int]], pad: int, batch_size: int | None, batch_tokens: int | None) -> list[Batch]:
    rows = sorted(rows, key=len, reverse=True)  # stable, so the order is the same in every run
    batches = []
    while rows:
        size = len(rows) if batch_size is None else batch_size
        if batch_tokens is not None:
            size = max(1, min(size, batch_tokens // len(rows[0])))
        ids, mask = pad_right(rows[:size], pad, torch.device("cpu"))
        batches.append({"input_ids": ids, "attention_mask": mask})
        del rows[:size]
    return batches


class _Collector:
    """Hooks that add the inputs of linears to their sums."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = linears
        self.sums: dict[str, InputStatistics] = {}
        self.mask = torch.empty(0)
        self.waiting: set[str] = set()
        self.last: tuple[Tensor | None, str] = (None, "")

    def begin(self, mask: Tensor) -> None:
        self.mask = mask.reshape(-1).bool()
        self.waiting = {linear.name for linear in self.linears}
        self.last = (None, "")

    def hook(self, linear: Linear) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x: Tensor = arguments[0]
            last, name = self.last
            if x is last:  # q, k and v, or gate and up: one sum serves all
                self.sums[linear.name] = self.sums[name]
            else:
                sums = self.sums.setdefault(linear.name, InputStatistics.zeros(x.shape[-1], x.device))
                sums.add_(x.reshape(-1, x.shape[-1])[self.mask.to(x.device)])
                self.last = (x, linear.name)
            self.waiting.discard(linear.name)
            if not self.waiting:
                raise StopForward

        return see


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    linears: Sequence[Linear],
    *,
    progress: Callable[[str], None] | None = None,
) -> dict[str, InputStatistics]:
    """Run `model` over `batches` and return the input statistics of `linears` by name.

    Linears with the same input tensor share one InputStatistics object. The forward pass ends at the last of the
    linears; padding does not count. The model is unchanged.
    """
    if not linears:
        return {}
    collector = _Collector(linears)
    handles = [linear.module.register_forward_pre_hook(collector.hook(linear)) for linear in linears]
    device = module_device(model)
    try:
        with keep_modes(model):
            for number, batch in enumerate(batches, start=1):
                collector.begin(batch["attention_mask"])
                if not run_until_seen(model, {key: value.to(device) for key, value in batch.items()}):
                    raise InterventionError(f"no input reached {', '.join(sorted(collector.waiting))}")
                if progress is not None:
                    progress(f"statistics: batch {number}")
    finally:
        for handle in handles:
            handle.remove()
    if not collector.sums:
        raise InterventionError("no batch of text to collect statistics from")
    return {linear.name: collector.sums[linear.name] for linear in linears}
