"""Edit success, paraphrase and locality: what an edited model says where it should, and elsewhere.

Answers are compared as in Meng et al. 2023 (MEMIT) and its successors, on greedy generations; see
`evaluators.answers.score_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluators.answers import Answer, Probe, Scores, answer_probes
from evaluators.measurement import EvaluationError, Measurement


@dataclass(frozen=True)
class EditCase:
    """One edit and the prompts that judge it.

    After `prompt` and after each of `paraphrases` the model should say `target`; after each
    prompt of `locality`, which is about something else, what was true before.
    """

    subject: str
    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()


@dataclass(frozen=True)
class UneditedAnswers:
    """What the unedited model generated for each locality probe."""

    generated: Mapping[Probe, tuple[int, ...]]


def capture_unedited(model: Any, tokenizer: Any, cases: Sequence[EditCase], *, batch_size: int = 32) -> UneditedAnswers:
    """Record the model's answers to the locality prompts of `cases`, to compare with after edits."""
    asked = [prompt for prompt in _prompts(cases) if prompt.aspect == "locality"]
    answers = _ask(model, tokenizer, asked, batch_size)
    return UneditedAnswers({p.probe: a.generated for p, a in zip(asked, answers, strict=True)})


def measure_editing(
    model: Any,
    tokenizer: Any,
    cases: Sequence[EditCase],
    *,
    unedited: UneditedAnswers | None = None,
    batch_size: int = 32,
) -> list[Measurement]:
    """Measure `edit_success`, `edit_paraphrase` and `edit_locality`, each as `_f1`, `_recall` and `_exact`.

    With `unedited` also `edit_locality_agreement`: the share of locality prompts whose generated
    tokens are the unedited model's. An aspect that no case has a prompt for is left out. Samples
    stand in the order of the cases; the errors treat the prompts of one case as one cluster.

    Raises EvaluationError for no cases, a target without tokens, or a locality prompt that
    `unedited` does not know.
    """
    if not cases:
        raise EvaluationError("edit success: no cases; is the edit file empty?")
    prompts = _prompts(cases)
    answers = _ask(model, tokenizer, prompts, batch_size)
    measurements = []
    for aspect in ("success", "paraphrase", "locality"):
        chosen = [(p, a) for p, a in zip(prompts, answers, strict=True) if p.aspect == aspect]
        if not chosen:
            continue
        clusters = [p.case for p, _ in chosen]
        note = f"{len(chosen)} prompts of {len(set(clusters))} edits, greedy, as many tokens as the answer has"
        for kind in Scores._fields:
            samples = [getattr(a.scores, kind) for _, a in chosen]
            measurements.append(Measurement.mean(f"edit_{aspect}_{kind}", samples, note=note, clusters=clusters))
        if aspect == "locality" and unedited is not None:
            samples = [float(a.generated == _before(unedited, p)) for p, a in chosen]
            measurements.append(Measurement.mean("edit_locality_agreement", samples, note=note, clusters=clusters))
    return measurements


@dataclass(frozen=True)
class _Prompt:
    """One prompt of one case, and the name it goes by in errors."""

    case: int
    aspect: str
    probe: Probe
    record: str


def _prompts(cases: Sequence[EditCase]) -> list[_Prompt]:
    prompts = []
    for i, case in enumerate(cases):
        name = f"case {i} ({case.subject})"
        prompts.append(_Prompt(i, "success", Probe(case.prompt, case.target), f"{name}, prompt"))
        for k, text in enumerate(case.paraphrases):
            prompts.append(_Prompt(i, "paraphrase", Probe(text, case.target), f"{name}, paraphrase {k}"))
        for k, probe in enumerate(case.locality):
            prompts.append(_Prompt(i, "locality", probe, f"{name}, locality prompt {k}"))
    return prompts


def _ask(model: Any, tokenizer: Any, prompts: Sequence[_Prompt], batch_size: int) -> list[Answer]:
    return answer_probes(model, tokenizer, [p.probe for p in prompts], [p.record for p in prompts], batch_size)


def _before(unedited: UneditedAnswers, prompt: _Prompt) -> tuple[int, ...]:
    if prompt.probe not in unedited.generated:
        raise EvaluationError(
            f"{prompt.record}: the unedited model was not asked {prompt.probe.prompt!r}; "
            "capture its answers for the same cases"
        )
    return unedited.generated[prompt.probe]
