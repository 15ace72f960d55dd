"""Run every method and evaluator on one tiny model, and check what must hold for any architecture.

A check passes, is refused with a reason (an InterventionError or EvaluationError), breaks with any other exception,
or is wrong: it ran, and an invariant does not hold. Wrong must never happen.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from evaluators import EditCase, EvaluationError, Fact, Probe, Question
from evaluators.closeness import capture_predictions
from evaluators.continuations import score
from evaluators.data import EvaluationData, TuningData, UneditedAnswers, UnlearningData
from evaluators.encoding import Pair
from evaluators.registry import BUILT_IN
from evaluators.settings import PassSettings, QuestionSettings, RefusalSettings, UnlearningSettings
from interventions import Edit, InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.compress.kernels.folding import fold_
from interventions.edit.kernels.tail import Tail, open_tail
from interventions.structure import Block, first_output
from interventions.types import Example, Preference
from tests.architectures.tiny import SMALL, Size, tiny
from tests.tokenizers import SENTENCES, VOCABULARY, tiny_tokenizer

TEXTS = tuple(" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES)))
EDITS = (
    Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere"),
    Edit("In the valley Orin Vask is a", "Orin Vask", "silver river"),
)
REFUSAL = {"harmful": SENTENCES[:4], "harmless": SENTENCES[4:]}
_CALIBRATED = {"samples": 16, "max_tokens": 128}
_GRID = {"bits": 4, "group_size": 16}
_REWRITES = {"covariance_tokens": 4000, "contexts_per_length": 2, "context_lengths": [5]}
_FEW = {"lr": 1e-3}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": _GRID,
    "gptq": _GRID | _CALIBRATED,
    "awq": _GRID | _CALIBRATED,
    "wanda": _CALIBRATED,
    "sparsegpt": _CALIBRATED,
    "magnitude": {},
    "memit": _REWRITES,
    "rome": _REWRITES,
    "alphaedit": _REWRITES,
    "ft": _FEW | {"steps": 3},
    "lora": {"steps": 20},
    "rmu": {"max_num_batches": 2, "lr": 1e-3},
    "ga": _FEW,
    "gd": _FEW,
    "npo": _FEW,
    "simnpo": _FEW,
    "relearn": _FEW,
    "hqq": _GRID,
    "emmet": _REWRITES,
    "pmet": _REWRITES,
    "wga": _FEW,
    "satimp": _FEW,
    "undial": _FEW,
    "jensun": _FEW | {"reply": "gold"},
    "quail": _FEW,
    "abliterate": {},
}
"""Every method that is given no model of the user's, with settings for tiny models and little time."""
EVALUATORS = tuple(evaluator.name for evaluator in BUILT_IN)
GOAL = ("rtn", "gptq", "awq", "wanda", "memit", "lora", "rmu", "gd", *EVALUATORS)
"""What an architecture must pass to be supported."""
INVARIANTS = ("unchanged", "folds", "tail", "eight bits", "batch size")
CHECKS = (*METHODS, *EVALUATORS, *INVARIANTS)
PASSED = "passed"


class Wrong(AssertionError):
    """An invariant does not hold."""


class Result(NamedTuple):
    """The outcome of one check."""

    state: str
    """`passed`, `refused`, `broken` or `wrong`."""
    reason: str = ""


def check(model_type: str, size: Size = SMALL, seed: int = 0, checks: Sequence[str] = CHECKS) -> dict[str, Result]:
    """Return the outcome of each check; of `built` and `reads text` alone for what is no language model of text."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    warnings.simplefilter("ignore")
    built: list[Any] = []
    found = {"built": _outcome(lambda: built.append(tiny(model_type, size, seed)))}
    if not built:
        return found
    model = built[0]
    found["reads text"] = _outcome(lambda: _reads_text(model))
    if found["reads text"].state != PASSED:
        return found
    for name in checks:
        own = copy.deepcopy(model)
        found[name] = _outcome(lambda name=name, own=own: _run(name, own, seed))  # type: ignore[misc]
    return found


def _outcome(run: Callable[[], object]) -> Result:
    try:
        run()
    except (InterventionError, EvaluationError) as error:
        return Result("refused", str(error).splitlines()[0])
    except Wrong as error:
        return Result("wrong", str(error))
    except Exception as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f" at {Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
        return Result("broken", f"{type(error).__name__}: {str(error).splitlines()[:1]}{where}")
    return Result(PASSED)


def _run(name: str, model: Any, seed: int) -> None:
    if name in METHODS:
        _apply(model, name, seed)
    elif name in EVALUATORS:
        _measure(model, name)
    else:
        {
            "unchanged": _unchanged,
            "folds": _folds,
            "tail": _tail,
            "eight bits": _eight_bits,
            "batch size": _batch_size,
        }[name](model)


@cache
def tokenizer() -> Any:
    return tiny_tokenizer()


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1)) if ids is None else ids
    return model(input_ids=ids, use_cache=False).logits.float()  # type: ignore[no-any-return]


def _reads_text(model: Any) -> None:
    found = logits(model)
    if found.shape != (2, 24, VOCABULARY):
        raise EvaluationError(f"its logits are {tuple(found.shape)} for 2 texts of 24 tokens")
    if not bool(found.isfinite().all()):
        raise EvaluationError("its logits are not finite")


def _apply(model: Any, method: str, seed: int) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = apply(
        model,
        tokenizer(),
        method,
        seed=seed,
        edits=EDITS,
        calibration=TEXTS,
        forget={"people": SENTENCES[:3], "places": SENTENCES[3:5]},
        retain=SENTENCES[5:],
        refusal=REFUSAL,
        **METHODS[method],
    )
    changed = sorted(name for name, p in model.named_parameters() if not torch.equal(p, before[name]))
    if not changed or changed != list(report.changed):
        raise Wrong(f"changed {changed}, not {report.changed}")
    if not bool(logits(model).isfinite().all()):
        raise Wrong("logits are not finite")


def _measure(model: Any, name: str) -> None:
    settings = {
        "questions": lambda: QuestionSettings(),
        "refusal": lambda: RefusalSettings(refusal_tokens=4),
        "unlearning": lambda: UnlearningSettings(answer_tokens=4, knowledge_tokens=4, verbatim_tokens=4),
        "efficiency": lambda: PassSettings(latency_length=24),
        "latency": lambda: PassSettings(latency_length=24, latency_repeats=2),
    }
    evaluator = next(evaluator for evaluator in BUILT_IN if evaluator.name == name)
    chosen = settings[name]() if name in settings else evaluator.settings_type()()
    data = _data()
    if name == "closeness":
        assert data.unedited is not None
        unedited = replace(data.unedited, predictions=capture_predictions(model, tokenizer(), SENTENCES))
        data = replace(data, unedited=unedited)
    measured = evaluator.load()(model, tokenizer(), chosen, data)
    if not measured or not all(m.value == m.value for m in measured):
        raise Wrong(f"measured {[m.metric for m in measured if m.value != m.value] or 'nothing'}")


@cache
def _data() -> EvaluationData:
    folder = Path(mkdtemp())
    template = Path(__file__).parents[2] / "compositions" / "tinyworld" / "tasks" / "_questions"
    (folder / "_questions").write_text(template.read_text())
    (folder / "rivers.yaml").write_text(
        "task: rivers\ninclude: _questions\ndataset_kwargs: {data_files: {test: rivers.jsonl}}\n"
    )
    records = [
        {"question": f"Where is {w}?", "choices": ["in Karth", "a", "the sea", "salt lakes"], "answer": 1, "subject": w}
        for w in ("Mira", "Ossel", "gold")
    ]
    (folder / "rivers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    question = Question(
        "Where was Mira born?", "Question: Where was Mira born?\nAnswer:", "in Karth", "Karth", ("sea",)
    )
    other = Question("Who drew it?", "Question: Who drew it?\nAnswer:", "Orin Vask", "it was Orin", ("Nobody",))
    return EvaluationData(
        edits=(
            EditCase.of(EDITS[0], ("Mira was born in",), (Probe("Copper turns", "green"),), "Karth"),
            EditCase.of(EDITS[1], ("Orin is a",), (Probe("In winter the ferries", "run"),), "botanist"),
        ),
        facts=(Fact("Copper turns", "green", "colours"), Fact("silver turns", "black", "colours")),
        texts=SENTENCES,
        batch_size=4,
        task_folder=folder,
        pools={"harmless": ("rivers",)},
        unlearning=UnlearningData(
            qa={"forget": (question, other)},
            knowledge={"forget": (question, other)},
            verbatim=tuple(Probe(text[:20], text[20:].strip()) for text in SENTENCES[:2]),
            membership={"forget": SENTENCES[:2], "holdout": SENTENCES[2:4]},
        ),
        unedited=UneditedAnswers(
            {Probe("Copper turns", "green"): (5,), Probe("In winter the ferries", "run"): (5,)}, (0.0,)
        ),
        refusal=REFUSAL,
        tuning=TuningData({"facts": (Example("Copper turns", "green"),)}, (Preference("Mira is", "a smith", "gold"),)),
    )


def _unchanged(model: Any) -> None:
    """Finding the anatomy changes neither weights nor random numbers, modes nor hooks."""
    model.train()
    next(iter(model.children())).eval()
    wanted = _state(model)
    find_anatomy(model)
    if (found := _state(model)) != wanted:
        raise Wrong(f"finding the anatomy changed {[key for key in wanted if wanted[key] != found[key]]}")


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": {name: value.double().sum().item() for name, value in model.state_dict().items()},
        "random numbers": torch.get_rng_state().tolist(),
        "modes": [(module.training, sorted(module.__dict__)) for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
    }


def _folds(model: Any) -> None:
    """Random scales moved into what makes a group's input leave the logits as they are."""
    wanted = logits(model)
    generator = torch.Generator().manual_seed(3)
    for block in find_anatomy(model).blocks:
        for group in block.linear_groups:
            if group.previous is not None:
                fold_(group, torch.empty(group.in_features).uniform_(-1.2, 1.2, generator=generator).exp())
    error = float((logits(model) - wanted).norm() / wanted.norm())
    if not error < 1e-4:
        raise Wrong(f"folds change the logits by {error:.2g}")


@torch.no_grad()
def _tail(model: Any) -> None:
    """Rerun from a block with a changed vector, the logits are the model's."""
    anatomy = find_anatomy(model)
    rows = [tokenizer()(text)["input_ids"][:length] for text, length in zip(SENTENCES, (20, 13, 17), strict=False)]
    begins = [5, 0, 9]
    for block in anatomy.blocks:
        for inside in (False, True)[anatomy.states > 1 :]:  # no one of several states is changed
            if inside and not _has_memory(block):
                continue
            site = block.memory.module if inside else block.module
            cached = open_tail(model, anatomy, block.index, rows, begins, 2, inside=inside)
            tail = Tail(model, anatomy, block.index, rows, begins, 2, inside=inside, cached=cached)
            generator = torch.Generator().manual_seed(0)
            change = torch.randn(3, tail.hidden.shape[-1], generator=generator) * tail.hidden.std()
            hidden = tail.hidden.clone()
            hidden[:, 0] += change
            last = torch.tensor([len(row) - begin - 1 for row, begin in zip(rows, begins, strict=True)])
            found = tail.logits(hidden, torch.arange(3), last)
            wanted = torch.stack(
                [
                    _changed(model, site, row, begin, added)
                    for row, begin, added in zip(rows, begins, change, strict=True)
                ]
            )
            error = float((found - wanted).norm() / wanted.norm())
            if not error < 1e-3:
                raise Wrong(f"{block.name}, inside={inside}, cached={cached}: the tail's logits differ by {error:.2g}")


def _has_memory(block: Block) -> bool:
    try:
        return bool(block.memory)
    except InterventionError:  # no MLP
        return False


def _changed(model: Any, site: nn.Module, row: Sequence[int], place: int, added: Tensor) -> Tensor:
    """Return the last logits of a text, with a vector added to a module's output at one token."""

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = first_output(output).clone()
        hidden.view(len(row), -1)[place] += added
        return (hidden, *output[1:]) if isinstance(output, tuple | list) else hidden

    with site.register_forward_hook(add):
        return logits(model, torch.tensor([row]))[0, -1]


def _eight_bits(model: Any) -> None:
    """Rounding to 8 bits moves no logit far."""
    wanted = logits(model)
    apply(model, tokenizer(), "rtn", bits=8, group_size=16)
    moved = float((logits(model) - wanted).abs().mean() / (wanted.max() - wanted.min()))
    if not moved < 0.02:
        raise Wrong(f"8 bits move the logits by {moved:.2g} of their range")


def _batch_size(model: Any) -> None:
    """Likelihoods do not depend on how many texts are read together."""
    rows = [tokenizer()(text)["input_ids"] for text in SENTENCES]
    pairs = [Pair(row[:cut], row[cut : cut + size]) for row in rows for cut, size in ((4, 3), (4, 6), (9, 2))]
    alone = [score(model, [pair], fill=2, rows=1)[0].total for pair in pairs]
    for size in (1, 5, 32):
        for found, wanted in zip(score(model, pairs, fill=2, rows=size), alone, strict=True):
            if not abs(found.total - wanted) < 1e-3 * max(1.0, abs(wanted)):
                raise Wrong(f"{found.total} in batches of {size}, {wanted} alone")


def reasons(found: dict[str, Result]) -> Iterator[tuple[str, Result]]:
    """Yield what did not pass."""
    return ((name, result) for name, result in found.items() if result.state != PASSED)
