"""llm-compressor: AWQ, GPTQ, Wanda and SparseGPT, one text at a time to avoid padding.

Its GPTQ computes all grids from the original weights (our `static_groups`) and calibrates all linears of a
block together. Its AWQ does not clip.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from .job import Clock, Job, Result, main, stand_in_tokenizer


def drive(job: Job) -> Result:
    """Apply the method's modifier and read the weights that the forward pass uses."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    # Pinning memory needs an accelerator.
    IntermediatesCache.pin_memory = lambda self, *_, **__: None
    model = job.model()
    rows = {"input_ids": job.rows, "attention_mask": [[1] * len(row) for row in job.rows]}
    with Clock() as clock:
        oneshot(
            model=model,
            dataset=Dataset.from_dict(rows),
            recipe=recipe(job),
            processor=stand_in_tokenizer(),
            num_calibration_samples=len(job.rows),
            max_seq_length=max(map(len, job.rows)),
            shuffle_calibration_samples=False,
            batch_size=1,
        )
    model.eval()
    return Result(weights(model), job.answer_to_probe(model), clock)


def recipe(job: Job) -> list[Any]:
    """Return the modifiers for the job's method and settings."""
    s = job.settings
    targets = [f"re:^{re.escape(name)}$" for name in job.linears]
    if job.method in ("wanda", "sparsegpt"):
        pruning = {"sparsity": s["sparsity"], "mask_structure": structure(s["pattern"]), "targets": targets}
        if job.method == "wanda":
            from llmcompressor.modifiers.pruning import WandaPruningModifier

            return [WandaPruningModifier(**pruning)]
        from llmcompressor.modifiers.pruning import SparseGPTModifier

        return [
            SparseGPTModifier(
                **pruning,
                block_size=s["block_size"],
                dampening_frac=s["damping"],
                preserve_sparsity_mask=s.get("preserve_mask", False),
            )
        ]
    groups = {"group_0": {"targets": targets, "weights": scheme(s, symmetric=s.get("symmetric", False))}}
    if job.method == "awq":
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        return [
            AWQModifier(duo_scaling=s["duo_scaling"], n_grid=s["grid"]),
            QuantizationModifier(config_groups=groups),
        ]
    from llmcompressor.modifiers.gptq import GPTQModifier

    # "static" keeps groups in the original column order, as in our kernel.
    order = "static" if s["act_order"] else None
    return [GPTQModifier(config_groups=groups, dampening_frac=s["damping"], actorder=order, block_size=128)]


def structure(pattern: str | None) -> str:
    """Return llm-compressor's mask structure, zeros:of, for our pattern kept:of."""
    if pattern is None:
        return "0:0"
    kept, of = map(int, pattern.split(":"))
    return f"{of - kept}:{of}"


def scheme(settings: dict[str, Any], *, symmetric: bool) -> dict[str, Any]:
    """Return the arguments of a weight quantisation."""
    grouped = settings["group_size"] > 0
    return {
        "num_bits": settings["bits"],
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": settings["group_size"] if grouped else None,
    }


@torch.no_grad()
def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter; round quantised layers as their forward pass does."""
    from compressed_tensors.quantization import forward_quantize

    found = {name: p.detach() for name, p in model.named_parameters() if not name.endswith(("_scale", "_zero_point"))}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            found[f"{name}.weight"] = forward_quantize(module, module.weight, "weight", scheme.weights)
    return found


if __name__ == "__main__":
    main(drive, "llmcompressor", "compressed-tensors")
