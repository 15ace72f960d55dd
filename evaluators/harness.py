"""A language model for lm-evaluation-harness that reads each question once for all its choices."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import LogitsProcessorList

from evaluators.continuations import score
from evaluators.encoding import Pair, check_length, padding_id
from evaluators.generation import Watch, generation_config, pads_in_generation, step_by_step, stop_ids
from evaluators.measurement import EvaluationError
from evaluators.reading import reading

Request = tuple[Any, list[int], list[int]]  # the texts, the ids of the context, the ids of the choice
Result = tuple[float, bool]  # log-likelihood in nats, whether greedy generation would give it


class SharedContextLM(HFLM):  # type: ignore[misc]
    """HFLM around a loaded model, scoring through `evaluators.continuations`, `batch_size` rows at a time.

    Nothing is truncated silently. Where padding is not inert on the model, texts are generated from
    full passes over contexts of one length (see `evaluators.generation`).
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self._encoded: dict[str, list[int]] = {}
        self._fill = padding_id(tokenizer)
        self._pads = False
        self.broken: set[tuple[str, int]] = set()
        """Tasks and numbers of the questions whose answer had logits that no choice can be made from."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Result]:
        """Return the likelihood of each request; no progress bar."""
        try:
            result: list[Result] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._encoded.clear()
        for request, (total, _) in zip(requests, result, strict=True):
            if math.isnan(total):  # the harness takes the argmax, to which a NaN is the largest: it would be an answer
                self._note(request)
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
        result = self._generate(requests, disable_tqdm)
        self._encoded.clear()
        return result

    def _generate(self, requests: list[Any], disable_tqdm: bool) -> list[str]:
        """Return the text generated for each request; one whose logits are broken gives none."""
        answers: dict[int, str] = {}
        for numbers in self._groups(requests):
            chosen = [requests[i] for i in numbers]
            try:
                answers |= zip(numbers, super().generate_until(chosen, disable_tqdm=disable_tqdm), strict=True)
            except _BrokenLogits:
                if len(chosen) > 1:
                    answers |= zip(
                        numbers, (self._generate([request], disable_tqdm)[0] for request in chosen), strict=True
                    )
                else:
                    self._note(chosen[0])
                    answers[numbers[0]] = ""
        return [answers[i] for i in range(len(requests))]

    def _groups(self, requests: list[Any]) -> list[list[int]]:
        """Return the requests, by number, that may be generated for together."""
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        how = reading(self.model, self._fill, max(lengths, default=0) + self.max_gen_toks)
        self._pads = how.padded and pads_in_generation(self.model, self._fill)
        if self._pads:
            return [list(range(len(requests)))]
        order = sorted(range(len(requests)), key=lambda i: -lengths[i])
        groups = [list(same) for _, same in groupby(order, key=lambda i: lengths[i])]
        return groups if how.together else [[i] for i in order]

    def _note(self, request: Any) -> None:
        self.broken.add((str(request.task_name), int(request.doc_id)))

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Result]:
        for (context, choice), head, tail in requests:
            if not tail:
                raise EvaluationError(f"the choice {choice!r} of the question {context!r} has no tokens")
            check_length(self.model, len(head) + len(tail), f"the question {context + choice!r}")
        pairs = [Pair(head, tail) for _, head, tail in requests]
        found = score(self.model, pairs, fill=self._fill, rows=override_bs or int(self.batch_size))
        return [(f.total, list(f.said) == pair.target) for f, pair in zip(found, pairs, strict=True)]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """Generate as the task says, whatever the model's own generation config would add to it."""
        stops = stop_ids(self.model, self.tokenizer)
        if self._pads:
            watch = Watch(*context.shape)
            with generation_config(self.model, eos_token_id=stops or None):
                output: torch.Tensor = super()._model_generate(
                    context, max_length, stop, logits_processor=LogitsProcessorList([watch]), **kwargs
                )
        else:
            if kwargs.get("do_sample"):
                raise EvaluationError(
                    f"{type(self.model).__name__} generates from full passes, which only choose the likeliest token; "
                    "take do_sample out of the task"
                )
            rows, width = context.shape
            until = stop_sequences_criteria(self.tokenizer, stop, width, rows)
            new = max_length - width
            ids, watch = step_by_step(self.model, context.tolist(), new, self._fill, stops, until)
            output = torch.cat([context, torch.tensor(ids, dtype=context.dtype, device=context.device)], dim=1)
        if any(math.isfinite(place) for place in watch.broken):
            raise _BrokenLogits
        return output


class _BrokenLogits(Exception):
    """Logits after some text of a batch are NaN or infinite."""
