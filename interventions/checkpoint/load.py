"""The weights of another checkpoint of the same architecture as a step: a fine-tuned or merged model, or any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from interventions.checkpoint.reading import ReadingError, check_folder, read_model, read_tokenizer
from interventions.checkpoint.reading.kinds import has_tokenizer, tokenizer_source
from interventions.contents import checkpoint_content, fetched, local
from interventions.intervention import Context, Intervention, Model, Resources, without_gradients
from interventions.names import near_names
from interventions.ranges import Items
from interventions.types import InterventionError

if TYPE_CHECKING:
    from interventions.known_grids import KnownGrid


@dataclass(frozen=True)
class LoadSettings(Intervention):
    """The weights of another folder or hub id of the same architecture, in place of the model's."""

    name = "load"
    category = "checkpoint"

    path: str = ""
    """Folder (relative to where pytest was called) or hub id of the other model; required."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    only: Annotated[list[str], Items()] | None = None
    """Globs of the parameters to replace, such as ["*.mlp.*"]; null: all."""

    def identity(self, folder: Path) -> Any:
        """Return the other model's content, wherever it lies, with the rest of the settings."""
        content = checkpoint_content(self.path, self.revision, folder)
        return {"content": content, "settings": dataclasses.replace(self, path="", revision=None)}

    def unready(self, folder: Path) -> Iterator[str]:
        """Yield that there is no path, or nothing at it."""
        yield from missing(self.path, folder)

    def checkpoints(self) -> tuple[str, ...]:
        """Return the path."""
        return (self.path,)

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Replace the weights, in place, one parameter at a time; each is rounded once to the model's dtype.

        Returns the path, the content's hash and the number of replaced parameters. Raises InterventionError if the
        other model cannot be read completely, or differs in more than its weights.
        """
        for problem in self.unready(context.folder):
            raise InterventionError(f"load: {problem}")
        place, revision = fetched(self.path, self.revision, context.folder)
        count = bring_in(model, tokenizer, place, f"load: {self.path}", context, self.only)
        content = checkpoint_content(self.path, revision, context.folder)
        return {"path": self.path, "revision": revision, "content": content, "replaced": count}


def missing(path: str, folder: Path) -> Iterator[str]:
    """Yield that a required `path` is not given, or that nothing is there."""
    if not path:
        yield "path is empty: name a folder or a hub id, as in [path=./checkpoint]"
    elif (place := local(path, folder)) is not None and not place.exists():
        yield f"path={path}: no such folder: {place}"


@without_gradients
def bring_in(
    model: Model,
    tokenizer: Any,
    folder: Path,
    who: str,
    context: Context,
    only: list[str] | None = None,
) -> int:
    """Replace the weights of `model` with those in `folder`; return how many were replaced.

    The context learns how the folder stored them. `who` starts the messages. Raises InterventionError if the model
    there cannot be read, or is another one.
    """
    import torch

    from interventions.checkpoint.kernels.sameness import check_same_model, check_same_tokenizer
    from interventions.checkpoint.reading.model import digest_of

    widest = max((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)
    other, grids, theirs = read_other(folder, who, widest)
    check_same_model(model, other, who)
    if theirs is not None:
        check_same_tokenizer(tokenizer, theirs, who, context.warn)
    held, ours = dict(other.named_parameters()), dict(model.named_parameters())
    chosen = [name for name in ours if only is None or any(fnmatchcase(name, glob) for glob in only)]
    for glob in only or ():
        if not any(fnmatchcase(name, glob) for name in ours):
            raise InterventionError(f"{who}: only={glob} matches no parameter.{near_names(glob, ours)}".rstrip("."))
    same = True
    for name in chosen:
        new = held[name].to(ours[name].device, ours[name].dtype)
        same = same and torch.equal(ours[name], new)
        ours[name].copy_(new)
        held[name].data = torch.empty(0, dtype=new.dtype)  # free memory as we go
    if same:
        raise InterventionError(f"{who} holds the weights that the model has already")
    for name in grids.keys() & chosen:
        if ours[name].dtype != widest:  # rounded once more
            module = model.get_submodule(name.removesuffix(".weight"))
            grids[name] = dataclasses.replace(grids[name], digest=digest_of(module))
    context.stored({name: grids[name] for name in chosen if name in grids})
    _bring_in_rounding(model, other, [name.removesuffix(".weight") for name in chosen], whole=only is None)
    return len(chosen)


def _bring_in_rounding(model: Model, other: Model, chosen: list[str], *, whole: bool) -> None:
    """Let the chosen layers of `model` round their inputs as in `other`, and of a `whole` model attention as well."""
    from interventions.rounding import Rounding, rounding_of, set_rounding_

    ours, theirs = rounding_of(model), rounding_of(other)
    kept = {name: rounded for name, rounded in ours.inputs.items() if name not in chosen}
    inputs = kept | {name: rounded for name, rounded in theirs.inputs.items() if name in chosen}
    set_rounding_(model, Rounding(inputs, theirs.caches if whole else ours.caches))


def read_other(folder: Path, who: str, dtype: Any) -> tuple[Any, dict[str, KnownGrid], Any]:
    """Return the model in `folder` on the CPU, how its weights were stored, and its tokenizer, None if there is none.

    Weights of a folder in full precision keep the dtype in which they are stored if it is the same for all, so that no
    copy of them is made; otherwise they become `dtype`. Raises InterventionError.
    """
    try:
        stored = _stored_dtype(folder) if check_folder(folder, tokenizer=False) is None else None
        other, grids = read_model(folder, {"dtype": stored or dtype})
        place, gguf = tokenizer_source(str(folder))
        absent = gguf is None and Path(place).is_dir() and not has_tokenizer(Path(place))
        theirs = None if absent else read_tokenizer(folder, {})
    except ReadingError as error:
        raise InterventionError(f"{who}: {error}") from error
    except Exception as error:  # transformers and the hub raise all kinds
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise InterventionError(f"{who} cannot be loaded: {type(error).__name__}: {reason[:300]}") from error
    return other.eval(), grids, theirs


def _stored_dtype(folder: Path) -> Any:
    """Return the dtype of all floating-point tensors in a folder's safetensors files; None if there are several."""
    import torch
    from safetensors import safe_open

    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            found |= {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    return names.get(found.pop()) if len(found) == 1 else None
