"""The shared part of ROME, MEMIT, EMMET, PMET and AlphaEdit: rewrite MLP output projections as associative memories.

For every edit, optimise the hidden state z at the subject's last token that makes the model predict the new target.
Then update the MLP output projections, block by block, so that the subjects' keys map to z. The methods differ in
how the solve preserves the outputs of other keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.context import Context
from interventions.edit.bases import Rewriter
from interventions.edit.kernels.arrival import ADDED, Arrival
from interventions.edit.kernels.closed_form import factorise
from interventions.edit.kernels.memory import EditedMemory, second_moments
from interventions.edit.kernels.prompts import check_edits, sample_contexts, tokenise
from interventions.edit.kernels.sequence import batch_sizes
from interventions.edit.kernels.subjects import SubjectStates, keys_and_values, roots
from interventions.edit.kernels.target_loss import nll_of
from interventions.edit.kernels.target_values import Components, TargetValues, optimise_values
from interventions.padding import padding_id
from interventions.statistics import TOKENS_PER_COLUMN, Batch, scarce, token_batches
from interventions.structure import Memory, within_context
from interventions.types import Edit, InterventionError, Resources

Solve = Callable[[Tensor, Tensor], Tensor]
"""From keys (d_k, n) and residuals (d_out, n) to the update of a weight, (d_out, d_k) float64."""
MakeSolve = Callable[[Memory, Tensor], Solve]
"""From a projection and the second moment of its keys to its solve."""

_BATCH = 32
_BATCH_TOKENS = 4096
_PROBED = 8
_ENOUGH = 0.9
"""A step warns about edits that reach less than this share of the wanted change of their hidden state."""
_UNLIKELY = math.log(2)
"""Negative log-likelihood of a target, in nats a token, above which an edit counts as not made: probability 1/2."""


def rewrite(
    model: nn.Module,
    tokenizer: Any,
    settings: Rewriter,
    resources: Resources,
    context: Context,
    make_solve: MakeSolve,
    *,
    remedy: str,
    components: Components | None = None,
    spread: Callable[[int], float] = float,
) -> dict[str, Any]:
    """Make all of `resources.edits` in place, batch by batch; return the details of the step.

    `make_solve` prepares the solve of one projection from the second moment of its keys on `resources.calibration`,
    computed before the first batch. Each layer takes a share of the change that remains, which corrects errors of
    earlier layers: with n layers left to edit, one part of `spread(n)`. `remedy` names the setting to change if edits
    do not reach their target values. With `components`, target values are outputs of MLPs, not of blocks.
    """
    edits = resources.edits
    check_edits(edits)
    anatomy = find_anatomy(model)
    layers = settings.choose_layers(len(anatomy.blocks))
    outputs = [anatomy.blocks[layer].memory for layer in layers]

    pad = padding_id(tokenizer)
    inside = components is not None
    prompts = [tokenise(tokenizer, edit, chat_template=settings.chat_template) for edit in edits]
    gains = [
        ADDED if inside else Arrival(model, anatomy.blocks[layer], prompts[:_PROBED], pad).gain(output.out_features)
        for layer, output in zip(layers, outputs, strict=True)
    ]
    if len(layers) > 1 and not all(gain.aligned for gain in gains):
        context.warn(
            f"only layer {layers[-1]} is edited: the blocks of this model pass on several hidden states for a token, "
            "and what the MLPs of other layers would have to add is not known"
        )
        layers, outputs, gains = layers[-1:], outputs[-1:], gains[-1:]

    window = within_context(model, settings.covariance_window)
    batches = _key_batches(tokenizer, resources.calibration, settings, window, outputs[0])
    moments, counts = second_moments(context.statistics, model, batches, outputs)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    context.progress(f"second moments of {tokens} keys")
    for warning in _too_few(settings, tokens, outputs, counts):
        context.warn(warning)
    solves = {output.name: make_solve(output, moments.pop(output.name)) for output in outputs}
    generator = context.generator(f"{settings.name} contexts")
    sampled = sample_contexts(model, tokenizer, settings.context_lengths, settings.contexts_per_length, generator)
    contexts = ["", *sampled]

    cached: bool | None = None

    def find_values(start: int, chosen: Sequence[Edit]) -> TargetValues:
        nonlocal cached
        found = optimise_values(
            model,
            tokenizer,
            anatomy,
            chosen,
            contexts,
            layers[-1],
            settings.z,
            context.progress,
            chat_template=settings.chat_template,
            first=start,
            gain=gains[-1],
            components=components,
            cached=cached,
        )
        cached = found.cached
        return found

    def read(chosen: Sequence[Edit], contexts: Sequence[str], layer: int, *, averaged: bool = True) -> SubjectStates:
        options: dict[str, Any] = {"chat_template": settings.chat_template, "inside": inside, "averaged": averaged}
        return keys_and_values(model, tokenizer, anatomy, chosen, contexts, layer, layers[-1], **options)

    weights = {output.name: EditedMemory(output) for output in outputs}
    sizes = batch_sizes(len(edits), settings.batch_size)
    reports: list[dict[str, Any]] = []
    starts: list[Tensor] = []
    values: list[Tensor] = []
    for number, size in enumerate(sizes):
        start = sum(sizes[:number])
        chosen = edits[start : start + size]
        found = find_values(start, chosen)
        at_first = found.start
        for position, (layer, output, gain) in enumerate(zip(layers, outputs, gains, strict=True)):
            keys, reached = read(chosen, contexts, layer, averaged=not output.routed)
            if gain.linear or layer != layers[-1]:
                residuals = (found.z - reached) / spread(len(layers) - position) / gain.factor
            else:  # the edits of the layers below changed the reachable values
                found = find_values(start, chosen) if position else found
                residuals = found.change
            if output.routed:  # contexts reach other experts, so that no one key stands for all of them
                residuals = residuals.repeat_interleave(len(contexts), dim=0)
                residuals *= roots(len(chosen), len(contexts), residuals.device)
            weights[output.name].add_(solves[output.name](keys.t(), residuals.t()))
        starts.append(at_first)
        values.append(found.z)
        moved = (found.z - at_first).norm(dim=1) / at_first.norm(dim=1)
        numbers = zip(chosen, found.nll.tolist(), found.steps.tolist(), moved.tolist(), strict=True)
        reports += [
            {"prompt": edit.prompt, "target": edit.target, "nll": nll, "steps": steps, "moved": moved}
            for edit, nll, steps, moved in numbers
        ]
        context.progress(f"{settings.name}: {len(reports)} of {len(edits)} edits made")
    _, now = read(edits, [""], layers[-1])
    shares = shares_reached(torch.cat(starts), torch.cat(values), now).tolist()
    after = nll_of(model, tokenizer, edits, _BATCH, chat_template=settings.chat_template).tolist()
    short = [(share, nll) for share, nll in zip(shares, after, strict=True) if share < _ENOUGH]
    if short:
        # Methods trade edits against other keys, so a smaller share can be enough: check the targets.
        lost = sum(nll > _UNLIKELY for _, nll in short)
        context.warn(
            f"{len(short)} of {len(edits)} edits reach less than {_ENOUGH} of the change of their target value in "
            f"layer {layers[-1]} (the least {min(short)[0]:.2f}), and {lost} of them leave their target less likely "
            f"than not; {remedy}"
        )
    return {
        "layers": layers,
        "batches": len(sizes),
        "sequence": sizes,
        "covariance_tokens": tokens,
        "contexts": contexts,
        "updates": {name: change for output in outputs for name, change in weights[output.name].changes().items()},
        "edits": [
            {**report, "reached": share, "nll_after": nll}
            for report, share, nll in zip(reports, shares, after, strict=True)
        ],
    }


def shares_reached(start: Tensor, wanted: Tensor, now: Tensor) -> Tensor:
    """Return the share of the change from `start` to `wanted` that each row of `now` has made, (rows,).

    That is the projection of the change on the wanted one, relative to its length; 1.0 if no change is wanted.
    """
    way = wanted - start
    length = (way * way).sum(dim=1)
    return torch.where(length > 0, ((now - start) * way).sum(dim=1) / length, 1.0)


def with_factor(update: Callable[..., Tensor], context: Context, **options: float) -> MakeSolve:
    """Return what prepares a closed form for a projection: with the factor of its second moment, and `options`.

    Warns if the second moment is singular.
    """

    def make_solve(output: Memory, second_moment: Tensor) -> Solve:
        stored = factorise(second_moment)
        if stored.ridge:
            context.warn(f"{output.parameter_name}: singular second moment, solved with a ridge of {stored.ridge}")
        return partial(update, stored=stored, **options)

    return make_solve


def _remedy(settings: Rewriter) -> str:
    more_text = "give more calibration text"
    return (
        more_text if settings.covariance_tokens is None else f"raise {settings.name}.covariance_tokens, or {more_text}"
    )


def _too_few(
    settings: Rewriter, tokens: int, outputs: Sequence[Memory], counts: Mapping[str, Sequence[int]]
) -> Iterator[str]:
    """Yield warnings of layers and experts with so few tokens that their second moments are mostly noise."""
    columns = {output.name: output.in_features for output in outputs if not output.routed}
    few = scarce(settings.name, tokens, columns, _remedy(settings))
    if few is not None:
        yield few
    for output in outputs:
        wanted = TOKENS_PER_COLUMN * output.in_features
        rare = sum(count < wanted for count in counts[output.name])
        if output.routed and rare:
            yield (
                f"{settings.name}: {rare} of the {len(output.linears)} experts of {output.name} got fewer than "
                f"{wanted} of the {tokens} calibration tokens, {TOKENS_PER_COLUMN} for each of their "
                f"{output.in_features} columns: {_remedy(settings)}"
            )


def _key_batches(tokenizer: Any, texts: Sequence[str], settings: Rewriter, window: int, output: Memory) -> list[Batch]:
    """Tokenise texts, in order, until there are enough tokens for the second moment."""
    if not texts:
        raise InterventionError(f"{settings.name} needs calibration text for the second moment of keys; none was given")
    wanted = settings.covariance_tokens
    if wanted is None:
        wanted = 10 * output.in_features * len(output.linears)
    return token_batches(tokenizer, texts, max_tokens=window, batch_tokens=_BATCH_TOKENS, least_tokens=wanted)
