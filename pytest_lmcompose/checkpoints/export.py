"""Export the compositions of a run as folders. Imports torch on first use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_lmcompose.checkpoints.card import make_export, update_card, write_card
from pytest_lmcompose.checkpoints.folder import new_folder
from pytest_lmcompose.checkpoints.options import PLAIN, ExportOptions
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.errors import CheckpointError

if TYPE_CHECKING:
    from pytest_lmcompose.build.states import ModelState
    from pytest_lmcompose.checkpoints.packing import Packing
    from pytest_lmcompose.run import Run


def export_composition(run: Run, composition: Composition, options: ExportOptions) -> None:
    """Write the state of `composition` in the first repeat, unless it is written; then bring its card up to date.

    Raises CheckpointError, or BuildError if the state has to be built and cannot be.
    """
    result = run.results[composition]
    if result.export is not None:
        update_card(result.record())
        return
    target = options.target(composition)
    if target.resolve() == Path(run.location).resolve():
        raise CheckpointError(f"{target} is the folder of the model; choose another one")
    with run.manager.visit(composition) as state, new_folder(target) as folder:
        from pytest_lmcompose.checkpoints.write import write_checkpoint
        from pytest_lmcompose.report.collect import environment, now

        if state.state_hash != result.state_hash:
            raise CheckpointError(
                f"{composition}: the state that was built again has other weights than the one that was measured; "
                "build and measure it in one run, with --lmcompose-no-cache"
            )
        digest = write_checkpoint(folder, state.model, state.tokenizer, _packing(state, options.format))
        result.export = make_export(folder, target, options.format, digest)
        facts = run.model_facts()
        assert facts is not None
        try:
            write_card(folder, result.record(), facts, environment(), run.seeds[0], now())
        except BaseException:
            result.export = None
            raise


def _packing(state: ModelState, format: str) -> Packing | None:
    """Return how to pack a state; None in full precision."""
    if format == PLAIN:
        return None
    from pytest_lmcompose.checkpoints.packing import plan_packing

    def moved(name: str) -> str | None:
        """Return the last step that changed a parameter."""
        steps = [(n, s) for n, s in enumerate(state.steps, start=1) if name in s.report.changed]
        return f"step {steps[-1][0]}, {steps[-1][1].step}" if steps else None

    return plan_packing(state.model, format, moved)
