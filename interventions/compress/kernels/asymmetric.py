"""GPTAQ: let a quantised layer put out what the unquantised model would (Li et al., ICML 2025, arXiv 2504.02692).

GPTQ makes Q X close to W X, with X the layer's input in the quantised model. But there the layers before have made
errors, and the unquantised model puts out W X~. What is missing is W D, D = X~ - X. Column i's part of it, w_i D_i, is
made up for by the columns after it, as well as their inputs allow. With H = X X^T and H^-1 = U^T U, U upper triangular,
that adds W P to the weights before they are rounded,

    P = ((D X^T U^T) masked to its strict upper triangle) U.

The authors' code takes a quarter of it by default.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interventions.compress.kernels.capture import Call
from interventions.compress.kernels.gram_factor import gram_factor
from interventions.compress.kernels.precision import pass_precision
from interventions.early_exit import StopForward
from interventions.statistics import InputStatistics
from interventions.structure import Block, LinearGroup


def asymmetric_target(
    W: Tensor, H: Tensor, DXt: Tensor, *, share: float, damping: float, act_order: bool = False
) -> Tensor:
    """Return the weights (rows, cols) to round instead of W so that outputs become those of the unquantised model.

    H = X X^T and DXt = (X~ - X) X^T are (cols, cols) float32. `damping` and `act_order` are those of the rounding that
    follows; `share` is how much of W D to make up for. Returns W if H cannot be factored.
    """
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(H), device=H.device)
    factor = gram_factor(H[order][:, order], damping)
    if factor is None:
        return W
    # U is the inverse of R, H = R R^T.
    left = torch.linalg.solve_triangular(factor.R.t(), DXt[order][:, order], upper=False, left=False)
    P = torch.linalg.solve_triangular(factor.R, left.triu_(diagonal=1), upper=True, left=False)
    return W.index_add(1, order, W.float()[:, order] @ P, alpha=share)


@dataclass
class PairedStatistics(InputStatistics):
    """Sums over the inputs of a linear layer in the quantised and the unquantised model, on the same tokens."""

    mismatch: Tensor | None = None
    """(d, d) float32: the sum of (x~ - x) x^T, with x~ from the unquantised model; None if it was not seen."""
    expected: Tensor | None = None
    """(n, d): x~ for the tokens that are added next."""

    def add_(self, x: Tensor) -> None:
        """Add tokens `x` of shape (n, d), in float32."""
        super().add_(x)
        if self.expected is not None:
            self.mismatch = torch.zeros_like(self.gram) if self.mismatch is None else self.mismatch
            self.mismatch.addmm_((self.expected - x).t(), x)
            self.expected = None


class UnchangedPath:
    """The way of the calibration text through the unchanged model, one block at a time."""

    def __init__(self, hidden: Sequence[Tensor], stored: torch.dtype) -> None:
        """Begin with the hidden states of each batch before the first block; `stored` is the dtype of the weights."""
        self._hidden, self._stored = list(hidden), stored

    def enter(self, block: Block, calls: Sequence[Call], resting: torch.device) -> None:
        """Copy a float32 block before it changes; `calls` are the model's calls of it."""
        self._block, self._resting = copy.deepcopy(block), resting
        self._calls = [call.on(hidden).to(resting) for call, hidden in zip(calls, self._hidden, strict=True)]
        self._hidden.clear()

    def expect(self, batch: int, groups: Mapping[LinearGroup, object], rows: Tensor | None) -> None:
        """Tell the statistics of `groups` what their linear layers read here on a batch; `rows` are its real tokens.

        Experts are left out: in the two models, other tokens reach them.
        """
        sums = {
            group.linears[0].name: s
            for group, s in groups.items()
            if isinstance(s, PairedStatistics) and getattr(group, "expert", None) is None
        }
        if not sums:
            return
        seen: set[str] = set()

        def see(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
                flat = arguments[0].flatten(0, -2)
                sums[name].expected = flat if rows is None else flat[rows]
                seen.add(name)
                if len(seen) == len(sums):
                    raise StopForward

            return hook

        firsts = [group.linears[0] for group in self._block.linear_groups if group.linears[0].name in sums]
        handles = [linear.module.register_forward_pre_hook(see(linear.name)) for linear in firsts]
        try:
            with suppress(StopForward):
                self._run(self._calls[batch])
        finally:
            for handle in handles:
                handle.remove()

    def leave(self) -> None:
        """Pass the hidden states through the unchanged block, to the next one."""
        self._calls.reverse()
        while self._calls:  # one by one, to free each input before the next output
            self._hidden.append(self._run(self._calls.pop()))

    def _run(self, call: Call) -> Tensor:
        device = self._block.linears[0].weight.device
        with pass_precision(device, self._stored):
            return call.to(device)(self._block.module).to(self._resting)
