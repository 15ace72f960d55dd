"""The trials of a search in a file, and Optuna's proposals for the next ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from pytest_lmcompose.search.bench import Say
from pytest_lmcompose.search.records import Trial
from pytest_lmcompose.search.space import Point, Space

if TYPE_CHECKING:
    import optuna

Direction = Literal["minimize", "maximize"]
MISSING = "Optuna is not installed: pip install 'pytest-lmcompose[search]'"
_PROPOSALS = 50
"""Proposals in a row that were tried before, after which the sampler has no more."""
_TRIAL = "trial"
"""Key of the user attribute with the record of a trial."""


def missing_optuna() -> str | None:
    """Return why nothing can be searched here, or None."""
    return MISSING if find_spec("optuna") is None else None


class Study:
    """Trials by point, of this call and of earlier ones."""

    def __init__(self, space: Space, file: Path | None, directions: Sequence[Direction], seed: int, say: Say) -> None:
        """Read and append to `file`; None: keep trials in memory. `directions` of the values to record."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._distributions: dict[str, Any] = {
            str(place): optuna.distributions.IntDistribution(0, len(dial.options) - 1)
            if dial.kind == "setting"
            else optuna.distributions.CategoricalDistribution(range(len(dial.options)))
            for place, dial in enumerate(space.dials)
        }
        try:
            self._file = _open(file, directions)
        except (OSError, ValueError) as error:  # a full disk, or a line that was cut off
            say(f"{file}: {error}; the search starts again")
            self._file = _open(None, directions)
        done = self._file.get_trials(states=[optuna.trial.TrialState.COMPLETE])
        self.known = {self._point(t.params): msgspec.convert(t.user_attrs[_TRIAL], Trial) for t in done}
        """The trials, in their order."""
        # Proposals are made in memory, so that the file has nothing but what was tried.
        self._study = _open(None, directions)
        self._study.sampler = optuna.samplers.TPESampler(seed=seed + len(done))  # not the same proposals again
        self._study.add_trials(done)

    def add(self, point: Point, trial: Trial, values: Sequence[float], constraints: dict[str, float]) -> None:
        """Record a trial with its values, and constraints that hold at 0 or less."""
        import optuna

        self.known[point] = trial
        done = optuna.trial.create_trial(
            values=values,
            params=dict(zip(self._distributions, point, strict=True)),
            distributions=self._distributions,
            user_attrs={_TRIAL: msgspec.to_builtins(trial)},
            constraints=constraints,
        )
        self._study.add_trial(done)
        self._file.add_trial(done)

    def propose(self, refused: Collection[Point]) -> Point | None:
        """Return a point that was neither tried nor refused; None if the sampler finds none."""
        import optuna

        for _ in range(_PROPOSALS):
            asked = self._study.ask(self._distributions)
            point = self._point(asked.params)
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)  # `add` records it
            if point not in self.known and point not in refused:
                return point
        return None

    def _point(self, params: dict[str, Any]) -> Point:
        return tuple(params[name] for name in self._distributions)


def _open(file: Path | None, directions: Sequence[Direction]) -> optuna.Study:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    storage = None
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(file)))
    return optuna.create_study(storage=storage, study_name="search", directions=directions, load_if_exists=True)
