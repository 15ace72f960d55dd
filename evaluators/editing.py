"""Success, paraphrase, portability and locality of edits.

Greedy answers are compared with the expected ones (see `evaluators.answers.score_tokens`). The probabilities of new
and old answer are compared as in ROME and CounterFact (Meng et al. 2022, arXiv 2202.05262): score P(new) > P(old) and
magnitude P(new) - P(old), where P is the geometric mean over tokens, so that long answers are not at a disadvantage.
On locality prompts the magnitude is P(true) - P(target). Portability tests consequences of the edit (Zhong et al.
2023, MQuAKE, arXiv 2305.14795).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluators.answers import Answer, Scores, answer_probes
from evaluators.data import EditCase, EvaluationData, Probe, UneditedAnswers
from evaluators.measurement import EvaluationError, Measurement, each_alike, shorten
from evaluators.settings import NoSettings
from evaluators.survival import measure_sequence
from interventions.tokens import Chat


def evaluate(model: Any, tokenizer: Any, settings: NoSettings, data: EvaluationData) -> list[Measurement]:
    """Measure the run's edits on a state, whether or not it has them."""
    if not data.edits:
        return []
    size, chat = data.batch_size, data.chat
    found = measure_editing(model, tokenizer, data.edits, unedited=data.unedited, batch_size=size, chat=chat)
    (success,) = (measurement for measurement in found if measurement.metric == "edit_success_exact")
    return [*found, *measure_sequence(success, data.sequence)]


def capture_unedited(
    model: Any, tokenizer: Any, cases: Sequence[EditCase], *, batch_size: int = 32, chat: Chat | None = None
) -> UneditedAnswers:
    """Record the model's answers to the locality prompts of `cases` before editing.

    Raises EvaluationError for logits that are NaN or infinite.
    """
    prompts = [replace(p, probe=_alone(p.probe)) for p in _prompts(cases) if p.aspect == "locality"]
    generated: dict[Probe, tuple[int, ...]] = {}
    for prompt, answer in zip(prompts, _answers(model, tokenizer, prompts, batch_size, chat), strict=True):
        if answer.generated is None:
            raise EvaluationError(
                f"{prompt.record}: the unedited model's logits after {prompt.probe.prompt!r} are NaN or infinite; "
                "its weights are broken"
            )
        generated[prompt.probe] = answer.generated
    return UneditedAnswers(generated)


def measure_editing(
    model: Any,
    tokenizer: Any,
    cases: Sequence[EditCase],
    *,
    unedited: UneditedAnswers | None = None,
    batch_size: int = 32,
    chat: Chat | None = None,
) -> list[Measurement]:
    """Measure `edit_success`, `edit_paraphrase`, `edit_portability` and `edit_locality`.

    Each has the suffixes `_f1`, `_recall` and `_exact`. Prompts whose old answer is known and differs
    from the new one also give `_margin` (magnitude, -1 to 1) and `_preferred` (score: share of margins
    above 0). `unedited` adds `edit_locality_agreement`, the share of locality prompts with the same
    generated tokens as before. Aspects without prompts are left out. Samples are in the order of the
    cases. The prompts of a case are averaged first and are one cluster: a case with ten prompts counts as
    much as one with two. Several kinds of portability or locality are also measured one by one:
    `edit_portability_exact/Reasoning`. With `chat`, all prompts are put into the chat template, as they must be
    for `unedited`.

    Broken logits give NaN samples. Raises EvaluationError for no cases, a target without tokens, or a
    locality prompt missing from `unedited`.
    """
    if not cases:
        raise EvaluationError("edit success: no cases; is the edit file empty?")
    prompts = _prompts(cases)
    answers = _answers(model, tokenizer, prompts, batch_size, chat)
    measurements = []
    for aspect in ("success", "paraphrase", "portability", "locality"):
        chosen = [(p, a) for p, a in zip(prompts, answers, strict=True) if p.aspect == aspect]
        if not chosen:
            continue
        clusters = [p.case for p, _ in chosen]
        note = f"{len(chosen)} prompts of {len(set(clusters))} edits, greedy, as many tokens as in the answer"
        said = [shorten(tokenizer.decode(a.generated or (), skip_special_tokens=True)) for _, a in chosen]
        for kind in Scores._fields:
            samples = [getattr(a.scores, kind) for _, a in chosen]
            kept = said if kind == "exact" else []
            measurements.append(_mean(f"edit_{aspect}_{kind}", samples, note, clusters, kept))
        measurements += _by_kind(aspect, chosen)
        measurements += _margins(aspect, chosen)
        if aspect == "locality" and unedited is not None:
            samples = [_agreement(a, _before(unedited, p)) for p, a in chosen]
            measurements.append(_mean("edit_locality_agreement", samples, note, clusters))
    return measurements


def _mean(
    name: str, samples: Sequence[float], note: str, clusters: Sequence[int], answers: Sequence[str] = ()
) -> Measurement:
    """Average over the prompts of each edit, then over edits."""
    return Measurement.mean(name, samples, note=note, clusters=clusters, answers=answers, weights=each_alike(clusters))


def _by_kind(aspect: str, chosen: Sequence[tuple[_Prompt, Answer]]) -> list[Measurement]:
    """Measure each kind of prompts that the data tell apart."""
    found = []
    for kind in dict.fromkeys(p.probe.kind for p, _ in chosen if p.probe.kind):
        of_kind = [(p, a) for p, a in chosen if p.probe.kind == kind]
        clusters = [p.case for p, _ in of_kind]
        note = f"{len(of_kind)} prompts of {len(set(clusters))} edits"
        for score in Scores._fields:
            samples = [getattr(a.scores, score) for _, a in of_kind]
            found.append(_mean(f"edit_{aspect}_{score}/{kind}", samples, note, clusters))
    return found


def _margins(aspect: str, chosen: Sequence[tuple[_Prompt, Answer]]) -> list[Measurement]:
    """Measure margin and preference on the prompts with a rival."""
    pairs = [(p.case, a.margin) for p, a in chosen if a.margin is not None]
    if not pairs:
        return []
    clusters, margins = [case for case, _ in pairs], [margin for _, margin in pairs]
    sides = "true answer minus the edit's target" if aspect == "locality" else "new minus old answer"
    note = f"{sides}, probabilities per token (geometric mean), {len(pairs)} of {len(chosen)} prompts"
    preferred = [math.nan if math.isnan(margin) else float(margin > 0) for margin in margins]
    return [
        _mean(f"edit_{aspect}_margin", margins, note, clusters),
        _mean(f"edit_{aspect}_preferred", preferred, note, clusters),
    ]


@dataclass(frozen=True)
class _Prompt:
    """One prompt of a case, with its name for errors."""

    case: int
    aspect: str
    probe: Probe
    record: str


def _prompts(cases: Sequence[EditCase]) -> list[_Prompt]:
    prompts = []
    for i, case in enumerate(cases):
        name = f"case {i} ({case.subject})"
        probe = Probe(case.prompt, case.target, case.truth)
        prompts.append(_Prompt(i, "success", probe, f"{name}, prompt"))
        for k, text in enumerate(case.paraphrases):
            prompts.append(_Prompt(i, "paraphrase", Probe(text, case.target, case.truth), f"{name}, paraphrase {k}"))
        for k, probe in enumerate(case.portability):
            prompts.append(_Prompt(i, "portability", probe, f"{name}, portability prompt {k}"))
        for k, probe in enumerate(case.locality):
            probe = replace(probe, rival=probe.rival or case.target)
            prompts.append(_Prompt(i, "locality", probe, f"{name}, locality prompt {k}"))
    return prompts


def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[_Prompt], batch_size: int, chat: Chat | None
) -> list[Answer]:
    # An answer is not its own rival.
    probes = [_alone(p.probe) if p.probe.answer == p.probe.rival else p.probe for p in prompts]
    return answer_probes(model, tokenizer, probes, [p.record for p in prompts], batch_size, chat=chat)


def _alone(probe: Probe) -> Probe:
    return replace(probe, rival="")


def _agreement(answer: Answer, before: tuple[int, ...]) -> float:
    return math.nan if answer.generated is None else float(answer.generated == before)


def _before(unedited: UneditedAnswers, prompt: _Prompt) -> tuple[int, ...]:
    probe = _alone(prompt.probe)
    if probe not in unedited.generated:
        raise EvaluationError(
            f"{prompt.record}: no answer of the unedited model to {probe.prompt!r}; "
            "capture its answers for the same cases"
        )
    return unedited.generated[probe]
