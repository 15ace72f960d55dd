"""A command of yours as a step: it gets the saved model, and what it writes becomes the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from interventions.checkpoint.load import bring_in
from interventions.checkpoint.reading.kinds import ADAPTER
from interventions.checkpoint.reading.quiet import quiet
from interventions.contents import hash_files
from interventions.intervention import Context, Intervention, Model, Resources, without_gradients
from interventions.ranges import Items, Positive
from interventions.types import InterventionError


@dataclass(frozen=True)
class CommandSettings(Intervention):
    """A command of yours, which reads the saved model from {input} and writes the changed one to {output}."""

    name = "command"
    category = "checkpoint"
    function = "interventions.checkpoint.command:run_step"
    runs_commands = True

    run: str = ""  # type: ignore[assignment]  # `function` takes the place of the method
    """The command line, for the shell, in the folder where pytest was called; required. {input} and {output} become
    paths, also in LMCOMPOSE_INPUT and LMCOMPOSE_OUTPUT; LMCOMPOSE_SEED is the step's seed."""
    reads: Annotated[list[str], Items(least=0)] = field(default_factory=list)
    """Files and folders whose content the result depends on, so that a change runs the command again. Files that the
    command line names count without it."""
    timeout: Positive = 3600.0
    """Seconds after which the command is stopped, and the step fails."""
    scratch: str | None = None
    """Folder for the two temporary copies of the model; null: the system's."""

    def identity(self, folder: Path) -> Any:
        """Return the command, with the content of the files that it names and of those in `reads`."""
        return {"run": self.run, "content": self.content(folder)}

    def content(self, folder: Path) -> str:
        """Return the hash of the files that the command names and of those in `reads`."""
        from interventions.checkpoint.kernels.running import named_files

        return hash_files([*named_files(self.run, folder), *(folder / os.path.expanduser(p) for p in self.reads)])

    def unready(self, folder: Path) -> Iterator[str]:
        """Yield that there is no command, or that a file or folder is missing."""
        if not self.run.strip():
            yield 'run is empty: give a command, as in [run="python quantise.py {input} {output}"]'
        for path in self.reads:
            if not (folder / os.path.expanduser(path)).exists():
                yield f"reads={path}: no such file or folder: {folder / os.path.expanduser(path)}"
        if self.scratch is not None and not (folder / os.path.expanduser(self.scratch)).is_dir():
            yield f"scratch={self.scratch}: no such folder: {folder / os.path.expanduser(self.scratch)}"


@without_gradients
def run_step(
    model: Model, tokenizer: Any, settings: CommandSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Save the model, run the command, and read the model or PEFT adapter that it writes, in place.

    Returns the command, the hash of the files that it names and the number of replaced parameters. Raises
    InterventionError if the command fails, or writes no model of the same architecture.
    """
    from interventions.checkpoint.kernels.merging import merge_adapter
    from interventions.checkpoint.kernels.running import run_command

    for problem in settings.unready(context.folder):
        raise InterventionError(f"command: {problem}")
    content = settings.content(context.folder)  # before the command, which may write beside its files
    scratch = None if settings.scratch is None else context.folder / os.path.expanduser(settings.scratch)
    with tempfile.TemporaryDirectory(prefix="lmcompose-command-", dir=scratch) as made:
        places = {name: Path(made) / name for name in ("input", "output")}
        _save(model, tokenizer, places["input"])
        context.progress(f"command: {settings.run}")
        run_command(settings.run, places, context.seed, context.folder, Path(made) / "log", settings.timeout)
        output, who = places["output"], "the output of the command"
        if (output / ADAPTER).is_file() and not (output / "config.json").is_file():
            merge_adapter(model, output, 1.0, who)
            return {"run": settings.run, "content": content, "replaced": "adapter"}
        if not (output / "config.json").is_file():
            found = sorted(path.name for path in output.glob("*"))[:5] if output.is_dir() else []
            what = f"only {', '.join(found)}" if found else "nothing"
            raise InterventionError(
                f"command: it wrote {what} to {{output}}, but not a model's folder with config.json"
            )
        count = bring_in(model, tokenizer, output, who, context)
        return {"run": settings.run, "content": content, "replaced": count}


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model and its tokenizer; raises InterventionError, also if the disk has no room for it and a copy."""
    from interventions.checkpoint.kernels.running import check_space

    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    check_space(folder.parent, 2 * size)
    try:
        with quiet():
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except Exception as error:  # a full disk, a config that transformers refuses to save
        reason = " ".join(str(error).split())[:300]
        raise InterventionError(f"command: the model cannot be saved: {type(error).__name__}: {reason}") from error
