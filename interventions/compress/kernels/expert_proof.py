"""Test, by running experts, whether a scaling of what their output layer reads can be folded into the layer before.

Like `fold_proof` for the other layers of a block: on a float32 copy with random weights, on random tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from interventions.compress.kernels.fold_proof import MAGNITUDES, TOKENS, TOLERANCE
from interventions.compress.kernels.folding import move_scales_
from interventions.compress.kernels.precision import matmul_precision
from interventions.parts import plain_experts
from interventions.structure import Linear, LinearGroup, module_device

Run = Callable[[nn.Module, Tensor], Tensor]


class ExpertProof:
    """Tells whether the outputs of one layer of experts can be scaled: all or none; tested at the first question."""

    def __init__(self, module: nn.Module, run: Run, width: int) -> None:
        self._module, self._run, self._width = module, run, width
        self.groups: tuple[LinearGroup, ...] = ()
        """The groups of the experts that `run` uses."""
        self._proven: bool | None = None

    def __deepcopy__(self, memo: object) -> ExpertProof:
        return self  # copies of experts have the same structure

    def __call__(self, group: LinearGroup) -> bool:
        """Return whether the group's input can be scaled; copies of a group share its result."""
        if self._proven is None:
            self._proven = self._prove()
        return self._proven and isinstance(group.declared, Linear)

    @torch.no_grad()
    def _prove(self) -> bool:
        module, groups = copy.deepcopy((self._module, self.groups))
        module.float().eval()
        generator = torch.Generator(module_device(module)).manual_seed(0)
        linears = [linear for group in groups for linear in group.linears]
        outputs = [(g.declared, g.linears) for g in groups if isinstance(g.declared, Linear)]
        readers = [linear for _, readers in outputs for linear in readers]
        hidden = torch.randn(TOKENS, self._width, generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(module_device(module))
        exponents = torch.empty(readers[0].in_features, device=hidden.device)
        scales = 10 ** exponents.uniform_(-MAGNITUDES, MAGNITUDES, generator=generator)
        with matmul_precision("highest"), plain_experts(module):
            randomise_(linears, generator)
            other = self._run(module, hidden)
            randomise_(readers, generator)
            wanted = self._run(module, hidden)
            share = float((other - wanted).norm())
            for operation, own in outputs:
                assert operation is not None
                move_scales_(operation, own, scales)
            change = float((self._run(module, hidden) - wanted).norm())
        return share > 0 and change <= TOLERANCE * share


def randomise_(linears: list[Linear], generator: torch.Generator) -> None:
    """Give linears random weights that preserve the scale of their input."""
    for linear in linears:
        bound = (3 / linear.in_features) ** 0.5
        weight = torch.empty(linear.weight.shape, device=linear.weight.device)
        linear.set_weight_(weight.uniform_(-bound, bound, generator=generator))
        if linear.bias is not None:
            linear.bias.uniform_(-0.5, 0.5, generator=generator)
