"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) and AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512) for edits.

Adapters are put on by peft, trained on the targets of the edits, and merged. AdaLoRA starts with a
higher rank everywhere and cuts singular values down to a budget over all layers, by how much they
matter to the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, LoraModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interventions.anatomy import Anatomy, Linear, find_anatomy, module_device
from interventions.edit.prompts import check_edits
from interventions.edit.rewriting import chosen_layers
from interventions.edit.settings import IN_ATTENTION, LoraSettings
from interventions.edit.target_loss import Watch, all_nll, edit_report, target_batches, target_nll
from interventions.step import Context
from interventions.training import workable_precision
from interventions.types import Resources

_ADAPTER = "default"


def lora(
    model: nn.Module, tokenizer: Any, settings: LoraSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Train adapters on `resources.edits` and add them to the weights, in place.

    The adapters are float32 whatever the model's dtype, and their product is rounded once, in the sum.
    The details give the rank that each layer ended with.
    """
    edits = resources.edits
    check_edits(edits)
    anatomy = find_anatomy(model)
    layers = _chosen_layers(settings, len(anatomy.blocks))
    linears = chosen_linears(anatomy, settings, layers)
    watch = Watch("lora", settings.lr, layers, edits)
    batches = target_batches(
        tokenizer, edits, settings.batch_size, module_device(model), chat_template=settings.chat_template
    )
    seed = int(torch.randint(2**31, (1,), generator=context.generator("lora adapters")))
    with workable_precision(model):
        with _adapters(model, linears, settings, seed) as adapters:
            before = all_nll(model, anatomy.head, batches)
            optimizer = torch.optim.Adam(adapters.parameters.values(), lr=settings.lr)
            steps = 0
            for steps in range(1, settings.steps + 1):
                highest = 0.0
                for number, batch in enumerate(batches):
                    nll = target_nll(model, anatomy.head, batch)
                    watch.finite(nll, batch.which, steps - 1)
                    highest = max(highest, float(nll.detach().mean()))
                    torch.autograd.backward(nll.mean() + adapters.penalty())
                    optimizer.step()
                    if number == len(batches) - 1:
                        adapters.allocate(steps)
                    optimizer.zero_grad()
                context.progress(f"lora: pass {steps}, loss {highest:.3f}")
                if highest < settings.stop_loss and adapters.allocated(steps):
                    break
            after = all_nll(model, anatomy.head, batches)
            watch.finite(after, range(len(edits)), steps)
            watch.learned(before, after)
            updates = {linear.parameter_name: adapters.change(linear) for linear in linears}
            ranks = {linear.parameter_name: adapters.rank(linear) for linear in linears}
        changes = {}
        for linear in linears:
            name = linear.parameter_name
            changes[name] = watch.change(name, linear.weight, updates[name])
            linear.set_weight_(linear.weight + updates[name])
    return {"ranks": ranks, "passes": steps, "changes": changes, "edits": edit_report(edits, before, after)}


def _chosen_layers(settings: LoraSettings, depth: int) -> list[int]:
    return list(range(depth)) if settings.layers is None else chosen_layers("lora", settings.layers, (), depth)


def chosen_linears(anatomy: Anatomy, settings: LoraSettings, layers: Sequence[int]) -> list[Linear]:
    """Return the linear layers that the settings name."""
    linears: dict[str, Linear] = {}
    for target in settings.targets:
        role: Any = "attention_in" if target in IN_ATTENTION else target
        for layer in layers:
            found = anatomy.blocks[layer].group(role).linears
            if target in IN_ATTENTION and len(found) == len(IN_ATTENTION):
                found = (found[IN_ATTENTION.index(target)],)
            linears |= {linear.name: linear for linear in found}
    return list(linears.values())


class _Adapters:
    """The adapters of peft on a model's linear layers."""

    def __init__(self, tuner: LoraModel, settings: LoraSettings) -> None:
        self.tuner = tuner
        self.parameters = {name: p for name, p in tuner.named_parameters() if p.requires_grad}
        self._settings = settings
        self._last_cut = settings.steps - settings.final_steps

    def penalty(self) -> Tensor | float:
        """Return AdaLoRA's term for orthonormal singular vectors: the mean of ||P^T P - I|| over the factors."""
        if not self._settings.adaptive:
            return 0.0
        factors = [(n, p) for n, p in self.parameters.items() if "lora_A" in n or "lora_B" in n]
        norms = []
        for name, factor in factors:
            gram = factor @ factor.t() if "lora_A" in name else factor.t() @ factor
            norms.append((gram - torch.eye(len(gram), device=gram.device)).norm())
        return self._settings.orthogonality * torch.stack(norms).mean()

    def allocate(self, step: int) -> None:
        """Cut ranks by AdaLoRA's schedule: after an update, with its gradients still there; steps count from 1."""
        if self._settings.adaptive:
            self.tuner.update_and_allocate(step)

    def allocated(self, step: int) -> bool:
        """Tell whether the ranks are cut down to the budget."""
        return not self._settings.adaptive or step >= self._last_cut

    @torch.no_grad()
    def change(self, linear: Linear) -> Tensor:
        """Return what an adapter adds to its layer's weight, (out, in) float32."""
        delta: Tensor = self._layer(linear).get_delta_weight(_ADAPTER)
        return delta.t() if isinstance(linear.module, Conv1D) else delta

    def rank(self, linear: Linear) -> int:
        if not self._settings.adaptive:
            return self._settings.rank
        return int((self._layer(linear).lora_E[_ADAPTER] != 0).sum())

    def _layer(self, linear: Linear) -> Any:
        return self.tuner.model.get_submodule(linear.name)


@contextmanager
def _adapters(model: nn.Module, linears: Sequence[Linear], settings: LoraSettings, seed: int) -> Iterator[_Adapters]:
    """Put adapters on `linears`, and take them off at the end."""
    names = {linear.name for linear in linears}
    # A pattern, as peft takes a name in a list for the end of other names too.
    pattern = "|".join(name.replace(".", r"\.") for name in sorted(names))
    shared: dict[str, Any] = {
        "target_modules": f"({pattern})",
        "lora_alpha": settings.alpha,
        "fan_in_fan_out": isinstance(linears[0].module, Conv1D),
    }
    config: LoraConfig
    if settings.adaptive:
        config = AdaLoraConfig(
            init_r=settings.initial_rank,
            target_r=settings.rank,
            total_step=settings.steps,
            tinit=settings.warmup_steps,
            tfinal=settings.final_steps,
            orth_reg_weight=settings.orthogonality,
            **shared,
        )
    else:
        config = LoraConfig(r=settings.rank, **shared)
    # peft draws its first values from the global generator of the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        tuner = (AdaLoraModel if settings.adaptive else LoraModel)(model, config, _ADAPTER)
    try:
        yield _Adapters(tuner, settings)
    finally:
        tuner.unload()
