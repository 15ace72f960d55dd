"""An adapter of PEFT as a step: LoRA, DoRA, AdaLoRA, IA3, LoHa, LoKr, VeRA, and all others that peft can merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from interventions.checkpoint.load import missing
from interventions.checkpoint.reading import ReadingError
from interventions.checkpoint.reading.folder import check_safetensors
from interventions.checkpoint.reading.kinds import ADAPTER, ADAPTER_WEIGHTS, check_adapter_weights
from interventions.contents import adapter_config, adapter_content, fetched, local
from interventions.intervention import Context, Intervention, Model, Resources
from interventions.ranges import Range
from interventions.types import InterventionError

_UNMERGEABLE = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "XLORA",
)


@dataclass(frozen=True)
class AdapterSettings(Intervention):
    """A PEFT adapter (LoRA, DoRA, AdaLoRA, IA3, LoHa, LoKr, VeRA, ...), merged into the current weights."""

    name = "adapter"
    category = "checkpoint"

    path: str = ""
    """Folder (relative to where pytest was called) or hub id of the adapter; required."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    weight: Annotated[float, Range(-10, 10)] = 1.0
    """Share of the change to apply: 0.5 sets weights halfway between those before and those merged."""

    def identity(self, folder: Path) -> Any:
        """Return the adapter's content, wherever it lies, with the rest of the settings."""
        content = adapter_content(self.path, self.revision, folder)
        return {"content": content, "settings": dataclasses.replace(self, path="", revision=None)}

    def problems(self) -> Iterator[str]:
        """Yield a weight that changes nothing."""
        if self.weight == 0:
            yield "weight=0: expected another number, because the step would change nothing"

    def unready(self, folder: Path) -> Iterator[str]:
        """Yield that there is no path, no adapter at it, or one that cannot be merged."""
        yield from missing(self.path, folder)
        if (place := local(self.path, folder)) is not None:
            yield from _unusable(self.path, place)

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Merge the adapter into the weights, in place; each sum is rounded once to the model's dtype.

        Returns the path, the content's hash, the kind of adapter and the base model that it names. Raises
        InterventionError if the adapter does not fit the model or cannot be merged.
        """
        for problem in self.unready(context.folder):
            raise InterventionError(f"adapter: {problem}")
        place, revision = fetched(self.path, self.revision, context.folder, (ADAPTER, ADAPTER_WEIGHTS))
        for problem in _unusable(self.path, place):
            raise InterventionError(f"adapter: {problem}")
        from interventions.checkpoint.kernels.merging import merge_adapter

        merge_adapter(model, place, self.weight, f"adapter: {self.path}")
        config = adapter_config(place)
        base = config.get("base_model_name_or_path")
        content = adapter_content(self.path, revision, context.folder)
        return {"path": self.path, "revision": revision, "content": content, "kind": config["peft_type"], "base": base}


def _unusable(path: str, place: Path) -> Iterator[str]:
    """Yield why the adapter in a folder cannot be merged into any model."""
    kind = adapter_config(place).get("peft_type")
    if not (place / ADAPTER).is_file():
        model = "; for the weights of a model use load[path=...]" if (place / "config.json").is_file() else ""
        yield f"path={path}: no PEFT adapter: {place / ADAPTER} is missing{model}"
    elif kind is None:
        yield f"path={path}: {place / ADAPTER} has no peft_type; save the adapter again with save_pretrained"
    elif kind in _UNMERGEABLE:
        yield f"path={path}: an adapter of the kind {kind} changes inputs, not weights, and cannot be merged"
    else:
        try:
            check_adapter_weights(place)
            check_safetensors(place / ADAPTER_WEIGHTS)
        except ReadingError as error:
            yield f"path={path}: {error}"
