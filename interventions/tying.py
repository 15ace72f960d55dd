"""Output heads that share the weights of the input embeddings: give them their own, and take them away again."""

from __future__ import annotations

from typing import Any

from torch import nn


def tied_head(model: nn.Module) -> str | None:
    """Return the name of the head's weight if it is that of the input embeddings too, otherwise None."""
    embeddings, head = _ends(model)
    if head is None or embeddings is None or head is embeddings or head.weight is not embeddings.weight:
        return None
    name = next(name for name, module in model.named_modules() if module is head)
    return f"{name}.weight"


def untie_head_(model: nn.Module) -> None:
    """Give the head a copy of the weights that it shares; `from_pretrained` then reads a saved model as it is."""
    embeddings, head = _ends(model)
    shared = embeddings.weight
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    say_tied_(model, False)


def tie_head_(model: nn.Module) -> None:
    """Let the head use the weights of the embeddings instead of its own."""
    embeddings, head = _ends(model)
    head.weight = embeddings.weight
    say_tied_(model, True)


def say_tied_(model: nn.Module, tied: bool) -> None:
    """Set what the config says of the head, for whoever saves or reads the model."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    for part in (config, config.get_text_config() if hasattr(config, "get_text_config") else config):
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = tied
    keys = getattr(model, "all_tied_weights_keys", None)
    if isinstance(keys, dict):  # transformers' list of what shares weights
        keys.clear()
        keys.update(model.get_expanded_tied_weights_keys(all_submodels=True))  # type: ignore[operator]


def _ends(model: nn.Module) -> tuple[Any, Any]:
    """Return the modules of the input embeddings and of the head, None where there is none with a weight."""
    found = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        function = getattr(model, method, None)
        module = function() if callable(function) else None
        found.append(module if isinstance(getattr(module, "weight", None), nn.Parameter) else None)
    return found[0], found[1]
