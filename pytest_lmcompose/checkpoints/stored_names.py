"""The names and shapes under which transformers reads weights. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pytest_lmcompose.errors import CheckpointError


def as_read(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters under the names and in the shapes that transformers reads: it merges experts, for example.

    Raises CheckpointError for a model that it cannot save.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        found: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    except Exception as error:  # its conversions raise all kinds
        raise unsaved(model, error) from error
    return found


def unsaved(model: Any, error: Exception) -> CheckpointError:
    """Return an error that says why transformers cannot save a model."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return CheckpointError(f"transformers cannot save {type(model).__name__}: {reason}")
