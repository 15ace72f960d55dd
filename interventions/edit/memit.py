"""MEMIT: mass-editing memory in a transformer (Meng et al., ICLR 2023, arXiv 2210.07229).

Facts are read out of the MLPs of some early blocks at the subject's last token. MEMIT finds, for
every edit, the hidden state z there that makes the model say the new target, and then changes the
MLP output projections, block after block, so that the subjects' keys yield it while the keys of
all other text yield what they did.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import Anatomy, find_anatomy, module_device
from interventions.edit.closed_form import memit_update
from interventions.edit.prompts import check_edits, sample_contexts, tokenise
from interventions.edit.settings import MemitSettings
from interventions.edit.target_values import optimise_values
from interventions.padding import pad_right, padding_id
from interventions.statistics import Batch, collect_statistics, token_batches
from interventions.step import Context
from interventions.types import Edit, InterventionError, Resources

_BATCH = 32


def memit(
    model: nn.Module, tokenizer: Any, settings: MemitSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Make all of `resources.edits` at once, in place; `resources.calibration` gives the other keys."""
    edits = resources.edits
    check_edits(edits)
    anatomy = find_anatomy(model)
    layers = chosen_layers(settings, len(anatomy.blocks))
    outputs = [anatomy.blocks[layer].mlp_output for layer in layers]

    batches = _key_batches(tokenizer, resources.calibration, settings, outputs[0].in_features)
    statistics = collect_statistics(model, batches, outputs)
    context.progress(f"second moments of {statistics[outputs[0].name].count} keys")
    generator = context.generator("memit contexts")
    sampled = sample_contexts(model, tokenizer, settings.context_lengths, settings.contexts_per_length, generator)
    contexts = ["", *sampled]
    values = optimise_values(model, tokenizer, anatomy, edits, contexts, layers[-1], settings.z, context.progress)

    details: dict[str, Any] = {"layers": layers, "contexts": contexts, "updates": {}}
    for position, (layer, output) in enumerate(zip(layers, outputs, strict=True)):
        keys, _ = keys_and_values(model, tokenizer, anatomy, edits, contexts, layer)
        _, reached = keys_and_values(model, tokenizer, anatomy, edits, [""], layers[-1])
        residuals = (values.z - reached) / (len(layers) - position)
        second_moment = statistics[output.name].second_moment()
        update, ridge = memit_update(keys.t(), residuals.t(), second_moment, settings.covariance_weight)
        if ridge:
            context.warn(f"{output.parameter_name}: singular second moment, solved with a ridge of {ridge}")
        weight = output.weight.double()
        output.set_weight_(weight + update)
        details["updates"][output.parameter_name] = float(update.norm() / weight.norm())
        context.progress(f"{output.parameter_name}: changed by {details['updates'][output.parameter_name]:.1%}")
    numbers = zip(edits, values.nll.tolist(), values.steps.tolist(), values.moved.tolist(), strict=True)
    details["edits"] = [
        {"prompt": edit.prompt, "target": edit.target, "nll": nll, "steps": steps, "moved": moved}
        for edit, nll, steps, moved in numbers
    ]
    return details


def chosen_layers(settings: MemitSettings, depth: int) -> list[int]:
    """Return the blocks to edit: as named, or the span that the fractions of depth give.

    Raises InterventionError for a block that the model does not have.
    """
    if settings.layers is not None:
        layers = sorted(set(settings.layers))
        if not layers or layers[0] < 0 or layers[-1] >= depth:
            raise InterventionError(f"memit.layers={settings.layers}: the model's blocks are 0 to {depth - 1}")
        return layers
    low, high = settings.layer_fractions
    if not 0.0 <= low <= high < 1.0:
        raise InterventionError(f"memit.layer_fractions={settings.layer_fractions}: need 0 <= first <= last < 1")
    return list(range(round(low * depth), min(round(high * depth), depth - 1) + 1))


def _key_batches(tokenizer: Any, texts: Sequence[str], settings: MemitSettings, width: int) -> list[Batch]:
    """Tokenise as much text as the second moment needs, in order."""
    wanted = settings.covariance_tokens if settings.covariance_tokens is not None else 10 * width
    batches, tokens = [], 0
    for start in range(0, len(texts), _BATCH):
        batch = token_batches(
            tokenizer, texts[start : start + _BATCH], max_tokens=settings.covariance_window, batch_size=_BATCH
        )
        batches += batch
        tokens += sum(int(b["attention_mask"].sum()) for b in batch)
        if tokens >= wanted:
            break
    if not batches:
        raise InterventionError("memit needs calibration text for the second moment of the keys; none was given")
    return batches


@torch.no_grad()
def keys_and_values(
    model: nn.Module,
    tokenizer: Any,
    anatomy: Anatomy,
    edits: Sequence[Edit],
    contexts: Sequence[str],
    layer: int,
) -> tuple[Tensor, Tensor]:
    """Return, at the subjects' last tokens, the MLP output projection's input and the block's output.

    Shapes (edits, d_k) and (edits, hidden), float32. Averaged over contexts as published: the bare
    prompt counts as much as all other contexts together.
    """
    block = anatomy.blocks[layer]
    seen: dict[str, Tensor] = {}

    def see_key(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["key"] = args[0]

    def see_value(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen["value"] = output[0] if isinstance(output, tuple) else output
        raise _Seen

    rows = [tokenise(tokenizer, edit, context) for edit in edits for context in contexts]
    device = module_device(model)
    keys, values = [], []
    handles = [
        block.mlp_output.module.register_forward_pre_hook(see_key),
        block.module.register_forward_hook(see_value),
    ]
    try:
        for start in range(0, len(rows), _BATCH):
            chunk = rows[start : start + _BATCH]
            ids, mask = pad_right([row.ids for row in chunk], padding_id(tokenizer), device)
            with suppress(_Seen):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            every = torch.arange(len(chunk), device=device)
            place = torch.tensor([row.subject_end for row in chunk], device=device)
            keys.append(seen["key"].reshape(len(chunk), -1, seen["key"].shape[-1])[every, place].float())
            values.append(seen["value"][every, place].float())
    finally:
        for handle in handles:
            handle.remove()
    share = torch.full((len(contexts),), 0.5 / max(1, len(contexts) - 1), device=device)
    share[0] = 0.5 if len(contexts) > 1 else 1.0
    shape = (len(edits), len(contexts), -1)
    average = [torch.einsum("ecd,c->ed", torch.cat(x).reshape(shape), share) for x in (keys, values)]
    return average[0], average[1]


class _Seen(Exception):
    """Ends a forward pass at the block that was asked for."""
