"""Train on what a model predicts for texts: the loop of all unlearning methods but RMU, and of relearning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.context import Context
from interventions.structure import module_device
from interventions.training import Trainer, workable_precision
from interventions.types import InterventionError, Resources
from interventions.unlearn.bases import Trained
from interventions.unlearn.kernels.choice import last_layers, trained_parameters
from interventions.unlearn.kernels.predictions import Predictions, predict
from interventions.unlearn.kernels.texts import TextBatch, choose_topics, endless, make_batches, shuffled, tokenise

TextLosses = Callable[[Predictions], Tensor]
"""From the predictions of a batch to the loss of each of its texts, (texts,)."""

Prepare = Callable[[nn.Module, Sequence[TextBatch]], TextLosses]
"""Makes the text losses, given the model before the first update and all batches of the term."""


def nll_by_token(said: Predictions) -> Tensor:
    """Return each text's mean negative log-likelihood per token."""
    return said.mean(said.nll)


def descend(model: nn.Module, batches: object) -> TextLosses:
    """Return the losses of ordinary training: the mean negative log-likelihood of each text."""
    return nll_by_token


def ascend(model: nn.Module, batches: object) -> TextLosses:
    """Return the losses of gradient ascent: the mean log-likelihood of each text."""
    return lambda said: -nll_by_token(said)


@dataclass(frozen=True)
class Terms:
    """The two terms of a loss and their weights."""

    forget: Prepare
    by_token: bool
    """Whether the mean over an update is weighted by the tokens of each text; otherwise all texts count the same."""
    forget_weight: float = 1.0
    retain_weight: float = 0.0
    """Weight of the loss on retain text, a mean over tokens."""
    retain: Prepare = descend


@torch.enable_grad()
def train_on_likelihood(
    model: nn.Module,
    tokenizer: Any,
    settings: Trained,
    resources: Resources,
    context: Context,
    terms: Terms,
) -> dict[str, Any]:
    """Minimise `terms` over forget and retain text, in place, and return the step's details.

    Raises InterventionError for settings or texts that cannot work, and for a loss that is not finite.
    """
    method = settings.name
    topics = choose_topics(method, settings.topics, resources.forget)
    if terms.retain_weight and not resources.retain:
        raise InterventionError(
            f"{method} needs retain text (resources.retain): give some, or set {method}.retain_weight=0"
        )
    anatomy = find_anatomy(model)
    layers = last_layers(method, settings, len(anatomy.blocks))
    parameters = trained_parameters(method, model, anatomy, layers, settings)
    device = module_device(model)

    def rows(texts: Sequence[str], source: str) -> list[list[int]]:
        return tokenise(model, tokenizer, texts, settings.max_tokens, f"{method}: {source}")

    chosen = [
        row for topic, texts in topics.items() for row in rows(texts[: settings.samples], f"forget texts of {topic!r}")
    ]
    forget = make_batches(chosen, settings.batch_size, tokenizer, device)
    kept = rows(resources.retain, "retain texts") if terms.retain_weight else []
    beside = settings.retain_batch_size or settings.batch_size
    retain = make_batches(kept, beside, tokenizer, device)
    losses: dict[str, list[float]] = {"forget": [], "retain": []}
    with workable_precision(model):
        trainer = Trainer(
            method,
            model,
            parameters,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            preserve_mask=settings.preserve_mask,
        )
        forget_losses, retain_losses = terms.forget(model, forget), terms.retain(model, retain)
        beside_forget = endless(retain, context.generator(f"{method} retain"))
        updates = list(_updates(forget, settings, context.generator(f"{method} order")))
        for number, batches in enumerate(updates):
            if settings.decay:
                trainer.set_rate(settings.lr * (1 - number / len(updates)))
            losses["forget"].append(
                add_gradients(trainer, model, batches, forget_losses, terms.by_token, terms.forget_weight)
            )
            if terms.retain_weight:
                others = [next(beside_forget) for _ in batches]
                losses["retain"].append(add_gradients(trainer, model, others, retain_losses, True, terms.retain_weight))
            trainer.update()
            if trainer.updates % 10 == 1:
                said = ", ".join(f"{name} {values[-1]:.4g}" for name, values in losses.items() if values)
                context.progress(f"{method}: update {trainer.updates}, {said}")
        trainer.finish()
    return {
        "topics": list(topics),
        "texts": len(chosen),
        "layers": layers,
        "trained": trainer.names,
        "updates": trainer.updates,
        "losses": losses,
    }


def _updates(batches: Sequence[TextBatch], settings: Trained, generator: torch.Generator) -> Iterator[list[TextBatch]]:
    """Yield the batches of each update; the last of an epoch takes the remaining ones."""
    done = 0
    for _ in range(settings.epochs):
        order = shuffled(batches, generator)
        for start in range(0, len(order), settings.accumulation):
            if settings.max_updates is not None and done == settings.max_updates:
                return
            yield order[start : start + settings.accumulation]
            done += 1


def add_gradients(
    trainer: Trainer,
    model: nn.Module,
    batches: Sequence[TextBatch],
    text_losses: TextLosses,
    by_token: bool,
    weight: float,
) -> float:
    """Add the gradients of `weight` times the mean loss over all texts of an update, and return that loss."""
    shares = [batch.scored if by_token else torch.ones_like(batch.scored) for batch in batches]
    total = sum(int(share.sum()) for share in shares)
    parts = []
    for batch, share in zip(batches, shares, strict=True):
        losses = text_losses(predict(model, batch))
        parts.append(trainer.backward(weight * (losses * share).sum() / total))
    return sum(parts)
