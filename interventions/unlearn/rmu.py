"""RMU: representation misdirection for unlearning (Li et al., ICML 2024, arXiv 2403.03218).

Trains some MLP output projections at and below one block to steer that block's output on forget text to a random
control vector per topic, and to keep it unchanged on retain text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from interventions.intervention import Context, Intervention, Model, Resources
from interventions.ranges import (
    SMALLER_IS_MILDER,
    Count,
    Layer,
    Layers,
    LearningRate,
    Positive,
    Preserve,
    Restraint,
    Search,
    Share,
    Updates,
)
from interventions.types import InterventionError
from interventions.unlearn.bases import Names, Tokens

if TYPE_CHECKING:
    from torch.nn import Parameter

    from interventions.structure import Anatomy
    from interventions.unlearn.kernels.texts import TextBatch


@dataclass(frozen=True)
class RmuSettings(Intervention):
    """RMU (Li et al., 2024); defaults as published for Zephyr-7B, layers as a fraction of depth."""

    name = "rmu"
    category = "unlearn"

    topics: Names | None = None
    """Topics of the forget text; None: all."""
    layer: Annotated[Layer | None, Search(plus=(-2, -1, 0, 1, 2))] = None
    """Block whose output is steered; None: that of `layer_fraction`."""
    layer_fraction: Share = 0.22
    """The steered block as a fraction of depth (7 of 32 blocks as published)."""
    train_layers: Layers | None = None
    """Blocks to train; None: the steered block and the two below it."""
    parameters: Names = field(default_factory=lambda: ["mlp_out"])
    """Parameters to train in those blocks: attention_in, attention_out, mlp_in or mlp_out for the weights of these
    linear layers, or parameter names relative to a block, such as `mlp.down_proj.weight`."""
    steering_coefficient: Annotated[Positive, SMALLER_IS_MILDER] = 6.5
    """Norm of the control vectors."""
    alpha: Restraint = 1200.0
    """Weight of the loss on retain text."""
    lr: LearningRate = 5e-5
    max_num_batches: Updates = 150
    """Updates over all topics; texts repeat if there are fewer."""
    batch_size: Count = 4
    """Texts per batch; each update uses one batch of forget text and one of retain text."""
    max_tokens: Tokens = 512
    """Maximum tokens per text; longer texts are truncated."""
    preserve_mask: Preserve = False
    """Keep pruned weights at zero in matrices with at least 5 % exact zeros."""

    def problems(self) -> Iterator[str]:
        """Yield `train_layers` above the steered block."""
        if self.layer is not None and self.train_layers is not None and self.train_layers[-1] > self.layer:
            yield f"train_layers={self.train_layers}: expected none above layer={self.layer}, whose output is steered"

    def may_change(self, model: Model) -> list[str]:
        """Return the parameters to train."""
        from interventions.anatomy import find_anatomy

        return list(steered_and_trained(self, model, find_anatomy(model))[1])

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Steer the hidden states on `resources.forget`, in place; preserve those on `resources.retain`.

        Each update uses a batch of one topic, in turn, and a batch of retain text.
        """
        import torch

        from interventions.anatomy import find_anatomy
        from interventions.structure import module_device
        from interventions.training import Trainer, workable_precision
        from interventions.unlearn.kernels.steering import control_vector, forget_loss, retain_loss, states
        from interventions.unlearn.kernels.texts import choose_topics, endless, make_batches, shuffled, tokenise

        topics = choose_topics("rmu", self.topics, resources.forget)
        if self.alpha and not resources.retain:
            raise InterventionError("rmu needs retain text (resources.retain): give some, or set rmu.alpha=0")
        anatomy = find_anatomy(model)
        layer, parameters = steered_and_trained(self, model, anatomy)
        block = anatomy.blocks[layer]
        device = module_device(model)

        def batches(texts: Sequence[str], source: str) -> list[TextBatch]:
            rows = tokenise(model, tokenizer, texts, self.max_tokens, f"rmu: {source}")
            return make_batches(rows, self.batch_size, tokenizer, device)

        forget = [
            endless(batches(texts, f"forget texts of {topic!r}"), context.generator(f"rmu order {topic}"))
            for topic, texts in topics.items()
        ]
        controls = [
            control_vector(anatomy.width, self.steering_coefficient, context.generator(f"rmu {topic}"))
            for topic in topics
        ]
        retain = batches(resources.retain, "retain texts") if self.alpha else []
        retain = shuffled(retain, context.generator("rmu order"))[: self.max_num_batches]
        losses: dict[str, list[float]] = {"forget": [], "retain": []}
        with torch.enable_grad(), workable_precision(model):
            trainer = Trainer("rmu", model, parameters, lr=self.lr, preserve_mask=self.preserve_mask)
            with torch.no_grad():
                frozen = [states(model, block, batch).cpu() for batch in retain]
            context.progress(f"rmu: recorded the outputs of {block.name} on {len(frozen)} batches of retain text")
            for update in range(self.max_num_batches):
                topic = update % len(topics)
                seen = states(model, block, next(forget[topic]))
                losses["forget"].append(trainer.backward(forget_loss(seen, controls[topic])))
                if retain:
                    number = update % len(retain)
                    loss = self.alpha * retain_loss(states(model, block, retain[number]), frozen[number])
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


def steered_and_trained(settings: RmuSettings, model: Model, anatomy: Anatomy) -> tuple[int, dict[str, Parameter]]:
    """Return the steered block and the parameters to train, by name."""
    from interventions.unlearn.kernels.choice import named_in_blocks

    layer, trained = chosen_layers(settings, len(anatomy.blocks))
    return layer, named_in_blocks("rmu", model, [anatomy.blocks[number] for number in trained], settings.parameters)


def chosen_layers(settings: RmuSettings, depth: int) -> tuple[int, list[int]]:
    """Return the steered block and the blocks to train.

    Raises InterventionError for missing blocks and for trained blocks above the steered one.
    """
    from interventions.structure import check_layers

    if settings.layer is not None:
        (layer,) = check_layers("rmu.layer", [settings.layer], depth)
    else:
        layer = min(round(settings.layer_fraction * depth), depth - 1)
    if settings.train_layers is None:
        return layer, list(range(max(0, layer - 2), layer + 1))
    trained = check_layers("rmu.train_layers", settings.train_layers, depth)
    if trained[-1] > layer:
        raise InterventionError(
            f"rmu.train_layers={settings.train_layers}: the loss is on the output of block {layer}, so block "
            f"{trained[-1]} above it would not be trained; remove it or raise rmu.layer"
        )
    return layer, trained
