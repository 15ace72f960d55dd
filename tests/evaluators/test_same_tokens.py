"""Editors and evaluators read the same text as the same tokens, on every kind of tokenizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evaluators import (
    EditCase,
    EvaluationError,
    Fact,
    Probe,
    answers,
    log_likelihood,
    measure_answer_perplexity,
    measure_editing,
    measure_recall,
)
from evaluators.encoding import encode, encode_pairs, meaningless_ids
from interventions import Edit, InterventionError
from interventions.edit.kernels.prompts import tokenise
from interventions.edit.kernels.target_loss import target_batches
from interventions.tokens import Chat, Pair, continued, frame, join, running, special_texts, windows
from tests.tokenizers import TOKENIZERS

SUBJECT = "Mira Tolvan"
MADE = {name: make() for name, make in TOKENIZERS.items()}
KINDS = st.sampled_from(sorted(MADE))
WORDS = st.lists(st.sampled_from(["is", "in", "Karth", "the", "élan", "東京", "🜁", "x9", "a.", "(see"]), max_size=3)
ENDS = ["", " ", "  ", "\n", "\n\n", " \n", "\r\n", "\t", "\u00a0", "\u2003", ":", ": ", ' "', "(", "."]
PROMPTS = st.builds(lambda a, b, end: " ".join([*a, SUBJECT, *b]) + end, WORDS, WORDS, st.sampled_from(ENDS))
TARGETS = st.builds(
    lambda before, words, after: f"{before}{words}{after}",
    st.sampled_from(["", " ", "\n", "  "]),
    st.sampled_from(
        ["Karth", "the lute", "in Karth is", ", of it", "(sea)", "'s lute", "7", "東京", "É", "zzq\nw", "?"]
    ),
    st.sampled_from(["", " ", "."]),
)
LOSSLESS = ["GPT-2", "Llama 3", "bytes", "byte-level, a space in front"]


class Parrot(torch.nn.Module):
    """A model that is certain of what follows wherever it is in one of its texts, and of nothing elsewhere."""

    def __init__(self, texts: list[list[int]], size: int) -> None:
        super().__init__()
        self.follows = {tuple(text[:i]): text[i] for text in texts for i in range(len(text))}
        self.size = size
        self.device, self.dtype, self.generation_config = torch.device("cpu"), torch.float32, None
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(), to_dict=lambda: {})

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(num_embeddings=self.size)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        logits = torch.zeros(*input_ids.shape, self.size)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True)):
            seen: tuple[int, ...] = ()
            for place in (place for place, there in enumerate(mask) if there):
                seen = (*seen, ids[place])
                if seen in self.follows:
                    logits[row, place] = -1e4
                    logits[row, place, self.follows[seen]] = 0.0
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any, **_: Any) -> Any:
        for _step in range(generation_config.max_new_tokens):
            said = self(input_ids, attention_mask).logits[:, -1].argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, said], dim=1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(said)], dim=1)
        return input_ids


@settings(max_examples=300, deadline=None)
@given(kind=KINDS, prompt=PROMPTS, target=TARGETS)
def test_the_tokens_of_editors_are_those_of_evaluators(kind: str, prompt: str, target: str) -> None:
    tokenizer = MADE[kind]
    edit = Edit(prompt, SUBJECT, target)
    row = tokenise(tokenizer, edit, with_target=True)
    (pair,) = encode_pairs(tokenizer, [(prompt, target)])
    assert (pair.prompt + pair.target, len(pair.target)) == (list(row.ids), row.target_length)
    (batch,) = target_batches(tokenizer, [edit], 1, torch.device("cpu"))
    assert batch.targets.tolist() == pair.target and batch.ids[0].tolist() == list(row.ids)
    assert kind == "across words" or row.subject_end < len(pair.prompt)
    # The text as the tokenizer reads it by default: special tokens as it adds them, and none between the two.
    start, end = frame(tokenizer)
    assert tokenizer(continued(prompt, target, special_texts(tokenizer)))["input_ids"] == [
        *pair.prompt,
        *pair.target,
        *end,
    ]
    assert pair.prompt[: len(start)] == start
    if kind in LOSSLESS:
        said = tokenizer.decode(pair.target)
        assert said.strip() == target.strip() and said.lstrip(" ") == target.strip()
    if not prompt.endswith(" ") and not prompt[-1].isspace():
        assert encode_pairs(tokenizer, [(f"{prompt} ", target)]) == [pair]  # whoever writes the space


@settings(max_examples=60, deadline=None)
@given(
    kind=KINDS,
    prompts=st.lists(PROMPTS, min_size=2, max_size=4, unique=True),
    target=TARGETS,
    truth=TARGETS,
    read_off=st.booleans(),
)
def test_a_model_that_is_certain_of_what_was_trained_succeeds(
    kind: str, prompts: list[str], target: str, truth: str, read_off: bool
) -> None:
    tokenizer = MADE[kind]
    nothing = meaningless_ids(tokenizer)
    asked = [(prompt, answer) for prompt in prompts for answer in (target, truth)]
    assume(not any(nothing.issuperset(pair.target) for pair in join(tokenizer, asked)))
    texts = [list(tokenise(tokenizer, Edit(prompt, SUBJECT, target), with_target=True).ids) for prompt in prompts]
    contexts = [pair.prompt for pair in join(tokenizer, [(prompt, target) for prompt in prompts])]
    # Two prompts may be one to a tokenizer, or one may begin as another goes on: then no model can say both.
    assume(
        all(
            one[: len(context)] != context or one == other
            for one in texts
            for other, context in zip(texts, contexts, strict=True)
        )
    )
    model = Parrot(texts, len(tokenizer))
    first, *others = prompts
    probes = tuple(Probe(prompt, target, truth) for prompt in others)
    case = EditCase(SUBJECT, first, target, tuple(others), probes, probes, truth)
    facts = [Fact(prompt, target, "r") for prompt in prompts]
    with pytest.MonkeyPatch.context() as patch:
        if not read_off:  # as where the scored texts do not tell what would be generated
            patch.setattr(answers, "_read_off", lambda *_: None)
        found = {m.metric: m.value for m in measure_editing(model, tokenizer, [case], batch_size=3)}
    for aspect in ("success", "paraphrase", "portability", "locality"):
        assert [found[f"edit_{aspect}_{kind}"] for kind in ("exact", "f1", "recall")] == [1.0, 1.0, 1.0]
    assert measure_recall(model, tokenizer, facts)[0].value == 1.0
    answered = measure_answer_perplexity(model, tokenizer, [Probe(p, target) for p in prompts], metric="m")
    assert answered.value == pytest.approx(1.0, abs=1e-6)
    scored = log_likelihood(model, tokenizer, [(prompt, target) for prompt in prompts])
    assert [likelihood.total for likelihood in scored] == pytest.approx([0.0] * len(prompts), abs=1e-6)


@pytest.mark.parametrize("kind", MADE)
def test_special_tokens_are_those_that_the_tokenizer_adds(kind: str) -> None:
    tokenizer = MADE[kind]
    start, end = frame(tokenizer)
    for text in ("Mira", "the lute, the sea", "x\n", "1"):
        (ids,) = encode(tokenizer, [text])
        assert [*ids, *end] == tokenizer(text)["input_ids"]
    if start:  # what has them in writing gets no second ones
        (ids,) = encode(tokenizer, [f"<s>{'Mira'}"])
        assert ids.count(start[0]) == 1
        assert join(tokenizer, [("", "Mira")])[0].prompt == start
    else:
        with pytest.raises(EvaluationError, match=r"text 0 \(''\) has no tokens to start from"):
            encode_pairs(tokenizer, [("", "Mira")])


TEMPLATE = "{{ bos }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ end }}{% endfor %}{{ ask }}"


@pytest.mark.parametrize("bos", ["", "<s>"])
@pytest.mark.parametrize("ask", ["\nassistant\n", "<|assistant|>", " assistant:", " assistant: "])
@pytest.mark.parametrize("kind", ["GPT-2", "Llama 3", "Llama 2", "across words"])
def test_a_prompt_in_a_chat_template_has_the_tokens_that_editors_give_it(kind: str, bos: str, ask: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE.replace("{{ bos }}", bos).replace("{{ ask }}", ask).replace("{{ end }}", "\n")
    prompt = f"Where was {SUBJECT} born?\n"
    row = tokenise(tokenizer, Edit(prompt, SUBJECT, "Karth"), with_target=True, chat_template=True)
    messages = [{"role": "user", "content": prompt}]
    (pair,) = encode_pairs(tokenizer, [(prompt, "Karth")], Chat())
    assert (pair.prompt + pair.target, len(pair.target)) == (list(row.ids), row.target_length)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
    if ask[-1] != " " and kind != "across words":  # a space, and what spans the border, go to the target
        assert pair.prompt == whole


class SlowCharacters(transformers.PreTrainedTokenizer):  # type: ignore[misc]
    """A tokenizer without offsets, in which a space and the letter before it are one token."""

    def __init__(self) -> None:
        letters = [chr(code) for code in range(32, 127)]
        self._ids = {token: i for i, token in enumerate(["<unk>", *letters, *(f"{a} " for a in letters)])}
        super().__init__(unk_token="<unk>")

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        tokens: list[str] = []
        while text:
            size = 2 if text[:2] in self._ids else 1
            tokens.append(text[:size])
            text = text[size:]
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self._ids)[index]


def test_without_offsets_the_prompt_keeps_the_tokens_that_it_has_alone() -> None:
    tokenizer = SlowCharacters()
    (pair,) = encode_pairs(tokenizer, [("Mira was born", "there")])
    assert tokenizer.convert_ids_to_tokens(pair.prompt) == [*"Mir", "a ", *"wa", "s ", *"bor"]
    assert tokenizer.convert_ids_to_tokens(pair.target) == ["n ", *"there"]  # "n " is on both sides
    assert encode_pairs(tokenizer, [("Mira was born ", "there")]) == [pair]
    parrot = Parrot([pair.prompt + pair.target], len(tokenizer))
    assert measure_recall(parrot, tokenizer, [Fact("Mira was born", "there", "r")])[0].value == 1.0
    with pytest.raises(InterventionError, match="no character offsets"):
        tokenise(tokenizer, Edit("Mira was born", "Mira", "there"), with_target=True)


def test_a_token_that_covers_the_whole_prompt_leaves_nothing_to_start_from() -> None:
    tokenizer = MADE["across words"]
    assert join(tokenizer, [("in", "Karth")]) == [Pair([], tokenizer("in Karth")["input_ids"])]
    with pytest.raises(EvaluationError, match=r"text 0 \('in'\) has no tokens to start from"):
        log_likelihood(Parrot([], len(tokenizer)), tokenizer, [("in", "Karth")])
    with pytest.raises(InterventionError, match="the prompt has no token of its own in 'in Karth'"):
        tokenise(tokenizer, Edit("in", "in", "Karth"), with_target=True)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("most", [1, 90, 700])
def test_running_text_is_the_texts_with_blank_lines_between_as_far_as_it_is_wanted(kind: str, most: int) -> None:
    tokenizer = MADE[kind]
    texts = [f"Mira number {i} plays the lute." for i in range(200)]
    whole = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    assert running(tokenizer, texts) == whole
    assert running(tokenizer, texts, most=most) == whole[:most]
    start = frame(tokenizer).start
    found = windows(tokenizer, whole[:most], 32)
    assert [token for row in found for token in row[len(start) :]] == whole[:most]
    assert all(row[: len(start)] == start and len(row) == len(start) + 32 for row in found[:-1])
