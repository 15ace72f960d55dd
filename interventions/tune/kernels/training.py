"""Train a copy of a model with a trainer of TRL, and take over its weights.

A trainer changes more of a model than its weights: its forward method, configuration, modes and hooks. So it gets a
copy, in float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from interventions.adapters import check_adaptable, targets_as_given, where_adapted
from interventions.context import Context
from interventions.structure import module_device, within_context
from interventions.tune.kernels.surroundings import surroundings_kept
from interventions.types import InterventionError
from interventions.zeros import zero_mask

if TYPE_CHECKING:
    from interventions.tune.bases import Tuned

_LOGS = 20
"""How often losses are reported."""


def train(
    settings: Tuned,
    kind: str,
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    context: Context,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Train `model` on `rows` in place, with TRL's trainer of a `kind` (SFT or DPO) and `options` of its configuration.

    Returns the number of updates and the losses. Raises InterventionError for rows whose answers are all truncated, and
    for a loss that is not finite.
    """
    import trl

    device = module_device(model)
    changed = settings.may_change(model)
    with surroundings_kept() as folder:
        learner = copy.deepcopy(model).float()
        for name, parameter in learner.named_parameters():
            parameter.requires_grad_(changed is None or name in changed)
        arguments = getattr(trl, f"{kind}Config")(
            **_arguments(settings, device, context.seed),
            max_length=within_context(model, settings.max_tokens),
            bf16=device.type == "cuda" and next(model.parameters()).dtype == torch.bfloat16,
            output_dir=str(folder),
            **options,
        )
        if device.type == "cuda":
            arguments.n_gpu  # noqa: B018  sets up devices
            arguments._n_gpu = 1
        more: dict[str, Any] = {}
        if settings.rank is not None:
            scale: dict[str, Any] = {"r": settings.rank, "lora_alpha": settings.alpha}
            linears = settings.adapted(model)
            more["peft_config"] = LoraConfig(**scale, task_type="CAUSAL_LM", **where_adapted(linears))
            check_adaptable(settings.name, model, more["peft_config"], linears)
        elif kind == "DPO":
            more["ref_model"] = copy.deepcopy(learner)
        watch = _Watch(settings, context, {} if settings.rank is not None else _masks(settings, learner))
        with targets_as_given():
            trainer = _quiet(getattr(trl, f"{kind}Trainer"))(
                model=learner,
                args=arguments,
                train_dataset=Dataset.from_list(list(rows)),
                processing_class=copy.deepcopy(tokenizer),
                callbacks=[watch],
                **more,
            )
        trainer.remove_callback(PrinterCallback)
        _check_lengths(settings, trainer.train_dataset, len(rows), arguments.max_length, context)
        trainer.train()
        tuned = trainer.model.merge_and_unload() if settings.rank is not None else learner
        _take_over(model, tuned)
    return {"updates": trainer.state.global_step, "losses": watch.losses}


def _arguments(settings: Tuned, device: torch.device, seed: int) -> dict[str, Any]:
    """Return the options that trainers share."""
    return {
        "learning_rate": settings.lr,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_updates or -1,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm or 0.0,
        "seed": seed % 2**32,
        "use_cpu": device.type == "cpu",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1 / _LOGS,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _quiet(kind: type) -> type:
    """Return a trainer that reports to nobody."""
    return type(kind.__name__, (kind,), {"_send_telemetry": lambda self: None})


def _masks(settings: Tuned, learner: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Return where trained matrices are pruned, if that is to stay."""
    if not settings.preserve_mask:
        return {}
    found = {p: zero_mask(p) for p in learner.parameters() if p.requires_grad and p.dim() == 2}
    return {parameter: mask for parameter, mask in found.items() if mask is not None}


class _Watch(TrainerCallback):
    """Reports losses, stops at one that is not finite, and keeps zeros."""

    def __init__(self, settings: Tuned, context: Context, masks: Mapping[nn.Parameter, Tensor]) -> None:
        self._name, self._lr, self._context, self._masks = settings.name, settings.lr, context, masks
        self.losses: list[float] = []

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for parameter, mask in self._masks.items():
            parameter.masked_fill_(mask, 0)

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        logs: Mapping[str, float] = more.get("logs") or {}
        if "loss" not in logs:
            return
        loss, name = float(more["logs"]["loss"]), self._name
        if not math.isfinite(loss):
            raise InterventionError(
                f"{name}: the loss became {loss} by update {state.global_step} with {name}.lr={self._lr}; lower "
                f"{name}.lr, or look for NaN in the model's weights"
            )
        self.losses.append(loss)
        self._context.progress(f"{name}: update {state.global_step} of {state.max_steps}, loss {loss:.3f}")


def _check_lengths(settings: Tuned, found: Any, given: int, limit: int, context: Context) -> None:
    """Raise InterventionError if no answer is within the maximum length; warn if some are not.

    Trainers leave out rows whose answer is not.
    """
    name = f"{settings.name}.max_tokens={settings.max_tokens}"
    if not len(found):
        raise InterventionError(f"{name}: no row has its answer within {limit} tokens; raise it")
    lost = given - len(found)
    if lost > 0 and not getattr(settings, "packing", False):
        context.warn(f"{name}: {lost} of {given} rows are left out, their answers are not within {limit} tokens")


@torch.no_grad()
def _take_over(model: nn.Module, tuned: nn.Module) -> None:
    """Copy all weights, rounded once to the model's dtype."""
    theirs = dict(tuned.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(theirs[name])
