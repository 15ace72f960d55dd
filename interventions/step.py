"""Apply one intervention to a model in place, and check that it changed only weights."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interventions.categories import find_category
from interventions.context import Context, OtherState, silent
from interventions.intervention import check_given, promised
from interventions.known_grids import KnownGrid
from interventions.modes import keep_modes
from interventions.names import near_names
from interventions.ranges import SettingError, check_settings, field_name, field_types, plain_settings, setting_name
from interventions.registry import Method, find_method
from interventions.rounding import rounding_of, set_rounding_
from interventions.safety import SafetyCopy
from interventions.shared_statistics import SharedStatistics
from interventions.structure import placement, streaming
from interventions.types import Edit, Example, InterventionError, Preference, Resources, StepReport


def apply(
    model: nn.Module,
    tokenizer: Any,
    method: str,
    /,
    settings: Any = None,
    *,
    resources: Resources | None = None,
    edits: Sequence[Edit] | None = None,
    calibration: Sequence[str] | None = None,
    forget: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    retain: Sequence[str] | None = None,
    refusal: Mapping[str, Sequence[str]] | None = None,
    tuning: Mapping[str, Sequence[Example]] | None = None,
    preferences: Sequence[Preference] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    statistics: SharedStatistics | None = None,
    copies: Mapping[str, Tensor] | None = None,
    folder: Path | None = None,
    states: Mapping[str, OtherState] | None = None,
    **overrides: Any,
) -> StepReport:
    """Apply the intervention named `method` to `model` in place, and return a report.

    `settings` is an instance of the method's settings dataclass (None: the defaults); `overrides` replace single
    values, `with_` that of the setting `with`. `edits`, `calibration`, `forget`, `retain`, `refusal`, `tuning` and
    `preferences` replace those in `resources`; `forget` is a mapping by topic or the texts of a single topic, `refusal`
    and `tuning` are mappings by set. `statistics` is the cache for the model's current state. `copies` are host tensors
    with the current values of all parameters, if the caller has them; without, the step copies what it may change.
    Relative paths in settings start at `folder` (None: the working folder). `states` are those of the compositions that
    the settings name, which only a run builds.

    Only weights change, and what the model rounds as it runs: parameter names, shapes, dtypes and requires_grad flags,
    train mode, the KV cache flag and the tokenizer stay the same; gradients are dropped. A method that removes experts
    changes shapes, and the number of experts in the model's configuration. On any exception, including an interrupt,
    the original weights are restored and the exception is raised again.

    Raises InterventionError if the step changes no weight, leaves NaN or infinity in one, or changes anything else;
    UnknownMethod for an unknown name. If the method reports that nothing was left to do, an unchanged model is only a
    warning.

    With the setting `preserve_mask`, pruned weights stay zero.
    """
    chosen = find_method(method)
    complete = _complete_settings(chosen, settings, overrides)
    given = _complete_resources(resources, edits, calibration, forget, retain, refusal)
    if tuning is not None:
        given = dataclasses.replace(given, tuning={name: tuple(examples) for name, examples in tuning.items()})
    if preferences is not None:
        given = dataclasses.replace(given, preferences=tuple(preferences))
    warnings: list[str] = []
    satisfied: list[str] = []
    grids: dict[str, KnownGrid] = {}
    context = Context(
        seed,
        progress or silent,
        warnings.append,
        satisfied.append,
        statistics,
        folder or Path.cwd(),
        grids.update,
        states or {},
    )
    function = chosen.load()
    rounding = rounding_of(model)
    before = SafetyCopy(model, _may_change(complete, model) if copies is None else None, copies)
    devices = {placement(model).device, *(parameter.device for parameter in model.parameters())}
    gpus = [device for device in devices if device.type == "cuda"]
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    start = time.perf_counter()
    try:
        streams = find_category(chosen.category).streams
        with keep_modes(model), _keep_tokenizer(tokenizer), streaming(model, on=streams):
            details = function(model, tokenizer, complete, given, context)
            if getattr(complete, "preserve_mask", False):
                details = before.keep_zeros(model) | details
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        seconds = time.perf_counter() - start
        rounds = rounding_of(model)
        same = bool(satisfied) or rounds != rounding
        resizes = getattr(complete, "resizes", False)
        changed = before.changed(model, method, may_be_none=same, may_resize=resizes)
        if not changed:
            warnings += satisfied
        details = _plain(details, method)
    except BaseException:
        before.restore()
        set_rounding_(model, rounding)
        raise
    finally:
        for parameter in model.parameters():
            parameter.grad = None
    return StepReport(
        method=method,
        settings=plain_settings(complete),
        changed=changed,
        details=details,
        warnings=tuple(warnings),
        seconds=seconds,
        peak_memory_bytes=_peak_memory(gpus),
        promises=dict(promised(complete, model)),
        rounding=rounds.plain() if rounds else None,
        grids=grids,
    )


def _complete_settings(method: Method, settings: Any, overrides: dict[str, Any]) -> Any:
    kind = method.settings_type()
    if settings is None:
        settings = kind()
    elif not isinstance(settings, kind):
        raise InterventionError(
            f"{method.name}: settings must be {kind.__name__}, not {type(settings).__name__}; "
            "pass single settings by name"
        )
    known, overrides = field_types(kind), {setting_name(name): value for name, value in overrides.items()}
    for name in overrides:
        if name not in known:
            raise InterventionError(
                f"{method.name} has no setting {name!r}.{near_names(name, known)} Known: {', '.join(known)}."
            )
    try:
        complete = dataclasses.replace(settings, **{field_name(name): value for name, value in overrides.items()})
        check_settings(complete)
        check_given(complete, overrides)
    except SettingError as error:
        raise SettingError(f"{method.name}.{error}") from None
    return complete


def _complete_resources(
    resources: Resources | None,
    edits: Sequence[Edit] | None,
    calibration: Sequence[str] | None,
    forget: Mapping[str, Sequence[str]] | Sequence[str] | None,
    retain: Sequence[str] | None,
    refusal: Mapping[str, Sequence[str]] | None,
) -> Resources:
    found: dict[str, Any] = {}
    if edits is not None:
        found["edits"] = tuple(edits)
    for name, texts in (("calibration", calibration), ("retain", retain)):
        if texts is not None:
            found[name] = _texts(name, texts)
    if forget is not None:
        topics = forget if isinstance(forget, Mapping) else {"forget": forget}
        found["forget"] = {topic: _texts(f"forget[{topic!r}]", texts) for topic, texts in topics.items()}
    if refusal is not None:
        found["refusal"] = {name: _texts(f"refusal[{name!r}]", prompts) for name, prompts in refusal.items()}
    return dataclasses.replace(resources or Resources(), **found)


def _may_change(settings: Any, model: nn.Module) -> Collection[str] | None:
    """Return the parameters that a step may change, None for all: the settings of a plain dataclass do not say."""
    found: Collection[str] | None = settings.may_change(model) if hasattr(settings, "may_change") else None
    return found


def _texts(name: str, texts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(texts, str):
        raise InterventionError(f"{name} must be a sequence of texts, not one text")
    return tuple(texts)


@contextmanager
def _keep_tokenizer(tokenizer: Any) -> Iterator[None]:
    names = ("padding_side", "truncation_side", "pad_token")
    before = {name: getattr(tokenizer, name) for name in names if hasattr(tokenizer, name)}
    try:
        yield
    finally:
        for name, value in before.items():
            if getattr(tokenizer, name) != value:
                setattr(tokenizer, name, value)


def _plain(details: dict[str, Any], method: str) -> dict[str, Any]:
    try:
        json.dumps(details)
    except TypeError as error:
        raise InterventionError(f"{method}: the details it reports are not plain data: {error}") from error
    return details


def _peak_memory(gpus: Collection[torch.device]) -> int:
    if gpus:
        return max(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
