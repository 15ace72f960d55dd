"""How much each routed expert adds to the output of its layer, measured on calibration text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.context import Context
from interventions.early_exit import replaced_forward
from interventions.experts import ExpertLayer, find_experts
from interventions.modes import keep_modes
from interventions.statistics import window_batches
from interventions.structure import first_output, module_device, within_context
from interventions.types import InterventionError, Resources

BATCH_TOKENS = 2048


class Reading(Protocol):
    """The settings that say what is read."""

    @property
    def name(self) -> str: ...
    @property
    def samples(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...


@dataclass
class Saliency:
    """Sums over the tokens of one layer of experts."""

    name: str
    """Dotted path of the experts from the model."""
    block: nn.Module
    layer: ExpertLayer
    sums: Tensor
    """(experts,) float64: router weight times norm of the output, over the tokens routed to each expert."""
    tokens: Tensor
    """(experts,) int64."""
    chosen: int = 0
    """Experts per token."""

    @property
    def means(self) -> Tensor:
        """The saliency of each expert, (experts,); 0 for one that no token reached."""
        return self.sums / self.tokens.clamp(min=1)

    def watching(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the experts' forward function, which adds to the sums besides."""

        def run(*arguments: Any, **keywords: Any) -> Any:
            output = forward(*arguments, **keywords)
            hidden, experts, weights = (*arguments, *keywords.values())[:3]
            hidden = hidden.reshape(-1, self.layer.width)
            experts, weights = experts.reshape(len(hidden), -1), weights.reshape(len(hidden), -1)
            self.chosen = experts.shape[1]
            for place in range(self.chosen):  # one of the experts of every token at a time
                one = slice(place, place + 1)
                norms = first_output(forward(hidden, experts[:, one], weights[:, one])).float().norm(dim=-1)
                index = experts[:, place].cpu()
                self.sums.index_add_(0, index, norms.double().cpu())
                self.tokens.index_add_(0, index, torch.ones_like(index))
            return output

        return run


def expert_saliency(
    model: nn.Module, tokenizer: Any, settings: Reading, resources: Resources, context: Context
) -> list[Saliency]:
    """Return the saliency of the experts of every layer, from the model as it is.

    Raises InterventionError for a model without routed experts, with layers of different numbers, or whose experts do
    not take the router's weights as an argument, and for missing text.
    """
    method = settings.name
    if not resources.calibration:
        raise InterventionError(f"{method} needs calibration texts: give `calibration`")
    found = []
    for block in find_anatomy(model).blocks:
        for layer in find_experts(block.name, block.module):
            zeros = torch.zeros(layer.count, dtype=torch.float64)
            found.append(Saliency(f"{block.name}.{layer.path}", block.module, layer, zeros, zeros.long()))
    _check(found, model, method)
    size = within_context(model, settings.max_tokens)
    options: dict[str, Any] = {"samples": settings.samples, "max_tokens": size, "batch_tokens": BATCH_TOKENS}
    batches = window_batches(tokenizer, resources.calibration, **options, padded=False)
    with keep_modes(model), torch.no_grad(), ExitStack() as stack:
        for saliency in found:
            module = saliency.layer.module
            stack.enter_context(replaced_forward(module, saliency.watching(module.forward)))
        for number, batch in enumerate(batches, start=1):
            context.progress(f"{method}: batch {number} of {len(batches)}")
            model(**{key: value.to(module_device(model)) for key, value in batch.items()}, use_cache=False)
    never = [f"{saliency.name}.{i}" for saliency in found for i in (saliency.tokens == 0).nonzero().flatten().tolist()]
    if never:
        total = sum(saliency.layer.count for saliency in found)
        context.warn(
            f"{method}: no calibration token reached {len(never)} of {total} experts ({len(never) / total:.1%}), such "
            f"as {never[0]}, which are removed first: give more calibration text, or raise {method}.samples"
        )
    return found


def _check(found: list[Saliency], model: nn.Module, method: str) -> None:
    if not found:
        raise InterventionError(f"{method}: {type(model).__name__} has no routed experts that could be removed")
    counts = {saliency.layer.count for saliency in found}
    if len(counts) > 1:
        raise InterventionError(f"{method}: the layers have different numbers of experts: {sorted(counts)}")
    for saliency in found:
        router = saliency.layer.router
        if saliency.layer.form != "routed" or router is None or router.out_features != saliency.layer.count:
            raise InterventionError(
                f"{method}: {saliency.name}: there is no router with one output for each of these experts whose "
                "weights their module takes as an argument: experts of this architecture cannot be removed"
            )


def chosen_experts(saliency: Saliency, share: float) -> list[int]:
    """Return the experts to keep, in order: of every group of experts that the router knows, as many.

    Raises InterventionError, naming the setting, if none would be removed, or fewer left than the router chooses.
    """
    groups, used = _groups_of(saliency.layer)
    size = saliency.layer.count // groups
    kept = size - int(share * size)
    where = f"reap.share={share}: {saliency.name} has {size} experts" + (f" in each of {groups} groups" * (groups > 1))
    if kept == size:
        raise InterventionError(f"{where}, of which none would be removed: raise share to {1 / size:.3g} or more")
    least = max(-(-saliency.chosen // used), 2 if groups > 1 else 1)
    if kept < least:
        raise InterventionError(
            f"{where}, of which {kept} would be left, but the router needs {least}: lower share to "
            f"{(size - least) / size:.3g} or less"
        )
    order = saliency.means.view(groups, size).argsort(dim=1, descending=True, stable=True)[:, :kept]
    return (order + size * torch.arange(groups).unsqueeze(1)).flatten().sort().values.tolist()


def _groups_of(layer: ExpertLayer) -> tuple[int, int]:
    """Return into how many groups the router divides the experts, and how many of these a token uses."""
    assert layer.router is not None
    own = vars(layer.router.module)
    groups = next((own[name] for name in ("num_group", "n_group", "num_expert_groups") if own.get(name)), 1)
    used = next((own[name] for name in ("topk_group", "num_limited_groups") if own.get(name)), groups)
    return int(groups), int(used)
