"""A language model for lm-evaluation-harness that reads each question once for all its choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import GenerationConfig, LogitsProcessorList

from evaluators.continuations import score
from evaluators.encoding import Pair, check_length, padding_id
from evaluators.generation import RejectNonFinite
from evaluators.measurement import EvaluationError

Request = tuple[Any, list[int], list[int]]  # the texts, the ids of the context, the ids of the choice
Result = tuple[float, bool]  # log-likelihood in nats, whether greedy generation would give it


class SharedContextLM(HFLM):  # type: ignore[misc]
    """HFLM around a loaded model, scoring through `evaluators.continuations`, `batch_size` rows at a time.

    Nothing is truncated silently, and logits that no choice can be made from stop a generation.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self._encoded: dict[str, list[int]] = {}

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Result]:
        """Return the likelihood of each request; no progress bar."""
        try:
            result: list[Result] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._encoded.clear()
        return result

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Return the ids of a text; those of a context are needed for each of its choices."""
        if args or kwargs:
            ids: list[int] = super().tok_encode(string, *args, **kwargs)
            return ids
        if string not in self._encoded:
            self._encoded[string] = super().tok_encode(string)
        return self._encoded[string]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the text generated for each request; no progress bar."""
        for context, options in (request.args for request in requests):
            budget = normalize_gen_kwargs(dict(options), self.max_gen_toks)["max_gen_toks"]
            check_length(self.model, len(self.tok_encode(context)) + budget, f"the question {context!r}")
        result: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._encoded.clear()
        return result

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Result]:
        for (context, choice), head, tail in requests:
            if not tail:
                raise EvaluationError(f"the choice {choice!r} of the question {context!r} has no tokens")
            check_length(self.model, len(head) + len(tail), f"the question {context + choice!r}")
        pairs = [Pair(head, tail) for _, head, tail in requests]
        found = score(self.model, pairs, fill=padding_id(self.tokenizer), rows=override_bs or int(self.batch_size))
        return [(f.total, list(f.said) == pair.target) for f, pair in zip(found, pairs, strict=True)]

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Generate as the task says, whatever the model's own generation config would add to it."""
        own = self.model.generation_config
        texts: Sequence[str] = self.tokenizer.batch_decode(context, skip_special_tokens=True)
        self.model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)  # type: ignore[no-untyped-call]
        try:
            guard = LogitsProcessorList([RejectNonFinite(texts)])
            output: torch.Tensor = super()._model_generate(context, *args, logits_processor=guard, **kwargs)
        finally:
            self.model.generation_config = own
        return output
