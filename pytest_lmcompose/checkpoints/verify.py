"""Say which composition of a report a folder is. Imports torch on first use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pytest_lmcompose.checkpoints.card import README, Card, file_hash, file_hashes, read_card
from pytest_lmcompose.checkpoints.folder import CARD
from pytest_lmcompose.composition import BASE
from pytest_lmcompose.errors import CheckpointError
from pytest_lmcompose.imports import fast_imports
from pytest_lmcompose.results import CompositionResult, Report
from pytest_lmcompose.texts import counted

_DTYPES = ("float32", "float16", "bfloat16")


class Verdict(NamedTuple):
    """The answer about a folder."""

    same: bool
    """Whether the folder is a composition of the report, unchanged."""
    message: str


def verify(folder: Path, report: Report, name: str, *, trust_remote_code: bool = False) -> Verdict:
    """Compare a folder with the compositions of a report, called `name` in messages.

    The files are compared with the hashes in the report and in lmcompose.json, and the weights with the states of the
    report. Raises ModelError for a folder that cannot be loaded.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if report.model is None:
        raise CheckpointError(f"{name} has no model: no test of its run loaded one")
    try:
        card = read_card(folder)
    except CheckpointError as error:
        return Verdict(False, str(error))
    files = file_hashes(folder)
    if card is not None and (changes := _changes(card.files, _with_readme(folder, files))):
        return Verdict(False, f"{folder} was changed after it was written: {changes}")
    digest = weights_hash(folder, report.model.dtype, trust_remote_code=trust_remote_code)
    if card is not None and digest != card.weights_hash:
        return Verdict(False, f"{folder}: its weights are not those that {CARD} was written for")
    found = list(_matches(report, digest, card))
    if not found:
        claim = "" if card is None else f"; {CARD} says it is {card.composition} in another state"
        return Verdict(False, f"{folder} is no composition of {name}: no state has the weights {digest[:12]}{claim}")
    for record in found:
        if record.export is not None and record.export.weights_hash == digest:
            if changes := _changes(record.export.files, files):
                return Verdict(False, f"{folder} has the weights of {record.id} of {name}, but was changed: {changes}")
            return Verdict(True, _answer(folder, name, found, digest, ""))
    note = "" if card is not None else f"; without {CARD}, config and tokenizer cannot be checked"
    return Verdict(True, _answer(folder, name, found, digest, note))


def weights_hash(folder: Path, dtype: str, *, trust_remote_code: bool = False) -> str:
    """Return the hash of the weights that a loader gets, in `dtype`, or in that of the folder if it is more precise.

    Raises ModelError.
    """
    with fast_imports():
        import torch

        from pytest_lmcompose.build.load import hash_weights, load_model
        from pytest_lmcompose.settings import ModelSettings

        both = torch.promote_types(getattr(torch, dtype), getattr(torch, _dtype_of(folder) or dtype))
        settings = ModelSettings(
            path=str(folder), dtype=str(both).removeprefix("torch."), trust_remote_code=trust_remote_code
        )
        loaded = load_model(settings, str(folder), torch.device("cpu"))
    return hash_weights(loaded.model)


def _dtype_of(folder: Path) -> str | None:
    """Return the dtype in config.json; None if it has none that is known."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("dtype") or config.get("torch_dtype")
    except (OSError, ValueError, AttributeError):  # loading says what is wrong
        return None
    return found if found in _DTYPES else None


def _matches(report: Report, digest: str, card: Card | None) -> Iterator[CompositionResult]:
    """Yield the compositions whose state has these weights, or was packed to them."""
    for record in report.compositions:
        states = {record.state_hash, *(repeat.state_hash for repeat in record.repeats)}
        if record.id == BASE and report.model is not None:
            states.add(report.model.weight_hash)
        packed = record.export is not None and record.export.weights_hash == digest
        if digest in states or packed or (card is not None and card.state_hash in states):
            yield record


def _answer(folder: Path, name: str, found: list[CompositionResult], digest: str, note: str) -> str:
    """Return which compositions a folder is, and how their gates ended."""
    texts = []
    for record in found:
        failed = sum(not gate.passed for gate in record.gates)
        gates = f"{failed} of {counted(len(record.gates), 'gate')} failed" if failed else "all gates passed"
        texts.append(f"{record.id} ({gates if record.gates else 'not judged'})")
    return f"{folder} is {' and '.join(texts)} of {name}, weights {digest[:12]}{note}"


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return which files were changed, added or removed, in words; empty if none were."""
    parts = [f"{name} differs" for name in before if name in now and now[name] != before[name]]
    parts += [f"{name} is missing" for name in before if name not in now]
    parts += [f"{name} was added" for name in now if name not in before]
    return ", ".join(parts)


def _with_readme(folder: Path, files: Mapping[str, str]) -> dict[str, str]:
    readme = folder / README
    return {**files, **({README: file_hash(readme)} if readme.is_file() else {})}
