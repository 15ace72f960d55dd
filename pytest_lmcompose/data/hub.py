"""Read datasets through the `datasets` library: folders in the hub's layout, and the hub itself. No torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytest_lmcompose.data.files import Rows
from pytest_lmcompose.data.records import WorldError
from pytest_lmcompose.data.source import Source

BUFFER = 10_000
"""Rows that a sample is shuffled among, besides the order of the files: a stream is never read to its end for one."""
_TIMEOUT = 10.0
_WAYS_OUT = "give a local path, or set HF_HOME to a cache that holds it"


def dataset_rows(source: Source, folder: Path | None) -> Rows:
    """Yield the rows of a dataset in `folder`, or of one on the hub, shuffled by the source's seed.

    A folder is streamed, so nothing of it is cached, and so is a hub dataset with a limit; others come from the
    cache of `datasets`. Raises WorldError.
    """
    try:
        if folder is not None:
            yield from _folder(source, folder)
        elif (problem := _unreachable(source)) is None:
            yield from _numbered(_load(source, source.path, streaming=source.limit is not None), source)
        else:
            yield from _cached(source, problem)
    except WorldError:
        raise
    except Exception as error:  # every library that a format needs has errors of its own
        raise WorldError(f"{source.name}: {_said(error)}") from None


def hub_file(path: str, file: str, revision: str | None) -> Path:
    """Return a single file of a hub dataset, downloaded into the hub's cache. Raises WorldError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    source = Source(path, file=file, revision=revision)
    problem = _unreachable(source)
    try:
        return Path(
            hf_hub_download(path, file, repo_type="dataset", revision=revision, local_files_only=problem is not None)
        )
    except LocalEntryNotFoundError as error:
        raise WorldError(f"{source.name}: {problem or _said(error)}; {_WAYS_OUT}") from None
    except EntryNotFoundError:
        raise WorldError(f"{path}: no file {file!r} in this dataset on the hub") from None
    except Exception as error:  # ids that are none, and answers of the hub
        raise WorldError(f"{source.name}: {_said(error)}") from None


def _unreachable(source: Source) -> str | None:
    """Say why the hub cannot be asked, None if the dataset is there. Raises WorldError if it is not."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if source.path.startswith((".", "~", "/")) or source.path.count("/") > 1:
        raise WorldError(f"no such data file or folder: {source.path}")
    try:
        if datasets.config.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled
        HfApi().dataset_info(source.path, revision=source.revision, timeout=_TIMEOUT)
    except OfflineModeIsEnabled:
        return "no such file or folder, and the hub is switched off (HF_HUB_OFFLINE)"
    except HFValidationError:
        raise WorldError(f"no such data file or folder: {source.path}") from None
    except RevisionNotFoundError:
        raise WorldError(f"{source.path}: no revision {source.revision!r} of this dataset on the hub") from None
    except GatedRepoError:
        raise WorldError(
            f"{source.path}: this dataset needs permission: accept its terms on the hub and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise WorldError(
            f"{source.path}: no such file or folder, and no such dataset on the hub (a private one needs HF_TOKEN)"
        ) from None
    except Exception as error:  # no name service, no route, a proxy's refusal, a time-out
        return f"no such file or folder, and the hub cannot be reached ({_said(error)})"
    return None


def _cached(source: Source, problem: str) -> Rows:
    """Yield the rows of a dataset without the hub: from the cache of `datasets`, or the hub's cache of files."""
    found = _prepared(source)
    if found is not None:
        yield from _numbered(found, source)
    elif (folder := _snapshot(source)) is not None:
        yield from _folder(source, folder)
    else:
        raise WorldError(f"{source.name}: {problem}; {_WAYS_OUT}")


def _prepared(source: Source) -> Any:
    """Return the dataset of the cache of `datasets`, None if it is not there, or not in this revision."""
    try:
        with _offline():
            found = _load(source, source.path, streaming=False)
    except WorldError:
        raise
    except Exception:  # errors of many kinds, by what is missing
        return None
    commits = {Path(file["filename"]).parent.name for file in found.cache_files}
    return found if source.revision in (None, *commits) else None


def _snapshot(source: Source) -> Path | None:
    """Return the folder of the hub's cache of files that holds a dataset."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(source.path, repo_type="dataset", revision=source.revision, local_files_only=True)
    except Exception:  # not there
        return None
    data = any(path.is_file() and path.suffix != ".md" for path in Path(folder).rglob("*"))
    return Path(folder) if data else None


def _folder(source: Source, folder: Path) -> Rows:
    """Yield the rows of a folder in the hub's layout; a configuration may be a subfolder."""
    import datasets

    configuration, below = source.configuration, {}
    if configuration is not None and configuration not in datasets.get_dataset_config_names(str(folder)):
        if (folder / configuration).is_dir():
            configuration, below = None, {"data_dir": configuration}
        else:
            known = ", ".join(datasets.get_dataset_config_names(str(folder)))
            raise WorldError(f"{source.name}: no configuration {configuration!r}; known: {known}")
    if not _is_part(source.split):
        found = _load(source, str(folder.absolute()), configuration, streaming=True, **below)
        yield from _numbered(found, source)
        return
    with tempfile.TemporaryDirectory() as cache:  # the library's own does not notice every change of a file
        found = _load(source, str(folder.absolute()), configuration, streaming=False, cache_dir=cache, **below)
        yield from _numbered(found, source)


def _load(source: Source, path: str, configuration: str | None = None, *, streaming: bool, **more: Any) -> Any:
    """Return a split as `datasets` loads it; raises WorldError for one that is not there."""
    import datasets

    local = Path(path).is_absolute()
    wanted = source.split if _is_part(source.split) else None
    with _quiet():
        found = datasets.load_dataset(
            path,
            configuration if local else source.configuration,
            split=wanted,
            revision=None if local else source.revision,
            streaming=streaming and wanted is None,
            **more,
        )
    if wanted is not None:
        return found
    splits = list(found)
    if source.split is None and len(splits) == 1:
        return found[splits[0]]
    if source.split is None:
        raise WorldError(f"{source.name}: choose a split, one of {', '.join(splits)}")
    if source.split not in splits:
        raise WorldError(f"{source.name}: no split {source.split!r}; known: {', '.join(splits)}")
    return found[source.split]


def _numbered(found: Any, source: Source) -> Rows:
    import datasets

    if source.seed is not None:
        if isinstance(found, datasets.Dataset):
            found = found.to_iterable_dataset()
        found = found.shuffle(seed=source.seed, buffer_size=BUFFER)
    yield from enumerate(found, start=1)


def _is_part(split: str | None) -> bool:
    """Say whether a split is a part of one, or several: `train[:10%]`, `train+test`."""
    return split is not None and ("[" in split or "+" in split)


@contextmanager
def _quiet() -> Iterator[None]:
    """Show no progress bars of `datasets`."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _offline() -> Iterator[None]:
    """Keep `datasets` from asking a hub that does not answer: it would do so for half a minute."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _said(error: Exception) -> str:
    """Return what an error says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
