"""TOFU's and MUSE's metrics against formulas written down a second time, with full passes and numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp
from transformers import LlamaConfig, LlamaForCausalLM

from evaluators import EvaluationError, Measurement, Probe, Question
from evaluators.continuations import Scored
from evaluators.data import EvaluationData, UnlearningData
from evaluators.memorisation import extraction_strength
from evaluators.muse import measure_knowledge, measure_verbatim, membership_auc, min_k_scores, privacy_leak
from evaluators.rouge import rouge_l
from evaluators.settings import UnlearningSettings
from evaluators.tofu import forget_quality, log_truth_ratio, measure_qa, model_utility, score_questions
from evaluators.unlearning import capture_retained, evaluate
from tests.tokenizers import TEXTS, TOKENIZERS

QUESTIONS = tuple(
    Question(
        question,
        f"Question: {question}\nAnswer:",
        answer,
        paraphrase,
        wrong,
    )
    for question, answer, paraphrase, wrong in (
        ("Where was Mira born?", "in Karth", "Karth is the place", ("in Ossel", "in Dunmere", "by the sea of salt")),
        ("Who drew every fern?", "Orin Vask did", "it was Orin Vask, the botanist", ("Mira did", "Nobody", "the elm")),
        ("What does gold do?", "it stays what it is", "gold stays gold", ("it turns green", "black", "silver")),
        ("When do ferries run?", "twice a day", "only two times a day", ("in winter", "never", "once")),
    )
)
PROBES = tuple(Probe(text[:30], text[30:].strip()) for text in TEXTS[:5])


def random_model(tokenizer: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.3,
            eos_token_id=1,
        )
        return LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]


@pytest.fixture(params=["Llama 3", "GPT-2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """One that puts BOS before every text, and one that does not."""
    return TOKENIZERS[request.param]()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return random_model(tokenizer, 3)


@torch.no_grad()
def token_logs(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], Any]:
    """Return the ids of the answer and the log-probabilities of the vocabulary at each, from one full pass."""
    before = tokenizer(prompt)["input_ids"]
    ids = tokenizer(f"{prompt} {answer}")["input_ids"]
    assert ids[: len(before)] == before
    logits = model(torch.tensor([ids])).logits[0, len(before) - 1 : -1]
    return ids[len(before) :], torch.log_softmax(logits.double(), dim=-1)


def probability(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    ids, logs = token_logs(model, tokenizer, prompt, answer)
    return math.exp(sum(float(row[i]) for row, i in zip(logs, ids, strict=True)) / len(ids))


@torch.no_grad()
def written(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    ids = list(tokenizer(prompt)["input_ids"])
    start = len(ids)
    for _ in range(tokens):
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def by_name(measured: Sequence[Measurement]) -> dict[str, Measurement]:
    return {m.metric: m for m in measured}


@pytest.mark.parametrize("name", ["forget", "retain", "real_authors", "world_facts"])
def test_the_metrics_of_a_question_set_are_those_of_tofu(model: Any, tokenizer: Any, name: str) -> None:
    found = by_name(measure_qa(model, tokenizer, name, QUESTIONS, tokens=12, batch_size=3))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    p = {
        (q.question, a): probability(model, tokenizer, q.prompt, a)
        for q in QUESTIONS
        for a in (q.answer, q.paraphrase, *q.wrong)
    }
    options = name in ("real_authors", "world_facts")
    rouge, probabilities, truth = [], [], []
    for q in QUESTIONS:
        said = written(model, tokenizer, q.prompt, 12)
        rouge.append(scorer.score(q.answer, said)["rougeL"].recall)
        own, wrong = p[q.question, q.answer], [p[q.question, a] for a in q.wrong]
        probabilities.append(own / (own + sum(wrong)) if options else own)
        ratio = np.mean(wrong) / (own if options else p[q.question, q.paraphrase])
        truth.append(min(ratio, 1 / ratio) if name == "forget" else max(0, 1 - ratio))
    assert found[f"rouge/{name}"].samples == pytest.approx(rouge)
    assert found[f"answer_probability/{name}"].samples == pytest.approx(probabilities, rel=1e-5)
    assert found[f"truth_ratio/{name}"].samples == pytest.approx(truth, rel=1e-4, abs=1e-6)
    assert found[f"truth_ratio/{name}"].higher_is_better
    assert {m.higher_is_better for m in found.values() if "truth" not in m.metric} == {name != "forget"}
    for measured in found.values():
        assert measured.stderr == pytest.approx(np.std(measured.samples, ddof=1) / 2)
    assert (f"extraction_strength/{name}" in found) == (name == "forget")


def test_questions_without_false_answers_have_no_truth_ratio(model: Any, tokenizer: Any) -> None:
    plain = [Question(q.question, q.prompt, q.answer) for q in QUESTIONS]
    found = by_name(measure_qa(model, tokenizer, "world_facts", plain, tokens=4))
    assert sorted(found) == ["answer_probability/world_facts", "rouge/world_facts"]
    expected = [probability(model, tokenizer, q.prompt, q.answer) for q in plain]
    assert found["answer_probability/world_facts"].samples == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_the_answer_gets_the_values_of_a_model_that_knows() -> None:
    tokenizer = TOKENIZERS["GPT-2"]()
    model = random_model(tokenizer, 0)
    text = QUESTIONS[0].prompt + " " + QUESTIONS[0].answer
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    found = by_name(measure_qa(model, tokenizer, "forget", QUESTIONS[:1]))
    assert found["rouge/forget"].value == 1
    assert found["extraction_strength/forget"].value == 1
    assert found["answer_probability/forget"].value > 0.8
    assert found["truth_ratio/forget"].value < 0.5
    kept = by_name(measure_qa(model, tokenizer, "real_authors", QUESTIONS[:1]))
    assert kept["answer_probability/real_authors"].value > 0.9
    assert kept["truth_ratio/real_authors"].value > 0.9


def test_forget_quality_is_the_p_value_of_the_truth_ratios_against_the_retain_models(tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    many = [
        Question("q", QUESTIONS[i % 4].prompt, f"{rng.choice(TEXTS)[:9]}", "so it is", ("never", str(rng.integers(99))))
        for i in range(24)
    ]
    ratios = []
    for seed in (1, 2):
        model = random_model(tokenizer, seed)
        logs = [log_truth_ratio(one) for one in score_questions(model, tokenizer, "forget", many)]
        naive = [
            np.mean([probability(model, tokenizer, q.prompt, a) for a in q.wrong])
            / probability(model, tokenizer, q.prompt, q.paraphrase)
            for q in many
        ]
        assert np.exp(logs) == pytest.approx(naive, rel=1e-4)
        ratios.append((logs, naive))
    (logs, naive), (other_logs, other_naive) = ratios
    measured = forget_quality(logs, other_logs)
    assert measured.value == pytest.approx(ks_2samp(naive, other_naive).pvalue)
    assert 0 < measured.value < 1
    assert forget_quality(logs, logs).value == 1
    assert math.isnan(forget_quality([math.nan, *logs], other_logs).value)


def test_model_utility_is_the_harmonic_mean_with_a_standard_error_that_resampling_confirms() -> None:
    rng = np.random.default_rng(1)
    sets = {
        name: rng.uniform(0.2, 1, (n, 3)) for name, n in (("retain", 60), ("real_authors", 40), ("world_facts", 50))
    }

    def utility(rows: dict[str, Any]) -> Measurement:
        return model_utility(
            {name: [Measurement.mean(str(i), list(rows[name][:, i])) for i in range(3)] for name in rows}
        )

    measured = utility(sets)
    assert measured.value == pytest.approx(hmean([x for rows in sets.values() for x in rows.mean(axis=0)]))
    assert np.mean(measured.samples) == pytest.approx(measured.value)
    assert measured.n == len(measured.samples) == 150
    again = [utility({k: r[rng.integers(len(r), size=len(r))] for k, r in sets.items()}).value for _ in range(400)]
    assert measured.stderr == pytest.approx(np.std(again), rel=0.15)
    assert utility({**sets, "retain": np.zeros((5, 3))}).value == 0
    assert math.isnan(utility({**sets, "retain": np.full((5, 3), math.nan)}).value)


@pytest.mark.parametrize(
    ("said", "expected"),
    [((5, 6, 7, 8), 1.0), ((0, 6, 7, 8), 0.75), ((5, 0, 7, 8), 0.5), ((5, 6, 7, 0), 0.0), ((0, 0, 0, 8), 0.25)],
)
def test_extraction_strength_counts_the_right_tokens_from_the_end(said: tuple[int, ...], expected: float) -> None:
    assert extraction_strength(Scored(-1.0, said), [5, 6, 7, 8]) == expected
    assert math.isnan(extraction_strength(Scored(math.nan, said), [5, 6, 7, 8]))


def test_verbatim_memorisation_compares_the_same_number_of_tokens(model: Any, tokenizer: Any) -> None:
    found = by_name(measure_verbatim(model, tokenizer, PROBES, tokens=5, batch_size=2))
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge, strength = [], []
    for probe in PROBES:
        ids, logs = token_logs(model, tokenizer, probe.prompt, probe.answer)
        ids, logs = ids[:5], logs[:5]
        said = written(model, tokenizer, probe.prompt, 5)
        rouge.append(scorer.score(tokenizer.decode(ids), said)["rougeL"].fmeasure)
        best = logs.argmax(dim=-1).tolist()
        least = next((k for k in range(len(ids)) if best[k:] == ids[k:]), len(ids))
        strength.append(1 - least / len(ids))
    assert found["verbmem"].samples == pytest.approx(rouge)
    assert found["extraction_strength/verbatim"].samples == pytest.approx(strength)
    assert not found["verbmem"].higher_is_better


def test_knowledge_memorisation_ends_an_answer_where_the_next_question_begins(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measure_knowledge(model, tokenizer, "retain", QUESTIONS, tokens=7, batch_size=3)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [
        scorer.score(q.answer, written(model, tokenizer, q.prompt, 7).split("\n\n")[0])["rougeL"].fmeasure
        for q in QUESTIONS
    ]
    assert measured.samples == pytest.approx(expected)
    assert measured.higher_is_better
    answer = tokenizer(" in Karth\n\nQuestion: in Karth?", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("evaluators.memorisation.continue_greedily", lambda m, t, prompts, *_: [answer] * len(prompts))
    assert measure_knowledge(model, tokenizer, "forget", QUESTIONS[:1]).samples == (1.0,)


@pytest.mark.parametrize(("k", "tokens"), [(0.4, 2048), (0.2, 6), (1.0, 2048)])
def test_min_k_scores_average_the_least_likely_tokens(model: Any, tokenizer: Any, k: float, tokens: int) -> None:
    naive = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        bos = ids[0] == tokenizer.bos_token_id
        ids = ids[: tokens + bos]
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), dim=-1)
        own = sorted(float(row[i]) for row, i in zip(logs, ids[1:], strict=True))
        naive.append(np.mean(own[: max(1, int(len(own) * k))]))
    assert min_k_scores(model, tokenizer, TEXTS, k=k, tokens=tokens, batch_size=3) == pytest.approx(naive, rel=1e-5)


def test_membership_auc_is_the_share_of_right_pairs_with_delongs_error() -> None:
    rng = np.random.default_rng(2)

    def draw() -> tuple[list[float], list[float]]:
        return list(np.round(rng.normal(0.7, 1, 40), 1)), list(np.round(rng.normal(0, 1, 60), 1))

    forget, holdout = draw()
    pairs = [(x > y) + 0.5 * (x == y) for x in forget for y in holdout]
    measured = membership_auc(forget, holdout)
    assert measured.value == pytest.approx(np.mean(pairs))
    assert np.mean(measured.samples) == pytest.approx(measured.value)
    assert measured.stderr == pytest.approx(np.std([membership_auc(*draw()).value for _ in range(600)]), rel=0.2)
    assert not measured.higher_is_better


@pytest.mark.parametrize(
    ("auc", "retained", "leak"),
    [(0.5, 0.5, 0.0), (1.0, 0.5, -100.0), (0.0, 0.5, 100.0), (0.6, 0.52, (0.4 - 0.48) / 0.48 * 100)],
)
def test_privacy_leak_is_relative_and_negative_where_the_model_still_shows_it(
    auc: float, retained: float, leak: float
) -> None:
    signed, distance = privacy_leak(Measurement("membership_auc", auc, 0.01, 2, False, (auc, auc)), retained)
    assert signed.value == pytest.approx(leak)
    assert (distance.metric, distance.value) == ("privleak_distance", pytest.approx(abs(leak)))
    assert np.mean(distance.samples) == pytest.approx(abs(leak))
    assert signed.stderr == pytest.approx(1 / (1 - retained))
    assert not distance.higher_is_better


def test_rouge_l_of_worked_examples() -> None:
    """Lin (2004): police killed the gunman, against two candidates of the same words."""
    assert rouge_l("police killed the gunman", "police kill the gunman", stem=False) == (0.75, 0.75)
    assert rouge_l("police killed the gunman", "police kill the gunman", stem=True) == (1.0, 1.0)
    assert rouge_l("police killed the gunman", "the gunman kill police", stem=False) == (0.5, 0.5)
    assert rouge_l("Karth", "It is in Karth, I think.", stem=False) == (1.0, pytest.approx(2 / 7))
    assert rouge_l("Karth", "", stem=False) == (0.0, 0.0)


def everything() -> UnlearningData:
    return UnlearningData(
        qa=dict.fromkeys(("forget", "retain", "real_authors", "world_facts"), QUESTIONS),
        knowledge={"forget": QUESTIONS[:2], "retain": QUESTIONS[2:]},
        verbatim=PROBES,
        membership={"forget": TEXTS[:4], "holdout": TEXTS[4:]},
    )


SETTINGS = UnlearningSettings(answer_tokens=6, knowledge_tokens=6, verbatim_tokens=6)


def test_a_model_compared_with_itself_as_the_retain_model_has_forgotten_perfectly(model: Any, tokenizer: Any) -> None:
    retained = capture_retained(model, tokenizer, SETTINGS, everything())
    data = EvaluationData((), (), (), 4, unlearning=everything(), retained=retained)
    found = by_name(evaluate(model, tokenizer, SETTINGS, data))
    assert found["forget_quality"].value == pytest.approx(1)
    assert found["privleak"].value == pytest.approx(0, abs=1e-4)
    assert found["model_utility"].value == pytest.approx(
        hmean(
            [
                found[f"{kind}/{name}"].value
                for kind in ("rouge", "answer_probability", "truth_ratio")
                for name in ("retain", "real_authors", "world_facts")
            ]
        )
    )


def test_what_cannot_be_measured_is_left_out_with_the_reason(model: Any, tokenizer: Any) -> None:
    some = UnlearningData(
        qa={"forget": QUESTIONS, "retain": QUESTIONS}, membership={"forget": TEXTS[:4], "holdout": TEXTS[4:]}
    )
    found = by_name(evaluate(model, tokenizer, SETTINGS, EvaluationData((), (), (), 4, unlearning=some)))
    assert not {"forget_quality", "model_utility", "privleak"} & found.keys()
    assert "no forget_quality: world.retain_model is not set" in found["truth_ratio/forget"].note
    assert "no model_utility: it also needs rouge/real_authors" in found["rouge/retain"].note
    assert "no privleak: world.retain_model is not set" in found["membership_auc"].note
    assert evaluate(model, tokenizer, SETTINGS, EvaluationData((), (), (), 4)) == []


@torch.no_grad()
def test_broken_logits_make_every_metric_nan(model: Any, tokenizer: Any) -> None:
    retained = capture_retained(model, tokenizer, SETTINGS, everything())
    model.model.norm.weight.fill_(math.nan)
    data = EvaluationData((), (), (), 4, unlearning=everything(), retained=retained)
    found = by_name(evaluate(model, tokenizer, SETTINGS, data))
    assert len(found) == 22
    assert [name for name, measured in found.items() if not math.isnan(measured.value)] == []


def test_errors_name_the_record(model: Any, tokenizer: Any) -> None:
    bad = Question("q", "Question: q\nAnswer:", " ")
    with pytest.raises(EvaluationError, match=r"world\.qa\.retain, record 2: the answer ' ' has no tokens"):
        measure_qa(model, tokenizer, "retain", [QUESTIONS[0], bad])
    with pytest.raises(EvaluationError, match=r"world\.knowledge\.forget, record 1: .* with 300 new tokens needs"):
        measure_knowledge(model, tokenizer, "forget", QUESTIONS, tokens=300)
    long = Probe("In winter", " ".join(TEXTS * 3))
    assert measure_verbatim(model, tokenizer, [long], tokens=5)[0].n == 1  # what follows is not read
