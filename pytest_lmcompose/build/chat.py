"""Check that a tokenizer's chat template can show what a run asks. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from interventions.tokens import ChatError
from pytest_lmcompose.errors import RecipeError
from pytest_lmcompose.settings import EvaluateSettings


def check_chat(tokenizer: Any, evaluate: EvaluateSettings, location: str) -> None:
    """Raise RecipeError if the prompts of a run cannot be put into the chat template of the model at `location`."""
    chat = evaluate.chat
    if chat is None:
        return
    templates = getattr(tokenizer, "chat_template", None)
    if not templates:
        raise RecipeError(
            f"evaluate.chat_template=true: the tokenizer of {location} has no chat template; set "
            "evaluate.chat_template=false, or use a model with one"
        )
    if isinstance(templates, dict) and chat.arguments.get("chat_template", "default") not in templates:
        raise RecipeError(
            f"evaluate.chat_template=true: the tokenizer of {location} has the chat templates "
            f"{', '.join(sorted(templates))}; choose one with evaluate.chat_template_args="
            f"{{chat_template: {min(templates)}}}"
        )
    try:
        replace(chat, system="").ask(tokenizer, "a")
    except ChatError as error:
        raise RecipeError(
            f"evaluate.chat_template=true: {location}: {error}; set evaluate.chat_template=false, or correct "
            "evaluate.chat_template_args or the template"
        ) from None
    try:
        chat.ask(tokenizer, "a")
    except ChatError as error:
        raise RecipeError(
            f"evaluate.system_prompt: {location}: {error}; remove evaluate.system_prompt, or use a model whose "
            "template has a system turn"
        ) from None
