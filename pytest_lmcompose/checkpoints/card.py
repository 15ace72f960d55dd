"""What an exported folder says of itself: `lmcompose.json` for programs, `README.md` for people. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml
from msgspec import Meta
from msgspec.structs import replace

from pytest_lmcompose.checkpoints.folder import CARD
from pytest_lmcompose.errors import CheckpointError
from pytest_lmcompose.report.files import write_text
from pytest_lmcompose.report.markdown import code_span, escaped, markdown_table
from pytest_lmcompose.report.numbers import MISSING, number, with_error
from pytest_lmcompose.results import (
    Base,
    CompositionResult,
    Environment,
    Export,
    Gate,
    Hash,
    Measured,
    Model,
    Number,
    Positive,
    Step,
    Time,
    Whole,
)

README = "README.md"
_VERSION: Literal[1] = 1


class Figure(Base, frozen=True, kw_only=True):
    """A measurement without its samples."""

    metric: str
    value: Number
    nonfinite: str | None = None
    stderr: Number
    n: Positive
    higher_is_better: bool


class Card(Base, frozen=True, kw_only=True):
    """The content of lmcompose.json."""

    card_version: Literal[1]
    composition: str
    format: str
    state_hash: Annotated[Hash, Meta(description="of the weights that were measured; see the report")]
    weights_hash: Annotated[Hash, Meta(description="of the weights that a loader gets; unlike state_hash if packed")]
    written: Time
    seed: Whole
    model: Annotated[Model, Meta(description="the model before the first step")]
    steps: tuple[Step, ...]
    data: Annotated[dict[str, str] | None, Meta(description="hash of each part of the data; null: not measured")]
    measurements: tuple[Figure, ...]
    gates: tuple[Gate, ...]
    environment: Environment
    files: Annotated[dict[str, Hash], Meta(description="SHA-256 of every other file")]
    checksum: Annotated[str, Meta(description="SHA-256 of this file with an empty checksum")] = ""

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that failed."""
        return tuple(gate for gate in self.gates if not gate.passed)


def write_card(
    folder: Path, record: CompositionResult, model: Model, environment: Environment, seed: int, written: str
) -> None:
    """Write README.md, then lmcompose.json, for a composition with an `export`, whose other files are in `folder`."""
    export = record.export
    assert export is not None and record.state_hash is not None
    card = Card(
        card_version=_VERSION,
        composition=record.id,
        format=export.format,
        state_hash=record.state_hash,
        weights_hash=export.weights_hash,
        written=written,
        seed=seed,
        model=model,
        steps=record.steps,
        data=record.data,
        measurements=tuple(map(_figure, record.measurements)),
        gates=record.gates,
        environment=environment,
        files=export.files,
    )
    write_text(folder / README, readme(card))
    card = replace(card, files={**export.files, README: file_hash(folder / README)})
    card = msgspec.json.decode(msgspec.json.encode(card), type=Card)  # so that what is read again encodes to the same
    write_text(folder / CARD, _encoded(replace(card, checksum=_checksum(card))))


def update_card(record: CompositionResult) -> None:
    """Write the cards of an exported composition again if they are of other gates or measurements than `record`."""
    assert record.export is not None
    folder = Path(record.export.folder)
    card = read_card(folder)
    if card is None or (card.composition, card.weights_hash) != (record.id, record.export.weights_hash):
        return  # another run has replaced the folder
    if (card.gates, card.measurements) == (record.gates, tuple(map(_figure, record.measurements))):
        return
    write_card(folder, record, card.model, card.environment, card.seed, card.written)


def read_card(folder: Path) -> Card | None:
    """Return the content of lmcompose.json, or None if there is none; raises CheckpointError if it was changed."""
    path = folder / CARD
    try:
        card = msgspec.json.decode(path.read_bytes(), type=Card)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} was changed after it was written: {error}") from None
    if card.checksum != _checksum(card):
        raise CheckpointError(f"{path} was changed after it was written: it does not match its checksum")
    return card


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in `folder` and below, except those that only describe it, and hidden ones."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hidden = [name for name in found if any(part.startswith(".") for part in name.split("/"))]
    return {name: file_hash(path) for name, path in found.items() if name not in (CARD, README, *hidden)}


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_export(folder: Path, target: Path, format: str, weights_hash: str) -> Export:
    """Return the export of the finished `folder`, which is going to be `target`."""
    return Export(str(target), format, weights_hash, file_hashes(folder))


def readme(card: Card) -> str:
    """Return the model card, as model hubs show it."""
    head: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if card.model.revision is not None:  # it is on the hub
        head["base_model"] = card.model.location
    head["tags"] = ["pytest-lmcompose", *dict.fromkeys(step.method for step in card.steps)]
    version = card.environment.packages.get("pytest-lmcompose", "")
    revision = "" if card.model.revision is None else f", revision {code_span(card.model.revision)}"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {escaped(card.composition)}",
        f"{code_span(card.model.id)}{revision}, changed by {code_span(card.composition)} with seed {card.seed} and "
        f"written by pytest-lmcompose {escaped(version)}. Format: {escaped(card.format)}.",
        f"**Gates**: {_verdict(card)}",
        "\n".join(f"- {escaped(gate.message)}" for gate in card.failed),
        "## Steps" if card.steps else "",
        _steps(card),
        "## Measurements" if card.measurements else "",
        _measurements(card),
        "## Origin",
        markdown_table(("what", "value"), _origin(card)),
        "`lmcompose verify FOLDER REPORT` checks that this folder is what was measured.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _verdict(card: Card) -> str:
    if not card.measurements:
        return "not measured."
    if not card.gates:
        return "measured, but not judged."
    failed, count = len(card.failed), len(card.gates)
    return f"❌ {failed} of {count} failed:" if failed else f"✅ all {count} passed."


def _steps(card: Card) -> str:
    rows = [
        [code_span(step.id), str(step.seed), code_span(msgspec.json.encode(step.settings).decode())]
        for step in card.steps
    ]
    return markdown_table(("step", "seed", "settings"), rows) if rows else ""


def _measurements(card: Card) -> str:
    """Return a table of all metrics, with the base model's value where a gate compares with it."""
    rows = []
    for figure in card.measurements:
        gates = [gate for gate in card.gates if figure.metric in gate.metrics]
        alone = (g for g in gates if g.reference is None and not g.pool)
        base = next((g.base_value for g in alone if g.base_value is not None), None)
        value = figure.nonfinite or with_error(figure.value, figure.stderr)
        state = MISSING if not gates else "failed" if any(not gate.passed for gate in gates) else "passed"
        before = MISSING if base is None else number(base)
        rows.append([escaped(figure.metric), escaped(value), str(figure.n), before, state])
    return markdown_table(("metric", "value ± standard error", "n", "base model", "gates"), rows) if rows else ""


def _origin(card: Card) -> list[list[str]]:
    rows = [
        ["state", code_span(card.state_hash)],
        ["weights in this folder", code_span(card.weights_hash)],
        ["weights before the first step", code_span(card.model.weight_hash)],
        *([f"data: {escaped(part)}", code_span(digest)] for part, digest in sorted((card.data or {}).items())),
        *([escaped(name), escaped(version)] for name, version in sorted(card.environment.packages.items())),
        ["Python", escaped(card.environment.python)],
        ["written", escaped(card.written)],
    ]
    return rows


def _figure(measured: Measured) -> Figure:
    return Figure(
        metric=measured.metric,
        value=measured.value,
        nonfinite=measured.nonfinite,
        stderr=measured.stderr,
        n=measured.n,
        higher_is_better=measured.higher_is_better,
    )


def _encoded(card: Card) -> str:
    return msgspec.json.format(msgspec.json.encode(card), indent=1).decode() + "\n"


def _checksum(card: Card) -> str:
    return hashlib.sha256(msgspec.json.encode(replace(card, checksum=""))).hexdigest()
