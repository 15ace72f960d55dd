"""FT: fine-tuning of some MLP output projections on the targets of edits.

As the baseline of Meng et al. (2022), with the bound on single weights of Zhu et al. (2020, arXiv
2012.00363): Adam on the mean loss of the target tokens, and none on the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy, module_device
from interventions.edit.prompts import check_edits
from interventions.edit.rewriting import chosen_layers
from interventions.edit.settings import FtSettings
from interventions.edit.target_loss import Watch, all_nll, edit_report, target_batches, target_nll
from interventions.step import Context
from interventions.training import Trainer, workable_precision
from interventions.types import Resources


def ft(
    model: nn.Module, tokenizer: Any, settings: FtSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Train the chosen projections, in place, until the targets of `resources.edits` are likely.

    Weights in less than float32 are trained in float32 and rounded once at the end of each update.
    """
    edits = resources.edits
    check_edits(edits)
    anatomy = find_anatomy(model)
    layers = chosen_layers("ft", settings.layers, settings.layer_fractions, len(anatomy.blocks))
    names = [anatomy.blocks[layer].mlp_output.parameter_name for layer in layers]
    batches = target_batches(
        tokenizer, edits, settings.batch_size, module_device(model), chat_template=settings.chat_template
    )
    watch = Watch("ft", settings.lr, layers, edits)
    with workable_precision(model):
        before = all_nll(model, anatomy.head, batches)
        trainer = _BoundedTrainer(model, {name: model.get_parameter(name) for name in names}, settings)
        steps = 0
        for steps in range(1, settings.steps + 1):
            trained = False
            for batch in batches:
                nll = target_nll(model, anatomy.head, batch)
                watch.finite(nll, batch.which, trainer.updates)
                loss = nll.mean()
                if float(loss.detach()) >= settings.stop_loss:
                    trainer.backward(loss)
                    trainer.update()
                    trained = True
            if not trained:
                break
            context.progress(f"ft: pass {steps}, loss {float(loss.detach()):.3f}")
        trainer.finish()
        changes = {name: watch.change(name, start, update) for name, (start, update) in trainer.changes().items()}
        after = all_nll(model, anatomy.head, batches)
        watch.finite(after, range(len(edits)), trainer.updates)
        watch.learned(before, after)
    return {
        "layers": layers,
        "passes": steps,
        "updates": trainer.updates,
        "changes": changes,
        "edits": edit_report(edits, before, after),
    }


class _BoundedTrainer(Trainer):
    """Adam with an optional bound on how far each single weight may go."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], settings: FtSettings) -> None:
        super().__init__("ft", model, parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self._bound = settings.norm_constraint
        self._starts = [master.detach().clone() for master in self._masters]

    def changes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what each weight was at first, and what was added to it."""
        pairs = zip(self._parameters, self._masters, self._starts, strict=True)
        return {name: (start, master.detach() - start) for name, master, start in pairs}

    @torch.no_grad()
    def update(self) -> None:
        super().update()
        if self._bound is None:
            return
        for parameter, master, start in zip(self._parameters.values(), self._masters, self._starts, strict=True):
            master.clamp_(start - self._bound, start + self._bound)
            if master is not parameter:
                parameter.copy_(master)
