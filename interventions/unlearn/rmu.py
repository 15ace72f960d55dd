"""RMU: representation misdirection for unlearning (Li et al., ICML 2024, arXiv 2403.03218).

Some MLP output projections below one block learn to send that block's output on forget text towards
a random vector, a control vector for each topic, and to leave it as it was on retain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import Block, check_layers, find_anatomy, first_output, module_device
from interventions.early_exit import SeenEnough, run_until_seen
from interventions.step import Context
from interventions.training import Trainer, workable_precision
from interventions.types import InterventionError, Resources
from interventions.unlearn.choice import named_in_blocks
from interventions.unlearn.settings import RmuSettings
from interventions.unlearn.texts import TextBatch, choose_topics, endless, make_batches, shuffled, tokenise


@torch.enable_grad()
def rmu(
    model: nn.Module, tokenizer: Any, settings: RmuSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Steer the model's states on `resources.forget` away, in place; `resources.retain` holds all others.

    Each update takes a batch of one topic, the topics in turn, and a batch of retain text.
    """
    topics = choose_topics("rmu", settings.topics, resources.forget)
    if settings.alpha and not resources.retain:
        raise InterventionError("rmu needs retain text (resources.retain): give some, or set rmu.alpha=0")
    anatomy = find_anatomy(model)
    layer, trained = chosen_layers(settings, len(anatomy.blocks))
    block = anatomy.blocks[layer]
    parameters = named_in_blocks("rmu", model, [anatomy.blocks[number] for number in trained], settings.parameters)
    device = module_device(model)

    def batches(texts: Sequence[str], source: str) -> list[TextBatch]:
        rows = tokenise(model, tokenizer, texts, settings.max_tokens, f"rmu: {source}")
        return make_batches(rows, settings.batch_size, tokenizer, device)

    forget = [
        endless(batches(texts, f"forget texts of {topic!r}"), context.generator(f"rmu order {topic}"))
        for topic, texts in topics.items()
    ]
    controls = [
        control_vector(block.mlp_output.out_features, settings.steering_coefficient, context.generator(f"rmu {topic}"))
        for topic in topics
    ]
    retain = batches(resources.retain, "retain texts") if settings.alpha else []
    retain = shuffled(retain, context.generator("rmu order"))[: settings.max_num_batches]
    losses: dict[str, list[float]] = {"forget": [], "retain": []}
    with workable_precision(model):
        trainer = Trainer("rmu", model, parameters, lr=settings.lr, preserve_mask=settings.preserve_mask)
        with torch.no_grad():
            frozen = [states(model, block, batch).cpu() for batch in retain]
        context.progress(f"what {block.name} makes of {len(frozen)} batches of retain text is kept")
        for update in range(settings.max_num_batches):
            topic = update % len(topics)
            seen = states(model, block, next(forget[topic]))
            losses["forget"].append(trainer.backward(forget_loss(seen, controls[topic])))
            if retain:
                number = update % len(retain)
                loss = settings.alpha * retain_loss(states(model, block, retain[number]), frozen[number])
                losses["retain"].append(trainer.backward(loss))
            trainer.update()
            if update % 10 == 0:
                context.progress(
                    f"rmu: update {update}, " + ", ".join(f"{k} {v[-1]:.4g}" for k, v in losses.items() if v)
                )
        trainer.finish()
    return {
        "topics": list(topics),
        "layer": layer,
        "trained": trainer.names,
        "updates": trainer.updates,
        "losses": losses,
    }


def chosen_layers(settings: RmuSettings, depth: int) -> tuple[int, list[int]]:
    """Return the block that is steered and those that are trained.

    Raises InterventionError for a block that the model does not have, or that the loss does not reach.
    """
    if settings.layer is not None:
        (layer,) = check_layers("rmu.layer", [settings.layer], depth)
    else:
        layer = min(round(settings.layer_fraction * depth), depth - 1)
    if settings.train_layers is None:
        return layer, list(range(max(0, layer - 2), layer + 1))
    trained = check_layers("rmu.train_layers", settings.train_layers, depth)
    if trained[-1] > layer:
        raise InterventionError(
            f"rmu.train_layers={settings.train_layers}: the loss stands at block {layer}, so block {trained[-1]} above "
            "it would not be trained; leave it out or raise rmu.layer"
        )
    return layer, trained


def control_vector(width: int, coefficient: float, generator: torch.Generator) -> Tensor:
    """Return a vector (width,) float32 of norm `coefficient`, its direction uniform in [0, 1) by component."""
    direction = torch.rand(width, generator=generator)
    control: Tensor = coefficient * direction / direction.norm()
    return control


def states(model: nn.Module, block: Block, batch: TextBatch) -> Tensor:
    """Return the output of `block` at the tokens of the batch, (tokens, hidden), padding left out.

    The forward pass ends there.
    """
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(first_output(output))
        raise SeenEnough

    handle = block.module.register_forward_hook(see)
    try:
        run_until_seen(model, {"input_ids": batch.ids, "attention_mask": batch.mask})
    finally:
        handle.remove()
    return seen[0][batch.mask.bool()]


def forget_loss(seen: Tensor, control: Tensor) -> Tensor:
    """Return the mean squared distance of states (tokens, hidden) from the control vector (hidden,)."""
    return (seen.float() - control.to(seen.device)).square().mean()


def retain_loss(seen: Tensor, frozen: Tensor) -> Tensor:
    """Return the mean squared distance of states (tokens, hidden) from what they were."""
    return (seen.float() - frozen.to(seen.device).float()).square().mean()
