"""Settings of methods that find a direction between two sets of prompts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interventions.intervention import Intervention
from interventions.ranges import Count
from interventions.tokens import Chat


@dataclass(frozen=True)
class PromptSettings(Intervention):
    """How the prompts of `world.refusal` are read."""

    category = "steer"
    needs = ("refusal",)

    chat_template: bool | None = None
    """Put the prompts into the tokenizer's chat template; None: if it has one."""
    system_prompt: str = ""
    """System turn before each prompt in the chat template; empty: none."""
    batch_size: Count = 16
    """Prompts per forward pass."""

    def chat(self, tokenizer: Any) -> Chat | None:
        """Return how prompts are put into the chat template; None: they are read as they stand."""
        wanted = self.chat_template
        if wanted is None:
            wanted = bool(getattr(tokenizer, "chat_template", None))
        return Chat(self.system_prompt) if wanted else None
