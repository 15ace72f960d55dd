"""Linear layers, and experts that share a parameter, that take adapters of peft. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from interventions.layouts import ROLES
from interventions.ranges import Choice
from interventions.types import InterventionError

if TYPE_CHECKING:
    from interventions.structure import Anatomy, Linear

IN_ATTENTION = ("query", "key", "value")
Target = Annotated[str, Choice(*IN_ATTENTION, *ROLES)]
"""Linear layers of a block: one of the three projections into attention, or a role."""


def chosen_linears(method: str, anatomy: Anatomy, targets: Sequence[str], layers: Sequence[int] | None) -> list[Linear]:
    """Return the linear layers that the settings `targets` and `layers` (None: all blocks) of a method name.

    Raises InterventionError for blocks and for linear layers that the model lacks.
    """
    from interventions.structure import chosen_layers

    depth = len(anatomy.blocks)
    blocks = [anatomy.blocks[i] for i in (range(depth) if layers is None else chosen_layers(method, layers, (), depth))]
    linears: dict[str, Linear] = {}
    for target in targets:
        role: Any = "attention_in" if target in IN_ATTENTION else target
        for found in (group.linears for block in blocks for group in block.groups_for(role)):
            if target in IN_ATTENTION and len(found) == len(IN_ATTENTION):
                found = (found[IN_ATTENTION.index(target)],)
            linears |= {linear.name: linear for linear in found}
    if not linears:
        raise InterventionError(f"{method}.targets={list(targets)}: the chosen blocks have no such linear layer")
    return list(linears.values())


def where_adapted(linears: Sequence[Linear]) -> dict[str, Any]:
    """Return the options of a `LoraConfig` that put adapters on these linear layers and no others."""
    from transformers.pytorch_utils import Conv1D

    modules = sorted({linear.name for linear in linears if linear.part is None})
    parameters = sorted({linear.parameter_name for linear in linears if linear.part is not None})
    # A pattern, because peft also matches the names in a list as suffixes.
    pattern = "|".join(name.replace(".", r"\.") for name in modules)
    return {
        "target_modules": f"({pattern})" if modules else [],
        "target_parameters": parameters or None,
        "fan_in_fan_out": isinstance(linears[0].module, Conv1D),
    }


@contextmanager
def targets_as_given() -> Iterator[None]:
    """Let peft take targets as they are.

    For mixtures of experts it rewrites them otherwise, to read adapters made before transformers 5: names of layers
    without their path, so those of all blocks, and dense layers to experts.
    """
    from peft.utils import transformers_weight_conversion as conversion

    before = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *arguments, **keywords: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = before


def check_adaptable(method: str, model: Any, config: Any, linears: Sequence[Linear]) -> None:
    """Raise InterventionError for a layer that peft refuses: it would do so with adapters on half of the model."""
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    for linear in linears:
        try:
            _check_lora_target_modules_mamba(config, model, linear.name.rpartition(".")[2])
        except ValueError:
            raise InterventionError(
                f"{method}.targets: {linear.name} takes no adapters of peft, because kernels of state spaces read its "
                "weight by themselves: choose other targets"
            ) from None
