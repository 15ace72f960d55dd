"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) and AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512) for edits.

Adapters of peft are trained on the targets of the edits and merged. AdaLoRA starts with a higher rank in every layer
and prunes the least important singular values to a budget over all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from interventions.adapters import Target, check_adaptable, chosen_linears, targets_as_given, where_adapted
from interventions.intervention import Context, Intervention, Model, Resources, without_gradients
from interventions.ranges import Count, Items, Layers, LearningRate, Positive, Preserve, Share, Updates, Weight
from interventions.types import InterventionError

if TYPE_CHECKING:
    from peft import LoraConfig, LoraModel
    from torch import Tensor, nn

    from interventions.structure import Anatomy, Linear
    from interventions.types import Edit

_ADAPTER = "default"


@dataclass(frozen=True)
class LoraSettings(Intervention):
    """LoRA (Hu et al., 2022) or AdaLoRA (Zhang et al., 2023), trained on the targets and merged into the weights.

    Defaults as in Kolbeinsson et al. (2025), who used AdaLoRA.
    """

    name = "lora"
    category = "edit"

    adaptive: bool = True
    """Use AdaLoRA, which reduces ranks from `initial_rank` to `rank` on average; false: LoRA."""
    rank: Count = 8
    initial_rank: Count = 12
    """AdaLoRA only: rank of every layer during the warm-up."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank."""
    targets: Annotated[list[Target], Items()] = field(default_factory=lambda: ["query", "value"])
    """Linear layers with adapters: query, key, value (all three if fused), attention_in, attention_out,
    mlp_in, mlp_out. Every expert has its own; experts that share a parameter only with adaptive=false."""
    layers: Layers | None = None
    """Decoder blocks with adapters; None: all."""
    lr: LearningRate = 5e-3
    steps: Updates = 70
    """Maximum number of passes over the edits."""
    batch_size: Count = 50
    """Edits per update."""
    edits_at_once: Count | None = None
    """Edits that are trained together, to the end, before the next ones; None: all."""
    stop_loss: Weight = 0.0
    """Training ends when the loss (nats) of every batch is below this; with AdaLoRA, not before ranks are final."""
    warmup: Share = 0.1
    """AdaLoRA only: share of the steps before ranks are reduced."""
    final: Share = 0.3
    """AdaLoRA only: share of the steps after the last reduction of ranks."""
    orthogonality: Weight = 0.5
    """AdaLoRA only: weight of the penalty that keeps singular vectors orthonormal."""
    chat_template: bool = False
    """Apply the tokenizer's chat template: prompts become user messages, targets the start of the answers."""
    preserve_mask: Preserve = False
    """Keep pruned weights at zero in linears with at least 5 % exact zeros."""

    @property
    def warmup_steps(self) -> int:
        """AdaLoRA's steps before ranks are reduced."""
        return round(self.warmup * self.steps)

    @property
    def final_steps(self) -> int:
        """AdaLoRA's steps after the last reduction of ranks."""
        return max(1, round(self.final * self.steps))

    def problems(self) -> Iterator[str]:
        """Yield settings with which AdaLoRA cannot reduce ranks."""
        if not self.adaptive:
            return
        if self.initial_rank <= self.rank:
            yield (
                f"initial_rank={self.initial_rank}: expected more than rank={self.rank}, to which AdaLoRA cuts it; "
                "for LoRA of a fixed rank set adaptive=false"
            )
        if self.warmup_steps + self.final_steps >= self.steps:
            yield (
                f"steps={self.steps}: with warmup={self.warmup} and final={self.final} no step is left in which "
                "AdaLoRA could cut ranks"
            )

    def may_change(self, model: Model) -> list[str]:
        """Return the weights of the linear layers with adapters."""
        from interventions.anatomy import find_anatomy

        linears, _ = self._chosen(find_anatomy(model))
        return list(dict.fromkeys(linear.parameter_name for linear in linears))

    def _chosen(self, anatomy: Anatomy) -> tuple[list[Linear], list[str]]:
        """Return the linear layers with adapters, and the parameters without, because there is no AdaLoRA of experts.

        Raises InterventionError if nothing else was chosen.
        """
        linears = chosen_linears("lora", anatomy, self.targets, self.layers)
        if not self.adaptive:
            return linears, []
        modules = [linear for linear in linears if linear.part is None]
        left = list(dict.fromkeys(linear.parameter_name for linear in linears if linear.part is not None))
        if not modules:
            raise InterventionError(
                f"lora.targets={self.targets}: all in experts that share a parameter, such as {left[0]}, for which "
                "there is no AdaLoRA: set lora.adaptive=false, or choose other targets"
            )
        return modules, left

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Train adapters on `resources.edits` and add them to the weights, in place.

        The adapters are float32 whatever the model's dtype, and the sum is rounded once.
        The details have the final rank of each layer.
        """
        from interventions.edit.kernels.prompts import check_edits
        from interventions.edit.kernels.sequence import in_sequence
        from interventions.edit.kernels.target_loss import nll_of

        def train(first: int, some: Sequence[Edit]) -> dict[str, Any]:
            return self._train(model, tokenizer, some, first, context)

        edits = resources.edits
        check_edits(edits)
        at_end = partial(nll_of, model, tokenizer, edits, self.batch_size, chat_template=self.chat_template)
        return in_sequence(edits, self.edits_at_once, train, ("passes",), at_end)

    def _train(
        self, model: Model, tokenizer: Any, edits: Sequence[Edit], first: int, context: Context
    ) -> dict[str, Any]:
        """Train on some edits, the first of which has the number `first`, and merge the adapters."""
        import torch

        from interventions.anatomy import find_anatomy
        from interventions.edit.kernels.target_loss import Watch, all_nll, edit_report, target_batches, target_nll
        from interventions.structure import module_device
        from interventions.training import workable_precision

        anatomy = find_anatomy(model)
        linears, left = self._chosen(anatomy)
        if left:
            context.warn(
                f"lora: {len(left)} parameters that experts share, such as {left[0]}, stay as they are, because there "
                "is no AdaLoRA of them: set lora.adaptive=false to adapt them too"
            )
        names = list(dict.fromkeys(linear.parameter_name for linear in linears))
        watch = Watch("lora", self.lr, self.layers or range(len(anatomy.blocks)), edits, first)
        batches = target_batches(
            tokenizer, edits, self.batch_size, module_device(model), chat_template=self.chat_template
        )
        seed = int(torch.randint(2**31, (1,), generator=context.generator("lora adapters")))
        with workable_precision(model):
            with _adapters(model, linears, self, seed) as adapters:
                before = all_nll(model, anatomy.head, batches)
                optimizer = torch.optim.Adam(adapters.parameters.values(), lr=self.lr)
                steps = 0
                for steps in range(1, self.steps + 1):
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
                    if highest < self.stop_loss and adapters.allocated(steps):
                        break
                after = all_nll(model, anatomy.head, batches)
                watch.finite(after, range(len(edits)), steps)
                watch.learned(before, after)
                updates = {name: adapters.change(name) for name in names}
                ranks = {name: adapters.rank(name) for name in names}
            changes = {}
            for name, update in updates.items():
                weight = model.get_parameter(name).detach()
                changes[name] = watch.change(name, weight, update)
                weight.add_(update)
        return {"ranks": ranks, "passes": steps, "changes": changes, "edits": edit_report(edits, before, after)}


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
        import torch

        factors = [(n, p) for n, p in self.parameters.items() if "lora_A" in n or "lora_B" in n]
        norms = []
        for name, factor in factors:
            gram = factor @ factor.t() if "lora_A" in name else factor.t() @ factor
            norms.append((gram - torch.eye(len(gram), device=gram.device)).norm())
        return self._settings.orthogonality * torch.stack(norms).mean()

    def allocate(self, step: int) -> None:
        """Reduce ranks by AdaLoRA's schedule; call after an update, before zero_grad; steps count from 1."""
        if self._settings.adaptive:
            self.tuner.update_and_allocate(step)

    def allocated(self, step: int) -> bool:
        """Return whether the ranks are within the budget."""
        return not self._settings.adaptive or step >= self._last_cut

    @without_gradients
    def change(self, name: str) -> Tensor:
        """Return what the adapter of a parameter adds to it."""
        delta: Tensor = self._layer(name).get_delta_weight(_ADAPTER)
        return delta

    def rank(self, name: str) -> int:
        """Return the rank of the adapter of a parameter, in each expert if it holds several."""
        if not self._settings.adaptive:
            return self._settings.rank
        return int((self._layer(name).lora_E[_ADAPTER] != 0).sum())

    def _layer(self, name: str) -> Any:
        path, _, own = name.rpartition(".")
        layer = self.tuner.model.get_submodule(path)
        while getattr(layer, "parameter_name", own) != own:  # adapters of several parameters of one module are nested
            layer = layer.base_layer
        return layer


@contextmanager
def _adapters(model: nn.Module, linears: Sequence[Linear], settings: LoraSettings, seed: int) -> Iterator[_Adapters]:
    """Add adapters to `linears`, and remove them at the end."""
    import torch
    from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, LoraModel

    shared: dict[str, Any] = {**where_adapted(linears), "lora_alpha": settings.alpha}
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
    check_adaptable("lora", model, config, linears)
    # Parameters with adapters leave their module at every run, and come back as its last ones.
    orders = {linear.module: list(linear.module._parameters) for linear in linears if linear.part is not None}
    # peft draws its first values from the global generator of the CPU.
    with torch.random.fork_rng(devices=[]), targets_as_given():
        torch.default_generator.manual_seed(seed)
        tuner = (AdaLoraModel if settings.adaptive else LoraModel)(model, config, _ADAPTER)
    try:
        yield _Adapters(tuner, settings)
    finally:
        tuner.unload()
        for module, order in orders.items():
            for name in order:
                module._parameters[name] = module._parameters.pop(name)
