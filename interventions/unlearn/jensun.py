"""JensUn: unlearning by Jensen-Shannon divergences (Singh et al., 2025, arXiv 2509.02820).

On forget text the model learns to say a refusal; on retain text it learns to predict what the original model does. The
divergence is bounded, and its gradient vanishes where the two distributions are far apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import Count, LearningRate, Updates, Weight
from interventions.types import InterventionError
from interventions.unlearn.bases import PartOfDepth, TwoTerms

if TYPE_CHECKING:
    from torch import Tensor, nn

    from interventions.unlearn.kernels.likelihood import TextLosses
    from interventions.unlearn.kernels.texts import TextBatch


@dataclass(frozen=True)
class JensUnSettings(TwoTerms):
    """JensUn (Singh et al., 2025); defaults as published."""

    name = "jensun"

    layer_fraction: PartOfDepth = 1.0
    lr: LearningRate = 8e-6
    epochs: Updates = 10
    accumulation: Count = 4
    weight_decay: Weight = 0.01
    reply: str = "No idea"
    """What to say instead of the forget text, token by token, again and again until the text's end."""

    def problems(self) -> Iterator[str]:
        """Yield an empty refusal, and weights that leave nothing to train on."""
        yield from super().problems()
        if not self.reply.strip():
            yield f"reply={self.reply!r}: expected some words"

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Answer `resources.forget` with the refusal, in place; preserve what is said about `resources.retain`."""
        from interventions.unlearn.kernels.likelihood import Terms, train_on_likelihood
        from interventions.unlearn.kernels.predictions import Reference

        refusal = tokenizer(self.reply, add_special_tokens=False)["input_ids"]
        if not refusal or tokenizer.unk_token_id in refusal:
            raise InterventionError(f"jensun.reply={self.reply!r}: the tokenizer cannot say that; choose other words")

        def forget(model: nn.Module, batches: Sequence[TextBatch]) -> TextLosses:
            wanted = batches[0].ids.new_tensor(refusal)
            return lambda said: said.mean(divergence_from_token(said.logits, wanted[said.places % len(wanted)]))

        def retain(model: nn.Module, batches: Sequence[TextBatch]) -> TextLosses:
            before = Reference(model)
            return lambda said: said.mean(divergence(said.logits, before.predict(said.batch).logits))

        terms = Terms(forget, True, self.forget_weight, self.retain_weight, retain)
        return train_on_likelihood(model, tokenizer, self, resources, context, terms)


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of each row's two distributions in nats, (rows,)."""
    log_p, log_q = logits.log_softmax(dim=1), others.log_softmax(dim=1)
    log_m = log_p.logaddexp(log_q) - math.log(2)
    terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return terms.sum(dim=1) / 2


def divergence_from_token(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of each row from the distribution that is one at its token, (rows,).

    Of the row, only the probability p of that token matters: all others are in one of the two distributions alone.
    """
    log_p = logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    p = log_p.exp()
    log_m = p.log1p() - math.log(2)
    return ((1 - p) * math.log(2) + p * (log_p - log_m) - log_m) / 2
