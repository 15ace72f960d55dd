"""Apply one intervention to a model, in place, and hold it to its promises."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.categories import find_category
from interventions.context import Context, silent
from interventions.intervention import promised
from interventions.modes import keep_modes
from interventions.names import near_names
from interventions.ranges import SettingError, check_settings
from interventions.registry import Method, find_method
from interventions.shared_statistics import SharedStatistics
from interventions.structure import placement, streaming
from interventions.types import Edit, InterventionError, Resources, StepReport
from interventions.zeros import zero_mask


def apply(
    model: nn.Module,
    tokenizer: Any,
    method: str,
    settings: Any = None,
    *,
    resources: Resources | None = None,
    edits: Sequence[Edit] | None = None,
    calibration: Sequence[str] | None = None,
    forget: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    retain: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    statistics: SharedStatistics | None = None,
    **overrides: Any,
) -> StepReport:
    """Apply the intervention named `method` to `model`, in place, and report what it did.

    `settings` is an instance of the method's settings dataclass (None: its defaults), of which
    `overrides` replace single values. `edits`, `calibration`, `forget` and `retain` take the place of
    those in `resources`; forget texts are by topic, or those of a single one. Steps that are given the
    `statistics` of one state, which the model must be in, collect what they have in common once.

    Only weights change: dtypes, shapes and names of the parameters, train mode, KV cache flag,
    requires_grad flags and the tokenizer are as before; gradients are dropped. If anything goes
    wrong, an interrupt included, the weights are exactly what they were and the exception passes on.

    Raises InterventionError if the step changed no weight, left a NaN or infinity in one, or
    broke another of these promises; UnknownMethod for a name that no intervention has. (A method may
    say that there was nothing left to do: then a step without a change passes, with a warning.)

    A method whose settings have `preserve_mask`, and have it on, keeps pruned weights at zero.
    """
    chosen = find_method(method)
    complete = _complete_settings(chosen, settings, overrides)
    given = _complete_resources(resources, edits, calibration, forget, retain)
    warnings: list[str] = []
    satisfied: list[str] = []
    context = Context(seed, progress or silent, warnings.append, satisfied.append, statistics)
    function = chosen.load()
    before = _Weights(model)
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
        changed = before.changed(model, method, may_be_none=bool(satisfied))
        if not changed:
            warnings += satisfied
        details = _plain(details, method)
    except BaseException:
        before.restore()
        raise
    finally:
        for parameter in model.parameters():
            parameter.grad = None
    return StepReport(
        method=method,
        settings=dataclasses.asdict(complete),
        changed=changed,
        details=details,
        warnings=tuple(warnings),
        seconds=seconds,
        peak_memory_bytes=_peak_memory(gpus),
        promises=dict(promised(complete)),
    )


def _complete_settings(method: Method, settings: Any, overrides: dict[str, Any]) -> Any:
    kind = method.settings_type()
    if settings is None:
        settings = kind()
    elif not isinstance(settings, kind):
        raise InterventionError(
            f"{method.name}: settings must be {kind.__name__}, not {type(settings).__name__}; "
            "single settings may be given by name"
        )
    known = [field.name for field in dataclasses.fields(kind)]
    for name in overrides:
        if name not in known:
            raise InterventionError(
                f"{method.name} has no setting {name!r}.{near_names(name, known)} Known: {', '.join(known)}."
            )
    try:
        complete = dataclasses.replace(settings, **overrides)
        check_settings(complete)
    except SettingError as error:
        raise SettingError(f"{method.name}.{error}") from None
    return complete


def _complete_resources(
    resources: Resources | None,
    edits: Sequence[Edit] | None,
    calibration: Sequence[str] | None,
    forget: Mapping[str, Sequence[str]] | Sequence[str] | None,
    retain: Sequence[str] | None,
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
    return dataclasses.replace(resources or Resources(), **found)


def _texts(name: str, texts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(texts, str):
        raise InterventionError(f"{name} must be a sequence of texts, not one text")
    return tuple(texts)


class _Weights:
    """A host copy of a model's parameters, and of where they stand."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        absent = [name for name, p in self.parameters.items() if p.is_meta]
        if absent:
            raise InterventionError(
                f"{absent[0]} has no values: load the model without offloading to the host or to disk; "
                "interventions.offload computes part by part one that is on the CPU"
            )
        self.copies = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        # A method that swaps modules or parameters must be undone too.
        self.places = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]

    @torch.no_grad()
    def keep_zeros(self, model: nn.Module) -> dict[str, int]:
        """Set linear weights that were exactly zero back to zero, in linears that had been pruned.

        Returns, as a detail of the step, how many had been filled; nothing if no linear had a mask.
        """
        now = dict(model.named_parameters())
        filled: list[int] = []
        for linear in (linear for block in find_anatomy(model).blocks for linear in block.linears):
            name = linear.parameter_name
            mask = zero_mask(self.copies[name]) if name in self.copies and name in now else None
            if mask is None or mask.shape != now[name].shape:
                continue
            mask = mask.to(now[name].device)
            filled.append(int((now[name][mask] != 0).sum()))
            now[name].masked_fill_(mask, 0)
        return {"zeros_refilled": sum(filled)} if filled else {}

    def changed(self, model: nn.Module, method: str, *, may_be_none: bool = False) -> tuple[str, ...]:
        """Return the names of the parameters whose values differ from the copy, sorted.

        Raises InterventionError if there are none, unless there `may_be_none`, or if a parameter's
        name, shape, dtype or finiteness changed.
        """
        now = dict(model.named_parameters())
        if now.keys() != self.copies.keys():
            names = ", ".join(sorted(now.keys() ^ self.copies.keys())[:5])
            raise InterventionError(f"{method} changed which parameters the model has: {names}")
        for name, copy in self.copies.items():
            if (now[name].shape, now[name].dtype) != (copy.shape, copy.dtype):
                raise InterventionError(
                    f"{method} turned {name} from {tuple(copy.shape)} {copy.dtype} "
                    f"into {tuple(now[name].shape)} {now[name].dtype}"
                )
        changed = sorted(name for name, copy in self.copies.items() if not _equal(now[name], copy))
        if not changed and not may_be_none:
            raise InterventionError(f"{method} changed no weight; are its settings and its texts or edits as meant?")
        broken = [name for name in changed if not bool(torch.isfinite(now[name]).all())]
        if broken:
            raise InterventionError(f"{method} left NaN or infinity in {', '.join(broken[:5])}")
        return tuple(changed)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back where they stood, with the very values they had."""
        for module, modules, parameters in self.places:
            module._modules.clear()
            module._modules.update(modules)
            module._parameters.clear()
            module._parameters.update(parameters)
        for name, parameter in self.parameters.items():
            copy = self.copies[name]
            if (parameter.shape, parameter.dtype) == (copy.shape, copy.dtype):
                parameter.data.copy_(copy)
            else:
                parameter.data = copy.to(parameter.device)


def _equal(parameter: Tensor, copy: Tensor) -> bool:
    return torch.equal(parameter.detach(), copy.to(parameter.device))


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
