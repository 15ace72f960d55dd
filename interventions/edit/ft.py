"""FT: fine-tuning of some MLP output projections on the targets of edits.

The baseline of Meng et al. (2022), with the bound on single weights of Zhu et al. (2020, arXiv 2012.00363): Adam on the
mean loss of the target tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from interventions.edit.bases import OutputEditor
from interventions.intervention import Context, Model, Resources
from interventions.ranges import Count, Fractions, Layers, LearningRate, Positive, Preserve, Updates, Weight
from interventions.types import Edit


@dataclass(frozen=True)
class FtSettings(OutputEditor):
    """Fine-tuning of some MLP output projections on the targets; defaults as in Kolbeinsson et al. (2025)."""

    name = "ft"

    layers: Layers | None = None
    """Decoder blocks whose MLP output projection is trained; None: those of `layer_fractions`."""
    layer_fractions: Fractions = field(default_factory=lambda: [0.125, 0.25])
    """First and last trained block as fractions of depth."""
    lr: LearningRate = 5e-5
    steps: Updates = 25
    """Maximum number of passes over the edits."""
    batch_size: Count = 50
    """Edits per update."""
    edits_at_once: Count | None = None
    """Edits that are trained together, to the end, before the next ones; None: all."""
    stop_loss: Weight = 0.01
    """Batches with a loss (nats) below this are skipped; training ends when all are."""
    weight_decay: Weight = 0.0
    norm_constraint: Positive | None = None
    """Maximum change of a single weight, the L-infinity norm of Zhu et al. (2020); None: no bound."""
    chat_template: bool = False
    """Apply the tokenizer's chat template: prompts become user messages, targets the start of the answers."""
    preserve_mask: Preserve = False
    """Keep pruned weights at zero in linears with at least 5 % exact zeros."""

    def choose_layers(self, depth: int) -> list[int]:
        """Return the chosen blocks, from `layers` or `layer_fractions`."""
        from interventions.structure import chosen_layers

        return chosen_layers("ft", self.layers, self.layer_fractions, depth)

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Train the chosen projections, in place, until the targets of `resources.edits` are likely.

        Weights in less than float32 are trained in float32 and rounded once at the end of each update.
        """
        from interventions.edit.kernels.prompts import check_edits
        from interventions.edit.kernels.sequence import in_sequence
        from interventions.edit.kernels.target_loss import nll_of

        def train(first: int, some: Sequence[Edit]) -> dict[str, Any]:
            return self._train(model, tokenizer, some, first, context)

        edits = resources.edits
        check_edits(edits)
        at_end = partial(nll_of, model, tokenizer, edits, self.batch_size, chat_template=self.chat_template)
        return in_sequence(edits, self.edits_at_once, train, ("passes", "updates"), at_end)

    def _train(
        self, model: Model, tokenizer: Any, edits: Sequence[Edit], first: int, context: Context
    ) -> dict[str, Any]:
        """Train on some edits, the first of which has the number `first`."""
        from interventions.anatomy import find_anatomy
        from interventions.edit.kernels.target_loss import Watch, all_nll, edit_report, target_batches, target_nll
        from interventions.structure import module_device
        from interventions.training import BoundedTrainer, workable_precision

        anatomy = find_anatomy(model)
        layers = self.choose_layers(len(anatomy.blocks))
        names = [name for layer in layers for name in anatomy.blocks[layer].memory.parameter_names]
        batches = target_batches(
            tokenizer, edits, self.batch_size, module_device(model), chat_template=self.chat_template
        )
        watch = Watch("ft", self.lr, layers, edits, first)
        with workable_precision(model):
            before = all_nll(model, anatomy.head, batches)
            trained_weights = {name: model.get_parameter(name) for name in names}
            options = {"lr": self.lr, "weight_decay": self.weight_decay, "bound": self.norm_constraint}
            trainer = BoundedTrainer("ft", model, trained_weights, **options)
            steps = 0
            for steps in range(1, self.steps + 1):
                trained = False
                for batch in batches:
                    nll = target_nll(model, anatomy.head, batch)
                    watch.finite(nll, batch.which, trainer.updates)
                    loss = nll.mean()
                    if float(loss.detach()) >= self.stop_loss:
                        trainer.backward(loss)
                        trainer.update()
                        trained = True
                if not trained:
                    break
                context.progress(f"ft: pass {steps}, loss {float(loss.detach()):.3f}")
            trainer.finish()
            changes = {name: watch.change(name, start, update) for name, (start, update) in trainer.changes().items()}
            after = all_nll(model, anatomy.head, batches)
            watch.finite(after, range(len(edits)), trainer.updates)
            watch.learned(before, after)
        return {
            "layers": layers,
            "passes": steps,
            "updates": trainer.updates,
            "changes": changes,
            "edits": edit_report(edits, before, after),
        }
