"""What a run must know of its base model; the cache keeps it, so that a run of known results loads no model.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from interventions.checkpoint.reading import ReadingError
from interventions.contents import model_content
from interventions.tokens import frame
from pytest_lmcompose.baseline.reference import architecture
from pytest_lmcompose.cache.address import METHOD_LIBRARIES, address, source_hash, versions
from pytest_lmcompose.distribute.gpus import may_have_gpu
from pytest_lmcompose.results import Base, Model, Tokenisation
from pytest_lmcompose.settings import ModelSettings

if TYPE_CHECKING:
    from pytest_lmcompose.build.load import Loaded

_CODE = tuple(f"pytest_lmcompose.build.{name}" for name in ("load", "identity", "snapshot"))
_LIBRARIES = (*METHOD_LIBRARIES, "safetensors", "sentencepiece", "tiktoken", "protobuf", "mistral-common", "blobfile")
"""Libraries whose version may change how a model and its tokenizer are read."""


class Facts(Base, frozen=True):
    """What a run must know of its base model."""

    address: str
    """Its content address; see `identity.base_address`."""
    model: Model
    """Its entry in the report."""


def facts_of(
    loaded: Loaded, base: str, weight_hash: str, settings: ModelSettings, location: str, asked: str | None
) -> Facts:
    """Return the facts of a model that was loaded from `location`; `base` is its address.

    `asked` is a prompt in the chat template, None for plain prompts.
    """
    parameter = next(loaded.model.parameters())
    start, end = map(loaded.tokenizer.convert_ids_to_tokens, frame(loaded.tokenizer))
    model = Model(
        id=settings.path,
        location=location,
        revision=loaded.revision,
        weight_hash=weight_hash,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(parameter.device),
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        architecture=architecture(loaded.model.config.to_dict()),
        tokenisation=Tokenisation(bool(start), tuple(start), tuple(end), asked),
    )
    return Facts(base, model)


def facts_address(
    settings: ModelSettings, location: str, device: str, asked: str | None, environ: Mapping[str, str]
) -> str | None:
    """Return the content address of the facts of the model at `location`, from its files; None: they must be loaded.

    That is so if the model runs code of its own, may run on a GPU, or cannot be read.
    """
    if settings.trust_remote_code or device not in ("auto", "cpu") or (device == "auto" and may_have_gpu(environ)):
        return None
    try:
        content = model_content(location, settings.revision)
    except (ReadingError, OSError):  # loading it says so
        return None
    return address(
        content=content,
        location=location,
        settings=dataclasses.replace(settings, revision=None),
        asked=asked,
        code=source_hash((__name__, *_CODE)),
        libraries=versions(_LIBRARIES),
    )
