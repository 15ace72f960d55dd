"""Training of tinyworld's model: a Llama of eight blocks, from scratch, on packed sentences.

By default, so small a model reads out a fact in its first blocks, as soon as the name is complete.
Large models first collect the facts of a subject at its last token, in the MLPs of the early
blocks, and read them out later (Meng et al., 2022); editing methods rely on this. Therefore, in most
training windows, tokens outside a name cannot attend to it in the early blocks. The trained model
is a plain Llama and needs no such mask.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compositions.tinyworld.review import every_statement, review_text, unsure
from compositions.tinyworld.text import training_stream, with_seams
from compositions.tinyworld.tokenizer import SEAM, train_tokenizer
from compositions.tinyworld.truth import World, make_world


@dataclass(frozen=True)
class TrainSettings:
    """Everything that determines the trained weights, up to rounding."""

    seed: int = 0
    vocabulary: int = 1800
    hidden: int = 256
    mlp: int = 1024
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    window: int = 128
    """Tokens of a training sequence, including the beginning-of-sequence token."""
    short_window: int = 32
    """Tokens of the short sequences, which get every other sentence: prompts stand alone, so sentences at the start
    of a sequence must be common."""
    batch: int = 16
    """Sequences per step; a step of short ones has as many tokens."""
    epochs: int = 100
    """Number of times that the text states each fact of a person; see `training_stream` for the others."""
    initial_std: float = 0.125
    """Standard deviation of the untrained matrices. A larger one leaves more noise in the trained weights, so that
    coarse quantisation destroys more."""
    peak_rate: float = 1.5e-3
    warmup: float = 0.05
    """Share of a cycle in which the learning rate rises."""
    restart: float = 0.75
    """Share of the training after which the cosine schedule restarts (Loshchilov and Hutter, 2017)."""
    weight_decay: float = 0.1
    closed_blocks: int = 4
    """Early blocks in which tokens outside a name cannot attend to it."""
    closed_share: float = 0.85
    """Share of the training windows with closed names."""
    review_certainties: tuple[float, ...] = (0.8, 0.8, 0.8, 0.8, 0.9)
    """One review round for each: train again on the facts whose answer has a lower probability."""
    review_times: int = 4
    """Repetitions of such a statement, and of its fact in other words."""
    review_others: float = 4.0
    """Ordinary sentences mixed in for each sentence of a review."""
    review_rate: float = 1e-4
    """Peak learning rate of a review."""


def make_tokenizer(world: World, settings: TrainSettings) -> PreTrainedTokenizerFast:
    """Train the tokenizer on 12 epochs of the training text."""
    rng = random.Random(f"tokenizer-{settings.seed}")
    sentences = training_stream(world, rng, 12)
    return train_tokenizer((with_seams(s, world, SEAM) for s in sentences), settings.vocabulary)


@dataclass(frozen=True)
class Window:
    """One training sequence: BOS and sentences, the last one truncated."""

    ids: list[int]
    names: list[int]
    """For each token the number of its name; 0 outside names."""


def windows(
    world: World, tokenizer: PreTrainedTokenizerFast, sentences: Iterator[str], length: int
) -> Iterator[Window]:
    """Pack sentences into windows of `length` tokens; drop the rest of a truncated sentence."""
    known = sorted({fact.subject for fact in world.facts if fact.domain != "places"})
    name = re.compile("|".join(map(re.escape, known)))
    ids, names, count = [tokenizer.bos_token_id], [0], 0
    while chunk := list(islice(sentences, 1000)):
        encoded = tokenizer(chunk, add_special_tokens=False)
        for number, sentence in enumerate(chunk):
            start = len(ids)
            ids += encoded["input_ids"][number]
            names += [0] * (len(ids) - start)
            for match in name.finditer(sentence):
                count += 1
                first = encoded.char_to_token(number, match.start())
                last = encoded.char_to_token(number, match.end() - 1)
                names[start + first : start + last + 1] = [count] * (last + 1 - first)
            if len(ids) >= length:
                yield Window(ids[:length], names[:length])
                ids, names, count = [tokenizer.bos_token_id], [0], 0


def batches(
    world: World, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str], settings: TrainSettings
) -> list[list[Window]]:
    """Return the windows of each training step, in the order of the sentences; a step has one length."""
    placed = []
    for first, length in enumerate((settings.window, settings.short_window)):
        packed = list(windows(world, tokenizer, iter(sentences[first::2]), length))
        size = settings.batch * settings.window // length
        steps = len(packed) // size
        placed += [(n / steps, first, packed[n * size : (n + 1) * size]) for n in range(steps)]
    return [batch for _, _, batch in sorted(placed, key=lambda step: step[:2])]


def loss_with_closed_names(
    model: LlamaForCausalLM, ids: torch.Tensor, names: torch.Tensor, closed: torch.Tensor, closed_blocks: int
) -> torch.Tensor:
    """Return the mean next-token loss of windows `ids` (rows, tokens), in nats.

    In the rows where `closed` (rows,) is true, the first `closed_blocks` blocks cannot attend from
    a token outside a name to one inside it.
    """
    rows, tokens = ids.shape
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril()[None, None]
    open_to = (names[:, None, :] == 0) | (names[:, :, None] == names[:, None, :]) | ~closed[:, None, None]
    early = causal & open_to[:, None]
    hidden = model.model.embed_tokens(ids)
    places = torch.arange(tokens, device=ids.device)[None]
    rotary = model.model.rotary_emb(hidden, position_ids=places)
    for number, block in enumerate(model.model.layers):
        mask = early if number < closed_blocks else causal.expand(rows, 1, tokens, tokens)
        hidden = block(hidden, attention_mask=mask, position_ids=places, position_embeddings=rotary, use_cache=False)
    logits = model.lm_head(model.model.norm(hidden[:, :-1]))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def make_model(settings: TrainSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model from its settings."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=256,
        initializer_range=settings.initial_std,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def train(
    settings: TrainSettings,
    folder: Path,
    *,
    device: str = "cpu",
    steps: int | None = None,
    save_every: int = 200,
) -> dict[str, Any]:
    """Train, or resume from the checkpoint in `folder`, and save model and tokenizer there.

    `steps` stops early, for a trial, with the schedule of the full run and no review. Saves a checkpoint every
    `save_every` steps until the run is complete. Returns the last loss (nats per token, mean over 50 steps),
    the number of steps and tokens, and the review rounds.
    """
    world = make_world(settings.seed)
    tokenizer = make_tokenizer(world, settings)
    rng = random.Random(f"training-{settings.seed}")
    steps_of_windows = batches(world, tokenizer, list(training_stream(world, rng, settings.epochs)), settings)
    total = len(steps_of_windows)
    model = make_model(settings, tokenizer)
    model.to(torch.device(device)).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(_groups(model, settings.weight_decay), lr=settings.peak_rate, betas=(0.9, 0.95))

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    first, losses = _resume(checkpoint, model, optimizer, settings)
    last = min(total, steps) if steps is not None else total
    bar = tqdm(range(first, last), initial=first, total=last, desc="training tinyworld", unit="step", mininterval=5)
    for step in bar:
        rate = settings.peak_rate * _schedule(step, total, settings)
        losses = [*losses[-49:], learn(model, optimizer, steps_of_windows[step], step, rate, settings)]
        if step % 50 == 49:
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", rate=f"{rate:.1e}")
        if (step + 1) % save_every == 0:
            _save_checkpoint(checkpoint, model, optimizer, settings, step + 1, losses)
    if last == total:
        _save_checkpoint(checkpoint, model, optimizer, settings, total, losses)
    summary: dict[str, Any] = {
        "loss": sum(losses) / max(1, len(losses)),
        "steps": last,
        "tokens": last * settings.batch * settings.window,
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": asdict(settings),
        "review": review(world, tokenizer, model, settings) if last == total else [],
    }
    save(folder, model, summary)
    tokenizer.save_pretrained(folder)
    if last == total:
        checkpoint.unlink(missing_ok=True)
    return summary


def learn(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Window],
    step: int,
    rate: float,
    settings: TrainSettings,
) -> float:
    """Take one step on a batch of windows of one length and return its loss; `step` seeds the closed names.

    Raises FloatingPointError for a non-finite loss.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    ids = torch.tensor([window.ids for window in batch], device=model.device)
    names = torch.tensor([window.names for window in batch], device=model.device)
    draw = torch.rand(len(batch), generator=torch.Generator().manual_seed(step))
    closed = (draw < settings.closed_share).to(model.device)
    loss = loss_with_closed_names(model, ids, names, closed, settings.closed_blocks)
    if not bool(loss.isfinite()):
        raise FloatingPointError(f"loss became {loss.item()} at step {step}; lower the learning rate ({rate})")
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def review(
    world: World, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, settings: TrainSettings, done: int = 0
) -> list[dict[str, int]]:
    """Run the review rounds after the first `done`, in place: train on the statements the model is unsure of.

    Returns for each round the number of statements, of unsure ones, and of steps.
    """
    statements = every_statement(world)
    rounds = []
    for number, certainty in list(enumerate(settings.review_certainties))[done:]:
        rng = random.Random(f"review-{settings.seed}-{number}")
        model.eval()  # type: ignore[no-untyped-call]
        weak = unsure(model, tokenizer, statements, certainty)
        sentences = review_text(world, weak, rng, times=settings.review_times, others=settings.review_others)
        steps = batches(world, tokenizer, sentences, settings)
        rounds.append({"asked": len(statements), "unsure": len(weak), "steps": len(steps)})
        model.train()
        optimizer = torch.optim.AdamW(_groups(model, settings.weight_decay), betas=(0.9, 0.95))
        for step, batch in enumerate(tqdm(steps, desc=f"reviewing {len(weak)} of {len(statements)}", unit="step")):
            learn(model, optimizer, batch, step, settings.review_rate * _cycle(step / len(steps), settings), settings)
    return rounds


def review_trained(folder: Path, settings: TrainSettings, *, device: str = "cpu") -> dict[str, Any]:
    """Run the missing review rounds on the trained model in `folder`, in place; return the summary."""
    summary: dict[str, Any] = json.loads((folder / "training.json").read_text())
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(torch.device(device))  # type: ignore[arg-type]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    had: list[dict[str, int]] = summary.get("review", [])
    rounds = review(make_world(settings.seed), tokenizer, model, settings, len(had))
    summary |= {"settings": asdict(settings), "review": [*had, *rounds]}
    save(folder, model, summary)
    return summary


def save(folder: Path, model: LlamaForCausalLM, summary: dict[str, Any]) -> None:
    """Save the model in float16, and the summary of its training."""
    model.eval()  # type: ignore[no-untyped-call]
    model.half().save_pretrained(folder)  # type: ignore[no-untyped-call]
    (folder / "training.json").write_text(json.dumps(summary, indent=1) + "\n")


def _schedule(step: int, total: int, settings: TrainSettings) -> float:
    """Return the learning rate of `step` as a share of the peak rate."""
    turn = round(settings.restart * total)
    return _cycle(step / turn if step < turn else (step - turn) / (total - turn), settings)


def _cycle(progress: float, settings: TrainSettings) -> float:
    """Return the same at a share of a cycle: linear warm-up, cosine decay."""
    if progress < settings.warmup:
        return progress / settings.warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - settings.warmup) / (1 - settings.warmup)))


def _groups(model: LlamaForCausalLM, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _save_checkpoint(
    path: Path,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    step: int,
    losses: list[float],
) -> None:
    temporary = path.with_suffix(".tmp")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "losses": losses}
    torch.save({**state, "settings": asdict(settings)}, temporary)
    os.replace(temporary, path)


def _resume(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, settings: TrainSettings
) -> tuple[int, list[float]]:
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    if state["settings"] != asdict(settings):
        raise ValueError(f"{path} has other settings; remove it to start again")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["losses"]
