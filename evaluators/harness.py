"""A language model for lm-evaluation-harness that reads each question once for all its choices."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM

from evaluators.encoding import check_length, pad, padding_id

Request = tuple[Any, list[int], list[int]]  # the texts, the ids of the context, the ids of the choice
Result = tuple[float, bool]  # log-likelihood in nats, whether greedy generation would give it


class Group(NamedTuple):
    """The requests, by index, that share a context."""

    context: list[int]
    members: list[int]


class SharedContextLM(HFLM):  # type: ignore[misc]
    """HFLM around a loaded model, with one forward pass over a context and one over its choices.

    The choices read the context from the KV cache. Four choices of a few tokens take about a third
    of the time of HFLM's four full passes, with the same likelihoods up to rounding in float32
    (1e-5). A model whose forward lacks the arguments for this goes HFLM's way.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        known = inspect.signature(model.forward).parameters
        self._shares = {"position_ids", "past_key_values", "logits_to_keep"} <= set(known)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Result]:
        """Return the likelihood of each request; no progress bar."""
        result: list[Result] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return result

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Result]:
        for (context, choice), head, tail in requests:
            check_length(self.model, len(head) + len(tail), f"the question {context + choice!r}")
        if not self._shares:
            result: list[Result] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return result
        results: dict[int, Result] = {}
        for groups in _batches(requests, int(self.batch_size)):
            results |= self._score(requests, groups)
        return [results[i] for i in range(len(requests))]

    @torch.no_grad()
    def _score(self, requests: Sequence[Request], groups: Sequence[Group]) -> dict[int, Result]:
        """Score the choices of a few contexts: the first id from the context's pass, the rest from theirs."""
        fill = padding_id(self.tokenizer)
        contexts = pad([group.context for group in groups], "left", fill, self.device)
        seen = contexts.attention_mask
        before = self.model(
            **contexts._asdict(),
            position_ids=(seen.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        owners = [row for row, group in enumerate(groups) for _ in group.members]
        members = [i for group in groups for i in group.members]
        targets = [requests[i][2] for i in members]
        owner = torch.tensor(owners, device=self.device)
        logits = before.logits[owner]  # (choices, 1, vocabulary)
        if max(map(len, targets)) > 1:
            # The last id of a choice predicts nothing that is scored. A choice of one id needs a
            # place in the batch all the same, so that every row has something to attend to.
            choices = pad([ids[:-1] or [fill] for ids in targets], "right", fill, self.device)
            cache = before.past_key_values
            cache.batch_select_indices(owner)
            start = seen.sum(dim=1)[owner].unsqueeze(1)
            after = self.model(
                input_ids=choices.input_ids,
                attention_mask=torch.cat([seen[owner], choices.attention_mask], dim=1),
                position_ids=start + torch.arange(choices.input_ids.shape[1], device=self.device),
                past_key_values=cache,
                use_cache=True,
            )
            logits = torch.cat([logits, after.logits], dim=1)
        return {i: _likelihood(row, ids) for i, row, ids in zip(members, logits, targets, strict=True)}


def _batches(requests: Sequence[Request], rows: int) -> Iterator[list[Group]]:
    """Yield groups of like context, longest contexts first, with at most `rows` choices a batch.

    A context with more choices than that is a batch of its own.
    """
    by_context: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (_, context, _) in enumerate(requests):
        by_context[tuple(context)].append(i)
    batch: list[Group] = []
    size = 0
    for ids, members in sorted(by_context.items(), key=lambda item: -len(item[0])):
        if batch and size + len(members) > rows:
            yield batch
            batch, size = [], 0
        batch.append(Group(list(ids), members))
        size += len(members)
    if batch:
        yield batch


def _likelihood(logits: torch.Tensor, ids: Sequence[int]) -> Result:
    """Return the summed log-probability of `ids` under the first rows of `logits` (length, vocabulary)."""
    scores = torch.log_softmax(logits[: len(ids)].float(), dim=-1)
    target = torch.tensor(ids, device=scores.device)
    greedy = bool((scores.argmax(dim=-1) == target).all())
    return scores.gather(1, target.unsqueeze(1)).double().sum().item(), greedy
