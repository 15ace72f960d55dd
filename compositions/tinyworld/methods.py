"""The measured effect of each method on tinyworld's model, for the table in docs/methods.md.

Each repeat uses another set of edits and another seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from compositions.tinyworld.bench import Bench, Log, Row
from compositions.tinyworld.relations import HARMLESS, HAZARDOUS
from evaluators.significance import compare
from interventions.zeros import zero_mask

EDITORS = {
    **{"ft": (0.9, None), "lora": (0.9, None), "memit": (0.9, 0.9), "alphaedit": (0.9, 0.9), "rome": (None, None)},
    **{"emmet": (0.9, 0.85), "pmet": (0.9, 0.85)},
}
"""Required success and locality of each editor."""
UNLEARNERS = {
    **{"rmu": True, "gd": True, "npo": True, "simnpo": True},
    **{"wga": True, "satimp": True, "undial": True, "jensun": True, "quail": True, "ga": False},
}
"""Whether the bounds below apply; gradient ascent may ruin the model."""
HAZARDOUS_LEFT, HARMLESS_LOST, PERPLEXITY_RISE = 0.40, 0.08, 1.10
TUNERS = {"sft": ("tuning_recall/harbours", "tuning_recall/guilds"), "dpo": ("preference_wins",)}
"""What each tuning method is for; each value is to be at least `TUNED`."""
TUNED, RECALL_KEPT, TUNED_PERPLEXITY = 0.9, 0.9, 1.3
QUANTISERS = ("rtn", "gptq", "awq")
PRUNERS = ("sparsegpt", "wanda", "magnitude")
SECONDS = {
    **{"memit": 15.0, "lora": 20.0, "ft": None, "alphaedit": None, "rome": None},
    **{"rmu": 30.0, "gd": 30.0, "npo": 30.0, "simnpo": None, "ga": None},
    **dict.fromkeys(("emmet", "pmet", "wga", "satimp", "undial", "jensun", "quail"), 30.0),
    **{"sft": 60.0, "dpo": 60.0},
    **dict.fromkeys((*QUANTISERS, *PRUNERS), 3.0),
}
"""Time limit of a step of each method, in seconds."""


class Knowledge(NamedTuple):
    """Accuracy on the questions of each domain, and perplexity of the held-out text."""

    accuracy: dict[str, float]
    perplexity: float

    def mean(self, domains: Sequence[str]) -> float:
        """Return the accuracy over domains, which all have equally many questions."""
        return fmean(self.accuracy[domain] for domain in domains)


def measure_methods(*, repeats: int, seed: int, log: Log) -> list[Row]:
    """Measure every method; repeat those with random numbers or edits `repeats` times."""
    bench = Bench()
    seeds = [1000 * seed + number for number in range(repeats)]
    return [
        *_edit_rows(bench, seeds, log),
        *_unlearn_rows(bench, seeds, log),
        *_tune_rows(bench, seeds, log),
        *_compress_rows(bench, log),
        *_seconds_rows(bench, seeds[0], log),
    ]


def _edit_rows(bench: Bench, seeds: Sequence[int], log: Log) -> Iterator[Row]:
    for method, (success, locality) in EDITORS.items():
        measured = [bench.edit(method, seed) for seed in seeds]
        for name, metric, least in (
            ("edit success", "edit_success_exact", success),
            ("paraphrase", "edit_paraphrase_exact", None),
            ("locality", "edit_locality_agreement", locality),
        ):
            yield Row.mean(f"{method}: {name}", [metrics[metric] for metrics in measured], least=least)
        log(f"{method}: success {fmean(metrics['edit_success_exact'] for metrics in measured):.3f}")


def _knowledge(bench: Bench) -> Knowledge:
    """Measure the accuracy on all questions, and perplexity."""
    accuracy = {domain: bench.questions(domain, [domain]).value for domain in (*HAZARDOUS, *HARMLESS)}
    return Knowledge(accuracy, bench.perplexity().value)


def _unlearn_rows(bench: Bench, seeds: Sequence[int], log: Log) -> Iterator[Row]:
    def knowledge_after(composition: str, seed: int) -> Knowledge:
        bench.apply(composition, seed)
        return _knowledge(bench)

    bench.restore()
    before = _knowledge(bench)
    for method, bounded in UNLEARNERS.items():
        measured = [knowledge_after(method, seed) for seed in seeds]
        hazardous = [after.mean(HAZARDOUS) for after in measured]
        lost = [before.mean(HARMLESS) - after.mean(HARMLESS) for after in measured]
        rise = [after.perplexity / before.perplexity for after in measured]
        for name, values, most in (
            ("hazardous questions", hazardous, HAZARDOUS_LEFT),
            ("harmless questions lost", lost, HARMLESS_LOST),
            ("perplexity, over the base model's", rise, PERPLEXITY_RISE),
        ):
            yield Row.mean(f"{method}: {name}", values, most=most if bounded else None)
        log(f"{method}: hazardous {fmean(hazardous):.3f}, harmless lost {fmean(lost):.3f}")
        if bounded:
            topic, other = HAZARDOUS
            after = knowledge_after(f"{method}[topics=[{topic}]]", seeds[0])
            yield Row(f"{method} of {topic} alone: its questions", after.accuracy[topic], None, 1, most=HAZARDOUS_LEFT)
            kept = before.accuracy[other] - after.accuracy[other]
            yield Row(f"{method} of {topic} alone: {other} lost", kept, None, 1, most=HARMLESS_LOST)


def _tune_rows(bench: Bench, seeds: Sequence[int], log: Log) -> Iterator[Row]:
    bench.restore()
    margins, facts = bench.margins(), bench.facts[:500]
    recall, perplexity = bench.recall(facts).value, bench.perplexity().value
    for method, metrics in TUNERS.items():
        measured = []
        for seed in seeds:
            bench.apply(method, seed)
            kept, rise = bench.recall(facts).value / recall, bench.perplexity().value / perplexity
            measured.append({**bench.tuned(margins), "recall": kept, "perplexity": rise})
        for name in metrics:
            yield Row.mean(f"{method}: {name}", [found[name] for found in measured], least=TUNED)
        for name, least, most in (("recall", RECALL_KEPT, None), ("perplexity", None, TUNED_PERPLEXITY)):
            values = [found[name] for found in measured]
            yield Row.mean(f"{method}: {name}, over the base model's", values, least, most)
        log(f"{method}: {', '.join(f'{name} {measured[0][name]:.3f}' for name in metrics)}")


def _compress_rows(bench: Bench, log: Log) -> Iterator[Row]:
    bench.restore()
    perplexity = {"base": bench.perplexity()}

    def ratio(name: str, one: str, other: str, least: float | None = None, most: float | None = None) -> Row:
        """Return the ratio of two perplexities, with the error of the difference on the same windows."""
        first, second = perplexity[one], perplexity[other]
        assert first.samples is not None and second.samples is not None
        noise = compare(second.samples, first.samples, higher_is_better=False).stderr
        value = first.value / second.value
        return Row(name, value, None if noise is None else value * noise, first.n, least, most)

    quantised = [f"{method}[bits={bits}]" for bits in (2, 3, 4, 8) for method in QUANTISERS]
    rates = ("sparsity=0.5", "sparsity=0.7", "pattern='2:4'")
    pruned = [f"{method}[{rate}]" for rate in rates for method in PRUNERS]
    for composition in (*quantised, *pruned):
        bench.apply(composition)
        perplexity[composition] = bench.perplexity()
        most = 1.005 if "bits=8" in composition else None
        yield ratio(f"{composition}: perplexity, over the base model's", composition, "base", most=most)
        log(f"{composition}: perplexity {perplexity[composition].value:.2f}")
    for one, other, least, most in (
        ("gptq[bits=3]", "rtn[bits=3]", None, 1.0),
        ("awq[bits=3]", "rtn[bits=3]", None, 1.0),
        ("gptq[bits=4]", "awq[bits=4]", 0.98, 1.02),
        ("sparsegpt[sparsity=0.5]", "wanda[sparsity=0.5]", None, 1.0),
        ("wanda[sparsity=0.5]", "magnitude[sparsity=0.5]", None, 1.0),
        *((f"{method}[pattern='2:4']", f"{method}[sparsity=0.5]", 1.0, None) for method in PRUNERS),
    ):
        yield ratio(f"perplexity of {one} over {other}", one, other, least, most)
    bench.apply("sparsegpt")
    masks = {name: mask for name, p in bench.model.named_parameters() if (mask := zero_mask(p)) is not None}
    bench.apply("sparsegpt+gptq")
    after = dict(bench.model.named_parameters())
    kept = sum(int((after[name][mask] == 0).sum()) for name, mask in masks.items())
    zeros = sum(int(mask.sum()) for mask in masks.values())
    yield Row("sparsegpt+gptq: zeros of the mask kept", kept / zeros, None, zeros, least=1.0)


def _seconds_rows(bench: Bench, seed: int, log: Log) -> Iterator[Row]:
    """Time one step of each method, the second of two."""
    edits = [record.edit for record in bench.edits(seed)]
    for method, most in SECONDS.items():
        bench.apply(method, seed, edits=edits)
        (report,) = bench.apply(method, seed, edits=edits)
        yield Row(f"{method}: seconds", report.seconds, None, 1, most=most)
        log(f"{method}: {report.seconds:.1f} s")
