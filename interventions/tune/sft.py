"""SFT: supervised fine-tuning on prompts with answers, by TRL's `SFTTrainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import Items
from interventions.tune.bases import Tuned


@dataclass(frozen=True)
class SftSettings(Tuned):
    """Supervised fine-tuning on prompts with answers (TRL): the loss is that of the answers' tokens."""

    name = "sft"

    sets: Annotated[list[str], Items()] | None = None
    """Sets of the world's `tuning` to train on; None: all."""
    packing: bool = False
    """Put several rows into one sequence of `max_tokens`; they do not see each other."""

    def aims_at(self, metric: str) -> bool:
        """Say whether a metric is about one of the sets."""
        kind, _, name = metric.partition("/")
        return kind in ("tuning_loss", "tuning_recall") and (self.sets is None or name in self.sets)

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Train on `resources.tuning`, in place, and return the sizes of the sets and the losses (nats per token).

        Of a conversation, every turn of the assistant counts if the chat template can mark them, else the last one.
        """
        from interventions.tune.kernels.rows import chosen_sets, example_rows
        from interventions.tune.kernels.training import train

        chosen = chosen_sets(self.name, self.sets, resources.tuning)
        rows = example_rows(self, tokenizer, chosen)
        options = {"packing": self.packing, "assistant_only_loss": rows.every_turn}
        details = train(self, "SFT", model, tokenizer, rows.rows, context, options)
        return {"examples": {name: len(examples) for name, examples in chosen.items()}, **details}
