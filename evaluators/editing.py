"""Edit success, paraphrase, portability and locality: what an edited model says where it should, and elsewhere.

Answers are compared on greedy generations (see `evaluators.answers.score_tokens`), and by the
probabilities of the new and the old answer as in ROME and CounterFact (Meng et al. 2022,
arXiv 2202.05262: score, P(new) > P(old), and magnitude, P(new) - P(old)), where P is the geometric
mean of the tokens' probabilities, so that long answers are not at a disadvantage. On locality
prompts what was true stands against the edit's target, the other way round: P(true) - P(target).
Portability asks for what follows from the edit (Zhong et al. 2023, MQuAKE, arXiv 2305.14795).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluators.answers import Answer, Scores, answer_probes
from evaluators.asked import Asked, EditCase, Probe, UneditedAnswers
from evaluators.measurement import EvaluationError, Measurement, each_alike, shown
from evaluators.settings import NoSettings


def evaluate(model: Any, tokenizer: Any, settings: NoSettings, asked: Asked) -> list[Measurement]:
    """Measure the run's edits on a state, edited or not: the base model's are the rates to compare with."""
    if not asked.edits:
        return []
    return measure_editing(model, tokenizer, asked.edits, unedited=asked.unedited, batch_size=asked.batch_size)


def capture_unedited(model: Any, tokenizer: Any, cases: Sequence[EditCase], *, batch_size: int = 32) -> UneditedAnswers:
    """Record the model's answers to the locality prompts of `cases`, to compare with after edits.

    Raises EvaluationError for logits that are NaN or infinite.
    """
    asked = [replace(p, probe=_alone(p.probe)) for p in _prompts(cases) if p.aspect == "locality"]
    generated: dict[Probe, tuple[int, ...]] = {}
    for prompt, answer in zip(asked, _ask(model, tokenizer, asked, batch_size), strict=True):
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
) -> list[Measurement]:
    """Measure `edit_success`, `edit_paraphrase`, `edit_portability` and `edit_locality`.

    Each as `_f1`, `_recall` and `_exact`, and over the prompts whose old answer is known, and is
    another than the new one, as `_margin` (magnitude, -1 to 1) and `_preferred` (score: the share
    with a margin above 0). With `unedited` also `edit_locality_agreement`: the share of locality
    prompts whose generated tokens are the unedited model's. An aspect that no case has a prompt for
    is left out. Samples stand in the order of the cases. The prompts of one case are averaged first, and
    are one cluster for the errors: a case with ten prompts counts as one with two. Where the data have
    several kinds of portability or locality, each is also measured alone: `edit_portability_exact/Reasoning`.

    Samples are NaN where the logits are. Raises EvaluationError for no cases, a target without
    tokens, or a locality prompt that `unedited` does not know.
    """
    if not cases:
        raise EvaluationError("edit success: no cases; is the edit file empty?")
    prompts = _prompts(cases)
    answers = _ask(model, tokenizer, prompts, batch_size)
    measurements = []
    for aspect in ("success", "paraphrase", "portability", "locality"):
        chosen = [(p, a) for p, a in zip(prompts, answers, strict=True) if p.aspect == aspect]
        if not chosen:
            continue
        clusters = [p.case for p, _ in chosen]
        note = f"{len(chosen)} prompts of {len(set(clusters))} edits, greedy, as many tokens as the answer has"
        said = [shown(tokenizer.decode(a.generated or (), skip_special_tokens=True)) for _, a in chosen]
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
    """Measure how answers fare against their rivals, on the prompts that have one."""
    pairs = [(p.case, a.margin) for p, a in chosen if a.margin is not None]
    if not pairs:
        return []
    clusters, margins = [case for case, _ in pairs], [margin for _, margin in pairs]
    sides = "what was true minus the edit's target" if aspect == "locality" else "new minus old answer"
    note = f"{sides}, probabilities by token (geometric mean), {len(pairs)} of {len(chosen)} prompts"
    preferred = [math.nan if math.isnan(margin) else float(margin > 0) for margin in margins]
    return [
        _mean(f"edit_{aspect}_margin", margins, note, clusters),
        _mean(f"edit_{aspect}_preferred", preferred, note, clusters),
    ]


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
        asked = Probe(case.prompt, case.target, case.truth)
        prompts.append(_Prompt(i, "success", asked, f"{name}, prompt"))
        for k, text in enumerate(case.paraphrases):
            prompts.append(_Prompt(i, "paraphrase", Probe(text, case.target, case.truth), f"{name}, paraphrase {k}"))
        for k, probe in enumerate(case.portability):
            prompts.append(_Prompt(i, "portability", probe, f"{name}, portability prompt {k}"))
        for k, probe in enumerate(case.locality):
            held = Probe(probe.prompt, probe.answer, probe.rival or case.target, probe.kind)
            prompts.append(_Prompt(i, "locality", held, f"{name}, locality prompt {k}"))
    return prompts


def _ask(model: Any, tokenizer: Any, prompts: Sequence[_Prompt], batch_size: int) -> list[Answer]:
    # An answer is not held against itself.
    probes = [_alone(p.probe) if p.probe.answer == p.probe.rival else p.probe for p in prompts]
    return answer_probes(model, tokenizer, probes, [p.record for p in prompts], batch_size)


def _alone(probe: Probe) -> Probe:
    return Probe(probe.prompt, probe.answer)


def _agreement(answer: Answer, before: tuple[int, ...]) -> float:
    return math.nan if answer.generated is None else float(answer.generated == before)


def _before(unedited: UneditedAnswers, prompt: _Prompt) -> tuple[int, ...]:
    probe = _alone(prompt.probe)
    if probe not in unedited.generated:
        raise EvaluationError(
            f"{prompt.record}: the unedited model was not asked {probe.prompt!r}; "
            "capture its answers for the same cases"
        )
    return unedited.generated[probe]
